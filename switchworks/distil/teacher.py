"""The teacher of a distilled run, or its stored probabilities: opened, and checked to fit; a
student's initial weights, and how much of its teacher's gain it kept (section 4.2)."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from switchworks.batch import Batch
from switchworks.checkpoint import is_model, open_model, require_tokenizer, weights_hash
from switchworks.config import CheckpointError, ConfigError, DataError
from switchworks.data import Tokenizer
from switchworks.distil.config import DistilConfig
from switchworks.distil.store import LogitStore, StoreInfo, info_differences
from switchworks.model import FFN, AttentionBase, Experts, ModelConfig, Router, SwitchTransformer


class Teacher(NamedTuple):
    """A trained model and the tokenizer it was trained with."""

    path: str
    model: SwitchTransformer
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Rows of its embedding."""
        return self.model.config.vocab_size

    @property
    def weights(self) -> str:
        """Hash of its weights."""
        return weights_hash(Path(self.path))

    def require_same_ids(self, tokenizer: Tokenizer, rows: int) -> None:
        """Raises CheckpointError unless ids mean the same to a student with `tokenizer` and `rows`
        embedding rows."""
        if self.tokenizer.fingerprint != tokenizer.fingerprint:
            raise CheckpointError(
                f"The teacher in {self.path} has another vocabulary ({self.tokenizer.vocab_size} "
                f"ids) than the student ({tokenizer.vocab_size} ids), so their probabilities are "
                f"of different tokens.\n  Use the teacher's: --data.tokenizer {self.path}."
            )
        if self.vocab_size != rows:
            raise CheckpointError(
                f"The teacher in {self.path} has {self.vocab_size} rows of vocabulary and the "
                f"student {rows}.\n  Leave --init out, or give it a model with as many."
            )


TeacherSource = Teacher | LogitStore
"""A teacher that runs, or its stored probabilities."""


def open_source(distil: DistilConfig, *, decoder_only: bool) -> TeacherSource:
    """What `distil` names: the store if it names one, else the teacher. Raises as both do."""
    return open_store(distil) if distil.store else open_teacher(distil, decoder_only=decoder_only)


def open_teacher(distil: DistilConfig, *, decoder_only: bool) -> Teacher:
    """The teacher that `distil` names, for a student with an encoder or without one. Raises
    CheckpointError if there is no such model or it has no tokenizer, ConfigError if it reads other
    rows than the student."""
    path = Path(distil.teacher)
    try:
        model, tokenizer = open_model(path)
    except CheckpointError as error:
        reason = str(error).partition("\n")[0] if distil.teacher else "none is named."
        raise CheckpointError(
            f"distil.teacher = {distil.teacher!r} holds no teacher that can be read: {reason}\n"
            "  Train one first (switchworks train quickstart), or give --distil.teacher PATH: the\n"
            "  directory of a finished run, of a model, or of a Hugging Face model."
        ) from error
    tokenizer = require_tokenizer(path, tokenizer)
    if model.config.decoder_only != decoder_only:
        kinds = "an encoder and a decoder", "a decoder only"
        raise ConfigError(
            f"The teacher in {path} has {kinds[not decoder_only]} and the student "
            f"{kinds[decoder_only]}: they read different rows."
            "\n  Choose a student of the teacher's kind, see model.decoder_only."
        )
    return Teacher(distil.teacher, model, tokenizer)


def open_store(distil: DistilConfig) -> LogitStore:
    """The store that `distil` names. Raises DataError if it is missing, or made at another
    temperature or by another teacher."""
    assert distil.store is not None
    store = LogitStore(Path(distil.store))
    if store.info.temperature != distil.temperature:
        raise DataError(
            f"The probabilities in {store.folder} are at temperature {store.info.temperature}, and "
            f"distil.temperature is {distil.temperature}.\n"
            f"  Set --distil.temperature {store.info.temperature}, or make another store."
        )
    if _has_model(distil.teacher) and weights_hash(Path(distil.teacher)) != store.weights:
        raise DataError(
            f"The probabilities in {store.folder} are of another teacher than {distil.teacher}: of "
            f"{store.path}, or of weights that it had before.\n"
            "  Make them again in another --distil.store."
        )
    return store


