"""8-bit weights: how far off they can be, and what must stay exactly as it was."""

import pytest
import torch
from torch import Tensor, nn

from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.model.experts import ExpertInput, Experts
from switchworks.quantise.matmul import (
    MAX_ROWS,
    PRODUCTS,
    best_product,
    dequantised,
    int8_dynamic,
    int8_kernel,
    to_int8,
)
from switchworks.quantise.modules import QuantiseConfig, QuantisedExperts, QuantisedLinear, quantise

CONFIG = ModelConfig(
    vocab_size=40,
    d_model=32,
    d_ff=64,
    d_kv=16,
    num_heads=2,
    num_layers=2,
    routing=RoutingConfig(experts=4),
)
with_kernels = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="torch's kernels for AVX"
)
each_product = pytest.mark.parametrize("product", PRODUCTS)


def test_a_weight_is_off_by_half_a_step_of_its_channel_at_most():
    weight = torch.randn(6, 50) * torch.tensor([[1e-3], [1.0], [50.0], [1e-9], [3.0], [0.0]])
    qweight, scale = to_int8(weight)
    off = (weight - qweight * scale[:, None]).abs()
    assert (off <= scale[:, None] * 0.5001).all()
    assert torch.equal(scale[:5], weight.abs().amax(dim=1)[:5] / 127)
    assert qweight[5].count_nonzero() == 0


def test_integers_are_multiplied_exactly():
    """At the ends of the range too, where 16 bits in between would overflow."""
    x, weight = torch.full((3, 300), 127.0), torch.full((5, 300), -127, dtype=torch.int8)
    assert torch.equal(
        int8_dynamic(x, weight, torch.ones(5)), torch.full((3, 5), -127.0 * 127 * 300)
    )


@each_product
def test_a_product_is_within_the_bound_of_its_rounding(product):
    """|dw| <= s / 2 for every weight, and |dx| <= r / 2 for inputs where they are qweight too."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 33), torch.randn(9, 33) * torch.logspace(-2, 2, 9)[:, None]
    y = QuantisedLinear(weight, QuantiseConfig(product=product))(x)
    s = weight.abs().amax(dim=1) / 254
    r = x.abs().amax(dim=1, keepdim=True) / 254 if product == "int8_dynamic" else torch.zeros(7, 1)
    bound = x.abs().sum(dim=1, keepdim=True) * s + r * weight.abs().sum(dim=1) + 33 * r * s
    off = (y - x @ weight.T).abs()
    assert (off <= bound * 1.0001).all()
    assert off.mean() < bound.mean() / 4  # roundings do not all point the same way


@with_kernels
@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS])
@pytest.mark.parametrize("outputs", [1, 33, 64])
def test_few_rows_by_weights_as_they_are_are_off_by_what_bfloat16_rounds(rows, outputs):
    """|dx| <= |x| / 2^9 for every input and |dy| <= |y| / 2^9 for every answer, beside the product
    with dequantised weights in float64. Channels of any size, and zeros, have a scale each."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 96), torch.randn(outputs, 96)
    weight *= torch.logspace(-6, 3, outputs)[:, None]
    weight[outputs // 2] = 0.0
    qweight, scale = to_int8(weight)
    wide = qweight.double() * scale.double()[:, None]
    exact = x.double() @ wide.T
    bound = (x.double().abs() @ wide.T.abs()) * 2**-9 + exact.abs() * 2**-9
    y = int8_kernel(x, qweight, scale)
    assert y.dtype == torch.float32
    assert ((y - exact).abs() <= bound * 1.01).all()
    assert outputs == 1 or not torch.equal(y, dequantised(x, qweight, scale))


@pytest.mark.parametrize(("rows", "inputs"), [(MAX_ROWS + 1, 64), (3, 33), (0, 64)])
def test_more_rows_and_odd_widths_are_multiplied_by_dequantised_weights(rows, inputs):
    x, (qweight, scale) = torch.randn(rows, inputs), to_int8(torch.randn(5, inputs))
    assert torch.equal(int8_kernel(x, qweight, scale), dequantised(x, qweight, scale))


@each_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_s_answer_does_not_depend_on_its_neighbours(product, dtype):
    torch.manual_seed(0)
    layer, x = (
        QuantisedLinear(torch.randn(8, 32), QuantiseConfig(product=product)),
        torch.randn(5, 32).to(dtype),
    )
    loud = torch.cat([x[:1], 100 * x[1:]])
    assert layer(x).dtype == dtype
    assert torch.equal(layer(loud)[0], layer(x)[0])


def new_experts(gated: bool) -> Experts:
    torch.manual_seed(0)
    experts = Experts(4, 32, 64, gated=gated, d_out=8)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.2)
    return experts.eval()


