"""Attention for GPUs, by torch's plain form of FlexAttention, which runs on a processor too."""

import pytest
import torch
from test_kernels import gradients, heads, masks
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from switchworks.fast import flex
from switchworks.fast.attention import FactoredBias, spread_diagonals
from switchworks.fast.flex import attend_fused
from switchworks.fast.kernels import use_fast_kernels
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.model.attention import attend, mask_to_bias
from switchworks.model.layers import SharedDropout

NO_DROPOUT = SharedDropout(0.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """torch refuses gradients on processors, though its plain form has them: the shapes asked for,
    one for each call."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)
    seen: list[tuple[int, ...]] = []

    def plain(q: Tensor, *rest: Tensor | None) -> Tensor:
        seen.append(tuple(q.shape))
        return flex.flex(q, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(flex, "_compiled", lambda: plain)
    return seen


def wide(**shapes) -> list[Tensor]:
    return heads(K=16, dtype=torch.float32, **shapes)


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("biased", [True, False])
def test_fused_attention_is_attention(mask, biased, calls):
    q, k, v = wide()
    distances = torch.randn(2, 5 + 7 - 1, requires_grad=True)
    mask = masks()[mask]
    mask = None if mask is None else mask.float()
    inputs = [q, k, v, distances] if biased else [q, k, v]
    whole = spread_diagonals(distances, 7)[None] if biased else None
    if mask is not None:
        whole = mask if whole is None else whole + mask
    expected = attend(q, k, v, whole, NO_DROPOUT)
    y = attend_fused(q, k, v, FactoredBias(distances, mask) if biased else mask, NO_DROPOUT)
    assert calls == [(3, 2, 5, 16)]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_fused_attention_drops_what_the_reference_drops():
    q, k, v = wide()
    dropout = SharedDropout(0.4)
    torch.manual_seed(5)
    expected = attend(q, k, v, None, dropout)
    torch.manual_seed(5)
    torch.testing.assert_close(attend_fused(q, k, v, None, dropout), expected, rtol=1e-4, atol=1e-4)


def test_a_query_that_sees_nothing_has_no_gradient_where_no_loss_asks_about_it():
    q, k, v = wide()
    seen = torch.ones(3, 1, 5, 7, dtype=torch.bool)
    seen[1, :, 2:] = False
    mask = mask_to_bias(seen, torch.float32)
    y = attend_fused(q, k, v, mask, NO_DROPOUT)
    expected = attend(q, k, v, mask, NO_DROPOUT)
    asked = seen[..., :1].float()
    for ours, theirs in zip(
        torch.autograd.grad((y * asked).square().sum(), [q, k, v]),
        torch.autograd.grad((expected * asked).square().sum(), [q, k, v]),
        strict=True,
    ):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [{"K": 4}, {"K": 16, "dtype": torch.float64}])
def test_what_the_kernel_does_not_know_is_done_in_blocks(form, calls):
    q, k, v = heads(**form)
    y = attend_fused(q, k, v, None, NO_DROPOUT)
    torch.testing.assert_close(y, attend(q, k, v, None, NO_DROPOUT), rtol=1e-4, atol=1e-5)
    assert calls == []


@pytest.mark.parametrize("decoder_only", [False, True])
def test_a_model_for_a_gpu_learns_as_the_plain_one_does(decoder_only, calls):
    """Float32, so that the experts stay with their slots; packed rows and padding."""
    config = ModelConfig(
        vocab_size=40,
        d_model=32,
        d_ff=24,
        d_kv=16,
        num_heads=2,
        num_layers=2,
        decoder_only=decoder_only,
        routing=RoutingConfig(experts=4, group_sequences=2, jitter=0.0),
        dropout=0.0,
    )
    plain = SwitchTransformer(config, seed=1)
    fused = use_fast_kernels(SwitchTransformer(config, seed=1), torch.device("cuda"))
    draw = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randint(2, 40, (4, size), generator=draw) for size in (9, 7))
    inputs[1, 5:], targets[1, 4:] = 0, 0
    found = []
    for model in (plain, fused):
        loss = model(inputs=inputs, targets=targets).losses.total
        loss.backward()
        found.append([loss.detach(), *(one.grad for one in model.parameters())])
    assert len(calls) == (2 if decoder_only else 6)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)
