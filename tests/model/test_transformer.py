"""The whole model: what may and may not depend on what, and what the losses count."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from switchworks.batch import check_rows, shift_right
from switchworks.config import ConfigError
from switchworks.model import (
    ModelConfig,
    RoutingConfig,
    SwitchTransformer,
    active_parameters,
    num_parameters,
)
from switchworks.model.attention import mask_to_bias
from switchworks.model.layers import SharedDropout
from switchworks.model.transformer import Output

V = 40
SPARSE = ModelConfig(
    vocab_size=V,
    d_model=16,
    d_ff=32,
    d_kv=4,
    num_heads=4,
    num_layers=2,
    routing=RoutingConfig(experts=3),
)
DENSE = replace(SPARSE, routing=None)
T5_1_1 = replace(SPARSE, activation="gelu", gated=True, tied_head=False, num_decoder_layers=3)
every_kind = pytest.mark.parametrize(
    "config", [DENSE, SPARSE, T5_1_1], ids=["dense", "sparse", "gated"]
)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order in which float32 was added up."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def with_routing(config: ModelConfig, **settings: Any) -> ModelConfig:
    assert config.routing is not None
    return replace(config, routing=replace(config.routing, **settings))


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, V, (rows, length))


def padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]))


def segments(*lengths: int, to: int) -> torch.Tensor:
    """One row of segment ids 1, 2, ... of these lengths, then padding."""
    ids = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    return torch.tensor([ids + [0] * (to - len(ids))])


def evaluated(config: ModelConfig, seed: int = 0) -> SwitchTransformer:
    return SwitchTransformer(config, seed).eval()


class Packed:
    """Two examples, alone and in one row with padding behind them."""

    def __init__(self) -> None:
        self.inputs, self.targets = [tokens(1, 6), tokens(1, 4)], [tokens(1, 3), tokens(1, 5)]

    def run(self, model: SwitchTransformer) -> torch.Tensor:
        """Logits of the packed row, without those of the padding."""
        output = model(
            padded(torch.cat(self.inputs, 1), 12),
            padded(torch.cat(self.targets, 1), 10),
            input_segments=segments(6, 4, to=12),
            target_segments=segments(3, 5, to=10),
        )
        return output.logits[:, :8]


@every_kind
def test_packed_examples_get_the_logits_each_gets_alone(config):
    model, packed = evaluated(config), Packed()
    alone = [model(i, t).logits for i, t in zip(packed.inputs, packed.targets, strict=True)]
    assert_close(packed.run(model), torch.cat(alone, 1))


@every_kind
@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("side", ["inputs", "targets"])
def test_nothing_leaks_from_one_packed_example_into_another(config, side, changed):
    model, packed = evaluated(config), Packed()
    before = packed.run(model)
    getattr(packed, side)[changed] = tokens(*getattr(packed, side)[changed].shape)
    after = packed.run(model)
    bystander = slice(3, 8) if changed == 0 else slice(0, 3)
    assert_close(after[:, bystander], before[:, bystander])


@every_kind
def test_packed_examples_have_the_loss_they_have_alone(config):
    model, packed = evaluated(config), Packed()
    alone = [
        model(i, t).losses.cross_entropy * t.shape[1]
        for i, t in zip(packed.inputs, packed.targets, strict=True)
    ]
    packed_loss = model(
        torch.cat(packed.inputs, 1),
        torch.cat(packed.targets, 1),
        input_segments=segments(6, 4, to=10),
        target_segments=segments(3, 5, to=8),
    ).losses.cross_entropy
    assert_close(packed_loss, (alone[0] + alone[1]) / 8)


@every_kind
@pytest.mark.parametrize(("longer_inputs", "longer_targets"), [(3, 0), (0, 4), (5, 5)])
def test_padding_changes_neither_logits_nor_losses(config, longer_inputs, longer_targets):
    model, inputs, targets = evaluated(config), tokens(3, 6), tokens(3, 5)
    plain = model(inputs, targets)
    wide = model(padded(inputs, 6 + longer_inputs), padded(targets, 5 + longer_targets))
    assert_close(wide.logits[:, :5], plain.logits)
    for name in plain.losses._fields:
        assert_close(getattr(wide.losses, name), getattr(plain.losses, name))


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_promising_no_padding_changes_nothing_when_there_is_none(config, training):
    config = with_routing(config, jitter=0.0) if config.routing else config
    model = SwitchTransformer(config).train(training)
    inputs, targets = tokens(2, 6), tokens(2, 5)
    masked, plain = model(inputs, targets), model(inputs, targets, padding=False)
    assert_close(plain.logits, masked.logits)
    assert_close(plain.losses.total, masked.losses.total)


@every_kind
def test_an_answer_does_not_depend_on_its_neighbours_in_the_batch(config):
    model, inputs, targets = evaluated(config), tokens(4, 6), tokens(4, 5)
    together, alone = model(inputs, targets), model(inputs[2:3], targets[2:3])
    assert_close(together.logits[2:3], alone.logits)


@every_kind
@pytest.mark.parametrize("changed", [0, 2, 4])
def test_logits_depend_on_earlier_targets_only(config, changed):
    model, inputs, targets = evaluated(config), tokens(2, 6), tokens(2, 5)
    other = targets.clone()
    other[:, changed:] = 1 + other[:, changed:] % (V - 1)
    before, after = model(inputs, targets).logits, model(inputs, other).logits
    assert_close(after[:, : changed + 1], before[:, : changed + 1])
    assert not torch.allclose(after[:, changed + 1 :], before[:, changed + 1 :]) or changed == 4


@every_kind
@pytest.mark.parametrize("steps", [[1] * 6, [2, 3, 1], [6]])
def test_decoding_step_by_step_equals_teacher_forcing(config, steps):
    """With padded inputs; `steps` tokens at a time."""
    model, inputs, targets = evaluated(config), padded(tokens(2, 5), 8), tokens(2, 6)
    memory = model.encode(inputs)
    cache = model.init_cache(memory, max_length=6)
    read = shift_right(targets, None).split(steps, dim=1)
    logits = torch.cat([model.decode_step(part, cache) for part in read], dim=1)
    assert_close(logits, model(inputs, targets).logits)


def test_a_token_is_decoded_without_another_look_at_the_table_of_biases():
    """What it depends on, the distance, is the same from any position: one look for all."""
    model = evaluated(SPARSE)
    cache = model.init_cache(model.encode(tokens(2, 5)), max_length=6)
    torch.nn.init.constant_(model.decoder.relative_bias.weight, torch.nan)
    for token in shift_right(tokens(2, 6), None).split(1, dim=1):
        assert model.decode_step(token, cache).isfinite().all()


@every_kind
def test_decoding_without_gradients_equals_teacher_forcing_with_them(config):
    """The first uses torch's fused attention, the second the plain one."""
    model, inputs, targets = evaluated(config), tokens(2, 5), tokens(2, 6)
    expected = model(inputs, targets).logits
    with torch.no_grad():
        cache = model.init_cache(model.encode(inputs, padding=False), max_length=6)
        steps = shift_right(targets, None).split(1, dim=1)
        logits = torch.cat([model.decode_step(step, cache) for step in steps], dim=1)
    assert_close(logits, expected)


