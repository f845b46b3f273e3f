"""The Hugging Face Hub: fetch a model, publish one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from switchworks.checkpoint.files import MANIFEST, verify
from switchworks.checkpoint.tensors import weight_files
from switchworks.config import CheckpointError

_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"


def is_hub_name(source: str) -> bool:
    """Whether `source` has the form org/name and is no folder here."""
    return re.fullmatch(_NAME, source) is not None and not Path(source).exists()


def fetch(repo: str) -> Path:
    """The folder in the Hub's cache with the model `repo`, downloaded unless it is there.

    Weights as safetensors, or as .bin if there are no others. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    directory = Path()
    with _explained(f"{repo} is no folder here, and could not be fetched from the Hub"):
        for weights in ("*.safetensors", "*.bin"):
            patterns = ["*.json", "*.model", weights]
            directory = Path(snapshot_download(repo, allow_patterns=patterns))
            if weight_files(directory):
                break
    return directory


def push_to_hub(path: Path | str, repo: str, *, private: bool = True) -> str:
    """Upload the model in `path`, of either format, to `repo`; returns the address of the commit.

    `path` is a model's folder or a run's. A missing `repo` is made, `private` or not; log in first
    (`hf auth login`). The README.md that goes along is the model card: fill in its licence. Raises
    CheckpointError if files have changed or the Hub refuses."""
    from huggingface_hub import HfApi

    directory = Path(path) / "model" if (Path(path) / "model").is_dir() else Path(path)
    if not weight_files(directory):
        raise CheckpointError(f"{path} holds no model to upload.\n  Name the folder of one.")
    if (directory / MANIFEST).is_file():
        verify(directory)
    api = HfApi(library_name="switchworks")
    with _explained(f"{directory} could not be uploaded to {repo}"):
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=directory))


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Turns the Hub's errors, which are OSErrors and ValueErrors, into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{problem}: {reason}\n  Check the name, the connection and `hf auth whoami`."
        ) from error
