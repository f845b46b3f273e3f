"""Muon: orthogonal updates for matrices and, expert by expert, for stacks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ranks import Case, run_case, run_cases, spawn
from torch import Tensor, nn

from switchworks.config import ConfigError
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.optim import Adafactor, Muon, OptimConfig, build_optimizer, dimension_letters
from switchworks.optim.muon import orthogonalise
from switchworks.parallel import MeshConfig

MESHES = [MeshConfig(data=2), MeshConfig(expert=2), MeshConfig(model=2)]
MUON = (("optim.name", "muon"), ("optim.lr", 1e-2), ("optim.fallback_lr", 1e-3))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (10, 6), (1, 7)])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors_and_has_values_about_one(shape):
    x = normal(*shape).double()
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ orthogonalise(x, torch.float64) @ v.mT
    assert values.diagonal().min() > 0.6
    assert values.diagonal().max() < 1.25
    torch.testing.assert_close(values - values.diagonal().diag(), torch.zeros_like(values))


def test_the_iteration_in_bfloat16_is_torchs():
    from torch.optim._muon import _zeropower_via_newtonschulz as reference

    for shape in ((24, 24), (16, 40), (40, 16)):
        x = normal(*shape)
        expected = reference(x, (3.4445, -4.775, 2.0315), 5, 1e-7)
        found = orthogonalise(x, torch.bfloat16)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0, atol=2**-6)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_steps_of_a_matrix_are_those_of_torchs_muon_with_the_scale_of_adamw(shape):
    """torch iterates in bfloat16, ours on the CPU in float32: hence the tolerance."""
    ours, theirs = (nn.Parameter(normal(*shape)) for _ in range(2))
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = [
        Muon([ours], **settings),
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings),
    ]
    for step in range(1, 4):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = normal(*shape, seed=step)
            optimizer.step()
    moved = (theirs.detach() - normal(*shape)).norm()
    assert (ours.detach() - theirs.detach()).norm() < 0.01 * moved


def test_each_expert_of_a_stack_moves_as_a_matrix_alone():
    stack = nn.Parameter(normal(4, 6, 10))
    single = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together, alone = Muon([stack], lr=0.1), Muon(single, lr=0.1)
    for step in range(1, 4):
        stack.grad = normal(4, 6, 10, seed=step)
        for parameter, grad in zip(single, stack.grad, strict=True):
            parameter.grad = grad.clone()
        together.step()
        alone.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]))


def test_the_update_of_any_shape_has_a_root_mean_square_of_about_a_fifth_of_the_rate():
    for shape in ((64, 64), (16, 128), (128, 16)):
        weight = nn.Parameter(torch.zeros(*shape))
        weight.grad = normal(*shape)
        Muon([weight], lr=0.5, momentum=0.0).step()
        assert 0.06 < float(weight.detach().square().mean().sqrt()) < 0.12


def test_an_expert_that_never_had_a_token_stays():
    stack = nn.Parameter(normal(2, 4, 4))
    stack.grad = torch.stack([normal(4, 4), torch.zeros(4, 4)])
    before = stack.detach().clone()
    Muon([stack], lr=0.1).step()
    assert torch.equal(stack[1], before[1])
    assert not torch.equal(stack[0], before[0])


def test_weight_decay_is_decoupled_from_the_scale_of_the_update():
    weight = nn.Parameter(torch.ones(4, 8))
    weight.grad = torch.zeros(4, 8)
    Muon([weight], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 8), 0.95))


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"not shape \(3,\)\.\n  Give it to another optimizer"):
        Muon([nn.Parameter(torch.zeros(3))])


def model() -> SwitchTransformer:
    routing = RoutingConfig(experts=2)
    return SwitchTransformer(
        ModelConfig(
            vocab_size=64, d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=2, routing=routing
        ),
        seed=0,
    )


@pytest.mark.parametrize(("fallback", "slots"), [("adamw", 3), ("adafactor", 2)])
def test_muon_has_matrices_and_stacks_and_the_fallback_everything_else(fallback, slots):
    switch = model()
    config = OptimConfig(name="muon", lr=0.02, fallback=fallback, fallback_lr=0.005, router_lr=3.0)
    updater = build_optimizer(switch.named_parameters(), dimension_letters(switch), config)
    state = updater.state_dict()["optimizer"]
    by_muon = {name for name, kept in state.items() if kept.keys() == {"momentum"}}
    assert by_muon == {
        name
        for name, parameter in switch.named_parameters()
        if parameter.dim() == 3 or ("attention" in name or ".ffn.w_" in name)
    }
    assert {len(state[name]) for name in state.keys() - by_muon} == {slots}
    updater._set_rate(0.02)
    names = {id(master): name for name, master in updater.masters.named.items()}
    rates = {
        names[id(parameter)]: group["lr"]
        for optimizer in updater.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    routers = {name for name in rates if name.endswith("router.weight")}
    expected = dict.fromkeys(by_muon, 0.02) | dict.fromkeys(rates.keys() - by_muon, 0.005)
    assert rates == pytest.approx(expected | dict.fromkeys(routers, 0.015))


def test_a_few_hundred_steps_learn_a_matrix():
    weight, target = nn.Parameter(torch.zeros(12, 8)), normal(12, 8)
    config = OptimConfig(name="muon", lr=0.1, schedule="linear", warmup_steps=0, final_lr_share=0.0)
    updater = build_optimizer([("w", weight)], {"w": "F D"}, config)
    losses = []
    for step in range(300):
        loss = (weight - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        updater.step(step, 300)
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"fallback": "muon"},
            r"optim.fallback = 'muon' is not known.\n  Use one of adafactor, adamw",
        ),
        ({"momentum": 1.0}, r"optim.momentum = 1.0"),
        ({"fallback_lr": 0.0}, r"optim.fallback_lr = 0.0"),
    ],
)
def test_a_setting_of_muon_that_cannot_work_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(name="muon", **settings)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> dict:
    folder: Path = tmp_path_factory.mktemp("muon")
    return spawn(2, run_cases, folder, [Case(mesh, more=MUON) for mesh in MESHES])[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=["data", "expert", "model"])
def test_three_steps_on_two_ranks_are_those_of_one_process(mesh, on_two):
    """Sharded matrices are gathered: 1e-7 of the largest entry, in float64."""
    case = Case(mesh, more=MUON)
    found, wanted = on_two[case], run_case(replace(case, mesh=MeshConfig()))
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-8)
    for kind in ("weights", "optimizer"):
        assert found[kind].keys() == wanted[kind].keys()
        for name, tensor in wanted[kind].items():
            bound = 1e-7 * float(tensor.abs().max())
            torch.testing.assert_close(found[kind][name], tensor, rtol=0, atol=bound)


@pytest.mark.parametrize("optimizer", [Muon, Adafactor])
def test_a_closure_is_refused_and_not_ignored(optimizer):
    with pytest.raises(ValueError, match="step takes no closure"):
        optimizer([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1).step(lambda: 1.0)
