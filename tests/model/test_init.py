"""The initial values of every parameter."""

import math
from dataclasses import replace

import pytest
import torch

from switchworks.model import ModelConfig, RoutingConfig, SwitchFFN, SwitchTransformer, init
from switchworks.model.init import truncated_normal_

CONFIG = ModelConfig(
    vocab_size=256,
    d_model=64,
    d_ff=96,
    d_kv=8,
    num_heads=4,
    num_layers=2,
    gated=True,
    tied_head=False,
    routing=RoutingConfig(experts=6),
)
TRUNCATED = 0.8796
"""The standard deviation of a unit normal cut at two, by its closed form."""


@pytest.fixture(scope="module")
def parameters() -> dict[str, torch.Tensor]:
    return dict(SwitchTransformer(CONFIG, seed=3).named_parameters())


def test_narrow_experts_have_the_fan_in_of_their_own_width():
    routing = RoutingConfig(experts=6, every=1, expert_d_ff=24)
    weights = dict(SwitchTransformer(replace(CONFIG, routing=routing)).named_parameters())
    found = weights["encoder.blocks.0.ffn.experts.w_out"]
    assert found.shape == (6, 24, 64)
    assert std_of(found) == pytest.approx(TRUNCATED * math.sqrt(0.1 / 24), rel=0.03)
    alone = SwitchFFN(64, 96, routing).experts.w_out
    assert std_of(alone) == pytest.approx(TRUNCATED * math.sqrt(0.1 / 24), rel=0.03)


def std_of(weight: torch.Tensor) -> float:
    return weight.detach().double().std().item()


@pytest.mark.parametrize(
    ("name", "sigma"),
    [
        ("encoder.blocks.0.ffn.w_in.weight", math.sqrt(0.1 / 64)),
        ("encoder.blocks.0.ffn.w_gate.weight", math.sqrt(0.1 / 64)),
        ("decoder.blocks.0.ffn.w_out.weight", math.sqrt(0.1 / 96)),
        ("encoder.blocks.1.ffn.experts.w_in", math.sqrt(0.1 / 64)),
        ("encoder.blocks.1.ffn.experts.w_gate", math.sqrt(0.1 / 64)),
        ("decoder.blocks.1.ffn.experts.w_out", math.sqrt(0.1 / 96)),
        ("decoder.blocks.1.ffn.router.weight", math.sqrt(0.1 / 64)),
        ("head.weight", math.sqrt(0.1 / 64)),
    ],
)
def test_ffn_expert_router_and_head_weights_are_truncated_at_two_sigma(parameters, name, sigma):
    """Fedus et al. 2021, section 2.4: sigma = sqrt(s / fan-in) with s = 0.1. Fan-in leaves out
    the experts; the truncation is not made up for, as in Mesh-TF."""
    weight = parameters[name]
    assert weight.abs().max() <= 2 * sigma
    spread = 5 / math.sqrt(2 * weight.numel())
    assert std_of(weight) == pytest.approx(TRUNCATED * sigma, rel=spread)


@pytest.mark.parametrize(
    ("name", "sigma"),
    [
        ("embedding.weight", 1.0),
        ("encoder.blocks.0.self_attention.q.weight", (64 * 8) ** -0.5),
        ("decoder.blocks.1.cross_attention.k.weight", 64**-0.5),
        ("decoder.blocks.1.cross_attention.v.weight", 64**-0.5),
        ("encoder.blocks.1.self_attention.o.weight", (4 * 8) ** -0.5),
    ],
)
def test_embedding_and_attention_are_normal_and_ignore_the_scale(parameters, name, sigma):
    """Mesh-TF `attention.py`: 1/sqrt(d_k) is part of the query's deviation."""
    weight = parameters[name]
    assert std_of(weight) == pytest.approx(sigma, rel=5 / math.sqrt(2 * weight.numel()))
    assert weight.abs().max() > 2 * sigma


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_relative_bias_is_glorot_uniform(parameters, stack):
    """Mesh-TF's default initialiser, over [buckets, heads]."""
    weight = parameters[f"{stack}.relative_bias.weight"]
    limit = math.sqrt(6 / (32 + 4))
    assert 0.9 * limit < weight.abs().max() <= limit
    assert std_of(weight) == pytest.approx(limit / math.sqrt(3), rel=0.2)


