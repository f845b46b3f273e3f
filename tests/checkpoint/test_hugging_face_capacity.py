"""Capacity as transformers counts it: with `capacity="hf"` the outputs are the same where it drops.

Checked against transformers itself with so few slots that about half of the tokens find none.
"""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from switchworks import load, load_hf, save, save_hf
from switchworks.checkpoint.model_files import convert_checkpoint
from switchworks.cli.main import main
from switchworks.config import ConfigError


@pytest.fixture(scope="module")
def transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def theirs(transformers) -> Any:
    """A random Switch model in which an expert takes two tokens of a sequence."""
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=61,
        d_model=16,
        d_kv=5,
        d_ff=22,
        num_heads=3,
        num_layers=4,
        num_decoder_layers=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_experts=4,
        expert_capacity=2,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def some_batch(padding: str) -> tuple[Tensor, Tensor]:
    """Three rows of 13 and 9 tokens; padding, if any, stands in the last two."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(2, 61, (3, 13), generator=generator)
    targets = torch.randint(2, 61, (3, 9), generator=generator)
    if padding == "right":
        inputs[1, 8:] = inputs[2, 5:] = targets[2, 5:] = 0
    if padding == "left":
        inputs[1, :8] = inputs[2, :5] = 0
    return inputs, targets


def run_theirs(model: Any, inputs: Tensor, targets: Tensor) -> Any:
    labels = targets.masked_fill(targets == 0, -100)
    return model(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels)


@pytest.mark.parametrize("padding", ["no", "right", "left"])
@torch.no_grad()
def test_evaluation_gives_their_logits_where_tokens_are_dropped(theirs, padding):
    """Within 1e-4. On the left, padding comes first and takes slots from the text."""
    inputs, targets = some_batch(padding)
    real = targets != 0
    expected = run_theirs(theirs, inputs, targets).logits[real]
    output = load_hf(theirs, capacity="hf")(inputs, targets)
    assert (output.logits[real] - expected).abs().max() < 1e-4
    assert all(0.3 < report.dropped < 0.8 for report in output.routing)
    assert (load_hf(theirs)(inputs, targets).logits[real] - expected).abs().max() > 1


def test_training_gives_their_loss_and_gradients_where_tokens_are_dropped(theirs):
    inputs, targets = some_batch("right")
    ours = load_hf(theirs, capacity="hf").train()
    theirs.zero_grad()
    expected = run_theirs(theirs.train(), inputs, targets).loss
    theirs.eval()
    expected.backward()
    loss = ours(inputs, targets).losses.cross_entropy
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for got, want in (
        (ours.embedding.weight.grad, theirs.shared.weight.grad),
        (
            ours.encoder.blocks[1].ffn.router.weight.grad,
            theirs.encoder.block[1].layer[1].mlp.router.classifier.weight.grad,
        ),
    ):
        assert got is not None
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("padding", ["no", "right", "left"])
def test_greedy_tokens_are_theirs_though_the_encoder_drops(theirs, padding):
    inputs, _ = some_batch(padding)
    mask = (inputs != 0).long()
    expected = theirs.generate(
        input_ids=inputs, attention_mask=mask, max_new_tokens=9, do_sample=False
    )
    got = load_hf(theirs, capacity="hf").generate(inputs, max_length=9)
    assert torch.equal(got, expected[:, 1:])


@torch.no_grad()
def test_decoding_one_token_after_another_never_drops(theirs):
    """One token is one sequence to the rule. So in this mode, as in transformers, decoding with a
    cache is not what a full pass computes: that is why it is not our default."""
    inputs, targets = some_batch("no")
    read = torch.cat([torch.zeros(3, 1, dtype=torch.long), targets[:, :-1]], dim=1)
    steps = {}
    for capacity in ("paper", "hf"):
        model = load_hf(theirs, capacity=capacity)
        memory = load_hf(theirs).encode(inputs)  # not limited, for both
        cache = model.init_cache(memory, 9)
        steps[capacity] = torch.cat(
            [model.decode_step(token, cache) for token in read.split(1, dim=1)], dim=1
        )
    torch.testing.assert_close(steps["hf"], steps["paper"], rtol=0, atol=1e-5)
    full = load_hf(theirs)(inputs, targets).logits
    torch.testing.assert_close(steps["paper"], full, rtol=0, atol=1e-4)


def test_a_dropped_token_gets_nothing_from_the_layer_there_and_here(theirs):
    """All tokens equal: an expert of two slots serves the first two of a sequence."""
    layer = theirs.encoder.block[1].layer[1].mlp
    switch = load_hf(theirs, capacity="hf").encoder.blocks[1].ffn
    x = torch.randn(1, 1, 16).expand(1, 5, 16).contiguous()
    with torch.no_grad():
        expected, (got, report) = layer(x), switch(x)
    assert (expected[0, 2:] == 0).all()
    assert (got[0, 2:] == 0).all()
    assert (got[0, :2] != 0).any()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert report.dropped == pytest.approx(3 / 5)


def test_the_default_ignores_their_capacity_and_hf_takes_it_over(theirs):
    paper, hf = load_hf(theirs).config.routing, load_hf(theirs, capacity="hf").config.routing
    assert paper is not None
    assert hf is not None
    assert (paper.expert_capacity, paper.padding_takes_slots) == (None, False)
    assert (hf.expert_capacity, hf.padding_takes_slots, hf.group_sequences) == (2, True, 1)
    assert hf.capacity(13, training=True) == hf.capacity(13, training=False) == 2


def test_a_model_with_a_capacity_of_its_own_keeps_it_there_and_back(transformers, theirs, tmp_path):
    save_hf(load_hf(theirs, capacity="hf"), tmp_path / "hf")
    opened = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    assert opened.config.expert_capacity == 2
    inputs, targets = some_batch("left")
    with torch.no_grad():
        assert torch.equal(
            run_theirs(opened, inputs, targets).logits, run_theirs(theirs, inputs, targets).logits
        )


def test_a_dense_model_has_no_capacity_to_take_over(transformers):
    config = transformers.T5Config(vocab_size=20, d_model=4, d_ff=4, d_kv=2, num_layers=1)
    model = load_hf(transformers.T5ForConditionalGeneration(config), capacity="hf")
    assert model.config.routing is None


def test_an_unknown_rule_is_refused(theirs):
    unchecked = inspect.unwrap(load_hf)  # users run without the type checker of the tests
    with pytest.raises(ConfigError, match=r"capacity = 'mesh' is not known\.\n  Use \"paper\""):
        unchecked(theirs, capacity="mesh")


def test_the_command_line_takes_it_over_too(theirs, tmp_path, capsys):
    theirs.save_pretrained(tmp_path / "hf")
    words = ["convert", str(tmp_path / "hf"), str(tmp_path / "ours"), "--capacity", "hf"]
    assert main(words) == 0
    assert load(tmp_path / "ours")[0].config == load_hf(theirs, capacity="hf").config
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "paper")]) == 0
    assert load(tmp_path / "paper")[0].config == load_hf(theirs).config
    capsys.readouterr()


def test_it_means_nothing_for_a_model_of_ours(theirs, tmp_path):
    save(load_hf(theirs), tmp_path / "ours")
    with pytest.raises(ConfigError, match="--capacity hf is for reading"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "hf", capacity="hf")
