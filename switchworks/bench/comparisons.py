"""All rows of a run before they are measured, part by part."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from switchworks.bench.config import BenchConfig, Comparison, Precision, Workload

INPUT_LENGTH = 128
"""Input tokens of each sequence in decoding."""

Rows = Iterator[Comparison]


def comparisons(bench: BenchConfig, precision: Precision, *, peers: bool) -> list[Comparison]:
    """Every row of `bench`; without `peers` ours is alone in the rows against transformers."""
    base = Workload(shape=bench.shape, precision=precision)
    rows = [row for part in bench.parts for row in PARTS[part](bench, base)]
    return [_against_foreign(row, bench, peers) for row in rows]


def _against_foreign(row: Comparison, bench: BenchConfig, peers: bool) -> Comparison:
    """`row` with transformers in a precision of its own, or without it."""
    if row.peer is None or row.peer.system == "ours":
        return row
    if not peers:
        return replace(row, peer=None)
    if bench.peer_precision == "same" or row.peer.precision == "float32":
        return row
    peer = row.peer.but(precision="float32")
    return replace(row, name=f"{row.name}, peer in float32", peer=peer)


def _peers(bench: BenchConfig, name: str, ours: Workload) -> Rows:
    """`ours` against transformers, and with `bench.compile_peers` against it compiled, too."""
    yield Comparison(name, "tokens/s", ours, ours.but(system="peer"))
    if bench.compile_peers:
        peer = ours.but(system="compiled peer")
        yield Comparison(f"{name}, compiled peer", "tokens/s", ours, peer)


def _train(bench: BenchConfig, base: Workload) -> Rows:
    """A step with AdamW against transformers, at every rate of dropout."""
    for rate, experts in product(bench.dropout, bench.experts):
        ours = base.but(experts=experts, dropout=rate)
        yield from _peers(bench, f"train {ours.label}, dropout {rate:g}", ours)


def _adafactor(bench: BenchConfig, base: Workload) -> Rows:
    """The same with Adafactor, without dropout."""
    for experts in bench.narrow():
        ours = base.but(experts=experts, optimizer="adafactor")
        yield from _peers(bench, f"train {ours.label}, adafactor", ours)


def _kernels(bench: BenchConfig, base: Workload, name: str = "fast paths") -> Rows:
    """The fast paths against the reference."""
    for experts, rate in product(bench.experts, bench.dropout):
        if experts <= 8:
            ours = base.but(experts=experts, dropout=rate)
            row = f"{name} over reference, {ours.label}, dropout {rate:g}"
            yield Comparison(row, "ms", ours, ours.but(kernels="reference"))


def _compile(bench: BenchConfig, base: Workload) -> Rows:
    """The step as one graph against the reference."""
    return _kernels(bench, base.but(kernels="compiled"), "one graph")


def _tax(bench: BenchConfig, base: Workload) -> Rows:
    """A sparse step against the dense twin's, as one batch and in four micro-batches."""
    for experts, parts in product(bench.sparse(), (1, 4)):
        shape = replace(base.shape, batch_size=base.shape.batch_size * parts)
        ours = base.but(experts=experts, shape=shape, micro_batches=parts)
        name = f"sparse tax {ours.label}" + (f", {parts} micro-batches" * (parts > 1))
        yield Comparison(name, "ms", ours, ours.but(experts=0))


def _layer(bench: BenchConfig, base: Workload) -> Rows:
    """Every switch layer against the dense FFN of equal FLOPs."""
    for experts in bench.sparse():
        ours = base.but(kind="layer", experts=experts)
        name = f"switch layer {ours.label} over FFN"
        yield Comparison(name, "ms", ours, ours.but(experts=0))


def _decode(bench: BenchConfig, base: Workload) -> Rows:
    """Greedy decoding by every model at every batch size against transformers."""
    for experts, rows in product(bench.narrow(), bench.decode_batches):
        ours = _decoding(bench, base, experts, rows)
        yield from _peers(bench, f"decode {ours.label}, batch {rows}", ours)


def _int8(bench: BenchConfig, base: Workload) -> Rows:
    """8-bit weights, by each of three products, against full precision at the smallest batch."""
    rows = min(bench.decode_batches, default=1)
    for experts in bench.narrow():
        plain = _decoding(bench, base, experts, rows)
        for product_name in ("int8_dynamic", "int8_kernel", "dequantised"):
            name = f"decode {plain.label} int8 {product_name}, batch {rows}"
            yield Comparison(name, "tokens/s", plain.but(int8=product_name), plain)


def _graph(bench: BenchConfig, base: Workload) -> Rows:
    """The rows above with our step compiled, int8 by its fastest product."""
    base = base.but(kernels="compiled")
    for row in (*_decode(bench, base), *_int8(bench, base)):
        if row.peer is not None and row.ours.int8 in (None, "int8_kernel"):
            peer = row.peer if row.peer.system == "ours" else row.peer.but(kernels="fast")
            yield replace(row, name=f"{row.name}, one graph", peer=peer)


def _decoding(bench: BenchConfig, base: Workload, experts: int, rows: int) -> Workload:
    length = min(INPUT_LENGTH, base.shape.input_length)
    shape = replace(base.shape, batch_size=rows, input_length=length)
    return base.but(kind="decode", experts=experts, shape=shape, new_tokens=bench.new_tokens)


def _memory(bench: BenchConfig, base: Workload) -> Rows:
    """Peaks of the widest model with each optimizer, also where it updates in the backward pass."""
    for optimizer, early in product(("adamw", "adafactor"), (False, True)):
        plain = base.but(experts=max(bench.narrow(), default=0), optimizer=optimizer)
        name = f"peak memory {plain.label}, {optimizer}" + ", updated in backward" * early
        ours, peer = plain.but(update_in_backward=early), plain.but(system="peer")
        yield Comparison(name, "MB", ours, peer)


PARTS = {
    part.__name__.removeprefix("_"): part
    for part in (
        *(_train, _adafactor, _kernels, _compile, _tax),
        *(_layer, _decode, _int8, _graph, _memory),
    )
}
"""The comparisons of each part."""
