"""Greedy decoding: its comparisons, and our side of them."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from switchworks.bench.config import BenchConfig, Comparison, Workload, label
from switchworks.bench.peers import against_peers
from switchworks.bench.timing import Work
from switchworks.bench.weights import new_model, random_batch
from switchworks.device import compute_device
from switchworks.fast import CompiledDecoder
from switchworks.generate import generate
from switchworks.quantise import QuantiseConfig, quantise
from switchworks.training import cast_for_compute

INPUT_LENGTH = 128
"""Input tokens of each sequence."""


def against_transformers(bench: BenchConfig, base: Workload) -> Iterator[Comparison]:
    """Every model at every batch size."""
    for experts in bench.narrow():
        for rows in bench.decode_batches:
            ours = _workload(bench, base, experts, rows)
            yield from against_peers(bench, f"decode {label(experts)}, batch {rows}", ours)


def int8(bench: BenchConfig, base: Workload) -> Iterator[Comparison]:
    """8-bit weights, by each of three products, against full precision at the smallest batch."""
    rows = min(bench.decode_batches, default=1)
    for experts in bench.narrow():
        plain = _workload(bench, base, experts, rows)
        for product in ("int8_dynamic", "int8_kernel", "dequantised"):
            name = f"decode {label(experts)} int8 {product}, batch {rows}"
            ours = plain.but(int8=product)
            yield Comparison(name=name, unit="tokens/s", ours=ours, peer=plain)


def compiled(bench: BenchConfig, base: Workload) -> Iterator[Comparison]:
    """The rows above with our step compiled, int8 by its fastest product."""
    base = base.but(kernels="compiled")
    for row in (*against_transformers(bench, base), *int8(bench, base)):
        if row.ours.int8 in (None, "int8_kernel"):
            assert row.peer is not None
            ours = row.peer.system == "ours"
            peer = row.peer.but(kernels="compiled" if ours else "fast")
            yield replace(row, name=f"{row.name}, one graph", peer=peer)


def _workload(bench: BenchConfig, base: Workload, experts: int, rows: int) -> Workload:
    length = min(INPUT_LENGTH, base.shape.input_length)
    shape = replace(base.shape, batch_size=rows, input_length=length)
    return base.but(kind="decode", experts=experts, shape=shape, new_tokens=bench.new_tokens)


def build_decoding(workload: Workload) -> Work:
    """`generate`, greedily."""
    model = new_model(workload).eval().to(compute_device())
    cast_for_compute(model, getattr(torch, workload.precision))
    if workload.int8 is not None:
        model = quantise(model, QuantiseConfig(product=workload.int8))
    inputs = random_batch(workload.shape).inputs.to(compute_device())
    compiled = CompiledDecoder(model) if workload.kernels == "compiled" else None
    return lambda: generate(model, inputs, max_length=workload.new_tokens, compiled=compiled)
