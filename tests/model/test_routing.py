"""Who goes where: the router's scores, the queues, and who finds one full."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchworks.model.config import RoutingConfig
from switchworks.model.routing import Router
from switchworks.model.strategies import queue, route


def wanting(*experts: int, of: int = 3) -> torch.Tensor:
    """Probabilities [1, S, of] whose tokens want `experts`, in this order."""
    return torch.nn.functional.one_hot(torch.tensor([experts]), of).float().mul(4).softmax(-1)


def all_real(probs: torch.Tensor) -> torch.Tensor:
    return torch.ones(probs.shape[:2], dtype=torch.bool)


def test_each_token_goes_to_its_likeliest_expert_with_its_raw_probability():
    """Fedus et al. 2021, section 2.1: the gate is p_i(x), not normalised again."""
    probs = torch.tensor([[[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]])
    routes = route(probs, all_real(probs), None)
    assert routes.expert.tolist() == [[1, 0]]
    assert torch.equal(routes.gate, torch.tensor([[0.5, 0.6]]))


def test_the_gate_lies_between_one_nth_and_one():
    """Fedus et al. 2021, section 2.1: the largest of N probabilities."""
    probs = torch.randn(4, 50, 8).softmax(-1)
    gate = route(probs, all_real(probs), None).gate
    assert (gate > 1 / 8).all()
    assert (gate <= 1).all()


def test_the_last_slot_is_filled_and_the_next_token_is_dropped():
    """Mesh-TF `moe.py`: an exclusive cumulative sum, compared with <."""
    probs = wanting(1, 1, 1, 1)
    routes = route(probs, all_real(probs), 3)
    assert routes.slot.tolist() == [[0, 1, 2, 3]]
    assert routes.kept.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(("capacity", "dropped"), [(2, 1), (3, 0)])
def test_the_worked_example_drops_one_token_at_factor_one_and_none_at_one_and_a_half(
    capacity, dropped
):
    """Fedus et al. 2021, figure 3: 6 tokens, 3 experts, loads of 3, 2 and 1."""
    probs = wanting(0, 1, 0, 2, 1, 0)
    kept = route(probs, all_real(probs), capacity).kept
    assert (~kept).sum() == dropped


@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([1, 2, 40]))
def test_places_in_queues_are_an_exclusive_cumulative_sum_over_one_hot_rows(seed, shuffled, size):
    """Mesh-TF `moe.py`, `_switch_gating`: the formulation that queues are counted by there."""
    draw = torch.Generator().manual_seed(seed)
    expert = torch.randint(5, (3, size), generator=draw)
    real = torch.rand(3, size, generator=draw) < 0.8
    order = torch.rand(3, size, generator=draw).argsort(dim=1) if shuffled else None
    found = queue(expert, real, 5, order)
    line = torch.arange(size).expand(3, -1) if order is None else order
    arrivals = torch.nn.functional.one_hot(expert.gather(1, line), 5)
    arrivals = arrivals * real.gather(1, line)[..., None]
    before = (arrivals.cumsum(dim=1) - arrivals).gather(-1, expert.gather(1, line)[..., None])
    wanted = torch.empty_like(line).scatter_(1, line, before.squeeze(-1))
    assert torch.equal(found[real], wanted[real])


def test_without_a_capacity_every_real_token_is_kept():
    """Fedus et al. 2021, section 2.2, with a capacity no group can exceed."""
    probs = wanting(*[0] * 40)
    assert route(probs, all_real(probs), None).kept.all()


def test_groups_do_not_compete_for_slots():
    """Fedus et al. 2021, figure 16: capacity is counted within a core's tokens."""
    probs = wanting(0, 0).repeat(5, 1, 1)
    assert route(probs, all_real(probs), 2).kept.all()


def test_padding_never_takes_a_slot():
    """Mesh-TF `moe.py`: the mask of padding is zeroed before the cumulative sum."""
    probs = wanting(0, 0, 0, 0, 0)
    real = torch.tensor([[False, True, False, True, True]])
    routes = route(probs, real, 2)
    assert routes.kept.tolist() == [[False, True, False, True, False]]