def crowd(model: SwitchTransformer) -> None:
    """Send every token of `model` to expert 0: all scores are equal, and the first wins."""
    for layer in model.switch_layers.values():
        torch.nn.init.zeros_(layer.router.weight)


def test_cached_decoding_drops_nothing_however_crowded_an_expert_is():
    """A capacity per step would not be that of the whole; so evaluation has none."""
    config = with_routing(SPARSE, capacity_factor=0.1, min_capacity=1)
    model, inputs, targets = evaluated(config), tokens(3, 7), tokens(3, 9)
    crowd(model)
    whole = model(inputs, targets)
    assert all(report.dropped == 0 for report in whole.routing)
    cache = model.init_cache(model.encode(inputs), max_length=9)
    steps = shift_right(targets, None).split(1, dim=1)
    logits = torch.cat([model.decode_step(step, cache) for step in steps], dim=1)
    assert_close(logits, whole.logits)


@pytest.mark.parametrize("changed", [2, 5])
def test_in_training_who_is_dropped_does_not_tell_of_later_targets(changed):
    """Fedus et al. 2021, section 2.2: dropping is causal, or the decoder would see what it is to
    predict."""
    config = with_routing(SPARSE, jitter=0.0, capacity_factor=0.5, min_capacity=1, every=1)
    model, inputs, targets = SwitchTransformer(config), tokens(2, 8), tokens(2, 8)
    other = targets.clone()
    other[:, changed:] = 1 + other[:, changed:] % (V - 1)
    before, after = model(inputs, targets), model(inputs, other)
    assert all(report.dropped > 0 for report in before.routing)
    assert_close(after.logits[:, : changed + 1], before.logits[:, : changed + 1])


