"""Random models of many shapes, to transformers and back: weights, logits and greedy tokens.

Each test draws its configurations once and for all (derandomize), a few for each kind of model.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from switchworks import load_hf, save_hf
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer

KINDS = ("t5", "t5_1_1", "mt5", "switch", "switch_untied")
BF16 = 2.0**-6
"""Of a router's root mean square logit: bfloat16 rounds by up to 2^-9, and some thirty roundings
lie one behind the other on the way to a router: sqrt(30) 2^-9 = 2^-6.5."""
few = settings(
    max_examples=2,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # to shrink a failing model would take minutes
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@st.composite
def shapes(draw) -> dict[str, int]:
    """Sizes that share no factor by habit; at least one stack is deep enough to be sparse."""
    layers, decoder_layers = draw(st.sampled_from([(1, 2), (2, 1), (2, 3), (3, 2), (4, 3)]))
    return {
        "vocab_size": draw(st.integers(20, 70)),
        "d_model": draw(st.integers(3, 20)),
        "d_kv": draw(st.integers(2, 9)),
        "d_ff": draw(st.integers(3, 30)),
        "num_heads": draw(st.integers(1, 5)),
        "num_layers": layers,
        "num_decoder_layers": decoder_layers,
    }


@st.composite
def batches(draw) -> tuple[Tensor, Tensor]:
    """Inputs and targets of odd lengths; every row but the first ends in padding."""
    B, L, T = draw(st.integers(1, 3)), draw(st.integers(2, 12)), draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    inputs = torch.randint(2, 20, (B, 2 * L + 1), generator=generator)
    targets = torch.randint(2, 20, (B, 2 * T + 1), generator=generator)
    for row in range(1, B):
        inputs[row, L + row :] = 0
        targets[row, T + row :] = 0
    return inputs, targets


@st.composite
def sparseness(draw) -> dict[str, int]:
    return {"experts": draw(st.integers(1, 7)), "every": draw(st.integers(1, 2))}


def theirs_of(transformers: Any, kind: str, shape: dict[str, int], sparse: dict[str, int]) -> Any:
    """A random model of transformers, norms included, that drops no token."""
    common = {
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 24,
    }
    if kind.startswith("switch"):
        every = sparse["every"]
        counts = {
            f"num_sparse_{stack}_layers": count_for(shape[layers], every)
            for stack, layers in (("encoder", "num_layers"), ("decoder", "num_decoder_layers"))
        }
        config = transformers.SwitchTransformersConfig(
            **shape,
            **common,
            **counts,
            num_experts=sparse["experts"],
            expert_capacity=1000,
            dense_act_fn="relu" if kind == "switch" else "gelu_new",
            tie_word_embeddings=kind == "switch",
        )
        model = transformers.SwitchTransformersForConditionalGeneration(config)
        for stack in (model.encoder, model.decoder):  # untied, each draws its own embedding
            stack.embed_tokens.weight.data.copy_(model.shared.weight.data)
    elif kind == "mt5":
        config = transformers.MT5Config(**shape, **common)
        model = transformers.MT5ForConditionalGeneration(config)
    else:
        new = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        config = transformers.T5Config(**shape, **common, **(new if kind == "t5_1_1" else {}))
        model = transformers.T5ForConditionalGeneration(config)
    if kind in ("t5_1_1", "mt5"):  # transformers 5 ties new ones; those released are not
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight) / 4)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def count_for(layers: int, every: int) -> int:
    """The number that makes transformers' every second block sparse: more than all make none."""
    return layers if every == 1 else layers // 2 or layers + 1


def ours_of(kind: str, shape: dict[str, int], sparse: dict[str, int]) -> SwitchTransformer:
    """A random model of ours that transformers can express as `kind`."""
    torch.manual_seed(0)
    routing = RoutingConfig(**sparse, jitter=0.0) if kind.startswith("switch") else None
    config = ModelConfig(
        **shape,
        activation="relu" if kind in ("t5", "switch") else "gelu",
        gated=kind in ("t5_1_1", "mt5"),
        tied_head=kind in ("t5", "switch"),
        relative_buckets=16,
        relative_max_distance=24,
        routing=routing,
        init_scale=1.0,
    )
    model = SwitchTransformer(config, seed=sum(shape.values())).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@torch.no_grad()
