"""Every fast path against its reference: values, gradients, noise, and what it keeps."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.cases import mostly_slow
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from switchworks.fast import attention
from switchworks.fast.attention import (
    FactoredBias,
    attend_in_blocks,
    factored,
    spread_diagonals,
    sum_diagonals,
)
from switchworks.fast.kernels import use_fast_kernels
from switchworks.fast.norm import rms_norm
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.model.attention import RelativeBias, attend, causal, mask_to_bias, segment_mask
from switchworks.model.layers import RMSNorm, SharedDropout

NO_DROPOUT = SharedDropout(0.0)
CONFIG = ModelConfig(
    vocab_size=40,
    d_model=16,
    d_ff=24,
    d_kv=8,
    num_heads=3,
    num_layers=2,
    routing=RoutingConfig(experts=4, group_sequences=2),
)


@pytest.fixture(params=[1, 40, 10**6], ids=["a query at a time", "some", "all at once"])
def block(request, monkeypatch) -> int:
    monkeypatch.setattr(attention, "BLOCK", request.param)
    return request.param


def heads(B=3, H=2, L=5, M=7, K=4, dtype=torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(B, H, L, K), (B, H, M, K), (B, H, M, K)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def masks(B=3, L=5, M=7) -> dict[str, Tensor | None]:
    """Padding, packing, causal, and rows that see nothing, as the model hands them over."""
    ones = torch.ones(B, M, dtype=torch.long)
    padded, packed = ones.clone(), ones.clone()
    padded[1, M // 2 + 1 :], packed[:, M // 2 :] = 0, 2
    seen = {
        "padding": (padded != 0)[:, None, None],
        "packing": segment_mask(packed[:, :L], packed),
        "causal": causal(L, M, torch.device("cpu")),
    }
    return {"none": None} | {name: mask_to_bias(mask, torch.float64) for name, mask in seen.items()}


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The same numbers come from above whatever the dtype of `y`, if they are few bits."""
    torch.manual_seed(1)
    return list(torch.autograd.grad(y, inputs, torch.randn(y.shape).bfloat16().to(y.dtype)))


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("biased", [True, False])
def test_attention_in_blocks_is_attention(mask, biased, block):
    q, k, v = heads()
    distances = torch.randn(2, 5 + 7 - 1, dtype=torch.float64, requires_grad=True)
    hidden = masks()[mask]
    inputs = [q, k, v, distances] if biased else [q, k, v]
    whole = spread_diagonals(distances, 7)[None] if biased else None
    if hidden is not None:
        whole = hidden if whole is None else whole + hidden
    parts = FactoredBias(distances, hidden) if biased else hidden
    expected, y = attend(q, k, v, whole, NO_DROPOUT), attend_in_blocks(q, k, v, parts, NO_DROPOUT)
    # The reference takes its softmax in float32, whatever it is given.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    pairs = zip(gradients(y, inputs), gradients(expected, inputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", masks(B=2, L=2, M=3))
def test_its_gradients_are_the_slopes_of_its_values(mask, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 6)  # a query at a time
    q, k, v = heads(B=2, L=2, M=3, K=2)
    distances = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    hidden = masks(B=2, L=2, M=3)[mask]

    def call(q: Tensor, k: Tensor, v: Tensor, distances: Tensor) -> Tensor:
        return attend_in_blocks(q, k, v, FactoredBias(distances, hidden), NO_DROPOUT)

    assert torch.autograd.gradcheck(call, (q, k, v, distances))


