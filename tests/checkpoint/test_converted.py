"""A Hugging Face directory where a run or model of ours is wanted."""

import json

import pytest

import switchworks
from switchworks.checkpoint import as_ours, weights_hash
from switchworks.cli.main import main
from switchworks.config import CheckpointError

SMALL = "--steps 2 --batch-size 4 --threads 1 --precision float32 --validate-every 1 --log-every 1"


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A dense model as transformers saves it, without a tokenizer: 384 ids, as ByT5 has."""
    import transformers

    config = transformers.T5Config(
        vocab_size=384, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2
    )
    path = tmp_path_factory.mktemp("hf")
    transformers.T5ForConditionalGeneration(config).save_pretrained(path)
    return path


def test_it_is_converted_once_and_holds_the_same_weights(directory):
    ours = as_ours(directory)
    assert ours.name.startswith("converted-")
    assert as_ours(directory) == ours
    assert as_ours(ours) == ours
    model, tokenizer = switchworks.load(ours)
    assert tokenizer is None
    kept = switchworks.load_hf(directory).state_dict()
    assert all(kept[name].equal(weight) for name, weight in model.state_dict().items())


def test_training_starts_from_it_with_a_tokenizer_that_is_named(directory, corpus, tmp_path):
    words = f"--init {directory} --data.path {corpus} --data.tokenizer bytes --run-dir {tmp_path}/r"
    assert main(["train", "finetune", *words.split(), *SMALL.split()]) == 0
    about = json.loads((tmp_path / "r" / "about.json").read_text())
    assert about["init_weights"] == weights_hash(as_ours(directory))
    assert switchworks.load(tmp_path / "r")[0].config.d_model == 16


def test_converting_takes_the_tokenizer_that_is_named(directory, tiny_run, tmp_path):
    words = ["convert", str(directory), str(tmp_path / "out")]
    assert main([*words, "--tokenizer", "bytes"]) == 0
    assert switchworks.load(tmp_path / "out")[1].vocab_size == 384


def test_a_place_that_is_neither_here_nor_on_the_hub_is_named(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"absent does not exist\.\n  Name a run, a model"):
        as_ours(tmp_path / "absent")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="runs/quikstart is no folder here, and could not be"):
        as_ours("runs/quikstart")
