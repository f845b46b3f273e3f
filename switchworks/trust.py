"""Code that a file names, and who allows it to run. SECURITY.md says what is trusted.

Whoever calls a verb with a Python file trusts it. What a run directory names may be somebody
else's: it is run inside `trusted_code` alone, which is `--trust-code` on the command line.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from switchworks.config import ConfigError


class NamedByRun(str):
    """A name that stands in a run's experiment.toml, and not in a call."""

    __slots__ = ()


_trusted = False


@contextmanager
def trusted_code() -> Iterator[None]:
    """Inside, Python files that only a run names are run, by all threads."""
    global _trusted
    before, _trusted = _trusted, True
    try:
        yield
    finally:
        _trusted = before


def require_trusted(file: str) -> None:
    """Raises ConfigError for a Python file that a run names, unless code is trusted."""
    if isinstance(file, NamedByRun) and not _trusted:
        raise ConfigError(
            f"The run names {file}, a Python file, and to read what is in it is to run it.\n"
            "  Look into it, then add --trust-code, or name tasks of your own."
        )
