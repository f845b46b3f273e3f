"""Pruning and merging a finished run to fewer and fewer experts: the table of docs/smaller.md.

    python experiments/fewer_experts.py runs/quickstart [--keep 12 8 4 2 1] [--by gates]
        [--text FILE] [--batches 32] [--held-out 16]
        [--recover 100] [--recipe quickstart] [--dense quickstart_dense]

Held-out loss of RUN, and after pruning and merging to each number of experts (by default half, a
quarter, ... and one). With `--recover N` each of the smaller models is then trained for N steps by
`switchworks train RECIPE --init`, or where one expert made it dense by RECIPE_dense (--dense), and
its loss is given again; so is that of RUN, since N more steps are worth something to any model.
Other flags go to that training. The table and its numbers are kept in OUT, and a second call goes
on with what is there.
"""

import argparse
import json
import sys
from pathlib import Path

from kept import finished, require_same

from switchworks.checkpoint import is_model, load, weights_hash
from switchworks.compress import reduce_directory
from switchworks.evaluate import held_out_losses, open_run


def halves(experts: int) -> list[int]:
    """Half, a quarter, ... and one."""
    return [experts // 2**power for power in range(1, experts.bit_length())]


def recovered(
    recipe: str, smaller: Path, place: Path, keep: int, steps: int, flags: list[str]
) -> Path:
    """The finished run, beside `place`, that trains the model in `smaller` on."""
    run_dir = place.with_name(f"{place.name}_recovered")
    words = ["--steps", str(steps), "--optim.warmup-steps", str(max(1, steps // 10))]
    words += ["--init", str(smaller), "--data.tokenizer", str(smaller)]
    words += ["--model.routing.experts", str(keep)] if keep > 1 else []
    return finished(recipe, run_dir, [*words, *flags])


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--keep", type=int, nargs="+")
    parser.add_argument("--by", choices=["usage", "gates"], default="usage")
    parser.add_argument("--text")
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--recover", type=int, default=0)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--dense")
    parser.add_argument("--out", type=Path, default=Path("runs/fewer_experts"))
    known, flags = parser.parse_known_args()
    counted = {"text": known.text, "batches": known.batches, "recover": known.recover}
    weights = weights_hash(known.run)
    require_same(known.out, {"run": known.run, "weights": weights, **counted, "flags": flags})
    model, corpora = open_run(known.run)
    held_out = corpora.held_out(batch_size=16, batches=known.held_out)
    if model.config.routing is None:
        sys.exit(f"{known.run} is dense: there are no experts to drop or merge")
    experts = model.config.routing.experts
    losses = {f"{experts}": {"as it is": held_out_losses(model, held_out)[0]}}
    if known.recover:
        place = known.out / "as_it_is"
        done = recovered(known.recipe, known.run, place, experts, known.recover, flags)
        losses[f"{experts}"]["as it is, trained on"] = held_out_losses(load(done)[0], held_out)[0]
    for keep in known.keep or halves(experts):
        row = losses.setdefault(str(keep), {})
        for how in ("prune", "merge"):
            smaller = known.out / f"{how}_{keep}_by_{known.by}"
            if not is_model(smaller):
                given = {"by": known.by, "text": known.text, "batches": known.batches}
                reduce_directory(known.run, smaller, keep, how=how, **given)
            row[how] = held_out_losses(load(smaller)[0], held_out)[0]
            if known.recover:
                dense = known.dense or f"{known.recipe}_dense"
                recipe = known.recipe if keep > 1 else dense
                done = recovered(recipe, smaller, smaller, keep, known.recover, flags)
                row[f"{how}, recovered"] = held_out_losses(load(done)[0], held_out)[0]
        print(f"{keep} experts: {row}", flush=True)
    show(losses, known.out)


def show(losses: dict[str, dict[str, float]], out: Path) -> None:
    """Print a table in Markdown, a column for each number of experts, and keep the numbers."""
    (out / "table.json").write_text(json.dumps(losses, indent=2) + "\n", encoding="utf-8")
    kinds = list(dict.fromkeys(kind for row in losses.values() for kind in row))
    print(f"| experts left | {' | '.join(losses)} |")
    print("| --- " * (len(losses) + 1) + "|")
    for kind in kinds:
        cells = [f"{row[kind]:.3f}" if kind in row else "" for row in losses.values()]
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
