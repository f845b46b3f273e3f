"""`switchworks serve PATH ...`: models over HTTP, with a page to try them."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from switchworks.cli import parsing
from switchworks.config import ConfigError
from switchworks.serve import ServeConfig


@dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """Answer over HTTP: POST /v1/generate fills holes, POST /v1/completions is OpenAI's, / is a
    page to try and look inside, /openapi.json lists the rest. The key that clients have to send is
    the environment variable SWITCHWORKS_API_KEY; without one nobody has to."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, checkpoints of runs, or model directories."""
    host: str = "127.0.0.1"
    """Address to listen at: this one is for programs on this machine, 0.0.0.0 for all."""
    port: int = 8000
    """0: any that is free."""
    config: tyro.conf.OmitArgPrefixes[ServeConfig] = field(default_factory=ServeConfig)
    """Limits."""
    precision: parsing.Precision = "stored"
    """What to compute in: as the weights are stored (float32 after training), or auto, which is
    bfloat16 where this machine multiplies it faster."""
    int8: bool = False
    """Quantise the weights to 8 bits first."""
    expert_memory: str | None = None
    """Keep experts on disk, and at most so many bytes of each model's in memory (2GB, 512MB)."""

    def __post_init__(self) -> None:
        parsing.parse_bytes(self.expert_memory, "--expert-memory")
        if self.int8 and self.expert_memory is not None:
            raise ConfigError(
                "--int8 quantises experts in memory, and --expert-memory leaves them on disk.\n"
                "  Quantise the files: switchworks convert PATH NEW --quantise int8"
            )


def run(words: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    flags = parsing.parse_flags(ServeFlags, "serve", words)
    try:
        from switchworks.serve import serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serve needs {error.name}, which is not installed.\n  pip install 'switchworks[serve]'"
        ) from error
    weights = {
        "int8": flags.int8,
        "dtype": parsing.dtype_of(flags.precision),
        "expert_memory": parsing.parse_bytes(flags.expert_memory, "--expert-memory"),
    }
    serve(flags.paths, flags.config, flags.host, flags.port, **weights)
    return 0
