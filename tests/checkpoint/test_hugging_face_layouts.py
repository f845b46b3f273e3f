"""Layouts that transformers writes: read here, run, written back and opened there again.

transformers builds and saves every model, so it is the oracle for both directions.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from switchworks import load_hf, save_hf
from switchworks.config import CheckpointError

SIZES: dict[str, Any] = {"vocab_size": 61, "d_model": 12, "d_kv": 5, "d_ff": 23, "num_heads": 3}
TWO = {"num_layers": 2, "num_decoder_layers": 2}
FOUR = {"num_layers": 4, "num_decoder_layers": 4}
NEW = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
UL2 = {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}
NONE = 5
"""More sparse layers than a stack of 4 has make none sparse; 0 makes block 1 sparse."""


def sparse(encoder: int, decoder: int, **settings: Any) -> dict[str, Any]:
    counts = {"num_sparse_encoder_layers": encoder, "num_sparse_decoder_layers": decoder}
    return counts | {"num_experts": 3, "expert_capacity": 1000} | settings


SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "T5 1.0": ("T5", TWO, {}),
    "T5 1.1, a head of its own": ("T5", TWO | NEW, {"head": True}),
    "T5 1.1, unscaled but tied": ("T5", TWO | NEW, {}),
    "UL2: gated silu": ("T5", TWO | UL2, {"head": True}),
    "silu without a gate": ("T5", TWO | {"feed_forward_proj": "silu"}, {}),
    "mT5": ("MT5", TWO, {"head": True}),
    "ByT5: a deep encoder": (
        "T5",
        {"num_layers": 6, "num_decoder_layers": 2, "vocab_size": 384} | NEW,
        {"head": True},
    ),
    "a deep decoder": ("T5", {"num_layers": 1, "num_decoder_layers": 3}, {}),
    "Switch by default": ("SwitchTransformers", {"num_experts": 3}, {}),
    "Switch, every other block": ("SwitchTransformers", FOUR | sparse(2, 2), {}),
    "Switch, all blocks": ("SwitchTransformers", TWO | sparse(2, 2), {}),
    "Switch, dense encoder": ("SwitchTransformers", FOUR | sparse(NONE, 2), {}),
    "Switch, dense decoder": ("SwitchTransformers", FOUR | sparse(2, NONE), {}),
    "Switch, 0 sparse layers of the encoder": ("SwitchTransformers", FOUR | sparse(0, 4), {}),
    "Switch with silu": ("SwitchTransformers", TWO | sparse(1, 2, dense_act_fn="silu"), {}),
    "T5 in bfloat16": ("T5", TWO | UL2, {"head": True, "dtype": torch.bfloat16}),
    "Switch in bfloat16": ("SwitchTransformers", FOUR | sparse(2, NONE), {"dtype": torch.bfloat16}),
    "Switch in many shards": ("SwitchTransformers", FOUR | sparse(2, 1), {"shard": "4KB"}),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(scope="module")
def transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def build(
    transformers: Any, family: str, settings: dict[str, Any], ending="ForConditionalGeneration"
) -> Any:
    """A random model with norms that are not all 1, so that each must be in its place."""
    torch.manual_seed(0)
    start = {"decoder_start_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**SIZES | start | settings)
    model = getattr(transformers, f"{family}{ending}")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("layer_norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def random_ids() -> tuple[Tensor, Tensor]:
    """Inputs, of which one row ends in padding, and targets."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(2, 61, (3, 11), generator=generator)
    inputs[1, 7:] = 0
    return inputs, torch.randint(2, 61, (3, 6), generator=generator)


@torch.no_grad()
def logits_of(theirs: Any) -> Tensor:
    inputs, targets = random_ids()
    mask = (inputs != 0).long()
    return theirs(input_ids=inputs, attention_mask=mask, labels=targets).logits


@each_shape
def test_a_model_of_transformers_comes_and_goes_with_equal_outputs(transformers, tmp_path, shape):
    """Here, and there again after writing back, logits are in float32 within 1e-5 of their largest.
    Written back, the weights are equal bit for bit and have the same names and dtypes."""
    family, settings, more = shape
    theirs = build(transformers, family, settings)
    if more.get("head"):  # transformers 5 ties new ones; those released are not
        theirs.lm_head.weight = nn.Parameter(torch.randn_like(theirs.shared.weight) / 4)
    theirs = theirs.to(more.get("dtype", torch.float32))
    shards = {"max_shard_size": more["shard"]} if "shard" in more else {}
    theirs.save_pretrained(tmp_path / "theirs", **shards)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > (1 if shards else 0)

    save_hf(load_hf(tmp_path / "theirs"), tmp_path / "ours")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [name for name in before if before[name].dtype != after[name].dtype] == []

    expected = logits_of(theirs.float())
    with torch.no_grad():
        ours = load_hf(tmp_path / "theirs", dtype=torch.float32)(*random_ids()).logits
    for logits in (ours, logits_of(back.float())):
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_transformers_default_switch_has_sparse_blocks_1_5_and_9(transformers, tmp_path):
    theirs = build(transformers, "SwitchTransformers", {"num_experts": 2})
    config = load_hf(theirs).config
    assert config.sparse_blocks(decoder=False) == config.sparse_blocks(decoder=True) == (1, 5, 9)
    save_hf(load_hf(theirs), tmp_path / "hf")
    written = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (written.num_sparse_encoder_layers, written.encoder_sparse_step) == (3, 4)


def test_a_switch_model_without_sparse_blocks_becomes_a_t5(transformers, tmp_path):
    theirs = build(transformers, "SwitchTransformers", TWO | sparse(NONE, NONE))
    ours = load_hf(theirs)
    assert ours.config.routing is None
    save_hf(ours, tmp_path / "hf")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    assert type(back).__name__ == "T5ForConditionalGeneration"
    torch.testing.assert_close(logits_of(back), logits_of(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["T5", "MT5", "SwitchTransformers"])
def test_an_encoder_alone_is_refused_and_the_whole_model_has_it(transformers, tmp_path, family):
    """What is refused as a file is a method of the model that it is a part of."""
    whole = build(transformers, family, TWO)
    whole.save_pretrained(tmp_path / "whole")
    encoder = getattr(transformers, f"{family}EncoderModel").from_pretrained(tmp_path / "whole")
    encoder.eval().save_pretrained(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match=r"an encoder alone(.|\n)*call encode\(inputs\)"):
        load_hf(tmp_path / "encoder")
    inputs, _ = random_ids()
    with torch.no_grad():
        expected = encoder(input_ids=inputs, attention_mask=(inputs != 0).long())
        got = load_hf(tmp_path / "whole").encode(inputs).states
    real = inputs != 0
    torch.testing.assert_close(got[real], expected.last_hidden_state[real], rtol=0, atol=1e-5)


def test_what_is_written_here_opens_as_an_encoder_there(transformers, tmp_path):
    ours = load_hf(build(transformers, "T5", TWO | UL2))
    save_hf(ours, Path(tmp_path / "hf"))
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "hf").eval()
    inputs = random_ids()[0][:1]
    with torch.no_grad():
        expected = encoder(input_ids=inputs).last_hidden_state
        torch.testing.assert_close(ours.encode(inputs).states, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "complaint"),
    [
        ("UMT5", "'umt5' cannot be read: its layers have a relative bias each"),
        ("LongT5", "'longt5' cannot be read"),
    ],
)
def test_relatives_of_t5_with_other_attention_are_refused(transformers, family, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        load_hf(build(transformers, family, TWO))
