"""Products of few rows in shares: the same numbers, and a model that is afterwards as it was."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from switchworks.generate import BeamSearch, generate
from switchworks.kernels.few_rows import FEW, few_rows, linear
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer

CONFIG = ModelConfig(
    vocab_size=512,
    d_model=128,
    d_ff=512,
    d_kv=128,
    num_heads=4,
    num_layers=2,
    routing=RoutingConfig(experts=4),
)
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
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (FEW, 1), (2, 3), (FEW + 1, 1), (0, 4)])
def test_a_product_in_shares_is_the_product(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 128), torch.randn(512, 128)
    ours, exact = linear(x, weight), x.double() @ weight.double().T
    assert ours.shape == (*shape, 512)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)


def test_with_gradients_nothing_changes():
    x, weight = torch.randn(2, 128), torch.randn(512, 128, requires_grad=True)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    linear(x, weight).sum().backward()
    assert weight.grad is not None


@each_kind
def test_a_model_scores_the_same_and_is_afterwards_as_it_was(config):
    model = SwitchTransformer(config, seed=1).eval()
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    given = inputs()[:, :0] if config.decoder_only else inputs()
    with torch.no_grad():
        expected = model(given, inputs()[:1].expand(3, -1)).logits
        with few_rows(model):
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
    monkeypatch.setattr("switchworks.kernels.few_rows.FEW", 0)
    assert torch.equal(ours, generate(model, inputs(), max_length=12, beams=beams))


def test_inside_another_s_decoding_nothing_is_taken_away_twice():
    model = SwitchTransformer(CONFIG, seed=1)
    before = set(vars(model.encoder.blocks[0].ffn.w_in))
    with few_rows(model):
        with few_rows(model):
            pass
        assert set(vars(model.encoder.blocks[0].ffn.w_in)) == before | {"forward"}
    assert set(vars(model.encoder.blocks[0].ffn.w_in)) == before


def test_other_dtypes_and_small_matrices_are_left_alone():
    wide = SwitchTransformer(CONFIG, seed=1).bfloat16()
    small = SwitchTransformer(replace(CONFIG, d_model=32, d_ff=64, d_kv=16, vocab_size=40), seed=1)
    for model in (wide, small):
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        with few_rows(model):
            assert {n: set(vars(module)) for n, module in model.named_modules()} == before