def test_every_norm_starts_at_one(parameters):
    norms = [weight for name, weight in parameters.items() if "norm" in name]
    assert len(norms) == 2 * 2 + 2 * 3 + 2
    assert all((weight == 1).all() for weight in norms)


def test_no_two_experts_start_alike(parameters):
    w_in = parameters["encoder.blocks.1.ffn.experts.w_in"]
    assert torch.pdist(w_in.flatten(1)).min() > 0


def test_no_two_parameters_of_one_shape_start_alike(parameters):
    keys_and_values = [
        weight.flatten()
        for name, weight in parameters.items()
        if name.endswith((".k.weight", ".v.weight"))
    ]
    assert torch.pdist(torch.stack(keys_and_values)).min() > 0


STACK = "encoder.blocks.1.ffn.experts.w_in"


def stack_of(*ranges: tuple[int, int]) -> torch.Tensor:
    """The stack of experts in CONFIG's encoder, or these (first, last + 1) of each dimension."""
    bounds = ranges or ((0, 6), (0, 64), (0, 96))
    shard = torch.empty([stop - start for start, stop in bounds])
    init.fill_shard(shard, STACK, CONFIG, 3, (6, 64, 96), [start for start, _ in bounds])
    return shard


@pytest.mark.parametrize("chunk", [96, 1000, 2**20])
@pytest.mark.parametrize(
    "ranges",
    [((2, 4), (0, 64), (0, 96)), ((0, 6), (16, 32), (0, 96)), ((3, 6), (0, 64), (48, 96)),
     ((1, 2), (33, 35), (5, 7))],
)  # fmt: skip
def test_a_shard_has_the_values_that_the_full_parameter_has_there(ranges, chunk, monkeypatch):
    monkeypatch.setattr(init, "CHUNK", chunk)
    assert torch.equal(stack_of(*ranges), stack_of()[tuple(slice(*r) for r in ranges)])


def test_no_two_chunks_have_the_same_values(monkeypatch):
    monkeypatch.setattr(init, "CHUNK", 960)
    chunks = [chunk for expert in stack_of() for chunk in expert.split(10)]
    assert len({tuple(chunk.flatten()[:8].tolist()) for chunk in chunks}) == 6 * 7


def test_the_truncated_normal_has_the_distribution_of_torch_s_own():
    """Kolmogorov and Smirnov's distance of two samples, against its bound at 1 in 1000."""
    ours = (stack_of() / math.sqrt(0.1 / 64)).flatten()
    theirs = torch.nn.init.trunc_normal_(
        torch.empty(len(ours)), generator=torch.Generator().manual_seed(1)
    )
    grid = torch.linspace(-2, 2, 801)
    below = [torch.searchsorted(x.sort().values, grid) / len(ours) for x in (ours, theirs)]
    assert (below[0] - below[1]).abs().max() < 1.95 * math.sqrt(2 / len(ours))


def test_a_tenth_of_the_scale_is_a_tenth_of_the_variance():
    """Fedus et al. 2021, section 2.4: the factor acts on s, not on sigma."""
    large, small = torch.empty(64, 64), torch.empty(64, 64)
    for weight, scale in ((large, 1.0), (small, 0.1)):
        generator = torch.Generator().manual_seed(0)
        truncated_normal_(weight, math.sqrt(scale / 64), generator)
    assert std_of(large) / std_of(small) == pytest.approx(math.sqrt(10), rel=1e-5)


def test_a_layer_of_its_own_starts_as_one_in_a_model_does():
    layer = SwitchFFN(64, 96, RoutingConfig(experts=6))
    for weight, fan_in in ((layer.router.weight, 64), (layer.experts.w_out, 96)):
        sigma = math.sqrt(0.1 / fan_in)
        assert weight.abs().max() <= 2 * sigma
        spread = 5 / math.sqrt(2 * weight.numel())
        assert std_of(weight) == pytest.approx(TRUNCATED * sigma, rel=spread)


