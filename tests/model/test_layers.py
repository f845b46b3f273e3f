"""The parts of a block against T5's own and against closed forms."""

import pytest
import torch

from switchworks.model import ModelConfig
from switchworks.model.layers import FFN, RMSNorm, SharedDropout, activate, look_up


def test_the_norm_is_that_of_t5():
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    x = torch.randn(2, 3, 8) * 5
    norm, theirs = RMSNorm(8, 1e-6), T5LayerNorm(8, 1e-6)
    norm.weight.data = theirs.weight.data = torch.randn(8)
    torch.testing.assert_close(norm(x), theirs(x))


def test_the_norm_gives_mean_square_one_and_keeps_the_mean():
    x = torch.randn(4, 64) * 10 + 30
    y = RMSNorm(64, 1e-6)(x)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4))
    assert (y.mean(-1) > 0.5).all()  # it is not a LayerNorm


def test_the_norm_of_bfloat16_is_rounded_once():
    """Statistics and division are in float32: half a unit in the last place is all that is lost."""
    x = torch.randn(16, 256).bfloat16()
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    y = RMSNorm(256, 1e-6).bfloat16()(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=1.001 * 2**-8, atol=0)


def test_a_row_of_zeros_stays_zero():
    assert torch.equal(RMSNorm(8, 1e-6)(torch.zeros(1, 8)), torch.zeros(1, 8))


def test_dropout_shares_its_mask_over_the_sequence():
    """Mesh-TF: the noise shape leaves out the length."""
    y = SharedDropout(0.5)(torch.ones(3, 40, 64))
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert not torch.equal(y[0], y[1])  # but not over the batch


def test_dropout_keeps_the_mean():
    y = SharedDropout(0.2)(torch.ones(400, 2, 50))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1.25]))
    assert y.mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_does_nothing_in_evaluation_or_at_rate_zero(rate):
    layer, x = SharedDropout(rate), torch.randn(2, 3, 4)
    if rate > 0:
        layer.eval()
    assert torch.equal(layer(x), x)


def test_gelu_is_the_tanh_form():
    x = torch.linspace(-4, 4, 50, dtype=torch.float64)
    expected = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(activate(x, None, "gelu"), expected)


def test_silu_is_x_times_its_sigmoid():
    x = torch.linspace(-4, 4, 50, dtype=torch.float64)
    torch.testing.assert_close(activate(x, None, "silu"), x / (1 + torch.exp(-x)))


def test_the_gate_is_what_is_activated():
    hidden, gate = torch.tensor([-3.0, 5.0]), torch.tensor([2.0, -2.0])
    assert activate(hidden, gate, "relu").tolist() == [-6.0, 0.0]


@pytest.mark.parametrize("gated", [False, True])
def test_the_dense_layer_is_that_of_t5(gated):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

    kind = "gated-gelu" if gated else "relu"
    settings = T5Config(d_model=8, d_ff=12, dropout_rate=0.0, feed_forward_proj=kind)
    ours = FFN(ModelConfig(d_model=8, d_ff=12, gated=gated, activation="gelu" if gated else "relu"))
    if gated:
        theirs = T5DenseGatedActDense(settings)
        assert ours.w_gate is not None
        theirs.wi_0.weight, theirs.wi_1.weight = ours.w_gate.weight, ours.w_in.weight
    else:
        theirs = T5DenseActDense(settings)
        theirs.wi.weight = ours.w_in.weight
    theirs.wo.weight = ours.w_out.weight
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_no_layer_has_a_bias():
    """T5 has none, in norms and matrices alike."""
    names = [
        name for name, _ in FFN(ModelConfig(d_model=8, d_ff=12, gated=True)).named_parameters()
    ]
    assert sorted(names) == ["w_gate.weight", "w_in.weight", "w_out.weight"]


def test_dropout_in_the_dense_layer_acts_on_the_hidden_activation():
    layer = FFN(ModelConfig(d_model=32, d_ff=32, dropout=0.5))
    layer.w_in.weight.data = layer.w_out.weight.data = torch.eye(32)
    y = layer(torch.ones(2, 5, 32))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 2.0]))


def test_the_gradient_of_a_shared_row_does_not_drown_in_bfloat16():
    """3000 terms of 1: summed in bfloat16 they stop growing at 256."""
    table = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = look_up(table, torch.zeros(30, 100, dtype=torch.long))
    rows.backward(torch.ones_like(rows))
    assert table.grad is not None
    assert table.grad.flatten().tolist() == [3008.0, 0.0]  # 3000 in eight bits


def test_rows_are_looked_up_as_torch_does():
    table, ids = torch.randn(5, 3), torch.tensor([[4, 0], [4, 2]])
    assert torch.equal(look_up(table, ids), table[ids])
    assert torch.equal(look_up(table.bfloat16(), ids), table.bfloat16()[ids])
