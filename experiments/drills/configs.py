"""Experiments that nobody meant: settings drawn by their types, each of which trains or is refused.

    python experiments/drills/configs.py                    1,000 experiments, texts and batches
    python experiments/drills/configs.py settings --count 200 --seed 3
    python experiments/drills/configs.py settings --first 17 --count 1      one again

An experiment has to train two steps to a finite loss, or to be refused in words that name the rule
and the fix; one in `WHOLE` goes through `train`, the others through all of it up to the loop.
Documents of any characters have to become rows from which they can be read again. Padding must not
change a loss, nor the fast kernels.
"""

import argparse
import dataclasses
import gzip
import json
import logging
import math
import random
import re
import shutil
import tempfile
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from damage import SENTENCES, SMALL
from tally import Tally
from worker import TooLong, failure, run_attempts

from switchworks import SwitchTransformer, fast, save
from switchworks.batch import Batch
from switchworks.config import CheckpointError, ConfigError, DataError, from_dict, to_dict, to_toml
from switchworks.data import DataConfig, open_dataset
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.disk import write_json
from switchworks.model import ModelConfig, RoutingConfig
from switchworks.parallel import SINGLE
from switchworks.recipes.tiny import tiny
from switchworks.training import Experiment, train
from switchworks.training.assemble import assemble, num_trainable
from switchworks.training.guard import DivergenceError
from switchworks.training.loggers import make_loggers
from switchworks.training.resolve import check_initial_weights
from switchworks.training.step import StepResult, train_step

SECONDS = 20.0
WHOLE = 5
"""Of so many experiments one goes through all of `train`."""
REFUSALS = (ConfigError, DataError, CheckpointError)
Settings = dict[str, Any]
"""An experiment as nested plain values, as in experiment.toml."""

