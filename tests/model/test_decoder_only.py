"""Decoder-only models: what a position may see, and that prompts are read as they are trained."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from switchworks.batch import align_right
from switchworks.checkpoint.hugging_face.weights import save_hf, to_hf
from switchworks.checkpoint.model_files import load, save
from switchworks.config import CheckpointError, ConfigError
from switchworks.generate import generate
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.model.sizes import active_parameters, flops_per_sequence, num_parameters

V = 40
SPARSE = ModelConfig(
    vocab_size=V,
    d_model=16,
    d_ff=32,
    d_kv=4,
    num_heads=4,
    num_layers=3,
    decoder_only=True,
    init_scale=1.0,
    relative_max_distance=20,
    routing=RoutingConfig(experts=3, jitter=0.0),
)
DENSE = replace(SPARSE, routing=None)
GATED = replace(SPARSE, activation="gelu", gated=True, tied_head=False)
every_kind = pytest.mark.parametrize(
    "config", [DENSE, SPARSE, GATED], ids=["dense", "sparse", "gated"]
)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order in which float32 was added up."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def evaluated(config: ModelConfig) -> SwitchTransformer:
    return SwitchTransformer(config, seed=2).eval()


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, V, (rows, length), generator=generator)


def nothing(rows: int) -> Tensor:
    """Inputs of width 0."""
    return torch.zeros(rows, 0, dtype=torch.long)


def logits_of(model: SwitchTransformer, tokens: Tensor) -> Tensor:
    return model(nothing(len(tokens)), tokens).logits


def test_there_is_one_stack_and_no_cross_attention():
    model = SwitchTransformer(SPARSE)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"embedding", "decoder"}
    assert not [name for name, _ in model.named_parameters() if "cross" in name]
    assert list(model.switch_layers) == ["decoder.1"]


@every_kind
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changed", [0, 3, 6])
def test_a_token_changes_nothing_at_its_own_position_or_before(config, changed, training):
    """In training too, where experts overflow: earlier tokens take the slots first."""
    if config.routing is not None:
        routing = replace(config.routing, capacity_factor=0.5, min_capacity=1)
        config = replace(config, routing=routing)
    model, tokens = SwitchTransformer(config, seed=2).train(training), text(2, 8)
    other = tokens.clone()
    other[:, changed] = 2 + (other[:, changed] - 1) % (V - 2)
    before, after = logits_of(model, tokens), logits_of(model, other)
    assert_close(after[:, : changed + 1], before[:, : changed + 1])
    assert not torch.allclose(after[:, changed + 1 :], before[:, changed + 1 :])


@every_kind
@pytest.mark.parametrize("steps", [[1] * 5, [2, 3], [5]])
def test_prompts_read_at_once_and_then_token_by_token_equal_one_full_pass(config, steps):
    model, tokens = evaluated(config), text(2, 9)
    full = logits_of(model, tokens)
    first, cache = model.prefill(tokens[:, :3], max_length=7)
    rest = [model.decode_step(part, cache) for part in tokens[:, 3:8].split(steps, dim=1)]
    assert_close(torch.cat([first, *rest], dim=1), full[:, 3:])


@every_kind
@pytest.mark.parametrize("grad", [True, False])
def test_a_token_changes_nothing_before_it_in_the_cache_either(config, grad):
    """With gradients attention takes the plain path, without them torch's fused one."""
    model, tokens = evaluated(config), text(2, 8)
    other = tokens.clone()
    other[:, 6] = 2 + (other[:, 6] - 1) % (V - 2)
    answers = []
    with torch.set_grad_enabled(grad):
        for these in (tokens, other):
            _, cache = model.prefill(these[:, :2], max_length=8)
            answers.append(model.decode_step(these[:, 2:], cache))
    assert_close(answers[0][:, :4], answers[1][:, :4])
    assert not torch.allclose(answers[0][:, 4:], answers[1][:, 4:])


@every_kind
def test_inputs_and_targets_are_one_text_of_which_the_targets_count(config):
    model, tokens = evaluated(config), text(2, 9)
    whole, parted = logits_of(model, tokens), model(tokens[:, :4], tokens[:, 4:])
    assert_close(parted.logits, whole[:, 4:])
    nats = -whole.log_softmax(-1).gather(-1, tokens[..., None])[:, 4:].mean()
    assert_close(parted.losses.cross_entropy, nats)


@every_kind
@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_neither_logits_nor_losses(config, left):
    model, prompts, targets = evaluated(config), text(3, 4), text(3, 5, seed=1)
    pads = (3, 0) if left else (0, 3)
    wide = model(torch.nn.functional.pad(prompts, pads), torch.nn.functional.pad(targets, (0, 2)))
    plain = model(prompts, targets)
    assert_close(wide.logits[:, :5], plain.logits)
    for name in plain.losses._fields:
        assert_close(getattr(wide.losses, name), getattr(plain.losses, name))


