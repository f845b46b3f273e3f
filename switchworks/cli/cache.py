"""`switchworks cache`: what the cache holds, how large it is, and cleaning it."""

from dataclasses import dataclass
from pathlib import Path

from switchworks.cli.parsing import parse_flags
from switchworks.config import check_at_least


@dataclass(frozen=True)
class CacheFlags:
    """Which cache, and what of it may go. All that is in it is made again when it is needed."""

    cache: str | None = None
    """The folder; default as for training: $SWITCHWORKS_CACHE or ~/.cache/switchworks."""
    clean: bool = False
    """Delete what killed processes left behind, and what was not used for --days."""
    days: int = 30
    """Days without use after which --clean deletes text, tokenizers and tokens; 0: all."""

    def __post_init__(self) -> None:
        check_at_least(self, "", 0, "days")


def run(words: list[str]) -> int:
    """Print every entry with its size and last use; with --clean delete the old ones."""
    flags = parse_flags(CacheFlags, "cache", words)
    from switchworks.data import DataConfig, cache_entries, cache_folder, delete_entry

    folder = cache_folder(DataConfig(cache=flags.cache))
    entries = sorted(cache_entries(folder), key=lambda entry: -entry.size)
    print(f"{folder.resolve()}: {_megabytes(sum(entry.size for entry in entries))}")
    for entry in entries:
        gone = flags.clean and (entry.is_leftover or entry.days >= flags.days)
        verb = "delete " if gone else ""
        if gone and not delete_entry(entry):
            verb = "in use "
        age = "today" if entry.days < 1 else f"{entry.days:.0f} days ago"
        place = Path(entry.path).relative_to(folder)
        print(f"  {verb}{_megabytes(entry.size):>10}  {entry.label}, used {age}  ({place})")
    if entries and not flags.clean:
        print(f"--clean deletes leftovers and what was not used for {flags.days} days.")
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