def test_the_same_seed_gives_the_same_model(parameters):
    again = dict(SwitchTransformer(CONFIG, seed=3).named_parameters())
    assert all(torch.equal(again[name], weight) for name, weight in parameters.items())


def test_another_seed_gives_another_model(parameters):
    other = dict(SwitchTransformer(CONFIG, seed=4).named_parameters())
    same = {name for name, weight in parameters.items() if torch.equal(other[name], weight)}
    assert same == {name for name in parameters if "norm" in name}


def test_a_dense_twin_starts_from_the_same_values_where_the_two_agree(parameters):
    dense = dict(SwitchTransformer(replace(CONFIG, routing=None), seed=3).named_parameters())
    shared = dense.keys() & parameters.keys()
    assert len(dense) - len(shared) == 2 * 3  # two sparse layers stand for three matrices each
    assert all(torch.equal(dense[name], parameters[name]) for name in shared)


def test_building_a_model_draws_nothing_from_the_global_generator():
    before = torch.random.get_rng_state()
    SwitchTransformer(CONFIG)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_on_meta_has_shapes_and_no_values():
    with torch.device("meta"):
        model = SwitchTransformer(CONFIG)
    assert all(weight.is_meta for weight in model.parameters())


# --- attention_init = "aligned" ---


@pytest.fixture(scope="module")
def aligned() -> SwitchTransformer:
    return SwitchTransformer(replace(CONFIG, attention_init="aligned"), seed=3).eval()


def test_t5s_attention_is_the_default_and_aligning_changes_two_kinds_of_weights(
    aligned, parameters
):
    changed = {n for n, w in aligned.named_parameters() if not torch.equal(w, parameters[n])}
    assert changed == {
        "encoder.relative_bias.weight",
        "decoder.relative_bias.weight",
        "decoder.blocks.0.cross_attention.q.weight",
        "decoder.blocks.1.cross_attention.q.weight",
    }


@pytest.mark.parametrize(
    ("stack", "head", "neighbour"),
    [("encoder", 0, -1), ("encoder", 1, 1), ("decoder", 0, 0), ("decoder", 1, -1)],
)
def test_half_of_the_aligned_heads_prefer_one_neighbour(aligned, stack, head, neighbour):
    table = getattr(aligned, stack).relative_bias
    bias = table(300, 300)[0, head].detach()
    middle = 150
    keys = bias[middle, : middle + 1] if stack == "decoder" else bias[middle]
    assert int(keys.argmax()) - middle == neighbour
    # Two nats a position, eight at most, around T5's own initial values.
    plain = SwitchTransformer(CONFIG, seed=3)
    fall = getattr(plain, stack).relative_bias(300, 300)[0, head].detach() - bias
    assert fall[middle, middle + neighbour] == 0
    assert fall[middle, middle + neighbour - 1] == pytest.approx(2, abs=1e-5)
    assert fall[middle, 0] == pytest.approx(8, abs=1e-5)


def test_the_other_half_of_the_heads_starts_as_t5s(aligned, parameters):
    for stack in ("encoder", "decoder"):
        name = f"{stack}.relative_bias.weight"
        weight = aligned.get_parameter(name)
        assert torch.equal(weight[:, 2:], parameters[name][:, 2:])


def test_an_aligned_decoder_first_reads_the_token_it_holds(aligned):
    """Of sixteen different tokens, seen as embeddings, most decoder positions find their own."""
    tokens = torch.arange(100, 116)[None]
    x = torch.nn.functional.embedding(tokens, aligned.embedding.weight)

    def found(model: SwitchTransformer) -> float:
        attention = model.decoder.blocks[0].cross_attention
        query, keys, _ = attention.qkv(x)
        return (query @ keys.k.mT).argmax(-1).eq(torch.arange(16)).float().mean().item()

    assert found(aligned) > 0.6
    assert found(SwitchTransformer(CONFIG, seed=3)) < 0.3


def test_a_language_model_may_start_aligned_too():
    config = replace(CONFIG, attention_init="aligned", decoder_only=True)
    bias = SwitchTransformer(config).decoder.relative_bias(20, 20)[0]
    assert int(bias[1, 10, :11].argmax()) == 9
