"""Ten defects of transformers' Switch model, shown there, and what is done here.

docs/conformance.md is the table of them.

Each number has two tests. The first, `theirs`, fails once transformers has mended the defect; then
its row in docs/conformance.md is out of date.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.compiling import compiling
from torch import Tensor, nn

from switchworks import RoutingConfig, SwitchFFN, load_hf
from switchworks.config import ConfigError
from switchworks.model import ModelConfig, SwitchTransformer

MENDED = "transformers {} no longer has defect {}: update docs/conformance.md"


@pytest.fixture(scope="module")
def transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


@pytest.fixture
def build(transformers):
    """A random Switch model of theirs: width 16, every second block sparse, no noise."""

    def make(**settings: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"num_layers": 4, "num_sparse_encoder_layers": 2}
        sizes |= {"num_decoder_layers": 4, "num_sparse_decoder_layers": 2}
        widths = {"vocab_size": 61, "d_model": 16, "d_kv": 4, "d_ff": 22, "num_heads": 4}
        noise = {"router_jitter_noise": 0.0, "dropout_rate": 0.0}
        values = {"num_experts": 4, "decoder_start_token_id": 0} | sizes | widths | noise | settings
        config = transformers.SwitchTransformersConfig(**values)
        return transformers.SwitchTransformersForConditionalGeneration(config).eval()

    return make


@pytest.fixture
def mended(transformers):
    return lambda number: MENDED.format(transformers.__version__, number)


def some_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def sparse_mlp(model: Any) -> Any:
    """Their switch layer in encoder block 1."""
    return model.encoder.block[1].layer[1].mlp


def rerouted(model: SwitchTransformer, **changes: Any) -> SwitchTransformer:
    """The same weights under another routing configuration."""
    assert model.config.routing is not None
    config = replace(model.config, routing=replace(model.config.routing, **changes))
    other = SwitchTransformer(config).eval()
    other.load_state_dict(model.state_dict())
    return other


# 1. Jitter reaches the experts. With one expert, whose gate is 1, it should change nothing.


@torch.no_grad()
def test_1_theirs_experts_see_the_router_s_noise(build, mended):
    layer = sparse_mlp(build(num_experts=1, router_jitter_noise=0.5)).train()
    x = torch.randn(2, 9, 16)
    got = layer(x.clone())
    assert (got - layer.experts.expert_0(x)).abs().max() > 0.1, mended(1)


@torch.no_grad()
def test_1_ours_experts_see_the_token_itself():
    layer = SwitchFFN(16, 22, RoutingConfig(experts=1, jitter=0.5, capacity_factor=None)).train()
    x = torch.randn(2, 9, 16)
    before = x.clone()
    y, _ = layer(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(y, layer.experts.run_one(0, x.flatten(0, 1)).view_as(x))


# 2. Padding takes experts' slots and counts in the losses, whatever the flag against it says.


def padded_left(text: Tensor, pads: int = 24) -> Tensor:
    return nn.functional.pad(text, (pads, 0))


@torch.no_grad()
def test_2_theirs_gives_a_text_other_states_beside_padding(build, mended):
    model = build(expert_capacity=3, router_ignore_padding_tokens=True)
    text = some_ids(1, 8)
    alone = model.encoder(input_ids=text).last_hidden_state
    beside = model.encoder(
        input_ids=padded_left(text), attention_mask=(padded_left(text) != 0).long()
    ).last_hidden_state[:, 24:]
    assert (beside - alone).abs().max() > 0.1, mended(2)


@torch.no_grad()
def test_2_theirs_balances_padding_too(build, mended):
    model, text = build(router_ignore_padding_tokens=True), some_ids(1, 8)
    with_pads = nn.functional.pad(text, (0, 48))
    aux = [
        model(
            input_ids=ids, attention_mask=(ids != 0).long(), labels=text, **ASKED
        ).encoder_aux_loss
        for ids in (text, with_pads)
    ]
    assert abs(aux[1] - aux[0]) > 0.01, mended(2)


ASKED = {"output_router_logits": True}


@torch.no_grad()
def test_2_ours_neither_serves_nor_counts_padding(build):
    model, text = rerouted(load_hf(build()), expert_capacity=3), some_ids(1, 8)
    alone, beside = model.encode(text), model.encode(padded_left(text))
    assert alone.routing[0].dropped > 0
    torch.testing.assert_close(beside.states[:, 24:], alone.states, rtol=0, atol=1e-5)
    for one, other in zip(alone.routing, beside.routing, strict=True):
        torch.testing.assert_close(other.balance, one.balance, rtol=1e-5, atol=0)
        torch.testing.assert_close(other.router_z, one.router_z, rtol=1e-5, atol=0)
        assert torch.equal(other.dropped, one.dropped)


# 3. No router losses at all in a model whose every FFN is sparse, such as Switch-C.


def all_sparse(build) -> Any:
    return build(num_sparse_encoder_layers=4, num_sparse_decoder_layers=4)


@torch.no_grad()
def test_3_theirs_losses_vanish_when_every_layer_is_sparse(build, mended):
    output = all_sparse(build)(input_ids=some_ids(2, 9), labels=some_ids(2, 5), **ASKED)
    assert len(output.encoder_router_logits) == 4
    losses = (output.encoder_aux_loss, output.decoder_aux_loss)
    losses += (output.encoder_z_loss, output.decoder_z_loss)
    assert losses == (0, 0, 0, 0), mended(3)


@torch.no_grad()
def test_3_ours_every_switch_layer_has_its_losses(build):
    output = load_hf(all_sparse(build))(some_ids(2, 9), some_ids(2, 5))
    assert len(output.routing) == 8
    assert all(report.balance > 0.9 and report.router_z > 0 for report in output.routing)
    assert output.losses.balance > 0.001 * 8 * 0.9
    assert output.losses.router_z > 0


# 4. Another number of sparse layers than was asked for.


@pytest.mark.parametrize(
    ("layers", "asked", "made"), [(1, 0, 1), (12, 0, 1), (12, 5, 6), (12, 8, 12), (6, 4, 6)]
)
def test_4_theirs_makes_another_number_of_layers_sparse(build, mended, layers, asked, made):
    model = build(num_layers=layers, num_sparse_encoder_layers=asked)
    assert sum(block.is_sparse for block in model.encoder.block) == made != asked, mended(4)


@pytest.mark.parametrize("every", range(1, 13))
def test_4_ours_makes_the_last_of_every_so_many_sparse(every):
    config = ModelConfig(num_layers=12, routing=RoutingConfig(every=every))
    sparse = [layer for layer in range(12) if config.is_sparse(layer, decoder=False)]
    assert sparse == list(range(every - 1, 12, every))
    assert len(sparse) == 12 // every


def test_4_ours_refuses_a_frequency_that_makes_none_sparse_and_reads_what_they_made(build):
    with pytest.raises(ConfigError, match="no layer would be sparse"):
        ModelConfig(num_layers=12, routing=RoutingConfig(every=13))
    made = build(num_layers=6, num_sparse_encoder_layers=4, num_sparse_decoder_layers=4)
    assert len(load_hf(made).switch_layers) == 10  # 6 + 4, where 4 + 4 were asked for


# 5. Capacity limits full passes, evaluation included, but not decoding token by token.


@torch.no_grad()
def decode_theirs(model: Any, inputs: Tensor, tokens: Tensor) -> Tensor:
    past, steps, read = None, [], model.encoder(input_ids=inputs)
    for token in tokens.split(1, dim=1):
        output = model(
            encoder_outputs=read, decoder_input_ids=token, past_key_values=past, use_cache=True
        )
        past = output.past_key_values
        steps.append(output.logits)
    return torch.cat(steps, dim=1)


@torch.no_grad()
def test_5_theirs_cached_decoding_disagrees_with_a_full_pass(build, mended):
    inputs, tokens = some_ids(2, 13), nn.functional.pad(some_ids(2, 15, seed=1), (1, 0))
    difference = {}
    for capacity in (2, 64):
        model = build(expert_capacity=capacity)
        full = model(input_ids=inputs, decoder_input_ids=tokens).logits
        difference[capacity] = (decode_theirs(model, inputs, tokens) - full).abs().max()
    assert difference[64] < 1e-4  # so it is the capacity
    assert difference[2] > 0.5, mended(5)


@torch.no_grad()
def test_5_ours_cached_decoding_agrees_with_a_full_pass(build):
    model = load_hf(build(expert_capacity=2))
    inputs, targets = some_ids(2, 13), some_ids(2, 16, seed=1)
    full = model(inputs, targets)
    cache = model.init_cache(model.encode(inputs), 16)
    tokens = nn.functional.pad(targets[:, :-1], (1, 0))
    steps = [model.decode_step(token, cache) for token in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full.logits, rtol=0, atol=1e-5)
    assert all(report.dropped == 0 for report in full.routing)


# 6. Training is not balanced unless each call asks for it.


@torch.no_grad()
def test_6_theirs_loss_has_no_balance_in_a_plain_call(build, mended):
    model, labels = build(router_aux_loss_coef=1.0).train(), some_ids(2, 5)
    output = model(input_ids=some_ids(2, 9), labels=labels)
    nats = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    assert output.encoder_aux_loss is None, mended(6)
    torch.testing.assert_close(output.loss, nats, msg=mended(6))


@torch.no_grad()
def test_6_ours_total_has_the_balance_always(build):
    losses = load_hf(build(router_aux_loss_coef=1.0)).train()(some_ids(2, 9), some_ids(2, 5)).losses
    assert losses.balance > 4 * 0.9
    parts = losses.cross_entropy + losses.output_z + losses.balance + losses.router_z
    torch.testing.assert_close(losses.total, parts)


# 7. Layers that collapse on different experts pass for balanced.


@torch.no_grad()
def opposite(build) -> Any:
    """Encoder block 1 sends every token to expert 0, block 3 every token to expert 1, of two."""
    model = build(num_experts=2)
    model.shared.weight[:, 0] = 100.0  # outweighs all that the blocks add
    for block, way in ((1, 1.0), (3, -1.0)):
        router = model.encoder.block[block].layer[1].mlp.router.classifier
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([5.0, -5.0]) * way
    return model


@torch.no_grad()
def test_7_theirs_opposite_collapses_cancel(build, mended):
    output = opposite(build)(input_ids=some_ids(2, 9), labels=some_ids(2, 5), **ASKED)
    chosen = [logits.argmax(-1) for logits in output.encoder_router_logits]
    assert (chosen[0] == 0).all()
    assert (chosen[1] == 1).all()
    assert abs(output.encoder_aux_loss - 1) < 1e-3, mended(7)  # as if even


@torch.no_grad()
def test_7_ours_each_layer_is_balanced_by_itself(build):
    first, second = load_hf(opposite(build)).encode(some_ids(2, 9)).routing
    assert first.balance == pytest.approx(2, abs=1e-3)  # the most that two experts allow
    assert second.balance == pytest.approx(2, abs=1e-3)


# 8. The layer cannot be compiled into one graph.


def test_8_theirs_does_not_compile_as_one_graph(build, mended):
    """It asks on the host which experts have tokens."""
    layer = torch.compile(sparse_mlp(build()), fullgraph=True, backend="eager")
    problem = ""
    try:
        layer(torch.randn(2, 9, 16))
    except torch._dynamo.exc.TorchDynamoException as error:
        problem = str(error)
    assert "for expert_idx in expert_hit" in problem, mended(8)


@pytest.mark.parametrize(
    ("training", "factors"), [(True, {}), (False, {"eval_capacity_factor": 2.0})]
)
def test_8_ours_compiles_as_one_graph_wherever_capacity_is_limited(training, factors):
    x = torch.randn(2, 9, 16)
    layer = SwitchFFN(16, 22, RoutingConfig(experts=4, jitter=0.0, **factors)).train(training)
    with compiling("eager"):
        got, _ = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(got, layer(x)[0])


# 9. Initial weights far from the paper's: section 2.4 scales T5's variances by 0.1.


def test_9_theirs_router_starts_with_large_logits(build, mended):
    model = build(d_model=128, d_ff=512, num_experts=16)
    layer = sparse_mlp(model)
    assert abs(layer.router.classifier.weight.std() - 1) < 0.1, mended(9)
    with torch.no_grad():
        z_loss = model(input_ids=some_ids(2, 9), labels=some_ids(2, 5), **ASKED).encoder_z_loss
    assert z_loss > 50, mended(9)


def test_9_theirs_experts_answer_with_a_spread_that_ignores_their_width(build, mended):
    """d_model ** -0.5 = 0.088 also for wo, whose fan-in is d_ff: 0.044 would keep the scale."""
    experts = sparse_mlp(build(d_model=128, d_ff=512)).experts
    assert abs(experts.expert_0.wo.weight.std() / 128**-0.5 - 1) < 0.05, mended(9)


def test_9_ours_router_and_experts_start_small():
    """Standard deviation sqrt(0.1 / fan-in), times 0.88 for the cut at two deviations."""
    torch.manual_seed(0)
    layer = SwitchFFN(128, 512, RoutingConfig(experts=16, jitter=0.0))
    for weight, fan_in in (
        (layer.router.weight, 128),
        (layer.experts.w_in, 128),
        (layer.experts.w_out, 512),
    ):
        assert weight.std().item() == pytest.approx(0.88 * (0.1 / fan_in) ** 0.5, rel=0.05)
    normed = nn.functional.rms_norm(torch.randn(2, 50, 128), (128,))
    assert layer(normed)[1].router_z < 1.2 * torch.tensor(16.0).log() ** 2  # its least is that


# 10. Experts without a token get no gradient, which stops DDP and ZeRO-3.


def test_10_theirs_idle_experts_have_no_gradient(build, mended):
    model = build(num_experts=32)
    model(input_ids=some_ids(1, 9), labels=some_ids(1, 5)).loss.backward()
    missing = [n for n, p in model.named_parameters() if ".experts." in n and p.grad is None]
    assert len(missing) > 4 * 2 * (32 - 9), mended(10)


def test_10_ours_idle_experts_have_a_gradient_of_zero(build):
    model = load_hf(build(num_experts=32)).train()
    output = model(some_ids(1, 9), some_ids(1, 5))
    output.losses.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    idle = output.routing[0].load == 0
    grad = model.encoder.blocks[1].ffn.experts.w_in.grad
    assert idle.sum() > 20
    assert (grad[idle] == 0).all()
    assert (grad[~idle] != 0).any()