FIXED = {"steps", "auto_steps", "threads", "compile", "data.cache", "data.dataset", "log"}
"""Never drawn: they decide how long it takes, or reach for the network."""
SIZES: dict[str, tuple[int, ...]] = {
    "batch_size": (1, 2, 3, 4, 6, 8),
    "model.vocab_size": (384, 260, 300, 1, 512),
    "model.d_model": (1, 2, 8, 16, 30, 32),
    "model.d_ff": (1, 4, 16, 33),
    "model.d_kv": (1, 2, 4, 8),
    "model.num_heads": (1, 2, 3, 4),
    "model.num_layers": (1, 2, 3),
    "model.num_decoder_layers": (1, 2, 3),
    "model.relative_buckets": (4, 8, 32, 6),
    "model.relative_max_distance": (3, 16, 128),
    "model.routing.experts": (1, 2, 3, 4, 8),
    "model.routing.expert_d_ff": (1, 8, 24),
    "model.routing.group_sequences": (1, 2, 3, 4),
    "data.input_length": (0, 1, 2, 7, 16, 40, 64),
    "data.target_length": (1, 2, 5, 16, 40, 64),
    "data.workers": (1, 2),
    "data.prefetch": (0, 1, 4),
    "lora.rank": (1, 2, 5, 16),
    "mesh.data": (1, 1, 1, 1, 2),
    "mesh.expert": (1, 1, 1, 1, 2),
    "mesh.model": (1, 1, 1, 1, 2),
}
"""Numbers for settings that decide the size of what is computed. The others may be anything."""
WHOLE_NUMBERS = (0, 1, 2, 3, 4, 8, 64)
NUMBERS = (0.0, 0.1, 0.5, 0.99, 1.0, 2.0, 1e-3, 1e-6, 10.0)
ODD: tuple[Any, ...] = (
    *(-1, -(10**18), 2**31, 2**63, 10**30, -0.5, 1e-320, 1e30, 1e300, math.inf, -math.inf),
    *(math.nan, "", "none", "x", "\0", "\ud800", "a" * 10_000, True, [], [[]], {}, {"x": 1}),
)
WORDS: dict[str, tuple[Any, ...]] = {
    "data.path": ("{site}/text/en.txt", "{site}/text", "{site}/text/*.jsonl", "{site}/none", ""),
    "data.source": ("files", "x", "hub"),
    "data.languages": ((), ("de", "en"), ("all",), ("en", "en"), ("xx",)),
    "data.mixture": ((), ("a={site}/text/en.txt", "b={site}/text/de.txt"), ("a=",), ("a=x", "a=x")),
    "data.tokenizer": ("bytes", "train", "{site}/model", "{site}/none", "{site}"),
    "data.tasks": (
        *((), ("t={site}/table.tsv:a:b",), ("t={site}/table.tsv",), ("t={site}/table.tsv:a:x",)),
        *(("x",), ("t={site}/table.tsv", "u={site}/table.tsv:b:a"), ("{site}/none.py",)),
    ),
    "data.task_folder": ("{site}", "{site}/none"),
    "data.task_metrics": (("accuracy",), ("f1",), ("rouge",), ("x",), ()),
    "data.task_labels": ((), ("yes", "no"), ("yes",), ("yes", "yes")),
    "data.task_delimiter": ("tab", ",", ";", "\t", "ab", '"'),
    "data.column": ("text", "x", ""),
    "optim.name": ("adafactor", "adamw", "muon", "sgd"),
    "optim.fallback": ("adamw", "adafactor", "muon"),
    "optim.betas": ((0.0, 0.999), (0.9, 0.95), (0.9,), (1.0, 0.5)),
    "model.routing.strategy": ("switch", "top2", "expert_choice", "no_token_left_behind", "x"),
    "model.routing.decoder_strategy": ("switch", "top2", "expert_choice", "x"),
    "best.metric": ("auto", "val/loss", "val/perplexity", "task/mean", "train/loss", "x"),
    "freeze": ((), ("experts",), ("all-but-experts",), ("*",), ("decoder.*", "norms"), ("x",)),
    "lora.also_train": ((), ("norms",), ("embeddings",), ("*",), ("x",)),
    "distil.teacher": ("{site}/model", "{site}/none", "{site}"),
    "distil.store": ("{site}/none", "{site}"),
}
"""Values of settings whose words mean something. A setting of words that is not here gets any."""
PROFILES: dict[str, Settings] = {
    "text": {},
    "dense": {"model.routing": "none"},
    "packed": {"data.packing": "documents", "data.target_length": 24},
    "prefix": {"data.objective": "prefix", "data.target_length": 20},
    "causal": {
        "model.decoder_only": True,
        "data.objective": "causal",
        "data.input_length": 0,
        "data.target_length": 40,
    },
    "mixture": {"data.path": "none", "data.mixture": WORDS["data.mixture"][1]},
    "languages": {"data.path": "{site}/text", "data.languages": ["de", "en"]},
    "task": {"data.path": "none", "data.tasks": WORDS["data.tasks"][1]},
    "prompts": {
        "model.decoder_only": True,
        "data.objective": "causal",
        "data.path": "none",
        "data.tasks": WORDS["data.tasks"][1],
        "data.target_length": 16,
    },
    "adapters": {"lora.rank": 2},
    "student": {"distil.soft_weight": 0.5},
    "switch attention": {"model.routing.layers": "both"},
    "pieces": {"data.tokenizer": "train", "model.vocab_size": 512},
}
"""Settings that go together, from which single ones are then changed."""
NEEDED: dict[str, Settings] = {"distil": {"teacher": "{site}/model"}}
"""What a group of settings that is absent needs to begin with."""


def make_site(site: Path) -> None:
    """Texts in two languages, a table and a model, which serves as teacher and as tokenizer."""
    (site / "text").mkdir(parents=True)
    text = "\n\n".join(SENTENCES)
    (site / "text" / "en.txt").write_text(text)
    (site / "text" / "de.txt").write_text(text.replace("quick", "schnelle \u00dc").swapcase())
    lines = (json.dumps({"text": line, "x": 1}) + "\n" for line in SENTENCES)
    (site / "text" / "fr.jsonl").write_text("".join(lines))
    rows = (f"{line}\t{('no', 'yes')[len(line) % 2]}\n" for line in SENTENCES)
    (site / "table.tsv").write_text("a\tb\n" + "".join(rows))
    save(SwitchTransformer(SMALL, seed=1), site / "model", ByteTokenizer())


