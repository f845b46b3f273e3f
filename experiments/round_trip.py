"""How many sentences of each language decode to exactly what was encoded.

    python experiments/round_trip.py runs/multilingual

Encodes and decodes every sentence of the embedded catalogs, of both splits, with the tokenizer of
RUN (a run, or any folder with a spiece.model). The last column is the share of them that T5's own
normalisation, nmt_nfkc, changes, without those with the ellipsis that replaces a name (it changes
all of them). The exit status is 1 if a sentence was not restored.
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
    flags = parser.parse_args()
    tokenizer = load_tokenizer(str(flags.run))
    t5 = sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc",
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=True,
    )
    corpus = split_sentences(catalogs(cache_folder(DataConfig())), flags.validation_share)
    total = lost = changed = compared = 0
    print("| code | language | sentences | restored | nmt_nfkc changes |")
    print("| --- | --- | ---: | ---: | ---: |")
    for code, split in corpus.items():
        texts = [sentence.text for sentence in (*split.train, *split.validation)]
        ids = tokenizer.encode_batch(texts, sentinels=False)
        restored = sum(tokenizer.decode(row) == text for row, text in zip(ids, texts, strict=True))
        plain = [text for text in texts if GAP not in text]
        other = sum(t5.normalize(text) != text for text in plain)
        print(
            f"| {code} | {english_name(code)} | {len(texts):,} | {restored:,} | "
            f"{other / max(1, len(plain)):.1%} |"
        )
        total, lost = total + len(texts), lost + len(texts) - restored
        changed, compared = changed + other, compared + len(plain)
    print(
        f"{len(corpus)} languages, {total:,} sentences, {lost} not restored; nmt_nfkc changes "
        f"{changed / compared:.1%}"
    )
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
