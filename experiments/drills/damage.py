"""Flip a bit of a file, or cut it short, and open what it belongs to.

    python experiments/drills/damage.py                      3,000 times, over all kinds of files
    python experiments/drills/damage.py "run, model" --count 200 --seed 3

What is opened must be refused in plain words, be made again, or be what it was: another value
without a word is lost, and so is a traceback. Files of other people carry no hash of ours: theirs
may come back with another value, never as a traceback, and within five seconds.
"""

import argparse
import hashlib
import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tally import Tally

from switchworks import SwitchTransformer, adapt, distil, load, load_hf, save, save_hf
from switchworks.adapt.files import merge_adapters
from switchworks.batch import Batch
from switchworks.checkpoint import Checkpoints
from switchworks.config import CheckpointError, ConfigError, DataError
from switchworks.data import DataConfig, open_dataset
from switchworks.data.sources.reading import read_documents
from switchworks.data.sources.tables import read_tables
from switchworks.data.tokens.hugging_face import write_for_transformers
from switchworks.data.tokens.tokenizer import ByteTokenizer, load_tokenizer
from switchworks.data.tokens.train import train_sentencepiece
from switchworks.disk import write_json
from switchworks.model import ModelConfig, RoutingConfig
from switchworks.report import write_report

SLOW = 5.0
"""Seconds within which whatever is damaged has to be refused."""
SENTENCES = [f"Line {n}: the quick brown fox jumps over {n * n} lazy dogs." for n in range(600)]
SMALL = ModelConfig(
    vocab_size=384,
    d_model=8,
    d_ff=8,
    d_kv=4,
    num_heads=2,
    num_layers=2,
    routing=RoutingConfig(experts=2, group_sequences=2),
)


