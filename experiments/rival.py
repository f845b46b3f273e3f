"""How long does transformers' T5 take to the loss of one of our runs, on the same rows?

    python experiments/rival.py runs/quickstart --optimizer adafactor-fixed --rate 1e-3 --steps 4000

A dense T5 of transformers with the shape of the run's model (without its experts), transformers'
own initial values, and its documented way to train: its Adafactor with a fixed rate of 1e-3
("adafactor-fixed"), with relative steps and warm-up ("adafactor-relative"), or torch's AdamW.
Rows, their order, batch and validation rows are those of the run. Ends when the run's last
validation loss is reached or the steps are done; `--out` gets a line of JSON per validation.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from switchworks.batch import Batch
from switchworks.checkpoint import to_hf_config
from switchworks.evaluate import open_run
from switchworks.report import read_run
from switchworks.training import settings_in


def build(config: Any, dropout: float) -> torch.nn.Module:
    """transformers' dense T5 of this shape, with its own initial values."""
    import transformers

    values: dict[str, Any] = {**to_hf_config(replace(config, routing=None))}
    values["dropout_rate"] = dropout
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**values))


def optimizer_of(name: str, model: torch.nn.Module, rate: float) -> tuple[Any, Any]:
    """The optimizer, and a schedule to step after it or None."""
    from transformers import get_constant_schedule_with_warmup
    from transformers.optimization import Adafactor, AdafactorSchedule

    if name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        return optimizer, get_constant_schedule_with_warmup(optimizer, 100)
    if name == "adafactor-fixed":
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return Adafactor(model.parameters(), lr=rate, **fixed), None
    relative = {"scale_parameter": True, "relative_step": True, "warmup_init": True}
    optimizer = Adafactor(model.parameters(), lr=None, **relative)
    return optimizer, AdafactorSchedule(optimizer)


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    labels = batch.targets.masked_fill(batch.targets == 0, -100)
    mask = (batch.inputs != 0).long()
    return model(input_ids=batch.inputs, attention_mask=mask, labels=labels).loss


@torch.no_grad()
def validate(model: torch.nn.Module, batches: Sequence[Batch]) -> float:
    """Mean nats per target token."""
    model.eval()
    sums = [(float(loss_of(model, b)), int((b.targets != 0).sum())) for b in batches]
    model.train()
    return sum(loss * count for loss, count in sums) / sum(count for _, count in sums)


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Train, and print and return the last line."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("run", type=Path)
    names = ("adafactor-fixed", "adafactor-relative", "adamw")
    parser.add_argument("--optimizer", choices=names, default=names[0])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/rival.jsonl"))
    flags = parser.parse_args(words)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    settings, run = settings_in(flags.run), read_run(flags.run)
    target = run.last("val/loss")
    if settings is None or target is None:
        raise SystemExit(f"{flags.run} is no finished run with a validation loss")
    _, dataset = open_run(flags.run)
    size = settings.batch_size
    batches = dataset.training(batch_size=size, seed=settings.seed).batches()
    held_out = dataset.held_out(batch_size=size, batches=settings.validation_batches)
    rows = [batch for part in held_out.batches.values() for batch in part]
    torch.manual_seed(settings.seed)
    model = build(settings.model, flags.dropout).train()
    optimizer, schedule = optimizer_of(flags.optimizer, model, flags.rate)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    seconds, line = 0.0, {}
    for step, batch in zip(range(1, flags.steps + 1), batches, strict=False):
        started = time.perf_counter()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if schedule is not None:
            schedule.step()
        seconds += time.perf_counter() - started  # validation does not count, as in our runs
        if step % flags.every == 0 or step == flags.steps:
            line = {"step": step, "seconds": seconds, "loss": validate(model, rows)}
            with flags.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"step {step}  {seconds:.0f} s  {line['loss']:.3f}  of {target:.3f}", flush=True)
            if line["loss"] <= target:
                break
    return line


if __name__ == "__main__":
    main()