def test_a_block_hands_on_a_dropped_token_as_it_came():
    """Fedus et al. 2021, section 2.2. Its attention is silenced: what is left is the FFN."""
    config = with_routing(SPARSE, jitter=0.0, capacity_factor=1.0, min_capacity=1)
    model = SwitchTransformer(config)
    crowd(model)
    block, x = model.encoder.blocks[1], torch.randn(1, 6, 16)
    torch.nn.init.zeros_(block.self_attention.o.weight)
    y, _ = model.encoder.call_block(
        block, x, model.encoder.relative_bias(6, 6), model.encoder.relative_bias, segments=None
    )
    assert (y[:, :2] != x[:, :2]).any(-1).all()  # int(6 * 1.0 / 3) slots
    assert torch.equal(y[:, 2:], x[:, 2:])


def test_padding_takes_no_slot_in_the_model_either():
    """Mesh-TF `moe.py`. Padding stands first, where it would take the only slots."""
    config = with_routing(SPARSE, jitter=0.0, capacity_factor=0.1, min_capacity=2)
    model, inputs = SwitchTransformer(config), tokens(1, 6)
    crowd(model)
    inputs[0, :4] = 0
    reports = model(inputs, tokens(1, 2)).routing
    assert [report.dropped.item() for report in reports] == [0, 0]


def train_step(model: SwitchTransformer, rows: int = 4) -> Output:
    output = model(padded(tokens(rows, 10), 12), padded(tokens(rows, 8), 9))
    output.losses.total.backward()
    return output


@every_kind
def test_the_gradient_reaches_every_parameter(config):
    model = SwitchTransformer(config)
    train_step(model, rows=16)
    untouched = {
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or weight.grad.abs().sum() == 0
    }
    assert not untouched


@every_kind
def test_a_bfloat16_model_trains_with_finite_losses_and_gradients(config):
    model = SwitchTransformer(config).bfloat16()
    output = train_step(model)
    assert output.logits.dtype == torch.bfloat16
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in output.losses)
    for weight in model.parameters():
        assert weight.grad is not None
        assert weight.grad.isfinite().all()


@every_kind
def test_a_bfloat16_model_answers_about_as_its_float32_self(config):
    model, inputs, targets = evaluated(config), tokens(4, 8), tokens(4, 6)
    exact = model(inputs, targets).losses.cross_entropy
    rounded = model.bfloat16()(inputs, targets).losses.cross_entropy
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)


def test_the_model_trains_under_autocast_too():
    model = SwitchTransformer(SPARSE)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens(2, 6), tokens(2, 5))
    output.losses.total.backward()
    assert output.routing[0].routes.gate.dtype == torch.float32
    assert all(weight.grad is not None for weight in model.parameters())


def test_one_expert_without_jitter_is_the_dense_model():
    """Fedus et al. 2021, section 2.1 with N = 1: p = 1, and the balance loss is a constant."""
    dense = SwitchTransformer(DENSE)
    sparse = SwitchTransformer(with_routing(SPARSE, experts=1, jitter=0.0))
    weights = dense.state_dict()
    for name in sparse.state_dict():
        if ".experts." in name:
            weights[name] = weights.pop(name.replace(".experts", "") + ".weight").T[None]
        elif ".router." in name:
            weights[name] = torch.randn(1, 16)
    sparse.load_state_dict(weights)
    inputs, targets = tokens(2, 6), tokens(2, 5)
    ours, theirs = sparse(inputs, targets), dense(inputs, targets)
    assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.losses.balance.item(), 2 * 0.01)


