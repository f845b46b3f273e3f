"""Products of few rows in shares: the same numbers, and a model that is afterwards as before."""

from dataclasses import replace

import pytest
import torch

from switchworks.fast.seams import skip_losses, swapped
from switchworks.fast.small_batch import (
    FEW_KEYS,
    MAX_ROWS,
    attend_query,
    dispatch_few,
    rms_norm,
    small_batch,
    split_k_matmul,
    split_n_linear,
)
from switchworks.generate import BeamSearch, generate
from switchworks.model import DISPATCHERS, ModelConfig, RoutingConfig, SwitchFFN, SwitchTransformer
from switchworks.model.attention import AttentionBase, attend, mask_to_bias
from switchworks.model.experts import Experts
from switchworks.model.layers import RMSNorm, SharedDropout
from switchworks.model.strategies import route

CONFIG = ModelConfig(
    vocab_size=512,
    d_model=128,
    d_ff=512,
    d_kv=128,
    num_heads=4,
    num_layers=2,
    routing=RoutingConfig(experts=4),
)
CLOSE = {"rtol": 1e-5, "atol": 1e-4}
each_kind = pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, routing=None, gated=True),
        replace(CONFIG, tied_head=True),
        replace(CONFIG, tied_head=False),
        replace(CONFIG, decoder_only=True),
    ],
    ids=["dense", "tied", "untied", "decoder alone"],
)


def inputs(rows: int = 3) -> torch.Tensor:
    return torch.randint(2, 512, (rows, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (MAX_ROWS, 1), (2, 3), (1, 3)])
def test_a_product_in_shares_of_the_outputs_is_the_product(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 128), torch.randn(512, 128)
    ours, exact = split_n_linear(x, weight), x.double() @ weight.double().T
    assert ours.shape == (*shape, 512)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours.double(), exact, **CLOSE)


@torch.no_grad()
def test_rows_taken_from_the_middle_of_others_are_read_where_they_lie():
    torch.manual_seed(0)
    many, weight = torch.randn(6, 3, 256), torch.randn(512, 128)
    for x in (many[2:4, 1, 128:], many[1, :, :128], many.mT[1, :128, :2].T):
        torch.testing.assert_close(split_n_linear(x, weight), x @ weight.T, **CLOSE)
        by_inputs = split_k_matmul(x, weight.T.contiguous())
        torch.testing.assert_close(by_inputs, x @ weight.T, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS])
def test_a_product_in_shares_of_the_inputs_is_the_product(rows):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 128), torch.randn(128, 512)
    exact = x.double() @ weight.double()
    torch.testing.assert_close(split_k_matmul(x, weight).double(), exact, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_a_norm_of_fewer_operations_is_the_norm(size):
    torch.manual_seed(0)
    norm, x = RMSNorm(128, epsilon=1e-6), size * torch.randn(2, 3, 128)
    norm.weight.copy_(torch.randn(128))
    ours = rms_norm(x, norm.weight, 1e-6)
    torch.testing.assert_close(ours.double(), norm.double()(x.double()), rtol=1e-5, atol=1e-6)


def test_with_gradients_nothing_changes():
    model, tokens = SwitchTransformer(CONFIG, seed=1).eval(), inputs()
    model(tokens, tokens).losses.total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with swapped(small_batch(model)):
        model(tokens, tokens).losses.total.backward()
    assert expected
    assert all(torch.equal(model.get_parameter(name).grad, g) for name, g in expected.items())


@each_kind
def test_a_model_scores_the_same_and_is_afterwards_as_it_was(config):
    model = SwitchTransformer(config, seed=1).eval()
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    given = inputs()[:, :0] if config.decoder_only else inputs()
    with torch.no_grad():
        expected = model(given, inputs()[:1].expand(3, -1)).logits
        with swapped(small_batch(model)):
            inside = {name: set(vars(module)) for name, module in model.named_modules()}
            got = model(given, inputs()[:1].expand(3, -1)).logits
    assert inside != modules
    assert {name: set(vars(module)) for name, module in model.named_modules()} == modules
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@each_kind
@pytest.mark.parametrize("beams", [None, BeamSearch(beams=3)])
def test_the_tokens_written_are_those_of_the_plain_products(config, beams, monkeypatch):
    model = SwitchTransformer(config, seed=1)
    ours = generate(model, inputs(), max_length=12, beams=beams)
    monkeypatch.setattr("switchworks.generate.batches.for_decoding", skip_losses)
    assert torch.equal(ours, generate(model, inputs(), max_length=12, beams=beams))


def test_inside_another_s_decoding_nothing_is_taken_away_twice():
    model = SwitchTransformer(CONFIG, seed=1)
    before = set(vars(model.encoder.blocks[0].ffn.w_in))
    with swapped(small_batch(model)):
        with swapped(small_batch(model)):
            pass
        assert set(vars(model.encoder.blocks[0].ffn.w_in)) == before | {"matmul"}
    assert set(vars(model.encoder.blocks[0].ffn.w_in)) == before


def changed(model: SwitchTransformer) -> set[str]:
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with swapped(small_batch(model)):
        inside = {name: set(vars(module)) for name, module in model.named_modules()}
    return {name for name in before if inside[name] != before[name]}


def names_of(model: SwitchTransformer, *kinds: type) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def decoder_attention(model: SwitchTransformer) -> set[str]:
    return {name for name in names_of(model, AttentionBase) if name.startswith("decoder")}


def test_in_float64_only_attention_and_the_dispatch_of_a_single_token_change():
    model = SwitchTransformer(CONFIG, seed=1).double()
    assert changed(model) == names_of(model, SwitchFFN) | decoder_attention(model)


def test_of_a_small_model_no_product_changes():
    small = SwitchTransformer(replace(CONFIG, d_model=32, d_ff=64, d_kv=16, vocab_size=40), seed=1)
    assert changed(small) == names_of(small, RMSNorm, SwitchFFN) | decoder_attention(small)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 40])
def test_one_query_is_attended_for_as_many_are(dtype, rows):
    """Few keys, and more than FEW_KEYS, with and without masks."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(rows, 4, 1, 16),
        torch.randn(rows, 4, 70, 16),
        torch.randn(rows, 4, 70, 16),
    )
    mask = mask_to_bias(torch.arange(70)[None, None, None] < 50, torch.float32)
    assert k.numel() > FEW_KEYS or rows == 1
    none = SharedDropout(0.0)
    for bias in (None, mask, mask + torch.randn(1, 4, 1, 70)):
        expected = attend(q, k, v, bias, none)
        given = None if bias is None else bias.to(dtype)
        ours = attend_query(q.to(dtype), k.to(dtype), v.to(dtype), given, none)
        assert ours.dtype == dtype
        close = 6e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours.float(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("gated", [False, True])
def test_a_single_token_is_dispatched_as_by_the_einsum(real, gated):
    experts = Experts(4, 6, 10, gated=gated)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    probs, x = torch.rand(1, 1, 4).softmax(dim=-1), torch.randn(1, 1, 6)
    routes = route(probs, torch.tensor([[real]]), None)
    expected = DISPATCHERS["einsum"](x, routes, experts, None)
    torch.testing.assert_close(dispatch_few(x, routes, experts, None), expected)
