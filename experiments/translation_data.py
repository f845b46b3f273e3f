"""Sentences of some languages of the corpus `catalogs`, for the task catalog_translation.

    python experiments/translation_data.py runs/translation --languages de fr ru el he ta ja zh-Hans

writes runs/translation/catalogs/train.jsonl and validation.jsonl, with which `--data.task-folder
runs/translation` replaces all languages. The splits are those of the corpus: what is held out here
was held out from pre-training on it too.
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
    flags = parser.parse_args()
    try:
        codes = list(dict.fromkeys(map(normalise, flags.languages)))
    except DataError as error:
        sys.exit(str(error))
    split = split_sentences(catalogs(cache_folder(DataConfig())), flags.validation_share)
    if missing := [code for code in codes if code not in split]:
        sys.exit(f"catalogs has no {', '.join(missing)}; it has {' '.join(sorted(split))}")
    folder = flags.out / "catalogs"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation"):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for code in codes:
                sentences = getattr(split[code], name)
                limit = flags.held_out if name == "validation" else None
                for item in evenly(sentences, limit):
                    record = {"language": code, "english": item.english, "text": item.text}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(folder / f"{name}.jsonl")


def evenly(sentences: Sequence[Sentence], limit: int | None) -> Sequence[Sentence]:
    """At most `limit` of them, from all over."""
    if limit is None or len(sentences) <= limit:
        return sentences
    return [sentences[index * len(sentences) // limit] for index in range(limit)]


if __name__ == "__main__":
    main()
