"""Training steps: their comparisons, and our side of them."""

from collections.abc import Iterator
from dataclasses import replace

from switchworks.bench.config import BenchConfig, Comparison, Workload, label
from switchworks.bench.peers import LR, against_peers
from switchworks.bench.timing import Work
from switchworks.bench.weights import new_model, random_batch
from switchworks.data import DataConfig
from switchworks.optim import OptimConfig
from switchworks.training import Experiment, build_state, train_step


def against_transformers(bench: BenchConfig, base: Workload) -> Iterator[Comparison]:
    """A step with AdamW, at every rate of dropout."""
    for rate in bench.dropout:
        for experts in bench.experts:
            ours = base.but(experts=experts, dropout=rate)
            yield from against_peers(bench, f"train {label(experts)}, dropout {rate:g}", ours)


def with_adafactor(bench: BenchConfig, base: Workload) -> Iterator[Comparison]:
    """A step with Adafactor, without dropout."""
    for experts in bench.narrow():
        ours = base.but(experts=experts, optimizer="adafactor")
        yield from against_peers(bench, f"train {label(experts)}, adafactor", ours)


def kernels(bench: BenchConfig, base: Workload) -> Iterator[Comparison]:
    """The fast paths against the reference."""
    return _over_reference(bench, "fast paths", base)


def compiled(bench: BenchConfig, base: Workload) -> Iterator[Comparison]:
    """The step as one graph against the reference."""
    return _over_reference(bench, "one graph", base.but(kernels="compiled"))


def _over_reference(bench: BenchConfig, name: str, base: Workload) -> Iterator[Comparison]:
    for experts in [experts for experts in bench.experts if experts <= 8]:
        for rate in bench.dropout:
            ours = base.but(experts=experts, dropout=rate)
            row = f"{name} over reference, {label(experts)}, dropout {rate:g}"
            yield Comparison(name=row, unit="ms", ours=ours, peer=ours.but(kernels="reference"))


def sparse_tax(bench: BenchConfig, base: Workload) -> Iterator[Comparison]:
    """A sparse step against the dense twin's, as one batch and in four micro-batches."""
    for experts in bench.sparse():
        for parts in (1, 4):
            shape = replace(base.shape, batch_size=base.shape.batch_size * parts)
            ours = base.but(experts=experts, shape=shape, micro_batches=parts)
            name = f"sparse tax {label(experts)}" + (f", {parts} micro-batches" * (parts > 1))
            yield Comparison(name=name, unit="ms", ours=ours, peer=ours.but(experts=0))


def build_step(workload: Workload) -> Work:
    """The step of `switchworks train`, with clipping and statistics of the routers."""
    shape = workload.shape
    experiment = Experiment(
        name="bench",
        steps=10**6,
        batch_size=shape.batch_size,
        micro_batches=workload.micro_batches,
        precision=workload.precision,
        kernels="fast" if workload.kernels == "fast" else "reference",
        compile=workload.kernels == "compiled",
        update_in_backward=workload.update_in_backward,
        model=shape.model(workload.experts, workload.dropout),
        data=DataConfig(input_length=shape.input_length, target_length=shape.target_length),
        optim=OptimConfig(
            name=workload.optimizer,
            lr=LR,
            schedule="constant",
            warmup_steps=0,
            betas=(0.9 if workload.optimizer == "adamw" else 0.0, 0.999),
        ),
    )
    state, batch = build_state(experiment, new_model(workload)), random_batch(shape)
    return lambda: train_step(state, batch).total
