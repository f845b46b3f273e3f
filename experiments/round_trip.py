"""Text in, text out: how many of a run's sentences its tokenizer gives back, by language.

    python experiments/round_trip.py runs/multilingual

goes through every sentence of the embedded catalogs, on both sides, with the tokenizer of RUN (a
run, or any folder with a spiece.model). Beside it stands how many of them T5's own normalisation,
nmt_nfkc, would change, not counting those with the ellipsis that stands for a name (all of which it
changes). It ends with status 1 if one did not come back.
"""

import argparse
import sys
from pathlib import Path

import sentencepiece

from switchworks.data import (
    GAP,
    DataConfig,
    cache_folder,
    catalogs,
    english_name,
    load_tokenizer,
    split_sentences,
)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--validation-share", type=float, default=0.1)
    known = parser.parse_args()
    tokenizer = load_tokenizer(str(known.run))
    t5 = sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc",
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=True,
    )
    corpus = split_sentences(catalogs(cache_folder(DataConfig())), known.validation_share)
    total = lost = changed = plain = 0
    print("| code | language | sentences | come back | nmt_nfkc changes |")
    print("| --- | --- | ---: | ---: | ---: |")
    for code, sides in corpus.items():
        texts = [sentence.text for sentence in (*sides.train, *sides.held_out)]
        ids = tokenizer.encode_batch(texts, sentinels=False)
        back = sum(tokenizer.decode(own) == text for own, text in zip(ids, texts, strict=True))
        whole = [text for text in texts if GAP not in text]
        other = sum(t5.normalize(text) != text for text in whole)
        print(
            f"| {code} | {english_name(code)} | {len(texts):,} | {back:,} | "
            f"{other / max(1, len(whole)):.1%} |"
        )
        total, lost = total + len(texts), lost + len(texts) - back
        changed, plain = changed + other, plain + len(whole)
    print(
        f"{len(corpus)} languages, {total:,} sentences, {lost} did not come back; nmt_nfkc changes "
        f"{changed / plain:.1%}"
    )
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
