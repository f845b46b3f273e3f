"""One corpus per language: of catalogs, of folders, of data sets laid out as mC4 is."""

import csv
import gzip
import json
import logging
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_mixture import Shifted
from test_pipeline import CONFIG, Ids

from switchworks.batch import Batch
from switchworks.cli.main import main
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.dataset import ValidationSet
from switchworks.data.open import open_dataset
from switchworks.data.rows.mixture import BLOCK_ROWS, corpus_mixture, rates
from switchworks.data.rows.pipeline import RunRows
from switchworks.data.sources import open_source, source_class
from switchworks.evaluate.perplexity import evaluate_run
from switchworks.recipes.quickstart import multilingual
from switchworks.report.runs import read_run
from switchworks.training import train
from switchworks.training.hooks.progress import epochs_text

LINES = {
    "de": "Die Katze lag den ganzen Tag auf der warmen Bank.",
    "iw": "\u05d4\u05d7\u05ea\u05d5\u05dc \u05d9\u05e9\u05df \u05e2\u05dc",
    "zh_TW": "\u8c93\u5728\u588a\u5b50\u4e0a\u7761\u89ba",
}


def languages_of(config, cache):
    return source_class(config).language_configs(config, cache)


@pytest.fixture
def cache() -> Path:
    return Path(os.environ["SWITCHWORKS_CACHE"])


