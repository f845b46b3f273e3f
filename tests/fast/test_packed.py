"""Products with copies of weights in another order: the same numbers, of weights as they are."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from switchworks.fast import for_decoding
from switchworks.fast.packed import PackedWeights, can_pack, run_packed, store_of
from switchworks.fast.small_batch import expert_matmul, linear
from switchworks.generate import generate
from switchworks.model import ExpertInput, Experts, ModelConfig, RoutingConfig, SwitchTransformer

CONFIG = ModelConfig(
    vocab_size=512,
    d_model=128,
    d_ff=512,
    d_kv=128,
    num_heads=4,
    num_layers=2,
    routing=RoutingConfig(experts=4),
)
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
each_dtype = pytest.mark.parametrize("dtype", CLOSE)


@torch.no_grad()
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (32, 1), (2, 9), (300,)])
def test_a_product_with_a_copy_is_the_product(dtype, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 128).to(dtype), (torch.randn(512, 128) / 11).to(dtype)
    exact = F.linear(x.double(), weight.double())
    store = PackedWeights()
    for _ in range(3):  # as it lies, then with a copy
        ours = linear(store, x, weight)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@torch.no_grad()
def test_a_copy_is_made_when_a_weight_is_used_again():
    store, weight = PackedWeights(), torch.randn(512, 128)
    copies = []
    for _ in range(3):
        linear(store, torch.randn(4, 128), weight)
        copies.append(store.copies)
    assert copies == [0, 1, 1]


@torch.no_grad()
@each_dtype
@pytest.mark.parametrize("gated", [False, True])
def test_experts_with_copies_give_what_they_give(dtype, gated):
    torch.manual_seed(0)
    experts = Experts(4, 128, 512, gated=gated).to(dtype)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    store, counts = PackedWeights(), [3, 0, 1, 5]
    inputs = ExpertInput(torch.randn(9, 128).to(dtype), counts)
    expected = experts(inputs)
    experts.matmul, experts.run = expert_matmul, store.seam(run_packed)
    for _ in range(3):
        torch.testing.assert_close(
            experts(inputs).float(), expected.float(), rtol=5 * CLOSE[dtype], atol=5 * CLOSE[dtype]
        )
    matrices = 2 + gated
    assert store.copies == matrices * (3 if dtype == torch.bfloat16 else 2)  # one row is split


def test_what_is_written_follows_weights_that_have_changed():
    model, ids = SwitchTransformer(CONFIG, seed=1).eval(), torch.randint(2, 512, (3, 9))
    generate(model, ids, max_length=6)
    for weight in model.parameters():
        weight.data.mul_(-1.5)
    fresh = SwitchTransformer(CONFIG, seed=1).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(generate(model, ids, max_length=6), generate(fresh, ids, max_length=6))


def test_experts_are_not_copied_where_memory_is_short(monkeypatch):
    monkeypatch.setattr("switchworks.fast.packed._free_memory", lambda: 3e6)
    model = SwitchTransformer(CONFIG, seed=1)  # of 4.2 MB of experts
    with for_decoding(model):
        bank = model.switch_layers["decoder.1"].experts
        assert "matmul" in vars(bank)
        assert "run" not in vars(bank)


def test_a_decoding_inside_another_uses_its_copies():
    model = SwitchTransformer(CONFIG, seed=1)
    attention = model.decoder.blocks[0].self_attention
    with for_decoding(model):
        outer = store_of(attention.q.matmul)
        with for_decoding(model):
            assert store_of(attention.q.matmul) is outer
    assert "matmul" not in vars(attention.q)


@pytest.mark.parametrize(
    "weight",
    [
        torch.empty(512, 128, dtype=torch.float64),
        torch.empty(16, 128),
        torch.empty(512, 128, device="meta"),
    ],
)
def test_other_weights_are_multiplied_as_they_lie(weight):
    assert not can_pack(weight)


def test_with_gradients_weights_are_multiplied_as_they_lie():
    weight, x = torch.randn(512, 128, requires_grad=True), torch.randn(4, 128)
    store = PackedWeights()
    for _ in range(3):
        linear(store, x, weight).sum().backward()
    assert store.copies == 0
    torch.testing.assert_close(weight.grad, 3 * x.sum(dim=0).expand(512, -1))


@each_dtype
def test_the_tokens_are_those_of_the_plain_model(dtype, monkeypatch):
    model = SwitchTransformer(replace(CONFIG, init_scale=1.0), seed=2).eval().to(dtype)
    ids = torch.randint(2, 512, (6, 9), generator=torch.Generator().manual_seed(0))
    ours = generate(model, ids, max_length=2)
    monkeypatch.setattr("switchworks.fast.packed._is_available", lambda: False)
    assert torch.equal(ours, generate(model, ids, max_length=2))
