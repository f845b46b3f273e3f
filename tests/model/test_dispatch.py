"""Every dispatcher against the paper's einsum, and the einsum against a plain loop."""

from dataclasses import dataclass

import pytest
import torch

from switchworks.model.dispatch import DISPATCHERS, Dispatcher, einsum, sort_by_expert
from switchworks.model.experts import Experts
from switchworks.model.losses import balance_loss
from switchworks.model.strategies import Routes, route

D, F = 6, 10
every_dispatcher = pytest.mark.parametrize("name", DISPATCHERS)
other_dispatchers = pytest.mark.parametrize("name", [n for n in DISPATCHERS if n != "einsum"])


@dataclass(frozen=True)
class Case:
    """A layer and a batch small enough to read."""

    groups: int = 2
    tokens: int = 9
    experts: int = 3
    capacity: int | None = None
    padding: float = 0.0
    """Share of the positions that are padding."""
    gated: bool = False
    crowd: float = 0.0
    """Added to the score of expert 0, to send tokens there."""


CASES = {
    "dropless": Case(),
    "with drops": Case(capacity=2),
    "more slots than tokens": Case(capacity=12),
    "with padding": Case(padding=0.4),
    "with padding and drops": Case(padding=0.4, capacity=2),
    "gated": Case(gated=True, capacity=3),
    "one expert": Case(experts=1),
    "one expert, one slot": Case(experts=1, capacity=1),
    "experts without tokens": Case(crowd=100.0),
    "experts without tokens and drops": Case(crowd=100.0, capacity=4),
    "many experts": Case(experts=32, groups=3),
    "one group": Case(groups=1, capacity=2),
    "one token": Case(groups=1, tokens=1),
    "one token, gated": Case(groups=1, tokens=1, gated=True),
    "one token that is padding": Case(groups=1, tokens=1, padding=1.0),
    "padding alone": Case(padding=1.0, capacity=2),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Layer:
    """A switch layer laid open: `x`, `router` and `experts` are leaves that take gradients."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        self.case = case
        self.x = torch.randn(case.groups, case.tokens, D).to(dtype).requires_grad_()
        self.router = torch.randn(case.experts, D).to(dtype).requires_grad_()
        self.experts = Experts(case.experts, D, F, gated=case.gated).to(dtype)
        for weight in self.experts.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        self.real = torch.rand(case.groups, case.tokens) >= case.padding

    def route(self) -> tuple[Routes, torch.Tensor]:
        logits = self.x @ self.router.T
        crowd = torch.zeros(self.case.experts).to(logits)
        crowd[0] = self.case.crowd
        probs = (logits + crowd).softmax(-1)
        return route(probs, self.real, self.case.capacity), probs

    def run(self, dispatcher: Dispatcher) -> torch.Tensor:
        return dispatcher(self.x, self.route()[0], self.experts, self.case.capacity)

    def gradients(self, dispatcher: Dispatcher, weights: torch.Tensor) -> list[torch.Tensor]:
        """Of a weighted sum of the outputs and of the balance loss, for all leaves."""
        routes, probs = self.route()
        y = dispatcher(self.x, routes, self.experts, self.case.capacity)
        loss = (y * weights).sum() + balance_loss(probs, routes.expert, self.real)
        return list(torch.autograd.grad(loss, [self.x, self.router, *self.experts.parameters()]))


@every_case
def test_the_einsum_gives_each_kept_token_its_experts_answer_times_the_gate(case):
    """Fedus et al. 2021, section 2.1: y = p_i(x) E_i(x), and 0 for whoever is not served."""
    layer = Layer(case)
    routes, _ = layer.route()
    y = layer.run(einsum)
    for place in torch.cartesian_prod(torch.arange(case.groups), torch.arange(case.tokens)):
        g, s = place.tolist()
        answer = layer.experts.run_one(int(routes.expert[g, s]), layer.x[g, s][None])[0]
        expected = answer * routes.gate[g, s] * routes.kept[g, s]
        torch.testing.assert_close(y[g, s], expected)


@other_dispatchers
@every_case
def test_every_dispatcher_gives_the_values_of_the_einsum(name, case):
    layer = Layer(case)
    torch.testing.assert_close(layer.run(DISPATCHERS[name]), layer.run(einsum))


@other_dispatchers
@every_case
def test_every_dispatcher_gives_the_gradients_of_the_einsum(name, case):
    layer = Layer(case)
    weights = torch.randn_like(layer.x)
    expected = layer.gradients(einsum, weights)
    torch.testing.assert_close(layer.gradients(DISPATCHERS[name], weights), expected)


@other_dispatchers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_every_dispatcher_agrees_in_lower_precision(name, dtype, tolerance):
    layer = Layer(Case(capacity=3, padding=0.2), dtype)
    y, expected = layer.run(DISPATCHERS[name]), layer.run(einsum)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@every_dispatcher
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_have_the_type_of_the_tokens_while_the_gate_is_float32(name, dtype):
    """Fedus et al. 2021, section 2.4: what travels is bfloat16."""
    layer = Layer(Case(capacity=3), dtype)
    routes = layer.route()[0]
    routes = routes._replace(gate=routes.gate.float())
    assert DISPATCHERS[name](layer.x, routes, layer.experts, 3).dtype == dtype


@every_dispatcher
def test_answers_have_the_type_of_the_tokens_under_autocast(name):
    layer = Layer(Case(capacity=3), torch.float32)
    routes = layer.route()[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = DISPATCHERS[name](layer.x, routes, layer.experts, 3)
    assert y.dtype == torch.float32


@every_dispatcher
def test_a_dropped_token_moves_no_expert(name):
    """Fedus et al. 2021, section 2.2: no answer, so no gradient either way."""
    layer = Layer(Case(groups=1, tokens=5, capacity=2, crowd=100.0))
    y = layer.run(DISPATCHERS[name])
    assert y[0, 2:].abs().sum() == 0
    gradients = torch.autograd.grad(y[0, 2:].sum(), [*layer.experts.parameters(), layer.x])
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


@every_dispatcher
def test_a_full_expert_serves_the_first_tokens_and_exactly_as_many_as_it_has_slots(name):
    """Fedus et al. 2021, section 2.2; Mesh-TF: by position, not by probability."""
    layer = Layer(Case(groups=1, tokens=9, capacity=4, crowd=100.0))
    for positive in (layer.x, layer.experts.w_in):  # so that no answer is zero by chance
        positive.data.abs_()
    served = layer.run(DISPATCHERS[name]).abs().sum(-1)[0] > 0
    assert served.tolist() == [True] * 4 + [False] * 5


@every_dispatcher
def test_finite_differences_agree_with_every_dispatcher(name):
    layer = Layer(Case(groups=1, tokens=4, experts=2, capacity=1))
    routes = layer.route()[0]
    gate = routes.gate.detach().requires_grad_()

    def run(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return DISPATCHERS[name](x, routes._replace(gate=gate), layer.experts, 1)

    assert torch.autograd.gradcheck(run, (layer.x, gate))


def test_sorting_puts_the_kept_tokens_in_the_order_of_experts_and_then_of_places():
    routes = Routes(
        expert=torch.tensor([[2, 0, 0], [0, 2, 1]]),
        slot=torch.zeros(2, 3, dtype=torch.long),
        kept=torch.tensor([[True, True, False], [True, True, False]]),
        gate=torch.ones(2, 3),
    )
    order, counts = sort_by_expert(routes, 4)
    assert order.tolist() == [1, 3, 0, 4]
    assert counts == [2, 0, 2, 0]
