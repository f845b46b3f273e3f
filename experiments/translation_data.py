"""Sentences of a few languages for the task catalog_translation, out of the corpus `catalogs`.

    python experiments/translation_data.py runs/translation --languages de fr ru el he ta ja zh-Hans

writes runs/translation/catalogs/train.jsonl and validation.jsonl, which `--data.task-folder
runs/translation` puts in the place of all languages. The sides are those of the corpus: what is
held out here was held out from pre-training on it too.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from switchworks.config import DataError
from switchworks.data import (
    DataConfig,
    Sentence,
    cache_folder,
    catalogs,
    normalise,
    split_sentences,
)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--languages", nargs="+", required=True)
    parser.add_argument("--validation-share", type=float, default=0.1)
    parser.add_argument("--held-out", type=int, help="at most so many of a language; default: all")
    known = parser.parse_args()
    try:
        codes = list(dict.fromkeys(map(normalise, known.languages)))
    except DataError as error:
        sys.exit(str(error))
    split = split_sentences(catalogs(cache_folder(DataConfig())), known.validation_share)
    if missing := [code for code in codes if code not in split]:
        sys.exit(f"catalogs has no {', '.join(missing)}; it has {' '.join(sorted(split))}")
    folder = known.out / "catalogs"
    folder.mkdir(parents=True, exist_ok=True)
    for name, side in (("train", "train"), ("validation", "held_out")):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for code in codes:
                sentences = getattr(split[code], side)
                most = known.held_out if side == "held_out" else None
                for one in evenly(sentences, most):
                    record = {"language": code, "english": one.english, "text": one.text}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(folder / f"{name}.jsonl")


def evenly(sentences: Sequence[Sentence], most: int | None) -> Sequence[Sentence]:
    """At most `most` of them, from all over."""
    if most is None or len(sentences) <= most:
        return sentences
    return [sentences[index * len(sentences) // most] for index in range(most)]


if __name__ == "__main__":
    main()
