"""One step: micro-batches, noise, divergence."""

from dataclasses import replace

import pytest
import torch

from switchworks.batch import Batch
from switchworks.recipes.tiny import tiny
from switchworks.training.state import build_state
from switchworks.training.step import DivergenceError, noise_seed, train_step


def quiet_experiment(**settings):
    """The tiny experiment without jitter, so that only the cut into micro-batches differs."""
    recipe = tiny()
    routing = replace(recipe.model.routing, jitter=0.0, z_weight=1e-3)
    return replace(recipe, model=replace(recipe.model, routing=routing), **settings)


def some_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(3, 384, (4, 64), generator=generator)
    targets = torch.randint(3, 384, (4, 16), generator=generator)
    targets[0, 5:] = 0  # rows with unequally many targets
    inputs[3, 40:] = 0
    return Batch(inputs=inputs, targets=targets)


def test_micro_batches_give_the_loss_and_the_update_of_the_whole_batch():
    whole = build_state(quiet_experiment())
    parts = build_state(quiet_experiment(micro_batches=2))
    one, two = train_step(whole, some_batch()), train_step(parts, some_batch())
    assert two.total == pytest.approx(one.total, rel=1e-6)
    assert two.cross_entropy == pytest.approx(one.cross_entropy, rel=1e-6)
    assert two.update.grad_norm == pytest.approx(one.update.grad_norm, rel=1e-5)
    for name, parameter in whole.model.named_parameters():
        twin = parts.model.get_parameter(name)
        torch.testing.assert_close(twin, parameter, rtol=1e-4, atol=1e-6, msg=name)


def test_the_noise_of_a_step_follows_from_seed_and_step():
    def losses() -> list[float]:
        state = build_state(tiny())
        torch.manual_seed(torch.seed() % 1000)  # whatever was drawn before does not matter
        return [train_step(state, some_batch(step)).total for step in range(3)]

    assert losses() == losses()


@pytest.mark.parametrize(
    "other", [(1, 0, 0), (65_536, 0, 0), (0, 1, 0), (0, 0, 1), (2**32 - 1, 1, 0)]
)
def test_seed_rank_and_step_each_change_the_noise_of_a_generator_on_the_cpu(other):
    """It takes 32 of the 64 bits of a seed: those of seed and rank must be among them."""

    def noise(key: tuple[int, int, int]) -> torch.Tensor:
        return torch.rand(3, generator=torch.Generator().manual_seed(noise_seed(*key)))

    assert torch.equal(noise(other), noise(other))
    assert not torch.equal(noise(other), noise((0, 0, 0)))
    assert not torch.equal(noise(other), noise((0, other[1] + 1, other[2])))


def test_two_seeds_draw_different_noise_and_values():
    first = train_step(build_state(tiny()), some_batch())
    second = train_step(build_state(replace(tiny(), seed=1)), some_batch())
    assert first.total != second.total


def test_the_total_is_the_sum_of_its_parts():
    state = build_state(quiet_experiment())
    batch = some_batch()
    losses = state.model.train()(batch.inputs, batch.targets).losses
    assert train_step(state, batch).total == pytest.approx(
        sum(part.item() for part in losses[1:]), rel=1e-6
    )


def test_a_step_counts_tokens_without_padding():
    state = build_state(tiny())
    result = train_step(state, some_batch())
    assert result.tokens == state.tokens == 4 * 64 - 24 + 4 * 16 - 11
    assert state.step == 1


def test_every_switch_layer_reports_its_load():
    result = train_step(build_state(tiny()), some_batch())
    assert list(result.layers) == ["encoder.1", "decoder.1"]
    for layer in result.layers.values():
        assert sum(layer.load) == pytest.approx(1.0)
        assert layer.balance >= 0.99


def test_a_weight_that_is_not_finite_is_named_with_the_step():
    state = build_state(tiny())
    train_step(state, some_batch())
    with torch.no_grad():
        state.model.decoder.blocks[1].cross_attention.k.weight[0, 0] = float("nan")
    with pytest.raises(DivergenceError, match=r"Step 2: .*decoder\.blocks\.1\.cross_attention\.k"):
        train_step(state, some_batch())


def test_an_activation_that_overflows_is_named_and_the_weights_stay():
    state = build_state(tiny())
    with torch.no_grad():
        state.model.encoder.blocks[0].ffn.w_in.weight.fill_(1e30)
        state.model.encoder.blocks[0].ffn.w_out.weight.fill_(1e30)
    before = {name: p.clone() for name, p in state.model.named_parameters()}
    with pytest.raises(DivergenceError, match=r"the output of encoder\.blocks\.0\.ffn\.w_out"):
        train_step(state, some_batch())
    assert all(torch.equal(before[name], p) for name, p in state.model.named_parameters())
    assert state.step == 0


def test_bfloat16_training_keeps_routers_and_masters_in_float32():
    state = build_state(replace(tiny(), precision="bfloat16"))
    train_step(state, some_batch())
    assert state.model.encoder.blocks[1].ffn.router.weight.dtype == torch.float32
    assert state.model.encoder.blocks[1].ffn.experts.w_in.dtype == torch.bfloat16
    masters = state.updater.masters.float_state()
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    weight = masters["embedding.weight"]
    assert torch.equal(state.model.embedding.weight, weight.bfloat16())
    assert not torch.equal(weight, weight.bfloat16().float())
