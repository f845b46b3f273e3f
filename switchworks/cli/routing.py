"""`switchworks routing PATH`: which experts handle what, by label and token type."""

from dataclasses import dataclass, field
from pathlib import Path

from switchworks.checkpoint import state_at
from switchworks.cli.parsing import HELP, check_writable, expand, parse_flags
from switchworks.config import ConfigError, check_at_least
from switchworks.data import DataConfig


@dataclass(frozen=True)
class RoutingFlags:
    """Which experts handle what, by label and token type: JSON, and one HTML page."""

    data: DataConfig = field(default_factory=DataConfig)
    step: int | None = None
    """Of a run: its checkpoint of this step, in place of its model."""
    against: Path | None = None
    """Another state of the same model: how many tokens have another expert there."""
    text: tuple[str, ...] = ()
    """Texts to show token by token, on the colours of their experts. Default: the beginning of the
    validation text."""
    batches: int = 16
    """Batches of 16 rows routed, over all labels together."""
    output: Path | None = None
    """The page; the numbers go beside it. Default: routing.html in the run directory, or here."""

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "batches")


def run(words: list[str]) -> int:
    """Write the page and its numbers, and print where the page is."""
    if words and words[0] in HELP:
        parse_flags(RoutingFlags, "routing PATH", words)
    if not words or words[0].startswith("-"):
        raise ConfigError(
            "switchworks routing needs a model first: a run, a checkpoint, a model directory.\n"
            "  Example: switchworks routing runs/quickstart --data.path texts"
        )
    from switchworks.recipes import text_of
    from switchworks.report import page_folder, write_routing_report

    path = Path(words[0])
    default, more = RoutingFlags(data=text_of(path)), [expand(word) for word in words[1:]]
    flags = parse_flags(RoutingFlags, f"routing {path}", more, default=default)
    output = flags.output or page_folder(path) / "routing.html"
    check_writable(output)
    path = state_at(path, flags.step)
    write_routing_report(
        path, flags.data, output, against=flags.against, texts=flags.text, batches=flags.batches
    )
    print(output.resolve())
    return 0