def test_the_total_loss_is_the_sum_of_its_parts():
    config = replace(with_routing(SPARSE, z_weight=1e-3), z_loss=1e-4)
    losses = SwitchTransformer(config)(tokens(2, 6), tokens(2, 5)).losses
    parts = losses.cross_entropy + losses.output_z + losses.balance + losses.router_z
    torch.testing.assert_close(losses.total, parts)
    assert all(part > 0 for part in losses)


def test_the_auxiliary_loss_sums_every_switch_layer_of_both_stacks():
    """Mesh-TF `transformer.py`; Fedus et al. 2021: 6 + 6 layers in a model of 12 + 12 blocks."""
    config = replace(with_routing(SPARSE, z_weight=1e-3), num_layers=12)
    model = SwitchTransformer(config)
    output = model(tokens(1, 6), tokens(1, 5))
    sparse = [f"{stack}.{n}" for stack in ("encoder", "decoder") for n in (1, 3, 5, 7, 9, 11)]
    assert list(model.switch_layers) == sparse
    assert len(output.routing) == 12
    total = sum(report.loss for report in output.routing)
    torch.testing.assert_close(output.losses.balance + output.losses.router_z, total)


def test_at_frequency_one_every_ffn_is_sparse():
    """Fedus et al. 2021, table 9: Switch-C."""
    model = SwitchTransformer(with_routing(SPARSE, every=1))
    assert list(model.switch_layers) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]


def test_the_cross_entropy_is_the_papers_metric_and_holds_no_other_loss():
    """Fedus et al. 2021: negative log perplexity is minus the mean nats per real target."""
    config = replace(with_routing(SPARSE, balance_weight=5.0, z_weight=5.0), z_loss=5.0)
    model, targets = evaluated(config), padded(tokens(3, 4), 7)
    output = model(tokens(3, 6), targets)
    log_probs = output.logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    nats = -log_probs[targets != 0].mean()
    torch.testing.assert_close(output.losses.cross_entropy, nats)
    assert output.losses.total > 2 * nats


def test_expert_dropout_leaves_every_other_dropout_alone():
    """Fedus et al. 2021, section 2.4: 0.4 in experts, 0.1 elsewhere, in training only."""
    model = SwitchTransformer(replace(with_routing(SPARSE, expert_dropout=0.4), dropout=0.1))
    rates = {m.rate for m in model.modules() if hasattr(m, "rate")}
    assert rates == {0.1}
    assert [layer.experts.dropout for layer in model.switch_layers.values()] == [0.4, 0.4]


@every_kind
def test_dropout_acts_in_training_only(config):
    model, batch = SwitchTransformer(replace(config, dropout=0.3)), (tokens(2, 6), tokens(2, 5))
    assert not torch.equal(model(*batch).logits, model(*batch).logits)
    model.eval()
    assert torch.equal(model(*batch).logits, model(*batch).logits)


def test_dropout_is_where_t5_has_it():
    """Mesh-TF `defaults.gin`: on embeddings, after each sublayer and each stack, and inside the
    attention weights and the dense FFN (experts have their own)."""
    model = SwitchTransformer(SPARSE)
    used: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, SharedDropout):
            module.register_forward_hook(lambda *_, name=name: used.update([name]))
    model(tokens(1, 6), tokens(1, 5))
    assert used.pop("dropout") == 2  # the embeddings of inputs and of targets
    assert used.pop("encoder.dropout") == used.pop("decoder.dropout") == 1
    for block in (0, 1):
        assert used.pop(f"encoder.blocks.{block}.dropout") == 2
        assert used.pop(f"decoder.blocks.{block}.dropout") == 3
    inside = ["encoder.blocks.0.ffn", "decoder.blocks.0.ffn"]
    for stack in ("encoder", "decoder"):
        inside += [f"{stack}.blocks.{block}.self_attention" for block in (0, 1)]
    inside += [f"decoder.blocks.{block}.cross_attention" for block in (0, 1)]
    assert used == {f"{name}.dropout": 1 for name in inside}


