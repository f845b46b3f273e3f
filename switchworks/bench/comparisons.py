"""The rows of the table before they are measured: which two sides, in what unit, and the floor.

Floors are what this project asks of itself on two cores at the default shape and in bfloat16;
they are left out elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from switchworks.bench.config import BenchConfig, Precision, Shape, Workload

Unit = Literal["tokens/s", "ms", "MB"]

DECODE_LENGTH = 128
"""Input tokens of each sequence in decoding."""
_TAX = {8: 1.2, 64: 1.8}
_LAYER = {8: 1.25, 64: 2.5}
_DECODE = {1: 2.0, 32: 4.0}
_INT8 = {1: 1.3}
"""Of the fastest of the three products; the others are shown beside it."""
SHARE = {0: 30.0, 8: 26.0}
"""Floors of the share of the machine's limit, in %."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row to be: `ours` against `peer`."""

    name: str
    unit: Unit
    """tokens/s: the ratio is ours over the peer's, more is better. ms, MB: less is better."""
    ours: Workload
    peer: Workload | None
    """None: there is nobody to compare with, ours is measured alone."""
    floor: float | None = None


def comparisons(bench: BenchConfig, precision: Precision, *, peers: bool) -> list[Comparison]:
    """Every row that `bench` asks for; without `peers`, ours alone where transformers would be."""
    makers = {
        "train": _train,
        "adafactor": _adafactor,
        "kernels": _kernels,
        "compile": _compile,
        "tax": _tax,
        "layer": _layer,
        "decode": _decode,
        "int8": _int8,
        "graph": _graph,
        "memory": _memory,
    }
    side = Workload(shape=bench.shape, precision=precision)
    found = [row for part in bench.parts for row in makers[part](bench, side)]
    if not has_floors(bench.shape, precision):
        found = [replace(row, floor=None) for row in found]
    if bench.peer_precision == "float32" and precision != "float32":
        found = [_beside_float32(row) for row in found]
    if not peers:
        found = [replace(row, peer=None) if _foreign(row) else row for row in found]
    return found


def has_floors(shape: Shape, precision: Precision) -> bool:
    """Whether the floors were set for it."""
    return shape == Shape() and precision == "bfloat16"


def label(experts: int) -> str:
    """How a row names a model."""
    return f"E={experts}" if experts else "dense"


def _foreign(row: Comparison) -> bool:
    return row.peer is not None and row.peer.system != "ours"


def _beside_float32(row: Comparison) -> Comparison:
    if row.peer is None or not _foreign(row):
        return row
    return replace(row, name=f"{row.name}, peer in float32", peer=row.peer.but(precision="float32"))


def _train(bench: BenchConfig, side: Workload) -> Iterator[Comparison]:
    for rate in bench.dropout:
        for experts in bench.experts:
            floor = 3.0 if rate else 2.2 if experts else 2.0
            ours = side.but(experts=experts, dropout=rate)
            name = f"train {label(experts)}, dropout {rate:g}"
            yield from _against_peers(bench, name, ours, floor)


def _adafactor(bench: BenchConfig, side: Workload) -> Iterator[Comparison]:
    for experts in bench.experts:
        if experts < 128:
            ours = side.but(experts=experts, optimizer="adafactor")
            yield from _against_peers(bench, f"train {label(experts)}, adafactor", ours, None)


def _against_peers(
    bench: BenchConfig, name: str, ours: Workload, floor: float | None
) -> Iterator[Comparison]:
    def row(system: str) -> Comparison:
        full = name if system == "peer" else f"{name}, compiled peer"
        return Comparison(
            name=full, unit="tokens/s", ours=ours, peer=ours.but(system=system), floor=floor
        )

    yield row("peer")
    if bench.compile_peers:
        yield row("compiled peer")


def _kernels(bench: BenchConfig, side: Workload) -> Iterator[Comparison]:
    return _over_reference(bench, "fast paths", side)


def _compile(bench: BenchConfig, side: Workload) -> Iterator[Comparison]:
    return _over_reference(bench, "one graph", side.but(kernels="compiled"))


