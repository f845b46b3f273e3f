"""All rows of a run before they are measured, part by part."""

from dataclasses import replace

from switchworks.bench import decode, layer, memory, train
from switchworks.bench.config import BenchConfig, Comparison, Precision, Workload

PARTS = {
    "train": train.against_transformers,
    "adafactor": train.with_adafactor,
    "kernels": train.kernels,
    "compile": train.compiled,
    "tax": train.sparse_tax,
    "layer": layer.against_ffn,
    "decode": decode.against_transformers,
    "int8": decode.int8,
    "graph": decode.compiled,
    "memory": memory.peak_memory,
}
"""The comparisons of each part."""


def comparisons(bench: BenchConfig, precision: Precision, *, peers: bool) -> list[Comparison]:
    """Every row of `bench`; without `peers` ours is alone in the rows against transformers."""
    base = Workload(shape=bench.shape, precision=precision)
    rows = [row for part in bench.parts for row in PARTS[part](bench, base)]
    if bench.peer_precision == "float32" and precision != "float32":
        rows = [_with_peer_in_float32(row) for row in rows]
    if not peers:
        rows = [replace(row, peer=None) if _is_foreign(row.peer) else row for row in rows]
    return rows


def _is_foreign(peer: Workload | None) -> bool:
    return peer is not None and peer.system != "ours"


def _with_peer_in_float32(row: Comparison) -> Comparison:
    if row.peer is None or not _is_foreign(row.peer):
        return row
    return replace(row, name=f"{row.name}, peer in float32", peer=row.peer.but(precision="float32"))
