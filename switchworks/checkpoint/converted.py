"""Models of Hugging Face where one of ours is wanted: converted once, and kept in the cache."""

from pathlib import Path

from switchworks.checkpoint.hub import fetch, is_hub_name
from switchworks.checkpoint.model_files import convert_checkpoint, is_model, weight_files
from switchworks.config import CheckpointError
from switchworks.data import DataConfig, cache_folder, digest, file_lock, file_stats


def as_ours(source: Path | str) -> Path:
    """`source` if a model or run of ours is there, else a copy in our format of the Hugging Face
    model in that directory or of that name on the Hub.

    Raises CheckpointError if it can be neither found nor expressed.
    """
    place = Path(source)
    if is_model(place) or (place.exists() and not (place / "config.json").is_file()):
        return place  # what is no model at all is refused by whoever opens it
    if not place.exists() and not is_hub_name(str(source)):
        raise CheckpointError(f"{place} does not exist.\n  Name a run, a model, or one on the Hub.")
    directory = place if place.exists() else fetch(str(source))
    files = [directory / "config.json", *weight_files(directory)]
    folder = cache_folder(DataConfig()) / f"converted-{digest(file_stats(files))[:16]}"
    with file_lock(folder):
        if not is_model(folder):
            convert_checkpoint(directory, folder)
    return folder
