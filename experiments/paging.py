"""Experts on disk: a model too large for memory written, decoded and removed; hit rates; a disk.

    python experiments/paging.py size --memory 2GB [--experts 256 --bits 8 ...]
    python experiments/paging.py hits RUN [--texts 200]

`size` writes a model of random weights, by default of the shape of Switch-Base-256 in 8 bits (15
GB), without holding it in memory; decodes it in a process of its own with `--memory` for experts;
and removes it. It prints tokens per second until nine tenths of the memory for experts were filled
(cold) and since (steady), the peak of resident memory beside what it should be, and the speed of
this disk for reads of one matrix. Hits of random routers say nothing about the policy. After each
token the system forgets what it has read of the file, so that a miss is a read of the disk as it is
where no memory is free; with `--page-cache` it keeps what it likes.

`hits` reads the validation text of a trained run, one text after another and token by token as
decoding does, with 1/8, 1/4 and 1/2 of each decoder layer's experts in memory. It also prints how
often a layer's router, given the input of the switch layer before it, names the expert that it will
choose: what a prefetch by it would have to go by.
"""

import argparse
import json
import math
import mmap
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from switchworks.checkpoint import tensor_places, weight_files, whole_directory
from switchworks.cli.parsing import parse_bytes
from switchworks.config import to_toml
from switchworks.evaluate import open_run
from switchworks.generate import Constraints, Sampling, stream
from switchworks.model import ModelConfig, RoutingConfig, SwitchFFN, SwitchTransformer
from switchworks.paging import PagedExperts, Traffic, expert_cache, load_paged
from switchworks.quantise import QuantiseConfig, QuantisedModule, quantise

DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}


def write_model(folder: Path, config: ModelConfig, bits: Any) -> None:
    """A quantised model of random weights, written tensor by tensor and in parts of a stack."""
    scheme = QuantiseConfig(bits=bits)
    with torch.device("meta"):
        model = quantise(SwitchTransformer(config), scheme)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    header, end = {}, 0
    for name, meta in tensors.items():
        entry = {"dtype": DTYPES[meta.dtype], "shape": list(meta.shape)}
        header[name] = entry | {"data_offsets": [end, end + meta.nbytes]}
        end += meta.nbytes
    with whole_directory(folder, needs=end, otherwise="Nothing was written.") as partial:
        (partial / "config.toml").write_text(to_toml(config))
        (partial / "quantised.toml").write_text(to_toml(scheme))
        with (partial / "model.safetensors").open("wb") as file:
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 64)
            file.write(struct.pack("<Q", len(text)) + text)
            for name, meta in tensors.items():
                write_random(file, name, meta)


def write_random(file: BinaryIO, name: str, meta: Tensor) -> None:
    """Values of about the size that training starts from."""
    parts = meta.shape[0] if meta.dim() == 3 else 1
    shape = (1, *meta.shape[1:]) if parts > 1 else tuple(meta.shape)
    for _ in range(parts):
        if meta.dtype == torch.int8:
            part = torch.randint(-127, 128, shape, dtype=meta.dtype)
        elif meta.dtype == torch.uint8:  # two halves from -7 to 7, kept with 8 added
            part = torch.randint(1, 16, shape) | torch.randint(1, 16, shape) << 4
        elif name.endswith("_scale"):
            size = 1.0 if name.startswith("embedding") else 0.03
            part = torch.full(shape, size / (73 if meta.dtype == torch.float32 else 4.6))
        else:
            part = torch.ones(shape) if meta.dim() == 1 else torch.randn(shape) * shape[-1] ** -0.5
        file.write(part.to(meta.dtype).flatten().view(torch.uint8).numpy().data)