@each_product
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [0, 6, 0, 0], None])
def test_experts_in_8_bits_answer_nearly_as_before(product, gated, counts):
    experts, x = new_experts(gated), torch.randn(6 if counts else 8, 32)
    with torch.no_grad():
        expected = experts(ExpertInput(x, counts))
        y = QuantisedExperts(experts, QuantiseConfig(product=product))(ExpertInput(x, counts))
    assert y.shape == expected.shape
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_experts_without_tokens_are_not_called(monkeypatch):
    called: list[int] = []
    monkeypatch.setattr(
        QuantisedExperts, "_run_one", lambda self, expert, x: called.append(expert) or x[:, :8]
    )
    QuantisedExperts(new_experts(False), QuantiseConfig())(
        ExpertInput(torch.randn(3, 32), [0, 2, 0, 1])
    )
    assert called == [1, 3]
    nothing = QuantisedExperts(new_experts(False), QuantiseConfig())(
        ExpertInput(torch.randn(0, 32), [0] * 4)
    )
    assert nothing.shape == (0, 8)


def inputs() -> Tensor:
    ids = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[1, 5:] = 0
    return ids


def logits(model: SwitchTransformer) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs(), inputs()).logits


@each_product
@pytest.mark.parametrize("routing", [None, CONFIG.routing])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_8_bits_scores_nearly_as_before(product, routing, tied):
    from dataclasses import replace

    config = replace(CONFIG, routing=routing, tied_head=tied)
    model = SwitchTransformer(config, seed=1)
    expected = logits(model)
    assert (
        logits(quantise(model, QuantiseConfig(product=product))) - expected
    ).norm() < 0.03 * expected.norm()


def test_routers_norms_and_relative_biases_keep_their_precision():
    model = quantise(SwitchTransformer(CONFIG, seed=1))
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    fresh = dict(SwitchTransformer(CONFIG, seed=1).named_parameters())
    assert wide == {
        name for name in fresh if any(part in name for part in ("router", "norm", "relative_bias"))
    }
    assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters())


def test_the_matrices_of_a_model_take_a_quarter_of_their_bytes():
    def size(model: SwitchTransformer) -> int:
        small = ("norm", "relative_bias", "router", "scale")
        tensors = model.state_dict().items()
        return sum(x.nbytes for name, x in tensors if not any(part in name for part in small))

    fresh = SwitchTransformer(CONFIG, seed=1)
    before = size(fresh)
    assert size(quantise(fresh)) == before / 4


@each_product
def test_decoding_in_8_bits_goes_token_by_token_as_all_at_once(product):
    model = quantise(SwitchTransformer(CONFIG, seed=1), QuantiseConfig(product=product))
    written = model.generate(inputs(), max_length=6)
    with torch.no_grad():
        whole = model(inputs(), written).logits.argmax(dim=-1)
    real = written != 0
    assert torch.equal(whole[real], written[real])


def test_the_default_is_what_the_processor_has_instructions_for():
    assert best_product() == ("int8_dynamic" if torch.cpu._is_vnni_supported() else "int8_kernel")


def test_the_reference_experts_answer_the_same_with_and_without_gradients():
    experts, x = new_experts(True), torch.randn(6, 32)
    for counts in ([3, 0, 2, 1], [0, 0, 0, 6]):
        with torch.no_grad():
            quiet = experts(ExpertInput(x, counts))
        assert torch.equal(quiet, experts(ExpertInput(x, counts)))
