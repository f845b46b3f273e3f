"""bfloat16 multiplied in float32: rounded once at the end, and a model that is afterwards as it
was."""

from dataclasses import replace

import pytest
import torch

from switchworks.batch import Batch
from switchworks.evaluate.perplexity import mean_nats
from switchworks.fast import emulated_bfloat16 as kernel
from switchworks.fast.emulated_bfloat16 import MANY, NATIVE, PIECE, in_float32, of_one_row, product
from switchworks.generate import BeamSearch, generate
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.model.experts import Experts
from switchworks.quantise.modules import QuantiseConfig, quantise

CONFIG = ModelConfig(
    vocab_size=512,
    d_model=128,
    d_ff=256,
    d_kv=32,
    num_heads=4,
    num_layers=2,
    routing=RoutingConfig(experts=4),
)
told_apart = kernel.emulated.__wrapped__  # not kept from one processor to the next
each_kind = pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, routing=None, gated=True),
        replace(CONFIG, tied_head=True),
        replace(CONFIG, tied_head=False),
        replace(CONFIG, decoder_only=True),
        replace(CONFIG, routing=RoutingConfig(experts=4, eval_capacity_factor=1.0)),
    ],
    ids=["dense", "tied", "untied", "decoder alone", "limited capacity"],
)


@pytest.fixture(autouse=True)
def a_processor_without_bfloat16(monkeypatch):
    """The same paths everywhere."""
    monkeypatch.setattr(kernel, "emulated", lambda: True)


def inputs(rows: int = 3) -> torch.Tensor:
    return torch.randint(2, 512, (rows, 9), generator=torch.Generator().manual_seed(0))


def half_a_step(exact: torch.Tensor) -> dict[str, float]:
    """What rounding to bfloat16 may move, and what sums in float32 add."""
    return {"rtol": 2**-8, "atol": 1e-5 * float(exact.abs().max())}


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1,), (NATIVE + 1,), (2, 20), (MANY,)])
@pytest.mark.parametrize("inputs_first", [False, True])
def test_a_product_is_the_exact_one_rounded_once(shape, inputs_first):
    torch.manual_seed(0)
    x = torch.randn(*shape, 128).bfloat16()
    weight = torch.randn(512, 128).bfloat16()
    if inputs_first:
        weight = weight.T.contiguous().T
    ours, exact = product(x, weight), x.double() @ weight.double().T
    assert ours.dtype == torch.bfloat16
    assert ours.is_contiguous()
    torch.testing.assert_close(ours.double(), exact, **half_a_step(exact))


@torch.no_grad()
def test_a_matrix_of_several_pieces_and_a_rest_is_multiplied_as_one():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 1024).bfloat16(), torch.randn(2500, 1024).bfloat16()
    assert len(weight) % (PIECE // 1024)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(product(x, weight).double(), exact, **half_a_step(exact))


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", [2, 64, 130])
def test_a_single_row_is_rounded_by_each_thread_and_once_more(width, threads):
    torch.manual_seed(0)
    x, weight = torch.randn(1, width).bfloat16(), torch.randn(width, 40).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = of_one_row(x, weight).double()
    finally:
        torch.set_num_threads(before)
    exact, magnitudes = x.double() @ weight.double(), x.double().abs() @ weight.double().abs()
    by_threads = 0 if threads == 1 else 2**-9 * magnitudes
    assert ((ours - exact).abs() <= 2**-8 * exact.abs() + by_threads + 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, 40, MANY])
@pytest.mark.parametrize("gated", [False, True])
def test_an_expert_rounds_where_the_plain_one_rounds(tokens, gated):
    torch.manual_seed(0)
    experts = Experts(2, 64, 128, gated=gated)
    for weight in experts.parameters():
        weight.normal_(std=0.1)
    experts.bfloat16()
    x = torch.randn(tokens, 64).bfloat16()
    expected = experts.one(1, x)
    ours = kernel._feed_forward(
        experts,
        x,
        experts.w_in[1],
        None if experts.w_gate is None else experts.w_gate[1],
        experts.w_out[1],
    )
    # A hidden number that lies between two of bfloat16 may be rounded either way.
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0.02)
    assert (ours != expected).float().mean() < 0.2