def _over_reference(bench: BenchConfig, what: str, side: Workload) -> Iterator[Comparison]:
    for experts in [experts for experts in bench.experts if experts <= 8]:
        for rate in bench.dropout:
            ours = side.but(experts=experts, dropout=rate)
            name = f"{what} over reference, {label(experts)}, dropout {rate:g}"
            yield Comparison(name=name, unit="ms", ours=ours, peer=ours.but(kernels="reference"))


def _tax(bench: BenchConfig, side: Workload) -> Iterator[Comparison]:
    for experts in _sparse(bench):
        for parts in (1, 4):
            shape = replace(side.shape, batch_size=side.shape.batch_size * parts)
            ours = side.but(experts=experts, shape=shape, micro_batches=parts)
            name = f"sparse tax {label(experts)}" + (f", {parts} micro-batches" * (parts > 1))
            yield Comparison(
                name=name, unit="ms", ours=ours, peer=ours.but(experts=0), floor=_TAX.get(experts)
            )


def _layer(bench: BenchConfig, side: Workload) -> Iterator[Comparison]:
    for experts in _sparse(bench):
        ours = side.but(kind="layer", experts=experts)
        name = f"switch layer {label(experts)} over FFN"
        floor = _LAYER.get(experts)
        yield Comparison(name=name, unit="ms", ours=ours, peer=ours.but(experts=0), floor=floor)


def _sparse(bench: BenchConfig) -> list[int]:
    """What has a dense twin of the same width."""
    return [experts for experts in bench.experts if 0 < experts < 128]


def _decode(bench: BenchConfig, side: Workload) -> Iterator[Comparison]:
    for experts in [experts for experts in bench.experts if experts < 128]:
        for rows in bench.decode_batches:
            ours = _decoding(bench, side, experts, rows)
            floor = _DECODE.get(rows) if experts else None
            yield from _against_peers(bench, f"decode {label(experts)}, batch {rows}", ours, floor)


def _int8(bench: BenchConfig, side: Workload) -> Iterator[Comparison]:
    rows = min(bench.decode_batches, default=1)
    for experts in [experts for experts in bench.experts if experts < 128]:
        plain = _decoding(bench, side, experts, rows)
        for product in ("int8_dynamic", "int8_kernel", "dequantised"):
            name = f"decode {label(experts)} int8 {product}, batch {rows}"
            ours, floor = plain.but(int8=product), _INT8.get(rows)
            yield Comparison(name=name, unit="tokens/s", ours=ours, peer=plain, floor=floor)


def _graph(bench: BenchConfig, side: Workload) -> Iterator[Comparison]:
    compile_step = side.but(kernels="compiled")
    for row in (*_decode(bench, compile_step), *_int8(bench, compile_step)):
        if row.ours.int8 in (None, "int8_kernel"):
            peer = row.peer and row.peer.but(kernels="fast" if _foreign(row) else "compiled")
            yield replace(row, name=f"{row.name}, one graph", peer=peer)


def _decoding(bench: BenchConfig, side: Workload, experts: int, rows: int) -> Workload:
    shape = replace(
        side.shape, batch_size=rows, input_length=min(DECODE_LENGTH, side.shape.input_length)
    )
    return side.but(kind="decode", experts=experts, shape=shape, new_tokens=bench.new_tokens)


def _memory(bench: BenchConfig, side: Workload) -> Iterator[Comparison]:
    experts = max([experts for experts in bench.experts if experts < 128], default=0)
    floors: dict[Literal["adamw", "adafactor"], float] = {"adamw": 0.8, "adafactor": 0.6}
    for optimizer, floor in floors.items():
        plain = side.but(experts=experts, optimizer=optimizer)
        floor = floor if experts == 64 else None
        for early in (False, True):
            name = f"peak memory {label(experts)}, {optimizer}"
            name += ", updated in backward" * early
            ours, peer = plain.but(update_in_backward=early), plain.but(system="peer")
            yield Comparison(name=name, unit="MB", ours=ours, peer=peer, floor=floor)
