"""What quantising costs a finished run: validation loss and bytes in int8, int8-dynamic and int4.

    python experiments/quantise.py runs/quickstart [--groups 16 32 64] [--held-out 16]

Every quantised model is written to OUT by `convert --quantise`, opened as `load` opens it, and
measured on the run's held-out text. The loss is given as it is and relative to the run's own.
"""

import argparse
import json
from pathlib import Path

from kept import require_same

from switchworks.checkpoint import is_model, load, weight_files, weights_hash
from switchworks.compress import quantise_directory
from switchworks.evaluate import open_run, validation_losses


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--groups", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/quantise"))
    args = parser.parse_args()
    require_same(args.out, {"run": args.run, "weights": weights_hash(args.run)})
    model, dataset = open_run(args.run)
    held_out = dataset.held_out(batch_size=16, batches=args.held_out)
    before = validation_losses(model, held_out)[0]
    rows = [{"weights": "as trained", "loss": before, "bytes": _bytes(args.run), "more": 0.0}]
    for scheme, group in [("int8", 32), ("int8-dynamic", 32), *(("int4", g) for g in args.groups)]:
        name = f"{scheme}, groups of {group}" if scheme == "int4" else scheme
        place = args.out / (f"int4_{group}" if scheme == "int4" else scheme)
        if not is_model(place):
            quantise_directory(args.run, place, scheme, group=group)
        loss = validation_losses(load(place)[0], held_out)[0]
        row = {"weights": name, "loss": loss, "bytes": _bytes(place), "more": loss / before - 1}
        rows.append(row)
        print(row, flush=True)
    (args.out / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("| weights | validation loss | relative | MB on disk |\n| --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['weights']} | {row['loss']:.4f} | {row['more']:+.2%} | "
            f"{row['bytes'] / 1e6:.2f} |"
        )


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(path))


if __name__ == "__main__":
    main()
