"""The data settings and metadata of a run directory, and the text to measure a model on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from switchworks.config import CheckpointError, ConfigError, from_dict, read_toml
from switchworks.data.config import DataConfig
from switchworks.disk import read_json
from switchworks.trust import NamedByRun


def run_data_config(path: Path) -> DataConfig | None:
    """The data settings of the run directory `path`; None if it is not a run directory."""
    file = path / "experiment.toml"
    if not file.is_file():
        return None
    values = read_toml(file)
    if "data" not in values:
        raise ConfigError(f"{file} has no [data]: it is not that of a run.\n  Name a run.")
    config = from_dict(DataConfig, values["data"], where="data.")
    return replace(config, tasks=tuple(map(NamedByRun, config.tasks)))


def run_metadata(path: Path) -> dict[str, Any]:
    """The about.json of the run in `path`; empty if the run has not begun. Raises CheckpointError
    if it is damaged."""
    try:
        return read_json(path / "about.json", CheckpointError)
    except FileNotFoundError:
        return {}


def default_rows(decoder_only: bool) -> DataConfig:
    """Settings for a model outside a run directory: T5's rows, or 512 tokens if decoder-only."""
    if decoder_only:
        return DataConfig(objective="causal", input_length=0, target_length=512)
    return DataConfig()


def text_for(path: Path, *, decoder_only: bool, text: str | None = None) -> DataConfig:
    """Settings to read the text of the run in `path`, or else the file, folder or glob `text`, with
    the model's own tokenizer in rows of the run's length.

    For a model outside a run directory rows are T5's, or of 512 tokens if it is decoder-only.
    Raises CheckpointError if it is given no text.
    """
    data = run_data_config(path)
    if data is None and text is None:
        raise CheckpointError(
            f"{path} is not a run directory, so it does not say which text it was trained on.\n"
            "  Give one: --text FILE, a folder or a glob."
        )
    data = replace(data or default_rows(decoder_only), tokenizer=str(path))
    if text is None:
        return data
    rows = {}
    if data.objective == "causal":  # prompts of tasks are inputs; text has none
        rows = {"input_length": 0, "target_length": data.input_length + data.target_length}
    return replace(data, path=text, mixture=(), dataset=None, languages=(), tasks=(), **rows)
