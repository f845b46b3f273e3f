"""What a server takes on."""

from dataclasses import dataclass, field

from switchworks.config import check_at_least, check_positive, with_field_help
from switchworks.engine import EngineConfig


@with_field_help
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Limits of a server. Each refusal names the one that was met."""

    max_body: int = 1_000_000
    """Bytes of a request (413)."""
    max_input: int = 2048
    """Tokens of a text (422)."""
    max_length: int = 512
    """Tokens written for a text (422)."""
    max_prompts: int = 128
    """Texts of one request (422)."""
    timeout: float = 120.0
    """Seconds that a request may take; what is written by then is its answer. Of an upload: 408."""
    log_texts: bool = False
    """Write what was asked and answered into the log."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How many texts are written at once."""

    def __post_init__(self) -> None:
        check_at_least(self, "", 1, "max_body", "max_input", "max_length", "max_prompts")
        check_positive(self, "", "timeout")