def require_same_rows(
    store: LogitStore, here: StoreInfo, num_rows: int, first: Batch, rows: range
) -> None:
    """Raises DataError unless `store` covers the run whose store would have the info `here`. The
    run has `num_rows` rows in all; `first` is this rank's part of its first batch, whose rows have
    the numbers `rows`."""
    info = store.info
    if (info.tokenizer, info.vocab_size) != (here.tokenizer, here.vocab_size):
        raise DataError(
            f"The probabilities in {store.folder} are of another vocabulary ({info.vocab_size} "
            f"rows) than the student's ({here.vocab_size}).\n"
            f"  Use the teacher's: --data.tokenizer {info.teacher}."
        )
    if store.num_rows < num_rows:
        raise DataError(
            f"{store.folder} holds the teacher's probabilities for {store.num_rows:,} rows; "
            f"this run has {num_rows:,}.\n"
            "  The command that made it continues with the --steps of this run."
        )
    try:
        store.read(rows, first)
    except DataError as error:
        lines = [x for x in info_differences(info, here) if x.startswith(("data.", "seed:"))]
        listed = "".join(f"    {line}\n" for line in lines) or "    the text itself\n"
        raise DataError(
            f"The teacher's probabilities in {store.folder} are for other rows than this run's. "
            f"What differs:\n{listed}"
            "  Train with the settings the store was made with, or make another store."
        ) from error


class Inherited(NamedTuple):
    """Names of a student's parameters, in its order."""

    copied: list[str]
    """Those with the teacher's values."""
    fresh: list[str]
    """Those left as they were."""


@torch.no_grad()
def initialise_from_teacher(student: SwitchTransformer, teacher: SwitchTransformer) -> Inherited:
    """Copies the teacher's values to every parameter of `student` with the same name and shape.

    Except experts and routers, attention with another number or width of heads, and FFNs with
    another activation. From a sparse teacher to a student of the same width this copies embeddings,
    attention, norms and the FFNs of dense blocks; the FFNs in place of the teacher's switch layers
    keep their initial values, unless the teacher is made dense first (`dense_teacher`).
    """
    sparse = (Experts, Router)
    excluded = _parameters_in(student, sparse) | _parameters_in(teacher, sparse)
    excluded |= _incompatible(student, teacher.config)
    sources = dict(teacher.named_parameters())
    inherited = Inherited([], [])
    for name, parameter in student.named_parameters():
        source = sources.get(name)
        if source is None or source.shape != parameter.shape or name in excluded:
            inherited.fresh.append(name)
            continue
        parameter.copy_(source)
        inherited.copied.append(name)
    return inherited


def fraction_of_gain(*, baseline: float, teacher: float, student: float) -> float:
    """(student - baseline) / (teacher - baseline), the paper's "percent of teacher gain" / 100.

    Of losses, log perplexities or any score, all three of one kind. 0: no better than the baseline,
    which was trained without a teacher; 1: as good as the teacher; nan: teacher and baseline are
    equal.
    """
    gain = teacher - baseline
    return (student - baseline) / gain if gain else float("nan")


def _incompatible(student: SwitchTransformer, teacher: ModelConfig) -> set[str]:
    """Parameters whose values mean something else in the teacher although the shapes may agree."""
    config = student.config
    kinds: tuple[type[nn.Module], ...] = ()
    if (config.num_heads, config.d_kv) != (teacher.num_heads, teacher.d_kv):
        kinds += (AttentionBase,)
    if (config.activation, config.gated) != (teacher.activation, teacher.gated):
        kinds += (FFN,)
    return _parameters_in(student, kinds)


def _parameters_in(model: SwitchTransformer, kinds: tuple[type[nn.Module], ...]) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters()
    }


def _has_model(teacher: str) -> bool:
    path = Path(teacher)
    return bool(teacher) and (is_model(path) or (path / "config.json").is_file())