def test_a_query_that_sees_no_key_gets_what_the_reference_gives_it_and_so_do_its_gradients(block):
    q, k, v = heads(dtype=torch.float32)
    distances = torch.randn(2, 11, requires_grad=True)
    seen = torch.ones(3, 1, 5, 7, dtype=torch.bool)
    seen[1, :, 2:] = False
    hidden = mask_to_bias(seen, torch.float32)
    y = attend_in_blocks(q, k, v, FactoredBias(distances, hidden), NO_DROPOUT)
    expected = attend(q, k, v, spread_diagonals(distances, 7)[None] + hidden, NO_DROPOUT)
    torch.testing.assert_close(y, expected)
    inputs = [q, k, v, distances]
    for ours, theirs in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_attention_in_blocks_drops_what_the_reference_drops():
    q, k, v = heads()
    dropout = SharedDropout(0.4)
    torch.manual_seed(5)
    expected = attend(q, k, v, None, dropout)
    torch.manual_seed(5)
    y = attend_in_blocks(q, k, v, None, dropout)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(y, [q, k, v]), gradients(expected, [q, k, v]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_attention_in_bfloat16_is_as_near_to_exact_as_the_reference():
    wide = heads(L=9, M=11, K=8)
    exact = attend(*wide, None, NO_DROPOUT)
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    errors = [
        (form(*narrow, None, NO_DROPOUT).double() - exact).norm() / exact.norm()
        for form in (attend_in_blocks, attend)
    ]
    assert errors[0] < 1.1 * errors[1] + 2**-9


@pytest.mark.parametrize(("length", "keys"), [(1, 1), (1, 6), (5, 1), (4, 7), (7, 4)])
def test_diagonals_are_summed_as_they_are_spread(length, keys):
    """<spread(d), m> = <d, sum(m)> for all d and m: one is the transpose of the other."""
    distances = torch.randn(2, length + keys - 1, dtype=torch.float64)
    matrix = torch.randn(2, length, keys, dtype=torch.float64)
    left = (spread_diagonals(distances, keys) * matrix).sum()
    torch.testing.assert_close(left, (distances * sum_diagonals(matrix)).sum())


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_bias_factored_is_the_bias(bidirectional):
    bias = RelativeBias(CONFIG, bidirectional=bidirectional)
    nn.init.normal_(bias.weight)
    whole = bias(5, 9, first=4)
    bias.form = factored
    parts = bias(5, 9, first=4)
    assert isinstance(parts, FactoredBias)
    assert torch.equal(spread_diagonals(parts.distances[:, : 5 + 9 - 1], 9)[None], whole)


def test_masks_add_up_in_a_bias_factored():
    one, two = torch.randn(1, 1, 2, 3), torch.randn(4, 1, 1, 3)
    parts = FactoredBias(torch.zeros(2, 4)) + one + two
    assert parts.mask is not None
    assert torch.equal(parts.mask, one + two)


@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 8), (2, 3, 2, 6)])
def test_the_norm_is_the_reference_s(shape):
    norm = RMSNorm(shape[-1], 1e-6).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = rms_norm(x, norm.weight, 1e-6), norm(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    inputs = [x, norm.weight]
    for ours, theirs in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, norm.weight))


def test_the_norm_in_bfloat16_rounds_where_the_reference_does():
    torch.manual_seed(0)
    norm, x = RMSNorm(32, 1e-6).bfloat16(), torch.randn(4, 32).bfloat16()
    nn.init.normal_(norm.weight)
    assert torch.equal(rms_norm(x, norm.weight, 1e-6), norm(x))
    x.requires_grad_()
    exact = RMSNorm(32, 1e-6).double()
    exact.weight.data = norm.weight.data.double()
    wide = x.detach().double().requires_grad_()
    expected = gradients(exact(wide), [wide, exact.weight])
    ours = gradients(rms_norm(x, norm.weight, 1e-6), [x, norm.weight])
    theirs = gradients(norm(x), [x, norm.weight])
    for our, their, right in zip(ours, theirs, expected, strict=True):
        assert (our - right).norm() < (their - right).norm() + 2**-9 * right.norm()
        assert (our - right).norm() < 2**-7 * right.norm()