def memory(name: str) -> int:
    """VmRSS or VmHWM, the peak, of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def decode(flags: argparse.Namespace) -> dict[str, Any]:
    """What decoding in this process took."""
    torch.manual_seed(0)
    torch.mm(torch.randn(256, 256), torch.randn(256, 256))  # the library's own memory is no model's
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = memory("VmRSS"), time.perf_counter()
    budget = parse_bytes(flags.memory, "--memory")
    assert budget is not None
    model, _ = load_paged(flags.folder, budget)
    loaded = time.perf_counter()
    (file,) = weight_files(flags.folder)
    drop_cache(file)  # verifying has read all of it
    inputs = torch.randint(3, model.config.vocab_size, (flags.texts, flags.input))
    steps = stream(
        model,
        inputs,
        max_length=flags.tokens,
        sampling=Sampling(temperature=1.0),
        constraints=Constraints(min_length=flags.tokens - 1),  # EOS ends it at the last
    )
    times, cold_steps = [time.perf_counter()], None
    for number, _ in enumerate(steps):
        if not flags.page_cache:
            drop_cache(file)
        times.append(time.perf_counter())
        if cold_steps is None and is_full(model):
            cold_steps = number + 1
    cold_steps = flags.tokens if cold_steps is None else cold_steps
    figures = expert_cache(model)
    assert figures is not None
    steady = flags.tokens - cold_steps
    dense = dense_bytes(model)
    return {
        "seconds_load": loaded - start,
        "cold_tokens": cold_steps * flags.texts,
        "cold_tokens_per_second": flags.texts * cold_steps / (times[cold_steps] - times[0]),
        "steady_tokens": steady * flags.texts,
        "steady_tokens_per_second": flags.texts * steady / (times[-1] - times[cold_steps])
        if steady
        else math.nan,
        "peak": memory("VmHWM") - before,
        "budget": budget,
        "dense": dense,
        "slots": figures.slots,
        "experts": figures.experts,
        "cache": str(figures),
    }


def is_full(model: SwitchTransformer) -> bool:
    """Whether nine tenths of the places in memory hold an expert. With random weights some experts
    are never chosen, so that the last place may stay empty for long."""
    figures = expert_cache(model)
    return figures is not None and figures.cold.misses >= 0.9 * figures.slots


def dense_bytes(model: SwitchTransformer) -> int:
    """Of all that is no expert, with the second copies of 4-bit matrices."""
    inside = {m for bank in paged(model).values() for m in bank.modules()}
    total = 0
    for module in set(model.modules()) - inside:
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, QuantisedModule):
            tensors += [tensor for pair in module.ordered.values() for tensor in pair]
        total += sum(tensor.nbytes for tensor in tensors)
    return total


def paged(model: SwitchTransformer) -> dict[str, PagedExperts]:
    """Layer -> its experts."""
    banks: dict[str, Any] = {name: layer.experts for name, layer in model.switch_layers.items()}
    return banks


def size(flags: argparse.Namespace) -> None:
    """`size`: write, measure the disk, decode in a process of its own, remove."""
    config = ModelConfig(
        vocab_size=flags.vocab,
        d_model=flags.d_model,
        d_ff=flags.d_ff,
        d_kv=flags.d_model // flags.heads,
        num_heads=flags.heads,
        num_layers=flags.layers,
        tied_head=False,  # a tied one of random weights writes the same token for ever
        routing=RoutingConfig(experts=flags.experts),
    )
    folder = flags.out / "paged_model"
    try:
        start = time.perf_counter()
        write_model(folder, config, flags.bits)
        total = sum(file.stat().st_size for file in folder.iterdir())
        print(f"model        {total / 1e9:.3f} GB, written in {time.perf_counter() - start:.0f} s")
        for line in disk_speed(folder):
            print(line)
        words = ["decode", str(folder), "--memory", flags.memory, "--tokens", str(flags.tokens)]
        words += ["--texts", str(flags.texts), "--input", str(flags.input)]
        words += ["--page-cache"] if flags.page_cache else []
        done = subprocess.run(
            [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
        )
        show(json.loads(done.stdout))
    finally:
        remove(folder)


def remove(folder: Path) -> None:
    """Delete the files of the model."""
    for file in folder.iterdir() if folder.is_dir() else ():
        file.unlink()
    if folder.is_dir():
        folder.rmdir()


def show(result: dict[str, Any]) -> None:
    """Print the figures of `decode`."""
    for kind in ("cold", "steady"):
        speed, tokens = result[f"{kind}_tokens_per_second"], result[f"{kind}_tokens"]
        print(f"{kind:<12} {speed:.2f} tokens/s over {tokens} tokens")
    expected = result["budget"] + result["dense"]
    print(
        f"memory       peak {result['peak'] / 1e6:,.0f} MB; {result['budget'] / 1e6:,.0f} for "
        f"experts + {result['dense'] / 1e6:,.0f} dense: {result['peak'] / expected:.2f} of it"
    )
    print(f"load         {result['seconds_load']:.1f} s, of which most verifies the hash")
    print(result["cache"])


def drop_cache(file: Path) -> None:
    """Let the system forget what it has read of `file`."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def disk_speed(folder: Path, reads: int = 48) -> Iterator[str]:
    """MB per second of reads of one expert's largest matrix at random places, not in memory."""
    (file,) = weight_files(folder)
    place = max(tensor_places([file]).values(), key=lambda p: math.prod(p.shape))
    length = math.prod(place.shape[1:]) * place.dtype.itemsize
    draws = random.Random(0)
    offsets = [place.offset + draws.randrange(place.shape[0]) * length for _ in range(reads)]
    methods = {"preadv": read_buffered, "O_DIRECT": read_direct, "mmap": read_mapped}
    for name, method in methods.items():
        for threads in (1, 4):
            drop_cache(file)
            with ThreadPoolExecutor(threads) as pool:
                targets = [torch.empty(length, dtype=torch.uint8).fill_(1) for _ in range(threads)]
                start = time.perf_counter()
                jobs = [
                    pool.submit(method, file, offset, targets[number % threads])
                    for number, offset in enumerate(offsets)
                ]
                for job in jobs:
                    job.result()
            speed = reads * length / (time.perf_counter() - start) / 1e6
            yield f"disk         {name:<9} {threads} threads  {speed:8,.0f} MB/s"