def logits_of_theirs(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    labels = targets.masked_fill(targets == 0, -100)
    return model(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels).logits


@torch.no_grad()
def largest_difference(ours: SwitchTransformer, theirs: Any, batch: tuple[Tensor, Tensor]) -> float:
    """Of the logits of both at real targets, over the largest logit if that exceeds 1."""
    real = batch[1] != 0
    expected = logits_of_theirs(theirs, *batch)[real].double()
    got = ours(*batch).logits[real].double()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


def assert_same_tokens(ours: SwitchTransformer, theirs: Any, inputs: Tensor) -> None:
    """Greedy decoding with a cache, 7 tokens, rows padded after their end.

    Theirs does without where the decoder is the deeper stack: its cache is as deep as the encoder
    and raises IndexError (seen in 5.23.0).
    """
    expected = theirs.generate(
        input_ids=inputs,
        attention_mask=(inputs != 0).long(),
        max_new_tokens=7,
        do_sample=False,
        use_cache=theirs.config.num_decoder_layers <= theirs.config.num_layers,
    )[:, 1:]
    got = ours.generate(inputs, max_length=7)
    assert torch.equal(got, expected)


def assert_same_state(one: Any, other: Any) -> None:
    before, after = one.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("kind", KINDS)
@few
@given(shape=shapes(), sparse=sparseness(), batch=batches())
def test_theirs_to_ours_and_back(transformers, kind, shape, sparse, batch):
    """Bit-equal weights; logits within 1e-4 of the largest; the same greedy tokens."""
    torch.manual_seed(0)
    theirs = theirs_of(transformers, kind, shape, sparse)
    ours = load_hf(theirs)
    assert largest_difference(ours, theirs, batch) < 1e-4
    assert_same_tokens(ours, theirs, batch[0])
    with tempfile.TemporaryDirectory() as directory:
        save_hf(ours, Path(directory) / "hf")
        back = transformers.AutoModelForSeq2SeqLM.from_pretrained(Path(directory) / "hf")
    assert_same_state(back, theirs)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(shape=shapes(), sparse=sparseness(), batch=batches())
def test_ours_to_theirs_and_back(transformers, kind, shape, sparse, batch):
    """Bit-equal weights, an equal configuration, the same logits and greedy tokens."""
    ours = ours_of(kind, shape, sparse)
    with tempfile.TemporaryDirectory() as directory:
        save_hf(ours, Path(directory) / "hf", shard_bytes=5000)
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(Path(directory) / "hf").eval()
        back = load_hf(Path(directory) / "hf")
    assert largest_difference(ours, theirs, batch) < 1e-4
    assert_same_tokens(ours, theirs, batch[0])
    assert_same_state(back, ours)
    assert_same_state(load_hf(theirs), ours)
    names = ("d_model", "d_kv", "num_layers", "activation", "gated", "tied_head")
    assert [getattr(back.config, name) for name in names] == [
        getattr(ours.config, name) for name in names
    ]


@pytest.mark.parametrize("kind", KINDS)
@few
@given(shape=shapes(), sparse=sparseness())
def test_bfloat16_weights_go_there_and_back_bit_equal(transformers, kind, shape, sparse):
    theirs = theirs_of(transformers, kind, shape, sparse).bfloat16()
    with tempfile.TemporaryDirectory() as directory:
        save_hf(load_hf(theirs), Path(directory) / "hf")
        back = transformers.AutoModelForSeq2SeqLM.from_pretrained(Path(directory) / "hf")
    assert back.dtype == torch.bfloat16
    assert_same_state(back, theirs)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(shape=shapes(), sparse=sparseness(), seed=st.integers(0, 1000))
def test_models_agree_in_bfloat16(transformers, kind, shape, sparse, seed):
    """Root mean squares, with theirs's own distance from float32 as the measure: ours is as far
    from float32, or half as much again, and at most twice as far from theirs. A greedy token is
    the best or nearly, by their scores.

    Of switch models only rows in which no choice of an expert is a matter of rounding: another
    expert is another answer, and not a less exact one.
    """
    torch.manual_seed(0)
    theirs = theirs_of(transformers, kind, shape, sparse).bfloat16()
    ours = load_hf(theirs)
    inputs, targets = torch.randint(
        2, 20, (2, 120, 3), generator=torch.Generator().manual_seed(seed)
    )
    inputs = F.pad(inputs, (0, 2))  # padded
    clear = rows_of_clear_choice(ours, inputs, targets)
    assume(clear.sum() >= 8)  # else the example has too few such rows to say anything
    expected = logits_of_theirs(theirs, inputs[clear], targets[clear]).float()
    wide = logits_of_theirs(copy.deepcopy(theirs).float(), inputs[clear], targets[clear])
    with torch.no_grad():
        got = ours(inputs[clear], targets[clear]).logits.float()
    rounding = rms(expected - wide)
    assert rounding < 2**-4 * rms(wide)
    assert rms(got - wide) < 1.5 * rounding
    assert rms(got - expected) < 2 * rounding

    written = ours.generate(inputs, max_length=3)
    clear = rows_of_clear_choice(ours, inputs, written)
    assume(clear.sum() >= 8)  # else the example has too few such rows to say anything
    written = written[clear]
    scores = logits_of_theirs(theirs, inputs[clear], written)[written != 0].float()
    chosen = scores.gather(-1, written[written != 0][:, None]).squeeze(-1)
    # Two entries of 4 deviations each, at most, between two scores that changed places.
    assert (scores.amax(-1) - chosen <= 8 * rounding).all()


@torch.no_grad()
def rows_of_clear_choice(model: SwitchTransformer, inputs: Tensor, targets: Tensor) -> Tensor:
    """True for rows in which, in float32, the best expert of every token beats the second by
    more than what bfloat16 makes of a router's logits: 4 BF16 of their root mean square."""
    wide = copy.deepcopy(model).float()
    clear = torch.ones(len(inputs), dtype=torch.bool)

    def look(router: nn.Module, x: object, logits: Tensor) -> None:
        if logits.shape[-1] > 1:
            best, second = logits.view(len(inputs), -1, logits.shape[-1]).topk(2).values.unbind(-1)
            clear.logical_and_((best - second).amin(dim=1) > 4 * BF16 * rms(logits))

    for layer in wide.switch_layers.values():
        layer.router.register_forward_hook(look)
    wide(inputs, targets)
    return clear


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_a_switch_layer_agrees_in_bfloat16_wherever_its_choice_is_clear(transformers):
    """The same experts and, of the largest entry, answers within 2^-7: the gate, the hidden layer
    and the answer are rounded. transformers rounds the probabilities before it chooses, so where
    the best two are closer than that it may choose another expert than ours."""
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 10, "num_heads": 2}
    shape |= {"num_layers": 1, "num_decoder_layers": 1}
    theirs = theirs_of(transformers, "switch", shape, {"experts": 4, "every": 1}).bfloat16()
    layer, switch = theirs.encoder.block[0].layer[1].mlp, load_hf(theirs).encoder.blocks[0].ffn
    x = torch.randn(2, 31, 8).bfloat16()
    with torch.no_grad():
        got, report = switch(x)
        probs = switch.router(x).softmax(-1)
        expected, chosen = layer(x), layer.router(x)[0].argmax(-1)
    best, second = probs.topk(2).values.unbind(-1)
    clear = best - second > 2**-8 * best
    assert clear.float().mean() > 0.9
    assert torch.equal(report.routes.expert[clear], chosen[clear])
    assert (got - expected)[clear].abs().max() < 2**-7 * expected.abs().max()