@every_kind
def test_promising_no_padding_changes_nothing_when_there_is_none(config):
    model, prompts, targets = SwitchTransformer(config), text(2, 4), text(2, 5, seed=1)
    masked, plain = model(prompts, targets), model(prompts, targets, padding=False)
    assert_close(plain.logits, masked.logits)
    assert_close(plain.losses.total, masked.losses.total)


@every_kind
def test_packed_documents_get_the_logits_each_gets_alone(config):
    model, documents = evaluated(config), [text(1, 4), text(1, 6, seed=1)]
    ids = torch.tensor([[1] * 4 + [2] * 6 + [0] * 2])
    packed = torch.nn.functional.pad(torch.cat(documents, 1), (0, 2))
    output = model(nothing(1), packed, input_segments=nothing(1), target_segments=ids)
    alone = [logits_of(model, document) for document in documents]
    assert_close(output.logits[:, :10], torch.cat(alone, 1))


def test_prompts_beside_packed_targets_are_refused():
    ids = torch.tensor([[1, 1, 2, 2]])
    with pytest.raises(ConfigError, match="3 positions of inputs beside packed targets"):
        SwitchTransformer(DENSE)(text(1, 3), text(1, 4), input_segments=ids[:, :3],
                                 target_segments=ids)  # fmt: skip


@every_kind
def test_the_gradient_reaches_every_parameter(config):
    model = SwitchTransformer(config)
    model(nothing(8), text(8, 12)).losses.total.backward()
    assert all(
        weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters()
    )


def test_encoding_is_refused_with_what_to_call_instead():
    with pytest.raises(ConfigError, match=r"has no encoder.\n  Use prefill"):
        SwitchTransformer(DENSE).encode(text(1, 3))


def test_padding_moves_to_the_front_and_tokens_keep_their_order():
    rows = torch.tensor([[7, 5, 0, 0], [0, 9, 8, 3], [0, 0, 0, 0]])
    assert align_right(rows).tolist() == [[0, 0, 7, 5], [0, 9, 8, 3], [0, 0, 0, 0]]


# --- generation ---


def prompts_of_different_lengths() -> list[Tensor]:
    return [text(1, 7, seed=3), text(1, 2, seed=4), text(1, 30, seed=5), nothing(1)]


def greedy_by_full_passes(model: SwitchTransformer, prompt: Tensor, steps: int) -> list[int]:
    """One full pass per token, without cache: slow and obvious."""
    tokens = prompt
    for _ in range(steps):
        # A last target is needed to ask for one more position; its value does not matter.
        longer = torch.cat([tokens, torch.full((1, 1), 5)], dim=1)
        logits = model(nothing(1), longer, padding=False).logits  # it may have written id 0
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if tokens[0, -1] == 1:
            break
    return tokens[0, prompt.shape[1] :].tolist()


def padded_rows(prompts: list[Tensor], width: int, *, left: bool) -> Tensor:
    room = [width - prompt.shape[1] for prompt in prompts]
    return torch.cat(
        [
            torch.nn.functional.pad(prompt, (free, 0) if left else (0, free))
            for prompt, free in zip(prompts, room, strict=True)
        ]
    )


@every_kind
def test_decoding_with_the_cache_writes_what_full_passes_write(config):
    model = evaluated(config)
    for prompt in prompts_of_different_lengths():
        written = generate(model, prompt, max_length=10)[0].tolist()
        assert written == greedy_by_full_passes(model, prompt, 10)


@every_kind
@pytest.mark.parametrize(("width", "left"), [(30, True), (30, False), (41, False)])
def test_a_continuation_is_the_same_alone_and_padded_in_a_batch(config, width, left):
    model, prompts = evaluated(config), prompts_of_different_lengths()
    together = generate(model, padded_rows(prompts, width, left=left), max_length=10)
    for row, prompt in zip(together.tolist(), prompts, strict=True):
        alone = generate(model, prompt, max_length=10)[0].tolist()
        assert row == alone + [0] * (len(row) - len(alone))


def test_padding_before_a_prompt_does_not_move_its_logits():
    """Greedy choices could agree by luck; the numbers do not."""
    model, prompts = evaluated(SPARSE), prompts_of_different_lengths()
    together, cache = model.prefill(padded_rows(prompts, 30, left=False), 3)
    next_together = model.decode_step(torch.full((4, 1), 9), cache)
    for row, prompt in enumerate(prompts):
        alone, cache = model.prefill(prompt, 3)
        assert_close(together[row], alone[0])
        assert_close(next_together[row], model.decode_step(torch.full((1, 1), 9), cache)[0])