def read_buffered(file: Path, offset: int, target: Tensor) -> None:
    """By `preadv` through the system's cache."""
    descriptor = os.open(file, os.O_RDONLY)
    fill(descriptor, target.numpy(), offset)
    os.close(descriptor)


def read_direct(file: Path, offset: int, target: Tensor) -> None:
    """Past the cache, which wants whole pages, and so a copy: an expert begins anywhere."""
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    first = offset // mmap.PAGESIZE * mmap.PAGESIZE
    end = -(-(offset + len(target)) // mmap.PAGESIZE) * mmap.PAGESIZE
    with mmap.mmap(-1, end - first) as pages:
        whole = torch.frombuffer(pages, dtype=torch.uint8)
        fill(descriptor, whole.numpy(), first)
        target.copy_(whole[offset - first : offset - first + len(target)])
        del whole
    os.close(descriptor)


def fill(descriptor: int, left: Any, offset: int) -> None:
    while len(left) and (count := os.preadv(descriptor, [left], offset)):
        left, offset = left[count:], offset + count


def read_mapped(file: Path, offset: int, target: Tensor) -> None:
    """By touching pages of a memory map."""
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    whole = torch.frombuffer(pages, dtype=torch.uint8, count=len(target), offset=offset)
    target.copy_(whole)
    del whole
    pages.close()


@torch.no_grad()
def hits(flags: argparse.Namespace) -> None:
    """`hits`: rates of a trained model on its validation text."""
    model, dataset = open_run(flags.run)
    held_out = dataset.held_out(batch_size=1, batches=flags.texts)
    rows = [(b.inputs, b.targets) for batches in held_out.batches.values() for b in batches]
    rows = [(inputs, targets[:, targets[0] != 0]) for inputs, targets in rows]
    experts = next(iter(model.switch_layers.values())).experts.num_experts
    tokens = sum(targets.shape[1] for _, targets in rows)
    print(f"{len(rows)} texts, {tokens:,} tokens, one text at a time; {experts} experts in a layer")
    for share in (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2)):
        slots = max(2, round(experts * share))
        cached, _ = load_paged(flags.run, budget_for(flags.run, slots))
        for inputs, targets in rows:
            decode_text(cached, inputs, targets)
        banks = paged(cached)
        assert all(len(bank.units) == slots for name, bank in banks.items() if "dec" in name)
        steady = sum((b.steady for n, b in banks.items() if n.startswith("dec")), Traffic())
        uniform = slots / experts
        print(
            f"decoder  {slots:>3} of {experts} in memory: {steady.hit_rate:6.1%} hits, uniform "
            f"{uniform:6.1%}, {100 * (steady.hit_rate - uniform):+.1f} points"
        )
        first = sum((b.steady for n, b in banks.items() if n.startswith("enc")), Traffic())
        print(f"encoder    2 of {experts} in memory: {first.hit_rate:6.1%} hits")
    right, most, count = foreseen(model, rows)
    if count:  # with one layer there is none to look ahead from
        print(
            f"next layer's expert foreseen by its router {right / count:.1%}, always the likeliest "
            f"{most / count:.1%}"
        )


