"""The teacher of a distilled run: found, opened, and held to the student's text and shape."""

from pathlib import Path
from typing import NamedTuple

from switchworks.checkpoint.convert import open_model
from switchworks.checkpoint.model_files import is_model
from switchworks.config import CheckpointError, ConfigError
from switchworks.data.tokenizer import Tokenizer
from switchworks.model import SwitchTransformer
from switchworks.training.experiment import Experiment


class Teacher(NamedTuple):
    """A trained model and the tokenizer it was trained with."""

    path: str
    model: SwitchTransformer
    tokenizer: Tokenizer

    def require_same_ids(self, tokenizer: Tokenizer, rows: int) -> None:
        """Raises CheckpointError unless an id means the same to a student with `tokenizer` and
        `rows` of embedding."""
        if self.tokenizer.fingerprint != tokenizer.fingerprint:
            raise CheckpointError(
                f"The teacher in {self.path} reads another vocabulary ({self.tokenizer.vocab_size} "
                f"ids) than the student ({tokenizer.vocab_size} ids), so their probabilities are "
                f"of different tokens.\n  Use the teacher's: --data.tokenizer {self.path}."
            )
        if self.model.config.vocab_size != rows:
            raise CheckpointError(
                f"The teacher in {self.path} has {self.model.config.vocab_size} rows of vocabulary "
                f"and the student {rows}.\n  Leave --init out, or give it a model with as many."
            )


def open_teacher(experiment: Experiment) -> Teacher | None:
    """The teacher that `experiment` names; None if it names none.

    Raises CheckpointError if there is no such model, or none that can teach this student.
    """
    distil = experiment.distil
    if distil is None:
        return None
    path = Path(distil.teacher)
    if not distil.teacher or not (is_model(path) or (path / "config.json").is_file()):
        raise CheckpointError(
            f"There is no teacher in distil.teacher = {distil.teacher!r}: {_why(distil.teacher)}.\n"
            "  Train one first (switchworks train quickstart), or give --distil.teacher PATH: the\n"
            "  directory of a finished run, of a model, or of a Hugging Face model."
        )
    model, tokenizer = open_model(path)
    if tokenizer is None:
        raise CheckpointError(
            f"The teacher in {path} has no tokenizer, so nobody knows what its ids mean.\n"
            "  Put its spiece.model beside the weights, or save it with its tokenizer."
        )
    if model.config.decoder_only != experiment.model.decoder_only:
        kinds = "an encoder and a decoder", "a decoder only"
        theirs, ours = kinds[model.config.decoder_only], kinds[experiment.model.decoder_only]
        raise ConfigError(
            f"The teacher in {path} has {theirs} and the student {ours}: they read different rows."
            "\n  Choose a student of the teacher's kind, see model.decoder_only."
        )
    return Teacher(distil.teacher, model, tokenizer)


def _why(teacher: str) -> str:
    path = Path(teacher)
    if not teacher:
        return "none is named"
    if not path.exists():
        return "it is not there"
    if (path / "experiment.toml").is_file():
        return "that run has not ended, so it has no model/ yet"
    return "it is no model"