def base(site: Path) -> Settings:
    """The settings from which drawing begins."""
    experiment, routing = tiny(), RoutingConfig(experts=2, group_sequences=2, min_capacity=1)
    model = replace(SMALL, num_layers=2, routing=routing, d_model=16)
    # Without a path the default source would be extracted, which takes minutes.
    data = replace(experiment.data, path=f"{site}/text/en.txt", source="files")
    data = replace(data, cache=f"{site}/cache")
    changed = replace(experiment, steps=2, threads=1, log=(), model=model, data=data)
    quiet = dict.fromkeys(("log_every", "validate_every", "evaluate_every", "checkpoint_every"), 1)
    return to_dict(changed) | quiet


def leaves(kind: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every setting of a dataclass, and of each group that may be absent."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], f"{path}{field.name}"
        group = next((part for part in members(hint) if dataclasses.is_dataclass(part)), None)
        if group is None or group is not hint:
            yield name, hint
        if group is not None:
            yield from leaves(typing.cast(type, group), f"{name}.")


def members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def value_of(hint: Any, name: str, draw: random.Random) -> Any:
    """A value of this type as it stands in a settings file."""
    if name in WORDS and (type(None) not in members(hint) or draw.random() < 0.7):
        return draw.choice(WORDS[name])
    part = draw.choice(members(hint))
    origin = typing.get_origin(part)
    if part is type(None):
        return "none"
    if dataclasses.is_dataclass(part):
        return dict(NEEDED.get(name, {}))
    if origin is Literal:
        return draw.choice(typing.get_args(part))
    if origin is tuple:
        inner = typing.get_args(part)[0]
        return [value_of(inner, name, draw) for _ in range(draw.choice((0, 1, 1, 2, 3)))]
    if part is bool:
        return draw.random() < 0.5
    if part is int:
        return draw.choice(SIZES.get(name, WHOLE_NUMBERS))
    if part is float:
        return draw.choice(NUMBERS)
    return draw.choice(("", "x", "none", "a b", "\0"))


def put(settings: Settings, name: str, value: Any) -> None:
    """Set `name`, dotted, and make the groups on the way that are absent."""
    *path, last = name.split(".")
    for key in path:
        if not isinstance(settings.get(key), dict):
            settings[key] = dict(NEEDED.get(key, {}))
        settings = settings[key]
    settings[last] = value


def drawn(draw: random.Random, site: Path) -> tuple[Settings, dict[str, Any]]:
    """Settings of an experiment, and those that differ from where it began."""
    profile = draw.choice(list(PROFILES))
    changed: dict[str, Any] = dict(PROFILES[profile])
    names = [(name, hint) for name, hint in leaves(Experiment) if name not in FIXED]
    for name, hint in draw.sample(names, draw.choice((0, 1, 1, 2, 3, 5))):
        changed[name] = value_of(hint, name, draw)
    if draw.random() < 0.2:
        name = draw.choice(names)[0]
        changed[name] = draw.choice(ODD)
    changed["seed"] = draw.choice((0, 1, 2**32 - 1))
    settings = base(site)
    for name, value in changed.items():
        put(settings, name, located(value, site))
    return settings, changed


def located(value: Any, site: Path) -> Any:
    """`value` with the folder of the drill in place of {site}."""
    if isinstance(value, str):
        return value.replace("{site}", str(site))
    if isinstance(value, list | tuple):
        return [located(each, site) for each in value]
    if isinstance(value, dict):
        return {key: located(each, site) for key, each in value.items()}
    return value


class Note:
    """A hook that keeps what the steps returned."""

    def __init__(self) -> None:
        self.results: list[StepResult] = []

    def after_step(self, state: Any, result: StepResult) -> None:
        self.results.append(result)

    def finish(self, state: Any, *, interrupted: bool) -> None:
        pass


def two_steps(experiment: Experiment, folder: Path, *, whole: bool) -> list[StepResult]:
    """What the two steps return: of `train`, or of all that comes before its loop and the steps."""
    note = Note()
    if whole or experiment.mesh.size > 1:
        train(experiment, folder, hooks=[note])
        return note.results
    check_initial_weights(experiment, None)
    num_trainable(experiment)
    make_loggers(experiment.log)
    run = assemble(experiment, folder, resume=False, init=None, ranks=SINGLE)
    return [train_step(run.state, run.pipeline.batch(step)) for step in range(2)]


def refusal(error: Exception) -> tuple[str, str | None]:
    """A refusal has to say what is wrong and what to do."""
    whole = re.search(r"[.?!:]\s+\S", str(error))
    lost = None if whole else f"without a fix: {type(error).__name__}: {error}"
    return "refused", lost and lost[:300]


def settings(number: int, *, seed: int, site: Path) -> tuple[str, str | None]:
    """One experiment: trained, refused, or lost."""
    draw = random.Random(f"settings {seed} {number}")
    values, changed = drawn(draw, site)
    folder = site / "run"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        experiment = from_dict(Experiment, values)
        if (again := repr(from_dict(Experiment, tomllib.loads(to_toml(experiment))))) != repr(
            experiment
        ):
            return "failed", f"{changed}: comes back from TOML as {again}"
        results = two_steps(experiment, folder, whole=number % WHOLE == 0)
    except REFUSALS as error:
        kind, lost = refusal(error)
    except DivergenceError as error:
        # Of rates and scales beyond measure that is what has to happen.
        del changed["seed"]
        numbers = [value for value in changed.values() if isinstance(value, int | float)]
        wild = any(abs(value) >= (2 if isinstance(value, float) else 1000) for value in numbers)
        kind, lost = "diverged", None if wild else failure(error)
    except TooLong:
        kind, lost = "slow", f"over {SECONDS:g} s"
    except Exception as error:
        kind, lost = "failed", failure(error)
    else:
        finite = all(math.isfinite(result.total) or result.skipped for result in results)
        kind, lost = "trained", None if finite and results else f"losses: {results}"[:300]
    return kind, lost and f"{lost} <- {changed}"


CHARACTERS = (
    *(
        "a",
        "b",
        " ",
        " ",
        "\n",
        "\n\n",
        "\r",
        "\r\n",
        "\t",
        "\0",
        "\x1b",
        "\x85",
        "\u00a0",
        "\u2028",
    ),
    *("\u00e9", "e\u0301", "\ufb01", "\u4e2d", "\u05d0", "\u202e", "\u200d", "\ufeff", "\ufffd"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469", "\U000e0041", "\U0010ffff", "\uffff", "\u2581"),
    *("<extra_id_0>", "</s>", "<pad>", '"', "\\", "{", ","),
)


def document(draw: random.Random) -> str:
    """Characters of all planes, no surrogates."""
    length = draw.choice((0, 1, 20, 200, 200, 2000))
    if draw.random() < 0.2:
        return draw.choice(CHARACTERS) * length
    points = (draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000))
    pool = [*CHARACTERS, *map(chr, points), *("word" * draw.choice((1, 500)),)]
    return "".join(draw.choices(pool, k=length))


def write_texts(folder: Path, texts: list[str], draw: random.Random) -> tuple[str, Path]:
    """One file with `texts`, of a format in which they are documents. Returns what it is."""
    kind = draw.choice(("txt", "jsonl", "jsonl.gz", "parquet"))
    path = folder / f"a.{kind}"
    if kind == "txt":
        path.write_bytes("\n\n".join(texts).encode())
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    else:
        lines = "".join(
            json.dumps({"text": t}, ensure_ascii=draw.random() < 0.5) + "\n" for t in texts
        )
        content = lines.encode()
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    return kind, path


def texts(number: int, *, seed: int, site: Path) -> tuple[str, str | None]:
    """Documents to tokens to rows, from which the text is read again."""
    draw = random.Random(f"texts {seed} {number}")
    folder = site / "texts"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    documents = [document(draw) for _ in range(draw.choice((1, 2, 5, 20, 20)))]
    kind, path = write_texts(folder, documents, draw)
    objective = draw.choice(("span_corruption", "prefix", "causal"))
    lengths: dict[str, Any] = {
        "input_length": draw.choice((4, 17, 40)),
        "target_length": draw.choice((12, 30)),
    }
    if objective == "causal":
        lengths["input_length"] = 0
    packing = "stream" if objective == "prefix" else draw.choice(("stream", "documents"))
    label = f"{kind}, {objective}, {packing}, {lengths}"
    try:
        config = DataConfig(
            path=str(path),
            cache=str(folder / "cache"),
            tokenizer="bytes",
            objective=objective,
            packing=packing,
            validation_share=draw.choice((0.02, 0.5)),
            workers=1,
            **lengths,
        )
        dataset = open_dataset(config, vocab_size=384)
        lost = check_tokens(dataset, [] if kind == "txt" else documents)
        pipeline = dataset.training(batch_size=3, seed=number)
        lost = lost or check_rows(pipeline, config)
    except REFUSALS as error:
        ended, lost = refusal(error)
    except Exception as error:
        ended, lost = "failed", failure(error)
    else:
        ended = "the same"
    return ended, lost and f"{label}: {lost}"


def check_tokens(dataset: Any, documents: list[str]) -> str | None:
    """Whether the stores hold all of `documents`, if there are any, and no more."""
    stores = [dataset.parts[""].train, dataset.parts[""].validation]
    found = sorted(
        dataset.tokenizer.decode(store.tokens(start, stop))
        for store in stores
        for start, stop in spans_of(store)
    )
    wanted = sorted(text for text in documents if text.strip())
    if len(wanted) > 1 and "".join(found) != "".join(wanted):
        return f"the tokens say {found} instead of {wanted}"[:300]
    return None


def spans_of(store: Any) -> list[tuple[int, int]]:
    borders = [0, *store.document_bounds(0, store.num_tokens).tolist(), store.num_tokens]
    return list(pairwise(borders))


def check_rows(pipeline: Any, config: DataConfig) -> str | None:
    """Whether rows have the lengths of the settings, and give back the tokens of their window."""
    batch, again = pipeline.rows([0, 1, 7]), pipeline.rows([0, 1, 7])
    shapes = [list(rows.shape) for rows in (batch.inputs, batch.targets)]
    if shapes != [[3, config.input_length], [3, config.target_length]]:
        return f"rows of {shapes}"
    if not (torch.equal(batch.inputs, again.inputs) and torch.equal(batch.targets, again.targets)):
        return "the same rows are others the second time"
    if config.packing == "documents":
        return None
    for row, number in enumerate((0, 1, 7)):
        tokens = pipeline.store.tokens(*pipeline.window_of(number)).tolist()
        inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
        if config.objective == "span_corruption":
            back = filled_in(inputs, targets, set(pipeline.corruption.sentinels))
        else:
            back = [token for token in inputs + targets if token > 1]
            tokens = tokens[: len(back)]
        if back != tokens:
            return f"row {number} says {back} instead of {tokens}"[:300]
    return None


def filled_in(inputs: list[int], targets: list[int], sentinels: set[int]) -> list[int]:
    """The inputs with the span that follows each sentinel in the targets in its place."""
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in targets:
        if token in sentinels:
            current = spans.setdefault(token, [])
        elif token > 1:
            current.append(token)
    return [
        each
        for token in inputs
        if token > 1
        for each in (spans[token] if token in sentinels else [token])
    ]


def batches(number: int, *, seed: int, site: Path) -> tuple[str, str | None]:
    """A random batch through a random model: finite, and the same with more padding."""
    draw = random.Random(f"batches {seed} {number}")
    torch.manual_seed(draw.randrange(1 << 30))
    try:
        model, label = random_model(draw)
        batch = random_batch(draw, model.config.decoder_only)
        wider = padded(batch, draw.choice((1, 5)), draw.choice((0, 4)))
        model.eval()
        with torch.no_grad():
            loss, other = (
                float(model(**each.arguments()).losses.cross_entropy) for each in (batch, wider)
            )
            fast.use_fast_kernels(model, torch.device("cpu"))
            quick = float(model(**batch.arguments()).losses.cross_entropy)
        output = model.train()(**batch.arguments())
        output.losses.total.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    except REFUSALS as error:
        return refusal(error)
    except Exception as error:
        return "failed", failure(error)
    lost = None
    if not (math.isfinite(loss) and finite):
        lost = f"loss {loss}, gradients finite: {finite}"
    if not math.isclose(loss, other, rel_tol=1e-4, abs_tol=1e-5):
        lost = f"loss {loss}, and with more padding {other}"
    if not math.isclose(loss, quick, rel_tol=1e-4, abs_tol=1e-5):
        lost = f"loss {loss}, and with fast kernels {quick}"
    shape = f"inputs {batch.inputs.tolist()}, targets {batch.targets.tolist()}"
    return "the same", lost and f"{lost}; {shape}; {label}"[:900]


def random_model(draw: random.Random) -> tuple[SwitchTransformer, str]:
    """A model in which no token is dropped in evaluation, and what it is."""
    routing = None
    if draw.random() < 0.8:
        routing = RoutingConfig(
            experts=draw.choice((1, 2, 4)),
            every=draw.choice((1, 2)),
            layers=draw.choice(("ffn", "attention", "both")),
            strategy=draw.choice(("switch", "top2", "no_token_left_behind")),
            decoder_strategy="switch",
            group_sequences=draw.choice((1, 2, 4)),
            exploration=draw.choice(("argmax", "input_jitter", "sample")),
        )
    config = ModelConfig(
        vocab_size=40,
        d_model=draw.choice((4, 8)),
        d_ff=8,
        d_kv=draw.choice((2, 4)),
        num_heads=draw.choice((1, 2)),
        num_layers=2,
        decoder_only=draw.random() < 0.3,
        activation=draw.choice(("relu", "gelu", "silu")),
        gated=draw.random() < 0.5,
        tied_head=draw.random() < 0.5,
        dropout=draw.choice((0.0, 0.5)),
        relative_buckets=8,
        relative_max_distance=16,
        routing=routing,
    )
    return SwitchTransformer(config, seed=draw.randrange(9)), str(config)


def random_batch(draw: random.Random, decoder_only: bool) -> Batch:
    """Four rows of tokens with padding behind them, perhaps in two segments, and rows without any.
    Targets without inputs have only padding to attend to, so there are none."""
    width = 0 if decoder_only and draw.random() < 0.5 else draw.choice((1, 3, 9))
    used = torch.tensor([draw.random() < 0.8 for _ in range(4)])
    parts, segments = [], []
    for length in (width, draw.choice((1, 2, 7))):
        ids = torch.randint(3, 40, (4, length))
        kept = torch.tensor([draw.randint(1, max(1, length)) for _ in range(4)]) * used
        inside = torch.arange(length) < kept[:, None]
        parts.append(ids * inside)
        segments.append((1 + (torch.arange(length) >= draw.randint(1, 9)).long()) * inside)
    given: dict[str, Any] = {}
    if draw.random() < 0.4 and not (decoder_only and width):
        if width:
            segments[1] = torch.minimum(segments[1], segments[0].amax(dim=1, keepdim=True))
        given = {"input_segments": segments[0], "target_segments": segments[1]}
    return Batch(inputs=parts[0], targets=parts[1], **given)


def padded(batch: Batch, columns: int, rows: int) -> Batch:
    """`batch` with padding behind its rows, and with rows of padding alone."""
    widen = partial(torch.nn.functional.pad, pad=(0, columns, 0, rows))
    keep = partial(torch.nn.functional.pad, pad=(0, 0, 0, rows))
    changed = {
        name: (widen if value.shape[1] else keep)(value)
        for name, value in batch.arguments().items()
        if isinstance(value, torch.Tensor)
    }
    return replace(batch, **changed)


Trial = Callable[..., tuple[str, str | None]]
DRILLS: dict[str, tuple[Trial, str]] = {
    "settings": (settings, "two steps to a finite loss, or refused with rule and fix"),
    "texts": (texts, "read again from the rows, or refused"),
    "batches": (batches, "finite, and the same with padding and with fast kernels"),
}


def drill(name: str, site: Path, numbers: range, seed: int) -> Tally:
    trial, goal = DRILLS[name]
    tally = Tally(f"random {name}", goal, seed)
    run_attempts(partial(trial, seed=seed, site=site), numbers, tally, limit=SECONDS)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description="Random experiments, texts and batches.")
    parser.add_argument("drills", nargs="*", metavar="DRILL", help="; ".join(DRILLS))
    parser.add_argument("--count", type=int, default=1000, help="of each")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    if unknown := set(args.drills) - set(DRILLS):
        parser.error(f"no drill {sorted(unknown)}; there are {'; '.join(DRILLS)}")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    numbers = range(args.first, args.first + args.count)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        make_site(site)
        tallies = [drill(name, site, numbers, args.seed) for name in args.drills or DRILLS]
    if args.json is not None:
        write_json(args.json, [tally.as_dict() for tally in tallies])
    raise SystemExit(any(tally.lost for tally in tallies))


if __name__ == "__main__":
    main()