@pytest.fixture
def texts(tmp_path) -> Path:
    """de/..., iw.txt and zh_TW.jsonl.gz, forty lines each."""
    root = tmp_path / "texts"
    (root / "de").mkdir(parents=True)
    for part in range(2):
        lines = "\n".join(f"{LINES['de']} {part}.{n}" for n in range(20))
        (root / "de" / f"{part}.txt").write_text(lines, encoding="utf-8")
    (root / "iw.txt").write_text("\n".join([LINES["iw"]] * 40), encoding="utf-8")
    rows = "".join(json.dumps({"text": f"{LINES['zh_TW']}{n}"}) + "\n" for n in range(40))
    (root / "zh_TW.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return root


def of(root: Path, *languages: str, **more) -> DataConfig:
    return DataConfig(path=str(root), languages=languages or ("all",), **more)


def test_a_folder_has_a_corpus_for_each_language_under_its_one_code(texts, cache):
    found = languages_of(of(texts), cache)
    assert list(found) == ["de", "he", "zh-Hant"]
    (first, *_) = open_source(found["he"], cache).documents()
    assert first.startswith(LINES["iw"])
    assert sum(1 for _ in open_source(found["zh-Hant"], cache).documents()) == 40


def test_named_languages_are_taken_in_the_order_given_and_others_left(texts, cache):
    (texts / "notes.txt").write_text("no language")
    assert list(languages_of(of(texts, "zh-Hant", "iw"), cache)) == ["zh-Hant", "he"]


def test_a_name_in_the_folder_that_is_no_language_is_refused_with_the_path(texts, cache):
    (texts / "germn.txt").write_text("Guten Tag")
    with pytest.raises(DataError, match=r"(?s)germn\.txt: 'germn' is no code.*Near: de \(German\)"):
        languages_of(of(texts), cache)


def test_one_language_under_two_names_is_refused(texts, cache):
    (texts / "he").mkdir()
    with pytest.raises(DataError, match=r"(?s)he and .*iw\.txt are the same language, he"):
        languages_of(of(texts), cache)


def test_an_unknown_or_absent_language_is_refused_with_those_there_are(texts, cache):
    with pytest.raises(DataError, match=r"'jp' is no code of a language"):
        languages_of(of(texts, "jp"), cache)
    with pytest.raises(DataError, match=r"(?s)no text in Japanese \(ja\).*de he zh-Hant"):
        languages_of(of(texts, "ja"), cache)


def test_three_sentences_are_left_out_of_all_and_refused_by_name_unless_allowed(
    texts, cache, caplog
):
    (texts / "gd.txt").write_text("Halo.\nMadainn mhath.\nTapadh leat.\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert "gd" not in languages_of(of(texts), cache)
    assert "gd is left out: it has 3 sentences, fewer than data.min_sentences = 20" in caplog.text
    with pytest.raises(DataError, match=r"Scottish Gaelic \(gd\) cannot be used: it has 3 sent"):
        languages_of(of(texts, "gd"), cache)
    assert "gd" in languages_of(of(texts, min_sentences=3), cache)


def test_a_long_line_counts_as_many_sentences(texts, cache):
    (texts / "fr.txt").write_text("Le chat dort sur le banc. " * 100, encoding="utf-8")
    assert "fr" in languages_of(of(texts), cache)


def test_mislabelled_text_is_refused_with_file_and_byte(texts, cache):
    (texts / "es.txt").write_bytes("ma\u00f1ana\n".encode("latin-1") * 30)
    with pytest.raises(DataError, match=r"es\.txt is not UTF-8: byte 2 is 0xf1"):
        languages_of(of(texts), cache)


def test_a_fault_in_one_language_is_no_matter_to_those_that_are_named(texts, cache):
    (texts / "es.txt").write_bytes("ma\u00f1ana\n".encode("latin-1") * 30)
    (texts / "fr.txt").write_text("", encoding="utf-8")
    assert list(languages_of(of(texts, "de"), cache)) == ["de"]


def test_bad_languages_end_the_command_with_status_2(texts, capsys):
    (texts / "gd.txt").write_text("Halo.\nMadainn mhath.\nTapadh leat.\n", encoding="utf-8")
    (texts / "es.txt").write_bytes("ma\u00f1ana\n".encode("latin-1") * 30)
    for name, said in (
        ("jp", "'jp' is no code of a language.(?s:.*)Near: ja"),
        ("gd", r"Scottish Gaelic \(gd\) cannot be used: it has 3 sentences"),
        ("es", r"es\.txt is not UTF-8: byte 2 is 0xf1(?s:.*)iconv"),
    ):
        words = ["prepare", "tiny", "--data.path", str(texts), "--data.languages", name]
        assert main(words) == 2
        assert re.match(f"error: .*{said}", capsys.readouterr().err)


def test_an_empty_file_or_folder_is_left_out_of_all_and_refused_by_name(texts, cache, caplog):
    (texts / "fr.txt").write_text("", encoding="utf-8")
    (texts / "it").mkdir()
    with caplog.at_level(logging.WARNING):
        assert not {"fr", "it"} & set(languages_of(of(texts), cache))
    assert "fr is left out: it has no text" in caplog.text
    with pytest.raises(DataError, match=r"Italian \(it\) cannot be used: it has no text"):
        languages_of(of(texts, "it"), cache)


ROWS_OF_BYTES = {"tokenizer": "bytes", "input_length": 64, "target_length": 14}


def test_languages_kept_by_the_flag_but_under_one_row_are_left_out_with_the_reason(texts, caplog):
    (texts / "gd.txt").write_text("Halo.\nTapadh leat.\n", encoding="utf-8")
    config = of(texts, min_sentences=1, validation_share=0.2, **ROWS_OF_BYTES)
    with caplog.at_level(logging.WARNING):
        corpora = open_dataset(config, vocab_size=384)
    assert "gd" not in corpora.parts
    assert "he" in corpora.parts
    assert "gd is left out, train text: The corpus has" in caplog.text


def test_a_language_under_one_row_that_was_asked_for_by_name_is_refused(texts):
    (texts / "gd.txt").write_text("Halo.\nTapadh leat.\n", encoding="utf-8")
    config = of(texts, "he", "gd", min_sentences=1, validation_share=0.2, **ROWS_OF_BYTES)
    with pytest.raises(DataError, match=r"\(gd\) cannot be used: of its text to train on: The "):
        open_dataset(config, vocab_size=384)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"languages": ("de",)}, "python_docs has no languages"),
        ({"languages": ("de",), "mixture": ("de=a",)}, r"data\.mixture and data\.languages"),
        ({"languages": ("all", "jp"), "path": "a"}, "all is every language there is"),
        ({"character_coverage": 0.5}, r"character_coverage = 0\.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        DataConfig(**settings)


@pytest.fixture
def mc4(tmp_path, monkeypatch) -> Path:
    """A folder laid out and described as allenai/c4 is: a config for each code."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    root, configs = tmp_path / "c4", []
    (root / "multilingual").mkdir(parents=True)
    for code in ("de", "iw", "zh"):
        for split, infix in (("train", ""), ("validation", "-validation")):
            rows = [{"text": f"{code} {split} {n}", "url": "u", "timestamp": "t"} for n in range(3)]
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            name = f"c4-{code}{infix}.tfrecord-00000-of-00001.json.gz"
            (root / "multilingual" / name).write_bytes(gzip.compress(data))
        files = "".join(
            f"  - split: {split}\n    path: multilingual/c4-{code}{infix}.*.json.gz\n"
            for split, infix in (("train", ""), ("validation", "-validation"))
        )
        configs.append(f"- config_name: {code}\n  data_files:\n{files}")
    (root / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    return root


def hub(dataset: str | Path, *languages: str) -> DataConfig:
    return DataConfig(
        source="hub",
        dataset=str(dataset),
        languages=languages,
        streaming=True,
        validation_split="validation",
    )


def test_mc4_is_streamed_by_its_codes(mc4, cache):
    found = languages_of(hub(mc4, "de", "he", "zh-Hans"), cache)
    assert [own.dataset_config for own in found.values()] == ["de", "iw", "zh"]
    source = open_source(found["he"], cache)
    assert list(source.documents()) == [f"iw train {n}" for n in range(3)]
    assert list(source.validation().documents()) == [f"iw validation {n}" for n in range(3)]
    few = open_source(replace(found["he"], documents=1), cache)
    assert list(few.documents()) == ["iw train 0"]
    assert list(few.validation().documents()) == ["iw validation 0"]


def test_all_of_mc4_are_its_107_codes_and_its_english_has_its_own_name_beside_c4():
    found = languages_of(hub("allenai/c4", "all"), Path())
    assert len(found) == 107
    assert found["en"].dataset_config == "en-multi"
    assert languages_of(hub("mc4", "en"), Path())["en"].dataset_config == "en"


def test_english_of_a_copy_of_c4_in_a_folder_is_mc4_s(mc4):
    assert languages_of(hub(mc4, "en"), Path())["en"].dataset_config == "en"
    card = mc4 / "README.md"
    card.write_text(card.read_text().replace("config_name: de\n", "config_name: en-multi\n"))
    assert languages_of(hub(mc4, "en"), Path())["en"].dataset_config == "en-multi"


def test_a_language_that_mc4_has_not_is_refused():
    with pytest.raises(DataError, match=r"mC4 has no text in Croatian \(hr\)"):
        languages_of(hub("mc4", "hr"), Path())


def test_two_codes_of_one_text_in_mc4_are_refused():
    for pair, one in (
        (("pt", "pt-BR"), "pt"),
        (("zh-Hans", "zh-Hant"), "zh"),
        (("nb", "nn"), "no"),
    ):
        with pytest.raises(DataError, match=f"{pair[0]} and {pair[1]} are both {one} in mC4"):
            languages_of(hub("mc4", *pair), Path())


def test_realised_rates_of_107_tasks_of_very_different_size_follow_the_formula():
    """Stores of 1e2 to 1e5 rows, drawn by n ** 0.3 through the real batches: a row shows its
    task by the size of its tokens."""
    rows = (100 * 1_000 ** (np.arange(107) / 106)).astype(int)
    stores = {
        f"task{k}": Shifted(int(n) * 24, 10_000_000 * (k + 1)) for k, n in enumerate(rows.tolist())
    }
    formula = rows**0.3 / (rows**0.3).sum()
    mixture = corpus_mixture(
        CONFIG, stores, Ids(), rates(rows.tolist()), RunRows(batch_size=64, seed=3)
    )
    seen = np.zeros(107)
    for step in range(40):
        inputs = mixture.batch(step).inputs
        np.add.at(seen, (inputs.max(dim=1).values // 10_000_000 - 1).numpy(), 1)
    assert np.abs(seen - formula * seen.sum()).max() < 1 + 107 * formula.max()
    many = 5 * BLOCK_ROWS + 12_345
    realised = mixture.schedule.counts_before(many) / many
    np.testing.assert_allclose(realised, formula, atol=2 / BLOCK_ROWS, rtol=2e-3)
    assert realised.max() / realised.min() == pytest.approx(1_000**0.3, rel=0.02)


def test_a_mixture_of_languages_goes_on_at_any_step_as_if_never_stopped(texts, tmp_path):
    config = of(texts, tokenizer="bytes", input_length=64, target_length=14, validation_share=0.2)
    config = replace(config, cache=str(tmp_path / "cache"), prefetch=0)
    first, second = (
        open_dataset(config, vocab_size=384).training(batch_size=4, seed=1) for _ in range(2)
    )
    ahead = first.batches()
    for _ in range(5):
        next(ahead)
    torch.testing.assert_close(next(ahead).inputs, next(second.batches(5)).inputs)


def test_bits_per_byte_of_guessing_bytes_is_eight():
    targets = torch.tensor([[3 + 65, 3 + 66, 3 + 67, 3 + 68]])
    from switchworks.data.tokens.coverage import byte_lengths, tokens_and_bytes
    from switchworks.data.tokens.tokenizer import ByteTokenizer

    size = tokens_and_bytes([Batch(inputs=targets, targets=targets)], byte_lengths(ByteTokenizer()))
    held_out = ValidationSet({}, {}, {"de": size})
    assert held_out.bits_per_byte("de", math.log(256)) == pytest.approx(8.0)


def test_the_line_of_a_validation_says_what_was_read_least_and_most():
    assert epochs_text({}) == ""
    said = epochs_text({"en": 0.25, "kab": 12.0, "de": 1.0})
    assert said == "  read 0.25 (en) to 12 times (kab)"


def test_a_run_over_catalogs_notes_loss_bits_and_epochs_of_every_language(
    tiny_experiment, tmp_path
):
    recipe = multilingual()
    data = replace(tiny_experiment.data, path=None, source="catalogs", validation_share=0.1)
    data = replace(data, languages=("de", "ar", "zh-Hans"), mixture_exponent=0.3)
    experiment = replace(tiny_experiment, data=data, steps=2, validate_every=2, sample_every=0)
    assert recipe.data.is_mixture
    run = train(experiment, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "val/loss" in row]
    for code in ("de", "ar", "zh-Hans"):
        assert 0 < row[f"val/loss/{code}"] < 20
        assert 0 < row[f"val/bits_per_byte/{code}"] < 40
        assert row[f"epoch/{code}"] > 0
    about = json.loads((run / "about.json").read_text())
    assert sum(one["rate"] for one in about["corpora"].values()) == pytest.approx(1.0)


@pytest.mark.long
def test_the_report_by_language_measures_the_last_weights_on_more_text(
    tiny_experiment, tmp_path, capsys
):
    data = replace(tiny_experiment.data, path=None, source="catalogs", validation_share=0.1)
    data = replace(data, languages=("de", "ar"))
    switch = replace(tiny_experiment, data=data, steps=2, validate_every=1, sample_every=0)
    model = replace(switch.model, routing=None)
    dense = replace(switch, model=model, validation_batches=1)
    switch = replace(switch, validation_batches=1)
    pair = [train(switch, tmp_path / "switch"), train(dense, tmp_path / "dense")]
    words = ["report", *map(str, pair), "--languages", str(tmp_path / "out"), "--batches", "3"]
    assert main(words) == 0
    assert "2 languages" in capsys.readouterr().out
    table = tmp_path / "out" / "languages.csv"
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    large = [evaluate_run(run, batches=6, batch_size=64) for run in pair]
    for row in rows:
        of_both = [figures[f"loss/{row['code']}"] for figures in large]
        assert float(row["switch_quality"]) == pytest.approx(-of_both[0], abs=1e-4)
        assert float(row["dense_quality"]) == pytest.approx(-of_both[1], abs=1e-4)
        assert float(row["improvement"]) == pytest.approx(of_both[1] - of_both[0], abs=1e-4)
    for name in ("quality", "speedups", "routing", "scripts", "similarity"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
    assert main([*words[:-1], "0"]) == 0
    (row, *_) = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    last = read_run(pair[0]).last(f"val/loss/{row['code']}")
    assert float(row["switch_quality"]) == pytest.approx(-last, abs=1e-4)


def test_a_row_longer_than_any_language_s_text_is_refused(texts, cache):
    config = of(texts, tokenizer="bytes", input_length=100_000, mean_span=300.0)
    message = r"No language has enough text .*\n  Use more text, or shorter rows than 100000 and"
    with pytest.raises(DataError, match=message):
        open_dataset(config, vocab_size=384)


def test_languages_of_too_few_sentences_are_refused_together(texts, cache):
    with pytest.raises(DataError, match=r"has 1000 sentences\.\n  Lower --data.min-sentences, or"):
        languages_of(of(texts, min_sentences=1000), cache)


def test_languages_are_looked_for_in_a_folder(texts, cache):
    with pytest.raises(
        DataError, match=r"iw\.txt is no folder\.\n  With data.languages, data.path"
    ):
        languages_of(of(texts / "iw.txt"), cache)