def kept_bytes(work) -> dict[tuple[int, ...], int]:
    """Shape -> bytes of every tensor that `work` keeps for its backward pass; each storage once."""
    seen: set[int] = set()
    sizes: dict[tuple[int, ...], int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in seen:
            seen.add(x.untyped_storage().data_ptr())
            shape = tuple(x.shape)
            sizes[shape] = sizes.get(shape, 0) + x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        work()
    return sizes


def test_attention_in_blocks_keeps_nothing_of_the_size_of_its_scores():
    q, k, v = heads(L=40, M=40)
    distances = torch.randn(2, 79, dtype=torch.float64, requires_grad=True)
    hidden = mask_to_bias(torch.ones(3, 1, 40, 40, dtype=torch.bool), torch.float64)
    parts = FactoredBias(distances, hidden)
    kept = kept_bytes(lambda: attend_in_blocks(q, k, v, parts, NO_DROPOUT))
    assert all(len(shape) < 4 or shape[1] == 1 or shape[-1] == 4 for shape in kept)
    whole = spread_diagonals(distances, 40)[None] + hidden
    assert (3, 2, 40, 40) in kept_bytes(lambda: attend(q, k, v, whole, NO_DROPOUT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_keeps_its_input_and_a_number_per_row(dtype):
    x = torch.randn(64, 32).to(dtype).requires_grad_()
    norm = RMSNorm(32, 1e-6).to(dtype)
    kept = kept_bytes(lambda: rms_norm(x * 2, norm.weight, 1e-6))
    assert kept == {
        (64, 32): 64 * 32 * x.element_size(),
        (64, 1): 256,
        (32,): 32 * x.element_size(),
    }


def rows(padding: bool) -> dict[str, Tensor]:
    torch.manual_seed(3)
    batch = {"inputs": torch.randint(2, 40, (4, 11)), "targets": torch.randint(2, 40, (4, 6))}
    if padding:
        batch["inputs"][1, 7:], batch["targets"][2, 3:] = 0, 0
    return batch


PACKED = {
    "input_segments": torch.tensor([[1] * 5 + [2] * 6] * 4),
    "target_segments": torch.tensor([[1] * 2 + [2] * 3 + [0]] * 4),
}


KINDS = ["plain", "padded", "packed"]
EACH_ONCE = [
    ("ffn", False, 0.2, "plain"),
    ("both", True, 0.0, "plain"),
    ("ffn", False, 0.0, "padded"),
    ("both", True, 0.2, "padded"),
    ("both", False, 0.2, "packed"),
    ("ffn", True, 0.0, "packed"),
]


@pytest.mark.parametrize(
    ("layers", "decoder_only", "rate", "kind"),
    mostly_slow(itertools.product(["ffn", "both"], [False, True], [0.0, 0.2], KINDS), EACH_ONCE),
)
def test_a_model_with_fast_paths_learns_what_it_learns_without(layers, decoder_only, rate, kind):
    assert CONFIG.routing is not None
    config = replace(
        CONFIG,
        decoder_only=decoder_only,
        dropout=rate,
        routing=replace(CONFIG.routing, layers=layers),
    )
    batch = rows(padding=kind == "padded") | {"padding": kind != "plain"}
    if kind == "packed":
        batch |= PACKED
        batch["targets"][:, 5:] = 0
        if decoder_only:
            batch |= {"inputs": batch["inputs"][:, :0], "input_segments": torch.zeros(4, 0).long()}
    plain = SwitchTransformer(config, seed=1)
    fast = use_fast_kernels(SwitchTransformer(config, seed=1))
    for layer in plain.switch_layers.values():
        layer.experts.dropout = 0.0
    for layer in fast.switch_layers.values():
        layer.experts.dropout = 0.0  # the reference draws it for every slot, empty ones too
    losses = []
    for model in (plain, fast):
        torch.manual_seed(7)
        output = model(**batch)
        output.losses.total.backward()
        losses.append(output.losses.total)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    theirs = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        expected = theirs[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            scale = float(expected.abs().max()) + 1e-6
            torch.testing.assert_close(
                parameter.grad, expected, rtol=1e-4, atol=2e-5 * scale, msg=name
            )


def test_a_bfloat16_model_with_fast_paths_is_as_near_to_float32_as_without():
    from switchworks.training.state import cast_for_compute

    def gradient(narrow: bool, fast: bool) -> Tensor:
        model = SwitchTransformer(replace(CONFIG, routing=None), seed=1)
        if narrow:
            cast_for_compute(model, torch.bfloat16)
        model = use_fast_kernels(model) if fast else model
        model(**rows(padding=True)).losses.total.backward()
        return torch.cat(
            [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        )

    exact = gradient(narrow=False, fast=False)
    fast, plain = (
        (gradient(narrow=True, fast=fast) - exact).norm() / exact.norm() for fast in (True, False)
    )
    assert fast < 1.1 * plain
    assert plain < 0.05


def test_decoding_is_untouched_by_the_fast_paths():
    model = SwitchTransformer(CONFIG, seed=1)
    expected = model.generate(rows(padding=True)["inputs"], max_length=8)
    assert torch.equal(
        use_fast_kernels(model).generate(rows(padding=True)["inputs"], max_length=8), expected
    )