def test_padding_before_a_prompt_takes_no_slot_of_an_expert():
    routing = RoutingConfig(experts=3, every=1, jitter=0.0, eval_capacity_factor=2.0)
    model, seen = evaluated(replace(SPARSE, routing=routing)), []
    for layer in model.switch_layers.values():
        layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output[1]))
    model.prefill(torch.tensor([[0, 0, 0, 7, 8]]), 3)
    assert [report.routes.kept.sum().item() for report in seen] == [3, 3, 3]  # 0 7 8


def test_the_model_generates_by_itself():
    model = evaluated(SPARSE)
    expected = generate(model, text(2, 5), max_length=4)
    assert torch.equal(model.generate(text(2, 5), max_length=4), expected)


# --- size, files, and transformers as the oracle ---


def test_a_switch_model_uses_its_dense_twin_and_the_router():
    assert active_parameters(SPARSE) == num_parameters(DENSE) + 3 * 16


def test_the_products_of_a_built_model_cost_what_the_closed_form_says():
    """torch's own counter, which sees both products of attention."""
    from torch.utils.flop_counter import FlopCounterMode

    L, T, A = 4, 7, 16
    with FlopCounterMode(display=False) as counter:
        SwitchTransformer(DENSE)(text(1, L), text(1, T))
    second_products = 3 * 2 * (L + T) ** 2 * A
    assert counter.get_total_flops() == flops_per_sequence(DENSE, L, T) + second_products


def test_a_depth_beside_an_encoder_is_refused():
    with pytest.raises(ConfigError, match=r"num_decoder_layers = 2 .*\n  Set model.num_layers"):
        replace(SPARSE, num_decoder_layers=2)


def test_a_saved_model_is_loaded_bit_for_bit(tmp_path):
    model = evaluated(SPARSE)
    save(model, tmp_path / "model")
    loaded, _ = load(tmp_path / "model")
    assert loaded.config == SPARSE
    assert torch.equal(logits_of(loaded, text(2, 5)), logits_of(model, text(2, 5)))


def test_transformers_has_no_such_model_and_nothing_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"decoder_only = true .*\n  Use switchworks' own"):
        save_hf(SwitchTransformer(SPARSE), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def their_stack(kind: str) -> tuple[nn.Module, ModelConfig]:
    """transformers' decoder stack with first values of its own, and the config it stands for."""
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersConfig,
        SwitchTransformersStack,
    )
    from transformers.models.t5.modeling_t5 import T5Config, T5Stack

    shape = {"vocab_size": V, "d_model": 12, "d_kv": 5, "num_heads": 3, "d_ff": 23}
    common: dict[str, Any] = shape | {
        "num_layers": 4,
        "num_decoder_layers": 4,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 40,
        "is_decoder": True,
        "use_cache": False,
    }
    gated = kind == "t5_1_1"
    routing = RoutingConfig(experts=4, jitter=0.0) if kind == "switch" else None
    ours = ModelConfig(
        **shape,
        num_layers=4,
        decoder_only=True,
        activation="gelu" if gated else "relu",
        gated=gated,
        relative_buckets=16,
        relative_max_distance=40,
        routing=routing,
    )
    torch.manual_seed(0)
    if routing is None:
        activation = "gated-gelu" if gated else "relu"
        return T5Stack(T5Config(**common, feed_forward_proj=activation)), ours
    config = SwitchTransformersConfig(
        **common,
        num_experts=4,
        num_sparse_decoder_layers=2,
        expert_capacity=1000,
        router_jitter_noise=0.0,
    )
    return SwitchTransformersStack(config), ours


@pytest.mark.parametrize("kind", ["t5", "t5_1_1", "switch"])
@pytest.mark.parametrize("length", [1, 9, 70])
def test_logits_equal_those_of_transformers_decoder_stack_without_an_encoder(kind, length):
    """Same weights, float32. The bias reaches past its 40 positions; norm scales are not all 1."""
    stack, config = their_stack(kind)
    ours, state = SwitchTransformer(config, seed=1).eval(), {}
    for name, parameter in ours.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        ffn = "mlp" if kind == "switch" else "DenseReluDense"
        for hf_name, weight in to_hf(name, parameter.detach(), gated=config.gated, ffn=ffn):
            theirs = hf_name.removeprefix("decoder.").replace("shared.", "embed_tokens.")
            state[theirs] = weight.clone()
    missing, unexpected = stack.eval().load_state_dict(state, strict=False)
    assert not unexpected
    assert all(".layer.1." in name for name in missing)  # cross-attention, which reads nothing

    tokens = text(2, length)
    read = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    with torch.no_grad():
        states = stack(input_ids=read, attention_mask=torch.ones_like(read)).last_hidden_state
        expected = (states * config.d_model**-0.5) @ ours.embedding.weight.T
        got = logits_of(ours, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