def test_the_tied_head_scales_hidden_states_and_the_untied_one_does_not():
    """Mesh-TF `VocabEmbedding`: times d_model ** -0.5."""
    x = torch.randn(1, 2, 16)
    tied, untied = SwitchTransformer(DENSE), SwitchTransformer(replace(DENSE, tied_head=False))
    torch.testing.assert_close(tied.logits(x), x @ tied.embedding.weight.T / 4)
    assert untied.head is not None
    torch.testing.assert_close(untied.logits(x), x @ untied.head.weight.T)


def test_the_decoder_reads_the_targets_one_position_late():
    """T5: it starts with id 0."""
    assert shift_right(torch.tensor([[7, 8, 9]]), None).tolist() == [[0, 7, 8]]


def test_every_packed_example_starts_with_id_zero():
    targets, ids = torch.tensor([[7, 8, 9, 5, 6, 0]]), torch.tensor([[1, 1, 1, 2, 2, 0]])
    assert shift_right(targets, ids).tolist() == [[0, 7, 8, 0, 5, 0]]


def test_a_row_of_padding_gives_finite_logits_and_no_loss_of_its_own():
    model, inputs, targets = evaluated(SPARSE), tokens(2, 6), tokens(2, 5)
    alone = model(inputs[:1], targets[:1])
    inputs[1], targets[1] = 0, 0
    output = model(inputs, targets)
    assert output.logits.isfinite().all()
    assert_close(output.losses.cross_entropy, alone.losses.cross_entropy)


def test_inputs_and_targets_of_different_batch_sizes_are_refused():
    """The message counts both; the annotations alone would not name them to a user."""
    with pytest.raises(ConfigError, match="3 rows of inputs but 2 rows of targets"):
        check_rows(tokens(3, 6), tokens(2, 5), None, None, decoder_only=False)


def test_segment_ids_on_one_side_only_are_refused():
    model = SwitchTransformer(DENSE)
    with pytest.raises(ConfigError, match="Only target_segments is given"):
        model(tokens(1, 6), tokens(1, 5), target_segments=segments(2, 3, to=5))


def test_a_float16_model_masks_without_overflow():
    """Its largest number is 65504; -1e9 would be infinite."""
    hidden = mask_to_bias(torch.tensor([True, False]), torch.float16)
    assert hidden.isfinite().all()
    assert hidden[0] == 0
    assert hidden[1] < -30000


def test_each_parameter_with_letters_has_as_many_dimensions_as_letters():
    """`parallel/` reads the letters to decide how to cut a parameter."""
    for module in SwitchTransformer(T5_1_1).modules():
        for name, letters in getattr(module, "letters", {}).items():
            parameters = dict(module.named_parameters())
            if name in parameters:  # the gate and the head are optional
                assert parameters[name].dim() == len(letters.split()), (module, name)


def test_a_printed_model_says_its_sizes_in_a_few_lines():
    lines = repr(SwitchTransformer(SPARSE)).splitlines()
    assert (
        f"{num_parameters(SPARSE):,} parameters, {active_parameters(SPARSE):,} of them" in lines[0]
    )
    assert lines[-1].strip() == "3 experts (switch) in encoder.1, decoder.1"
    assert len(lines) == 4
    assert len(repr(SwitchTransformer(DENSE)).splitlines()) == 3


class Logits(torch.nn.Module):
    """What is exported: ids to logits."""

    def __init__(self, model: SwitchTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model(inputs, targets).logits


@pytest.mark.parametrize("rows", [1, 5])
def test_an_exported_model_takes_any_number_of_rows(exported, rows):
    program, model = exported
    inputs, targets = torch.randint(0, 40, (rows, 7)), torch.randint(1, 40, (rows, 5))
    with torch.no_grad():
        torch.testing.assert_close(program(inputs, targets), model(inputs, targets).logits)


@pytest.fixture(scope="module")
def exported():
    """A model, groups of two rows in training, exported for evaluation; and the model."""
    routing = RoutingConfig(experts=3, group_sequences=2)
    model = SwitchTransformer(replace(SPARSE, routing=routing), seed=1).eval()
    rows = ({0: torch.export.Dim("rows", min=1, max=64)},) * 2
    example = torch.randint(1, 40, (3, 7)), torch.randint(1, 40, (3, 5))
    return torch.export.export(Logits(model), example, dynamic_shapes=rows).module(), model