@dataclass(frozen=True)
class Kind:
    """A kind of files: how they are made in a folder, and what opening them gives."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    """Anything with a `repr` that tells two contents apart."""
    protected: bool = True
    """Whether another value without a word is a loss."""
    only: str = "*"
    """The names of the files that are damaged."""


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def of_model(folder: Path) -> object:
    model, tokenizer = load(folder)
    return fingerprint(model.state_dict()), model.config, tokenizer and tokenizer.fingerprint


def of_hf(folder: Path) -> object:
    model = load_hf(folder)
    return fingerprint(model.state_dict()), model.config


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"model": {"w": torch.randn(30, 4, generator=generator), "b": torch.arange(5)}}


def make_checkpoint(folder: Path) -> None:
    Checkpoints(folder, 0).save(3, state(), {"tokens": 7})


def of_checkpoint(folder: Path) -> object:
    checkpoints, into = Checkpoints(folder, 0), state()
    into = {"model": {name: torch.zeros_like(each) for name, each in into["model"].items()}}
    path = checkpoints.latest()
    if path is None:
        raise CheckpointError("there is no checkpoint")
    about = checkpoints.load(path, into)
    return about, fingerprint(into["model"])


def text(folder: Path) -> DataConfig:
    path = folder.parent / "text.txt"
    if not path.exists():
        path.write_text("\n\n".join(SENTENCES))
    return DataConfig(
        path=str(path), cache=str(folder), tokenizer="train", input_length=32, target_length=12
    )


def of_cache(folder: Path) -> object:
    dataset = open_dataset(text(folder), vocab_size=400)
    batch = dataset.training(batch_size=8, seed=0).batch(3)
    return batch.inputs.tolist(), dataset.digest, dataset.tokenizer.fingerprint


def of_tasks(folder: Path) -> object:
    table = folder.parent / "table.tsv"
    if not table.exists():
        table.write_text("a\tb\n" + "".join(f"{line}\tyes\n" for line in SENTENCES))
    config = replace(text(folder), path=None, tokenizer="bytes", tasks=(f"t={table}:a:b",))
    dataset = open_dataset(config, vocab_size=384)
    return dataset.training(batch_size=8, seed=0).batch(2).inputs.tolist(), dataset.digest


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(3, 40, (4, 6), generator=generator)
    return Batch(inputs=inputs, targets=torch.randint(1, 40, (4, 5), generator=generator))


def make_store(folder: Path) -> None:
    info = distil.StoreInfo(
        teacher="t",
        weights="w",
        tokenizer="k",
        vocab_size=40,
        top_k=4,
        temperature=1.0,
        dtype="float16",
        precision="float32",
        seed=0,
        data={},
    )
    writer = distil.LogitWriter(folder, info)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        writer.add(batch_of(step), torch.randn(4, 5, 40, generator=generator))
    writer.flush()


def of_store(folder: Path) -> object:
    store = distil.LogitStore(folder)
    read = [store.read(range(4 * step, 4 * step + 4), batch_of(step)) for step in range(4)]
    return store.info, [(each.ids.tolist(), each.logs.tolist()) for each in read]


def of_run(folder: Path) -> object:
    return write_report([folder], folder.with_name("page.html")).stat().st_size > 0


def make_run(folder: Path) -> None:
    folder.mkdir()
    (folder / "experiment.toml").write_text('name = "x"\nsteps = 3\n')
    (folder / "about.json").write_text('{"parameters": 3, "machine": "m", "text": "t"}')
    lines = [{"step": n, "train/loss": 5.0 / n, "val/loss": 4.0 / n} for n in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"step": 3, "inputs": "a <extra_id_0>", "truth": "b", "prediction": "c"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")


def make_text(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import gzip

        import pyarrow as pa
        import pyarrow.parquet as pq
        import zstandard

        folder.mkdir()
        whole = "\n".join(SENTENCES).encode()
        lines = "".join(json.dumps({"text": line}) + "\n" for line in SENTENCES).encode()
        contents = {
            "a.txt": whole,
            "a.txt.gz": gzip.compress(whole, mtime=0),
            "a.txt.zst": zstandard.compress(whole),
            "a.jsonl": lines,
        }
        if name in contents:
            (folder / name).write_bytes(contents[name])
        else:
            pq.write_table(pa.table({"text": SENTENCES}), folder / name)

    return make


def of_text(folder: Path) -> object:
    (file,) = folder.iterdir()
    return len(list(read_documents(file, "text")))


def make_table(folder: Path) -> None:
    folder.mkdir()
    rows = "".join(f'"{line}",{number}\n' for number, line in enumerate(SENTENCES))
    (folder / "a.csv").write_text(f"a,b\n{rows}")


def make_tokenizer(folder: Path) -> None:
    tokenizer = train_sentencepiece(SENTENCES, 400)
    write_for_transformers(tokenizer, folder)


def of_tokenizer(folder: Path) -> object:
    tokenizer = load_tokenizer(folder)
    return tokenizer.encode("a quick dog <extra_id_0>"), tokenizer.decode([5, 6, 7])


def make_adapters(folder: Path) -> None:
    config, adapted = adapt.LoraConfig(rank=2), SwitchTransformer(SMALL, seed=1)
    adapt.adapt(adapted, config)
    adapt.save_adapters(folder, dict(adapted.named_parameters()), config, ())


def of_adapters(folder: Path) -> object:
    merged = merge_adapters(SwitchTransformer(SMALL, seed=1), folder)
    return fingerprint(merged.state_dict())


def make_bin(folder: Path) -> None:
    save_hf(SwitchTransformer(SMALL, seed=1), folder)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "manifest.json").unlink()


def make_foreign(folder: Path) -> None:
    save_hf(SwitchTransformer(SMALL, seed=1), folder)
    (folder / "manifest.json").unlink()


KINDS = {
    "a model": Kind(
        lambda folder: save(SwitchTransformer(SMALL, seed=1), folder, ByteTokenizer()), of_model
    ),
    "a model for transformers": Kind(
        lambda folder: save_hf(SwitchTransformer(SMALL, seed=1), folder), of_hf
    ),
    "a checkpoint": Kind(make_checkpoint, of_checkpoint),
    "adapters": Kind(make_adapters, of_adapters),
    "a cache": Kind(lambda folder: of_cache(folder), of_cache),
    "a task's cache": Kind(lambda folder: of_tasks(folder), of_tasks),
    "a store of probabilities": Kind(make_store, of_store),
    "a run": Kind(make_run, of_run),
    "somebody's safetensors": Kind(make_foreign, of_hf, protected=False),
    "somebody's .bin": Kind(make_bin, of_hf, protected=False),
    "somebody's tokenizer": Kind(make_tokenizer, of_tokenizer, protected=False),
    "a table": Kind(make_table, lambda f: len(list(read_tables([f / "a.csv"]))), protected=False),
    **{
        f"text, {name}": Kind(make_text(name), of_text, protected=False)
        for name in ("a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.parquet")
    },
}


def damage(file: Path, draw: random.Random) -> str:
    """Change `file` in one place; returns how."""
    content = bytearray(file.read_bytes())
    if not content:
        file.write_bytes(b"\0")
        return "a byte added"
    place = draw.randrange(len(content))
    if draw.random() < 0.2:
        file.write_bytes(content[:place])
        return f"cut at {place}"
    content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"a bit of byte {place}"


def attempt(kind: Kind, folder: Path, whole: str) -> tuple[str, str | None]:
    """How opening the damaged `folder` ended, and what is wrong with that."""
    started = time.monotonic()
    try:
        with redirect_stdout(StringIO()):
            value = repr(kind.read(folder))
    except (ConfigError, DataError, CheckpointError):
        ended, lost = "refused", None
    except Exception as error:
        ended, lost = "traceback", f"{type(error).__name__}: {str(error)[:200]}"
    else:
        ended, lost = ("the same", None) if value == whole else ("another value", None)
        if kind.protected and value != whole:
            lost = "another value without a word"
    seconds = time.monotonic() - started
    return ended, lost or (f"after {seconds:.1f} s" if seconds > SLOW else None)


def drill(name: str, folder: Path, count: int, seed: int) -> Tally:
    """`count` times one place of one file of a kind."""
    kind, draw = KINDS[name], random.Random(f"{name} {seed}")
    goal = "refused, made again, or what it was" if kind.protected else "no traceback"
    tally = Tally(f"damage: {name}", goal, seed)
    shutil.rmtree(folder, ignore_errors=True)
    template, work = folder / "template", folder / "work" / "it"  # paths are part of keys
    work.parent.mkdir(parents=True)
    kind.make(work)
    whole = repr(kind.read(work))
    shutil.copytree(work.parent, template)
    for _ in range(count):
        shutil.rmtree(work.parent)
        shutil.copytree(template, work.parent)
        files = sorted(path for path in work.rglob(kind.only) if path.is_file())
        file = draw.choice([path for path in files if not path.name.endswith(".lock")])
        what = damage(file, draw)
        ended, lost = attempt(kind, work, whole)
        label = f"{file.relative_to(work)}, {what}"
        tally.add(ended, None if lost is None else f"{label}: {lost}")
    print(tally.line(), *(f"  {lost}" for lost in islice(tally.lost, 10)), sep="\n", flush=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description="Flip bits of files and cut them short.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="; ".join(KINDS))
    parser.add_argument("--count", type=int, default=3000 // len(KINDS) + 1, help="for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"no kind {sorted(unknown)}; there are {'; '.join(KINDS)}")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        tallies = [drill(name, site, args.count, args.seed) for name in args.kinds or KINDS]
    if args.json is not None:
        write_json(args.json, [tally.as_dict() for tally in tallies])
    raise SystemExit(any(tally.lost for tally in tallies))


if __name__ == "__main__":
    main()
