"""The teacher of a distilled run: found, opened, and held to the student's text and shape.

Or what it left on the disk (`compress/logit_store.py`), held to the same.
"""

from pathlib import Path
from typing import Any, NamedTuple

from switchworks.batch import Batch
from switchworks.checkpoint import is_model, open_model, weights_hash
from switchworks.config import CheckpointError, ConfigError, DataError, to_dict
from switchworks.data import Tokenizer, run_metadata
from switchworks.distil.store import LogitStore, StoreInfo, info_differences
from switchworks.model import SwitchTransformer
from switchworks.training import Experiment


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


def weights_of(teacher: Teacher | LogitStore) -> str:
    """The hash of the weights that teach, be it from a store."""
    if isinstance(teacher, LogitStore):
        return teacher.info.weights
    return weights_hash(Path(teacher.path))


def require_same_teacher(teacher: Teacher | LogitStore, run_dir: Path) -> None:
    """Raises CheckpointError if the run in `run_dir` began with other weights in that place."""
    before = run_metadata(run_dir).get("teacher_weights")
    if before is not None and before != weights_of(teacher):
        where = teacher.info.teacher if isinstance(teacher, LogitStore) else teacher.path
        raise CheckpointError(
            f"The teacher in {where} is not the one this run began with: its weights have "
            "changed.\n  Put those back, or begin anew in another --run-dir."
        )


NOT_CONTENT = ("cache", "workers", "prefetch", "tokenizer")
"""Settings of data that change no row; of the tokenizer the fingerprint is compared."""


def about_store(
    experiment: Experiment, tokenizer: Tokenizer, top_k: int, dtype: Any, weights: str
) -> StoreInfo:
    """What a store of the teacher's probabilities for the rows of `experiment` has to say."""
    assert experiment.distil is not None
    data = to_dict(experiment.data)
    return StoreInfo(
        teacher=experiment.distil.teacher,
        weights=weights,
        tokenizer=tokenizer.fingerprint,
        vocab_size=experiment.model.vocab_size,
        top_k=top_k,
        temperature=experiment.distil.temperature,
        dtype=dtype,
        precision=experiment.precision,
        seed=experiment.seed,
        data={name: value for name, value in data.items() if name not in NOT_CONTENT},
    )


def open_logits(experiment: Experiment) -> LogitStore | None:
    """The store that `experiment` names; None if it names none.

    Raises DataError if there is none there, or if it is of another temperature or teacher.
    """
    distil = experiment.distil
    if distil is None or distil.store is None:
        return None
    store = LogitStore(Path(distil.store))
    if store.info.temperature != distil.temperature:
        raise DataError(
            f"The probabilities in {store.folder} are at temperature {store.info.temperature}, and "
            f"distil.temperature is {distil.temperature}.\n"
            f"  Set --distil.temperature {store.info.temperature}, or make another store."
        )
    teacher = Path(distil.teacher)
    there = bool(distil.teacher) and (is_model(teacher) or (teacher / "config.json").is_file())
    if there and weights_hash(teacher) != store.info.weights:
        raise DataError(
            f"The probabilities in {store.folder} are of another teacher than {teacher}: of "
            f"{store.info.teacher}, or of weights that it had before.\n"
            "  Make them anew in another --distil.store."
        )
    return store


def require_same_rows(
    store: LogitStore, experiment: Experiment, tokenizer: Tokenizer, first: Batch, rows: range
) -> None:
    """Raises DataError unless `store` is of the rows that `experiment` trains on.

    `first` is this rank's part of the first batch, whose rows have the numbers `rows`.
    """
    info, needed = store.info, experiment.steps * experiment.batch_size
    here = about_store(experiment, tokenizer, info.top_k, info.dtype, info.weights)
    if (info.tokenizer, info.vocab_size) != (here.tokenizer, here.vocab_size):
        raise DataError(
            f"The probabilities in {store.folder} are of another vocabulary ({info.vocab_size} "
            f"rows) than the student's ({here.vocab_size}).\n"
            f"  Use the teacher's: --data.tokenizer {info.teacher}."
        )
    if store.num_rows < needed:
        raise DataError(
            f"{store.folder} holds the teacher's probabilities for {store.num_rows:,} rows; "
            f"{experiment.steps:,} steps of {experiment.batch_size} rows need {needed:,}.\n"
            f"  The command that made it goes on with --steps {experiment.steps}."
        )
    try:
        store.taught(rows, first)
    except DataError as error:
        text = ("data.", "seed:")
        changed = [line for line in info_differences(info, here) if line.startswith(text)]
        why = "".join(f"    {line}\n" for line in changed) or "    the text itself\n"
        raise DataError(
            f"The teacher's probabilities in {store.folder} are for other rows than this run's. "
            f"What differs:\n{why}"
            "  Train with the settings the store was made with, or make another store."
        ) from error


def _why(teacher: str) -> str:
    path = Path(teacher)
    if not teacher:
        return "none is named"
    if not path.exists():
        return "it is not there"
    if (path / "experiment.toml").is_file():
        return "that run has not ended, so it has no model/ yet"
    return "it is no model"
