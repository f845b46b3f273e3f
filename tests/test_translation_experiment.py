"""experiments/translation.py: chrF by direction, from what runs answered."""

import json
import os
from pathlib import Path

import pytest
from sacrebleu import sentence_chrf
from support.scripts import run_script

ASKED = {
    "translate English to German: Save": "Speichern",
    "translate German to English: Speichern": "Save",
    "translate English to French: Save to: disk": "Enregistrer sur le disque",
    "translate French to English: Enregistrer sur le disque": "Save to: disk",
}


def answered(folder: Path, wrong: str | None) -> None:
    """A run that was right, or said `wrong` to everything."""
    folder = folder / "answers"
    folder.mkdir(parents=True)
    lines = [
        {"task": "catalog_translation", "inputs": inputs, "answers": [right]}
        | {"prediction": right if wrong is None else wrong}
        for inputs, right in ASKED.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")


def call(runs: Path, *words: str) -> str:
    return run_script("translation.py", str(runs), "--models", "switch", *words)


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two seeds: right answers after pre-training in one of them, none from scratch."""
    for seed, wrong in enumerate((None, "Sp")):
        run = tmp_path / f"seed_{seed}" / "switch"
        answered(run / "catalog_translation_tune", wrong)
        answered(run / "catalog_translation_scratch", "")
    return tmp_path


def test_directions_are_scored_apart_and_averaged_over_seeds(runs):
    said = call(runs)
    rows = json.loads((runs / "translation.json").read_text())
    found = {(row["start"], row["from"], row["to"]): row["chrf"] for row in rows}
    assert len(found) == 8
    half = sentence_chrf("Sp", ["Speichern"]).score
    assert found["pre-trained", "English", "German"] == pytest.approx((100 + half) / 2)
    assert found["pre-trained", "French", "English"] == pytest.approx(
        (100 + sentence_chrf("Sp", ["Save to: disk"]).score) / 2
    )
    assert found["from scratch", "English", "French"] == 0
    assert "pre-trained is better in 4 of 4 directions" in said
    assert (runs / "translation.png").stat().st_size > 1000


def test_languages_can_be_chosen_and_unknown_ones_are_named(runs):
    shown = call(runs, "--languages", "de")
    assert "| English | German |" in shown
    assert "| German | English |" in shown
    assert "French" not in shown
    with pytest.raises(SystemExit, match="no held-out sentence in Japanese"):
        call(runs, "--languages", "de", "ja")


def test_sentences_of_a_few_languages_are_a_folder_that_the_task_reads(tmp_path):
    from switchworks.data.tasks.sources import Places
    from switchworks.data.tasks.translation import SOURCE

    words = [str(tmp_path), "--languages", "de", "pt_BR", "--held-out", "5"]
    run_script("translation_data.py", *words)
    cache = Path(os.environ["SWITCHWORKS_CACHE"])
    few, whole = Places(cache, tmp_path, 0.1), Places(cache, None, 0.1)
    held_out = list(SOURCE.records("validation", few))
    assert [one["language"] for one in held_out] == ["de"] * 5 + ["pt-BR"] * 5
    assert all(one in list(SOURCE.records("validation", whole)) for one in held_out)
    of_both = [one for one in SOURCE.records("train", whole) if one["language"] in ("de", "pt-BR")]
    assert list(SOURCE.records("train", few)) == of_both
    for code, said in (("haw", "catalogs has no haw"), ("xx", "'xx' is no code of a language")):
        words[2] = code
        with pytest.raises(SystemExit, match=said):
            run_script("translation_data.py", *words)