def test_the_routes_of_real_tokens_do_not_depend_on_how_much_padding_follows():
    """Mesh-TF `moe.py`: padding is not dispatched. At a fixed capacity."""
    probs = torch.randn(2, 10, 3).softmax(-1)
    real = torch.arange(10).expand(2, -1) < 6
    padded, alone = route(probs, real, 2), route(probs[:, :6], real[:, :6], 2)
    assert torch.equal(padded.kept[:, :6], alone.kept)
    assert torch.equal(padded.slot[:, :6], alone.slot)


@pytest.mark.parametrize("first_changed", [1, 5, 9])
def test_who_is_dropped_depends_on_earlier_tokens_only(first_changed):
    """Fedus et al. 2021, section 2.2: a decoder may not look ahead, and neither may its queues."""
    probs, other = torch.randn(3, 10, 2).softmax(-1), torch.randn(3, 10, 2).softmax(-1)
    other[:, :first_changed] = probs[:, :first_changed]
    before, after = (route(p, all_real(p), 3) for p in (probs, other))
    for field in ("expert", "slot", "kept", "gate"):
        left, right = getattr(before, field), getattr(after, field)
        assert torch.equal(left[:, :first_changed], right[:, :first_changed])


@given(
    tokens=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=20),
    capacity=st.integers(1, 5),
)
def test_the_queues_are_those_of_a_plain_loop(tokens, capacity):
    probs = wanting(*(expert for expert, _ in tokens))
    routes = route(probs, torch.tensor([[real for _, real in tokens]]), capacity)
    waiting: dict[int, int] = defaultdict(int)
    for place, (expert, real) in enumerate(tokens):
        assert routes.kept[0, place] == (real and waiting[expert] < capacity)
        if real:
            assert routes.slot[0, place] == waiting[expert]
            waiting[expert] += 1


def new_router(jitter: float = 0.0, experts: int = 4) -> Router:
    router = Router(8, RoutingConfig(experts=experts, jitter=jitter))
    torch.nn.init.normal_(router.weight)
    return router


def test_the_router_is_one_matrix_without_bias():
    """Fedus et al. 2021, equation 1; Mesh-TF `use_bias=False`."""
    assert [(n, tuple(p.shape)) for n, p in new_router().named_parameters()] == [("weight", (4, 8))]


def test_the_logits_are_the_matrix_times_the_token():
    router, x = new_router(), torch.randn(2, 3, 8)
    assert torch.allclose(router(x), x @ router.weight.T, atol=1e-6)


def test_a_bfloat16_router_answers_in_float32():
    """Fedus et al. 2021, section 2.4."""
    router = new_router().bfloat16()
    assert router(torch.randn(2, 3, 8).bfloat16()).dtype == torch.float32


def test_autocast_does_not_lower_the_routers_precision():
    """Fedus et al. 2021, section 2.4."""
    router, x = new_router(), torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(x)
    assert torch.equal(logits, router(x))


def test_jitter_multiplies_the_routers_input_by_at_most_its_share():
    """Mesh-TF `switch_jitter`: x * Uniform(1 - eps, 1 + eps), element by element."""
    router = Router(1, RoutingConfig(experts=1, jitter=0.01))
    torch.nn.init.ones_(router.weight)
    noisy = router(torch.ones(1, 4000, 1))
    assert 0.99 <= noisy.min() < 0.9905
    assert 1.0095 < noisy.max() <= 1.01


def test_jitter_is_for_training_only():
    router, x = new_router(jitter=0.5), torch.randn(2, 3, 8)
    assert not torch.equal(router(x), router(x))
    router.eval()
    assert torch.equal(router(x), router(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jitter_leaves_its_input_as_it_was(dtype):
    """The cast to float32 is no copy of a float32 input, so noise in place would reach experts."""
    router, x = new_router(jitter=0.5), torch.randn(2, 3, 8).to(dtype)
    before = x.clone()
    router(x)
    assert torch.equal(x, before)
