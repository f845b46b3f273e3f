"""The model card: what it says, and that huggingface_hub's own classes read it."""

from dataclasses import replace

import pytest
from support.models import CAUSAL, DENSE, TINY

from switchworks import SwitchTransformer, load, save, save_hf
from switchworks.checkpoint import CardFacts, write_card
from switchworks.cli.main import main

LOSS = CardFacts(name='a "b": |c\nd', data={"Source": "x/ü\\y: #1"}, loss=3.81234)


def read(directory):
    """The card by huggingface_hub, which refuses front matter that it cannot parse."""
    return pytest.importorskip("huggingface_hub").ModelCard.load(directory / "README.md")


@pytest.mark.parametrize("config", [TINY, DENSE, CAUSAL], ids=["sparse", "dense", "decoder"])
def test_the_hub_s_own_class_reads_every_card(tmp_path, config):
    save(SwitchTransformer(config), tmp_path / "mine")
    card = read(tmp_path / "mine")
    assert card.data.library_name == "switchworks"
    assert ("mixture-of-experts" in card.data.tags) is (config.routing is not None)
    assert "| Parameters |" in card.text
    assert "# mine" in card.text


def test_a_loss_becomes_a_result_that_the_hub_lists(tmp_path):
    hub, data = map(pytest.importorskip, ("huggingface_hub", "huggingface_hub.repocard_data"))
    write_card(tmp_path, TINY, LOSS)
    card = read(tmp_path)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", 3.8123)
    assert result.dataset_name == "x/ü\\y: #1"
    index = data.eval_results_to_model_index(card.data.model_name, [result])
    assert data.model_index_to_eval_results(index)[1] == [result]
    assert hub.ModelCard(str(card)).data.eval_results == [result]  # what it writes it reads again


def test_the_licence_is_left_open_and_says_where_to_choose(tmp_path):
    write_card(tmp_path, TINY, LOSS)
    assert read(tmp_path).data.license is None
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.splitlines()[1].startswith("# license: ")
    (tmp_path / "README.md").write_text(
        text.replace(text.splitlines()[1], "license: mit"), encoding="utf-8"
    )
    assert read(tmp_path).data.license == "mit"


def test_a_licence_filled_in_harms_no_checksum_and_survives_convert(tmp_path):
    save(SwitchTransformer(replace(TINY, vocab_size=384)), tmp_path / "ours")
    card = tmp_path / "ours" / "README.md"
    card.write_text("---\nlicense: mit\nlibrary_name: x\n---\nMine.\n", encoding="utf-8")
    load(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "hf")]) == 0
    converted = read(tmp_path / "hf")
    assert (converted.data.license, converted.data.library_name) == ("mit", "transformers")
    card.unlink()
    load(tmp_path / "ours")


def test_the_card_in_hugging_face_s_format_names_its_library(tmp_path):
    save_hf(SwitchTransformer(TINY), tmp_path)
    assert read(tmp_path).data.library_name == "transformers"


def test_the_card_of_a_run_has_data_compute_command_and_loss(tiny_run):
    card = read(tiny_run / "model")
    for name in ("Source", "Digest of the text", "Tokens seen", "FLOPs", "Command", "Recipe"):
        assert f"| {name} | " in card.text
    (result,) = card.data.eval_results
    assert f"| Validation loss | {result.metric_value:.4f} nats" in card.text


def test_a_changed_model_keeps_its_run_s_card_and_names_the_change(tiny_run, tmp_path):
    command = ["convert", str(tiny_run), str(tmp_path / "small"), "--quantise", "int8"]
    assert main(command) == 0
    card = read(tmp_path / "small")
    assert "--quantise int8`" in card.text
    assert "| Validation loss, before the change | " in card.text
    assert card.data.eval_results is None
