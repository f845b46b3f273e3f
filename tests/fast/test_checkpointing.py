"""Activation checkpointing: the same loss and gradients, the same routes, fewer bytes kept."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.cases import mostly_slow
from support.models import TINY
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from switchworks.fast.checkpointing import checkpoint_blocks
from switchworks.fast.kernels import use_fast_kernels
from switchworks.model import Output, RoutingConfig, SwitchTransformer
from switchworks.model.dispatch import DISPATCHERS
from switchworks.model.strategies import Routes

ROUTING = RoutingConfig(experts=4, group_sequences=2, jitter=0.1)
CONFIG = replace(TINY, dropout=0.2, routing=ROUTING)
INPUTS, TARGETS = (
    torch.randint(2, 40, (4, length), generator=torch.Generator().manual_seed(0))
    for length in (11, 7)
)


def forward(model: SwitchTransformer) -> Output:
    torch.manual_seed(7)
    return model(INPUTS, TARGETS)


def gradients(model: SwitchTransformer) -> dict[str, Tensor]:
    forward(model).losses.total.backward()
    torch.rand(5)  # the generator has moved on when the backward pass begins; no matter
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


ENCODERS = [
    "switch",
    "switch_max",
    "switch_random",
    "top2",
    "no_token_left_behind",
    "expert_choice",
]


EACH_ONCE = [(strategy, number % 2 == 0) for number, strategy in enumerate(ENCODERS)]


@pytest.mark.parametrize(
    ("strategy", "fast"), mostly_slow(itertools.product(ENCODERS, [False, True]), EACH_ONCE)
)
def test_loss_and_gradients_are_those_without_checkpointing(strategy, fast):
    decoder = "top2" if strategy == "top2" else "switch"
    routing = replace(ROUTING, strategy=strategy, decoder_strategy=decoder, layers="both")
    models = [SwitchTransformer(replace(CONFIG, routing=routing), seed=1) for _ in range(2)]
    if fast:
        models = [use_fast_kernels(model) for model in models]
    expected, ours = gradients(models[0]), gradients(checkpoint_blocks(models[1]))
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-8, msg=name)


def test_a_dense_decoder_only_model_and_packed_rows_are_no_different():
    config = replace(CONFIG, decoder_only=True, routing=None)
    segments = torch.tensor([[1] * 4 + [2] * 3] * 4)
    found = []
    for wrap in (lambda model: model, checkpoint_blocks):
        model = wrap(SwitchTransformer(config, seed=1))
        torch.manual_seed(3)
        empty = INPUTS[:, :0]
        output = model(empty, TARGETS, input_segments=empty, target_segments=segments)
        output.losses.total.backward()
        found.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


class Spy:
    """A dispatcher that notes every plan it carries out."""

    def __init__(self) -> None:
        self.plans: list[Routes] = []

    def __call__(self, x, routes, experts, capacity):
        self.plans.append(routes)
        return DISPATCHERS["padded"](x, routes, experts, capacity)


@pytest.mark.parametrize("strategy", ENCODERS)
def test_the_routes_are_kept_and_not_chosen_again(strategy):
    """Between the passes the router turns around: a second choice would be another one."""
    routing = replace(ROUTING, strategy=strategy, decoder_strategy="switch")
    model = checkpoint_blocks(SwitchTransformer(replace(CONFIG, routing=routing), seed=1))
    layer, spy = model.switch_layers["encoder.1"], Spy()
    layer.dispatcher = spy
    loss = forward(model).losses.total
    layer.router.weight.data.neg_()
    loss.backward()
    first, again = spy.plans
    forward(model)
    assert torch.equal(first.expert, again.expert)
    assert torch.equal(first.slot, again.slot)
    assert torch.equal(first.kept, again.kept)
    other = spy.plans[-1]
    if strategy == "expert_choice":
        assert first.token is not None
        assert again.token is not None
        assert torch.equal(first.token, again.token)
        assert not torch.equal(first.token, other.token)
    else:
        assert not torch.equal(first.expert, other.expert)


def kept_bytes(model: SwitchTransformer) -> int:
    """What autograd keeps of a forward pass, parameters not counted; each storage once."""
    sizes: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        output = forward(model)
    assert output.losses.total.requires_grad
    return sum(sizes.values())


def test_far_fewer_bytes_are_kept_and_the_fast_paths_keep_fewer_without_it_too():
    config = replace(CONFIG, num_layers=4)
    plain = kept_bytes(SwitchTransformer(config, seed=1))
    fast = kept_bytes(use_fast_kernels(SwitchTransformer(config, seed=1)))
    spare = kept_bytes(checkpoint_blocks(SwitchTransformer(config, seed=1)))
    assert spare < plain / 4
    assert fast < 0.9 * plain


def test_nothing_changes_for_a_model_that_decodes():
    model = SwitchTransformer(CONFIG, seed=1)
    expected = model.generate(INPUTS, max_length=6)
    assert torch.equal(checkpoint_blocks(model).generate(INPUTS, max_length=6), expected)


def test_a_run_may_ask_for_it_and_for_the_fast_paths(tiny_experiment):
    """The same step, from the same batch, in all four forms."""
    from switchworks.batch import Batch
    from switchworks.training.state import build_state
    from switchworks.training.step import train_step

    model = tiny_experiment.model
    routing = replace(model.routing, jitter=0.0)  # each form has noise of its own
    tiny_experiment = replace(tiny_experiment, model=replace(model, routing=routing))
    size = model.vocab_size
    data, rows = tiny_experiment.data, tiny_experiment.batch_size
    draw = torch.Generator().manual_seed(0)
    batch = Batch(
        inputs=torch.randint(2, size, (rows, data.input_length), generator=draw),
        targets=torch.randint(2, size, (rows, data.target_length), generator=draw),
    )
    losses = []
    for form in ("reference", "fast"):
        for spare in (False, True):
            experiment = replace(tiny_experiment, kernels=form, activation_checkpointing=spare)
            state = build_state(experiment)
            train_step(state, batch)
            losses.append(train_step(state, batch).total)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