def test_with_gradients_nothing_changes():
    model, tokens = SwitchTransformer(CONFIG, seed=1).bfloat16().eval(), inputs()
    model(tokens, tokens).losses.total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with in_float32(model):
        model(tokens, tokens).losses.total.backward()
    assert expected
    assert all(torch.equal(model.get_parameter(name).grad, g) for name, g in expected.items())


@each_kind
def test_a_model_scores_the_same_and_is_afterwards_as_it_was(config):
    model = SwitchTransformer(config, seed=1).bfloat16().eval()
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    given = inputs()[:, :0] if config.decoder_only else inputs()
    with torch.no_grad():
        expected = model(given, inputs()).logits.float()
        with in_float32(model):
            inside = {name: set(vars(module)) for name, module in model.named_modules()}
            got = model(given, inputs()).logits.float()
    assert inside != modules
    assert {name: set(vars(module)) for name, module in model.named_modules()} == modules
    off = (got - expected).norm() / expected.norm()
    assert off < 0.02, off


@each_kind
@pytest.mark.parametrize("beams", [None, BeamSearch(beams=3)])
def test_what_is_written_is_as_likely_as_what_plain_products_write(config, beams, monkeypatch):
    """Another token may be written where two are as likely to a last digit."""
    model = SwitchTransformer(config, seed=1).bfloat16()
    ours = generate(model, inputs(), max_length=6, beams=beams)
    monkeypatch.setattr(kernel, "emulated", lambda: False)
    theirs = generate(model, inputs(), max_length=6, beams=beams)
    gap = log_likelihood(model, ours) - log_likelihood(model, theirs)
    assert gap.abs().max() < 0.2, gap


@torch.no_grad()
def log_likelihood(model: SwitchTransformer, written: torch.Tensor) -> torch.Tensor:
    """Of each row, in nats, with 3 to 6 nats a token."""
    wide = SwitchTransformer(model.config, seed=1).eval()
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    given = inputs()
    if model.config.decoder_only:
        given, written = given[:, :0], torch.cat([given, written], dim=1)
    scores = wide(given, written).logits.log_softmax(dim=-1)
    return scores.gather(-1, written[..., None]).squeeze(-1).sum(dim=1)


def test_float32_weights_and_other_processors_are_left_alone(monkeypatch):
    assert not list(kernel.replacements(SwitchTransformer(CONFIG, seed=1)))
    narrow = SwitchTransformer(CONFIG, seed=1).bfloat16()
    assert list(kernel.replacements(narrow))
    monkeypatch.setattr(kernel, "emulated", lambda: False)
    assert not list(kernel.replacements(narrow))


@pytest.mark.parametrize(
    ("machine", "vectors", "slow"),
    [
        ("x86_64", "AVX2", True),
        ("AMD64", "DEFAULT", True),
        ("x86_64", "AVX512", False),
        ("arm64", "DEFAULT", False),
    ],
)
def test_processors_are_told_apart(machine, vectors, slow, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: vectors)
    assert told_apart() == slow


def test_the_held_out_loss_is_that_of_the_same_weights_in_float32():
    model = SwitchTransformer(CONFIG, seed=1).bfloat16()
    wide = SwitchTransformer(CONFIG, seed=1)
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    batches = [Batch(inputs=inputs(), targets=inputs())]
    assert mean_nats(model, batches) == pytest.approx(mean_nats(wide, batches), rel=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("how", [QuantiseConfig(product="unpacked"), QuantiseConfig(bits=4)])
def test_a_rounded_bfloat16_model_scores_as_by_plain_products(how, monkeypatch):
    model = quantise(SwitchTransformer(CONFIG, seed=1).bfloat16(), how)
    with in_float32(model):
        got = model(inputs(), inputs()).logits.float()
    monkeypatch.setattr(kernel, "emulated", lambda: False)
    expected = model(inputs(), inputs()).logits.float()
    assert not torch.equal(got, expected)
    off = (got - expected).norm() / expected.norm()
    assert off < 0.02, off