def budget_for(run: Path, slots: int) -> int:
    """Bytes with which each decoder layer has so many experts in memory, and each encoder's two."""
    model, _ = load_paged(run, 1 << 60)
    total = 0
    for name, bank in paged(model).items():
        expert = sum(tensor.nbytes for tensor in bank.units[0].parameters())
        expert += sum(tensor.nbytes for tensor in bank.units[0].buffers())
        total += expert * (slots if name.startswith("dec") else 2) + 64  # for rounding
    return total


def decode_text(model: SwitchTransformer, inputs: Tensor, targets: Tensor) -> None:
    """One pass of `targets` through the decoder, a token at a time."""
    if model.config.decoder_only:
        _, cache = model.prefill(inputs, targets.shape[1])
    else:
        cache = model.init_cache(model.encode(inputs), targets.shape[1])
        model.decode_step(torch.zeros_like(targets[:, :1]), cache)
    for token in targets[0, :-1]:
        model.decode_step(token.view(1, 1), cache)


def foreseen(model: SwitchTransformer, rows: list[tuple[Tensor, Tensor]]) -> tuple[int, int, int]:
    """Tokens whose expert the router names from the input of the switch layer before; those with
    the likeliest expert of their layer; all of them, summed over decoder layers but the first."""
    inputs: list[Tensor] = []
    layers = [layer for n, layer in model.switch_layers.items() if n.startswith("decoder")]
    hooks = [layer.register_forward_pre_hook(keep_input(inputs)) for layer in layers]
    chosen: list[list[Tensor]] = [[] for _ in layers]
    right = 0
    for given, targets in rows:
        inputs.clear()
        model(given, targets)
        for number, layer in enumerate(layers):
            choice = favourite(layer, inputs[number])
            chosen[number].append(choice)
            if number:
                right += int((favourite(layer, inputs[number - 1]) == choice).sum())
    for hook in hooks:
        hook.remove()
    counts = [torch.cat(choices).bincount() for choices in chosen[1:]]
    return right, sum(int(c.max()) for c in counts), sum(int(c.sum()) for c in counts)


def keep_input(inputs: list[Tensor]) -> Any:
    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    return keep


def favourite(layer: SwitchFFN, x: Tensor) -> Tensor:
    """The expert that each token wants most."""
    return layer.router(x).argmax(dim=-1).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    decoding = argparse.ArgumentParser(add_help=False)
    decoding.add_argument("--memory", default="2GB")
    decoding.add_argument("--tokens", type=int, default=256)
    decoding.add_argument("--texts", type=int, default=1)
    decoding.add_argument("--input", type=int, default=64)
    decoding.add_argument("--page-cache", action="store_true")
    verb = verbs.add_parser("size", parents=[decoding])
    verb.add_argument("--out", type=Path, default=Path("runs"))
    verb.add_argument("--bits", type=int, choices=(4, 8), default=8)
    sizes = {"vocab": 32128, "d-model": 768, "d-ff": 3072, "heads": 12, "layers": 12}
    for name, default in (sizes | {"experts": 256}).items():
        verb.add_argument(f"--{name}", type=int, default=default)
    verb = verbs.add_parser("decode", parents=[decoding])
    verb.add_argument("folder", type=Path)
    verb = verbs.add_parser("hits")
    verb.add_argument("run", type=Path)
    verb.add_argument("--texts", type=int, default=200)
    flags = parser.parse_args()
    if flags.verb == "decode":
        print(json.dumps(decode(flags)))
    else:
        {"size": size, "hits": hits}[flags.verb](flags)


if __name__ == "__main__":
    main()
