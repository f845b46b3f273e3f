"""Pruning and merging a finished run to fewer and fewer experts: the table of docs/smaller.md.

    python experiments/fewer_experts.py runs/quickstart [--keep 12 8 4 2 1] [--by gates]
        [--text FILE] [--batches 32] [--held-out 16]
        [--recover 100] [--recipe quickstart] [--dense quickstart_dense]

Validation loss of RUN, and after pruning and merging to each number of experts (by default half, a
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
from switchworks.evaluate import open_run, validation_losses


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
    args, flags = parser.parse_known_args()
    counted = {"text": args.text, "batches": args.batches, "recover": args.recover}
    weights = weights_hash(args.run)
    require_same(args.out, {"run": args.run, "weights": weights, **counted, "flags": flags})
    model, dataset = open_run(args.run)
    held_out = dataset.held_out(batch_size=16, batches=args.held_out)
    if model.config.routing is None:
        sys.exit(f"{args.run} is dense: there are no experts to drop or merge")
    experts = model.config.routing.experts
    losses = {f"{experts}": {"as it is": validation_losses(model, held_out)[0]}}
    if args.recover:
        place = args.out / "as_it_is"
        done = recovered(args.recipe, args.run, place, experts, args.recover, flags)
        losses[f"{experts}"]["as it is, trained on"] = validation_losses(load(done)[0], held_out)[0]
    for keep in args.keep or halves(experts):
        row = losses.setdefault(str(keep), {})
        for method in ("prune", "merge"):
            smaller = args.out / f"{method}_{keep}_by_{args.by}"
            if not is_model(smaller):
                given = {"by": args.by, "text": args.text, "batches": args.batches}
                reduce_directory(args.run, smaller, keep, method=method, **given)
            row[method] = validation_losses(load(smaller)[0], held_out)[0]
            if args.recover:
                dense = args.dense or f"{args.recipe}_dense"
                recipe = args.recipe if keep > 1 else dense
                done = recovered(recipe, smaller, smaller, keep, args.recover, flags)
                row[f"{method}, recovered"] = validation_losses(load(done)[0], held_out)[0]
        print(f"{keep} experts: {row}", flush=True)
    show(losses, args.out)


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
