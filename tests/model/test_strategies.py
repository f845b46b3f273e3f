"""Every routing strategy: against plain loops over tokens, and what it promises."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchworks.config import ConfigError
from switchworks.model import ModelConfig, RoutingConfig, SwitchFFN, SwitchTransformer
from switchworks.model.dispatch import DISPATCHERS, einsum
from switchworks.model.routing import Router
from switchworks.model.sizes import flops_per_sequence
from switchworks.model.strategies import STRATEGIES, Routes, RoutingLimits

D = 8
NON_CAUSAL = [name for name, each in STRATEGIES.items() if each.looks_ahead]
IN_DECODERS = [name for name, each in STRATEGIES.items() if not each.looks_ahead]
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def probabilities(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([rows])


def plan(name: str, probs: torch.Tensor, capacity: int | None, real=None, **rules: Any) -> Routes:
    """What strategy `name` makes of `probs`, each token wanting the likeliest expert."""
    real = torch.ones(probs.shape[:2], dtype=torch.bool) if real is None else real
    return STRATEGIES[name].plan(probs, probs.argmax(-1), real, RoutingLimits(capacity, **rules))


def assignments(routes: Routes) -> list[set[tuple[int, int]]]:
    """The kept (token, expert) pairs of each group."""
    size = routes.expert.shape[1]
    token = torch.arange(size).expand_as(routes.expert) if routes.token is None else routes.token
    return [
        {(int(t), int(e)) for t, e, kept in zip(*columns, strict=True) if kept}
        for columns in zip(token, routes.expert, routes.kept, strict=True)
    ]


@st.composite
def groups_of_tokens(draw):
    """(probs [1, S, E], real [1, S], capacity)."""
    tokens, experts = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    sharpness = draw(st.sampled_from([0.5, 5.0]))
    logits = sharpness * torch.randn(1, tokens, experts, generator=generator)
    real = torch.rand(1, tokens, generator=generator) < draw(st.sampled_from([1.0, 0.6]))
    return logits.softmax(-1), real, draw(st.integers(1, 6))


@given(groups_of_tokens())
def test_switch_max_serves_the_likeliest_tokens_of_each_expert(case):
    """Mesh-TF `switch_max`: on overflow the lowest probabilities are dropped."""
    probs, real, capacity = case
    best, expert = probs[0].max(-1)
    expected = set()
    for e in range(probs.shape[-1]):
        wanting = [t for t in range(probs.shape[1]) if real[0, t] and expert[t] == e]
        wanting.sort(key=lambda t: -float(best[t]))
        expected |= {(t, e) for t in wanting[:capacity]}
    assert assignments(plan("switch_max", probs, capacity, real)) == [expected]


@given(groups_of_tokens())
def test_top4_serves_whom_a_plain_loop_serves(case):
    """In a decoder: token after token, each its four likeliest experts; gates are shares of those
    four."""
    probs, real, capacity = case
    load, expected, gates = Counter[int](), set(), {}
    for t in range(probs.shape[1]):
        wishes = probs[0, t].sort(descending=True, stable=True).indices[:4].tolist()
        total = sum(float(probs[0, t, e]) for e in wishes)
        for e in wishes if real[0, t] else []:
            load[e] += 1
            if load[e] <= capacity:
                expected.add((t, e))
                gates[t, e] = float(probs[0, t, e]) / total
    routes = plan("top4", probs, capacity, real, causal=True)
    assert assignments(routes) == [expected]
    assert routes.token is not None
    columns = (x[0].tolist() for x in (routes.token, routes.expert, routes.kept, routes.gate))
    served = {(t, e): gate for t, e, kept, gate in zip(*columns, strict=True) if kept}
    assert served == pytest.approx(gates, abs=1e-6)


def test_a_bias_moves_which_four_experts_are_chosen_and_no_gate():
    probs = probabilities([0.3, 0.25, 0.2, 0.15, 0.1])
    bias = torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0])
    rules = RoutingLimits(None, selection_bias=bias)
    chosen = (probs + bias).argmax(-1)
    routes = STRATEGIES["top4"].plan(probs, chosen, torch.ones(1, 1, dtype=torch.bool), rules)
    assert routes.expert.tolist() == [[1, 2, 3, 4]]
    torch.testing.assert_close(routes.gate, torch.tensor([[0.25, 0.2, 0.15, 0.1]]) / 0.7)


@given(groups_of_tokens())
def test_no_token_left_behind_serves_whom_a_plain_loop_serves(case):
    """Appendix B: stage by stage, each token still waiting asks its next likeliest expert."""
    probs, real, capacity = case
    wishes = probs[0].argsort(dim=-1, descending=True, stable=True)
    load: Counter[int] = Counter()
    expected: dict[int, int] = {}
    for stage in range(min(4, probs.shape[-1])):
        for t in range(probs.shape[1]):
            e = int(wishes[t, stage])
            if real[0, t] and t not in expected and load[e] < capacity:
                expected[t] = e
                load[e] += 1
    routes = plan("no_token_left_behind", probs, capacity, real)
    assert assignments(routes) == [set(expected.items())]
    for t, e in expected.items():
        assert routes.gate[0, t] == probs[0, t, e]
    kept = routes.kept[0]
    places = list(zip(routes.expert[0][kept].tolist(), routes.slot[0][kept].tolist(), strict=True))
    assert len(set(places)) == len(places)
    assert all(slot < capacity for _, slot in places)


def test_no_token_left_behind_fills_every_expert_of_figure_11():
    """Appendix B, Figure 11: 6 tokens, 3 experts, capacity 2: every expert ends with 2 tokens."""
    probs = probabilities(
        [0.1, 0.7, 0.2],
        [0.7, 0.2, 0.1],
        [0.5, 0.3, 0.2],
        [0.8, 0.1, 0.1],
        [0.3, 0.1, 0.6],
        [0.7, 0.1, 0.2],
    )
    routes = plan("no_token_left_behind", probs, 2)
    assert routes.kept.all()
    assert Counter(routes.expert[0].tolist()) == {0: 2, 1: 2, 2: 2}
    first = plan("switch", probs, 2)
    assert torch.equal(routes.expert[first.kept], first.expert[first.kept])  # stage 1 is switch


@pytest.mark.parametrize("experts", [4, 16])
@pytest.mark.parametrize("seed", range(5))
def test_no_token_left_behind_drops_nobody_while_slots_suffice(seed, experts):
    """With as many stages as experts and E * capacity >= tokens."""
    draw = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, 3 * experts, experts, generator=draw)
    routes = plan("no_token_left_behind", logits.softmax(-1), 3, ntlb_rounds=experts)
    assert routes.kept.all()


def test_with_fewer_stages_than_experts_a_token_may_be_left_behind():
    """Mesh-TF offers four: everyone wants the same four of eight, which have four slots."""
    logits = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]).expand(1, 8, 8)
    few, all_of_them = (
        plan("no_token_left_behind", logits.softmax(-1), 1, ntlb_rounds=rounds) for rounds in (4, 8)
    )
    assert few.kept.sum() == 4
    assert all_of_them.kept.all()


@given(groups_of_tokens(), st.booleans())
def test_top2_fills_slots_as_a_plain_loop_does(case, causal):
    """Mesh-TF `_top_2_gating`: all first choices, then all second ones; by position if causal."""
    probs, real, capacity = case
    tokens = probs.shape[1]
    wishes = probs[0].argsort(dim=-1, descending=True, stable=True)[:, :2]
    turns = [(t, c) for c in range(wishes.shape[1]) for t in range(tokens)]
    load: Counter[int] = Counter()
    expected = set()
    for t, c in sorted(turns) if causal else turns:
        e = int(wishes[t, c])
        if real[0, t] and load[e] < capacity:
            expected.add((t, e))
            load[e] += 1
    assert assignments(plan("top2", probs, capacity, real, causal=causal)) == [expected]


def test_the_gates_of_top2_sum_to_one():
    """Mesh-TF: gates are divided by their sum before anything is dropped."""
    routes = plan("top2", probabilities([0.6, 0.3, 0.1], [0.2, 0.3, 0.5]), None)
    torch.testing.assert_close(routes.gate, torch.tensor([[2 / 3, 5 / 8, 1 / 3, 3 / 8]]))
    assert routes.expert.tolist() == [[0, 2, 1, 1]]


def test_top2_asks_a_second_expert_as_often_as_its_gate_says():
    """Mesh-TF, policy "random", threshold 0.2: kept with probability min(1, g2 / 0.2)."""
    torch.manual_seed(0)
    weak = probabilities(*[[0.9, 0.1, 0.0]] * 4000)  # g2 = 0.1: half of them
    strong = probabilities(*[[0.7, 0.3, 0.0]] * 4000)  # g2 = 0.3: all
    asked = plan("top2", weak, None, training=True).kept[0, 4000:]
    assert asked.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert plan("top2", strong, None, training=True).kept.all()
    assert plan("top2", weak, None, training=False).kept.all()


@given(groups_of_tokens())
def test_experts_choose_their_likeliest_tokens(case):
    """arXiv 2202.09368: the transpose of token choice. Padding is never chosen."""
    probs, real, capacity = case
    group_capacity = 1 + capacity // 2
    expected = set()
    for e in range(probs.shape[-1]):
        candidates = [t for t in range(probs.shape[1]) if real[0, t]]
        candidates.sort(key=lambda t, e=e: -float(probs[0, t, e]))
        expected |= {(t, e) for t in candidates[: min(group_capacity, capacity)]}
    routes = plan(
        "expert_choice", probs, capacity, real, group_capacity=torch.tensor([group_capacity])
    )
    assert assignments(routes) == [expected]


def test_switch_random_drops_at_random_in_training_and_by_position_in_evaluation():
    torch.manual_seed(0)
    crowd = probabilities(*[[0.9, 0.1]] * 10).repeat(400, 1, 1)
    kept = plan("switch_random", crowd, 4, training=True).kept
    assert (kept.sum(1) == 4).all()
    assert kept.float().mean(0).sub(0.4).abs().max() < 0.1  # no place is preferred
    assert plan("switch_random", crowd, 4).kept[0].tolist() == [True] * 4 + [False] * 6


@every_strategy
@given(case=groups_of_tokens())
def test_padding_gets_no_expert_and_changes_nothing_for_the_rest(name, case):
    probs, real, capacity = case
    routes = plan(name, probs, capacity, real)
    served = {token for token, _ in assignments(routes)[0]}
    assert served <= set(real[0].nonzero()[:, 0].tolist())
    noise = torch.where(real[..., None], probs, torch.rand_like(probs).softmax(-1))
    assert assignments(plan(name, noise, capacity, real)) == assignments(routes)


@every_strategy
def test_without_a_limit_every_strategy_of_one_expert_is_switch(name):
    if name in ("top2", "top4", "expert_choice"):
        pytest.skip("asks several experts")
    probs = torch.randn(2, 9, 4).softmax(-1)
    routes, first = plan(name, probs, None, training=True), plan("switch", probs, None)
    assert assignments(routes) == assignments(first)
    assert torch.equal(routes.gate, first.gate)


def new_layer(name: str, *, causal: bool = False, **settings: Any) -> SwitchFFN:
    """A layer in evaluation mode without noise, its weights large enough to tell tokens apart."""
    settings = {"experts": 4, "jitter": 0.0, "min_capacity": 1, "strategy": name} | settings
    layer = SwitchFFN(D, 16, RoutingConfig(**settings), init_scale=4.0, causal=causal)
    return layer.eval()


@every_strategy
@pytest.mark.parametrize("dispatcher", [n for n in DISPATCHERS if n != "einsum"])
@pytest.mark.parametrize("factor", [0.6, 3.0])
def test_every_dispatcher_carries_out_every_plan(name, dispatcher, factor):
    """Values and gradients, against the einsums of Figure 16."""
    layer = new_layer(name, capacity_factor=factor, eval_capacity_factor=factor).double()
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    real = torch.arange(9).expand(2, -1) < torch.tensor([[9], [6]])
    weights, leaves = torch.randn(2, 9, D, dtype=torch.float64), [x, *layer.parameters()]
    results = []
    for each in (einsum, DISPATCHERS[dispatcher]):
        layer.dispatcher = each
        y, _ = layer(x, real)
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaves)])
    # The router works in float32, so gradients of the two meet there only.
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@every_strategy
def test_each_token_gets_the_gated_sum_of_its_experts_answers(name):
    layer = new_layer(name, capacity_factor=1.0, eval_capacity_factor=1.0)
    x = torch.randn(2, 9, D)
    y, routing = layer(x)
    routes, expected = routing.routes, torch.zeros_like(x)
    token = torch.arange(9).expand(2, -1) if routes.token is None else routes.token
    for g, a in routes.kept.nonzero().tolist():
        t, e = int(token[g, a]), int(routes.expert[g, a])
        expected[g, t] += routes.gate[g, a] * layer.experts.run_one(e, x[g, t][None])[0]
    torch.testing.assert_close(y, expected)


@every_strategy
def test_in_evaluation_an_answer_depends_neither_on_neighbours_nor_on_padding(name):
    layer = new_layer(name, capacity_factor=1.0, group_sequences=2)
    rows = torch.randn(4, 10, D)
    together, _ = layer(rows)
    for row in range(4):
        alone, _ = layer(rows[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])
        padded = torch.cat([rows[row], torch.randn(6, D)])[None]
        answer, _ = layer(padded, (torch.arange(16) < 10)[None])
        torch.testing.assert_close(answer[0, :10], together[row])


@pytest.mark.parametrize("name", IN_DECODERS)
@pytest.mark.parametrize("factor", [0.5, 1.0, None])
@pytest.mark.parametrize("first", [1, 4, 8])
def test_in_a_decoder_no_token_feels_a_later_one(name, factor, first):
    """In training too, where slots are short. Noise apart: it has no place in the claim."""
    settings = {"capacity_factor": factor, "second_threshold": 0.0}
    layer = new_layer(name, causal=True, **settings).train()
    x, other = torch.randn(3, 9, D), torch.randn(3, 9, D)
    other[:, :first] = x[:, :first]
    torch.testing.assert_close(layer(other)[0][:, :first], layer(x)[0][:, :first])


@pytest.mark.parametrize("name", NON_CAUSAL)
def test_what_looks_ahead_is_refused_in_decoders_with_the_reason(name):
    with pytest.raises(
        ConfigError, match=rf"{name} cannot route a decoder: (?s:.*)later.*\n.*top2"
    ):
        new_layer(name, causal=True)
    with pytest.raises(ConfigError, match="decoder_strategy"):
        ModelConfig(routing=RoutingConfig(strategy=name))
    mixed = RoutingConfig(strategy=name, decoder_strategy="switch", experts=4)
    model = SwitchTransformer(tiny(mixed))
    used = {layer: module.config.strategy for layer, module in model.switch_layers.items()}
    assert used == {"encoder.1": name, "decoder.1": "switch"}


@pytest.mark.parametrize("name", NON_CAUSAL)
def test_what_is_refused_does_look_ahead(name):
    """The reason given is true: some later token changes an earlier token's answer."""
    torch.manual_seed(0)
    layer = new_layer(name, capacity_factor=1.0).train()
    x = torch.randn(8, 9, D)
    other = torch.cat([x[:, :5], torch.randn(8, 4, D)], dim=1)
    assert not torch.allclose(layer(other)[0][:, :5], layer(x)[0][:, :5])


def test_expert_choice_needs_no_balance_loss_and_wastes_no_slot():
    layer = new_layer("expert_choice", capacity_factor=2.0, balance_weight=0.01).train()
    _, routing = layer(torch.randn(2, 10, D))
    assert routing.loss == 0
    assert routing.routes.kept.all()
    assert routing.routes.kept.sum() == 2 * 4 * 5  # groups, experts, int(10 * 2.0 / 4) slots


def test_expert_choice_without_a_number_of_slots_is_refused():
    with pytest.raises(
        ConfigError, match=r"expert_choice needs .* many tokens(?s:.*)capacity_factor"
    ):
        RoutingConfig(strategy="expert_choice", decoder_strategy="switch", capacity_factor=None)


def tiny(routing: RoutingConfig | None) -> ModelConfig:
    return ModelConfig(
        vocab_size=50, d_model=D, d_ff=16, d_kv=4, num_heads=2, num_layers=2, routing=routing
    )


# --- exploration (appendix C) ---


def a_router(**settings: Any) -> Router:
    router = Router(D, RoutingConfig(experts=4, **settings))
    torch.nn.init.normal_(router.weight)
    return router


def test_sampling_draws_experts_as_often_as_the_softmax_says():
    """Appendix C, "sample softmax"; Mesh-TF policy `sample`."""
    torch.manual_seed(0)
    router = a_router(exploration="sample")
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 20_000, 4)
    drawn = router.choose(logits, logits.softmax(-1))
    share = torch.bincount(drawn.flatten(), minlength=4) / 20_000
    torch.testing.assert_close(share, logits[0, 0].exp(), atol=0.015, rtol=0)
    router.eval()
    assert (router.choose(logits, logits.softmax(-1)) == 0).all()


def test_a_sampled_experts_gate_is_its_own_probability():
    """Mesh-TF: the gate is the probability of the sampled expert."""
    layer = new_layer("switch", exploration="sample", capacity_factor=None).train()
    x = torch.randn(1, 200, D)
    probs = layer.router(x).softmax(-1)
    routes = layer(x)[1].routes
    assert (routes.expert != probs.argmax(-1)).any()
    torch.testing.assert_close(routes.gate, probs.gather(-1, routes.expert[..., None])[..., 0])


def test_input_dropout_zeroes_a_share_of_the_routers_input_in_training():
    """Appendix C, "input dropout"; Mesh-TF rate 0.1."""
    torch.manual_seed(0)
    router = Router(1, RoutingConfig(experts=1, exploration="input_dropout", input_dropout=0.25))
    torch.nn.init.ones_(router.weight)
    scores = router(torch.ones(1, 4000, 1))
    assert sorted(scores.unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert (scores == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (router.eval()(torch.ones(1, 10, 1)) == 1).all()


def test_argmax_explores_nothing_whatever_the_jitter():
    router, x = a_router(exploration="argmax", jitter=0.9), torch.randn(1, 5, D)
    assert torch.equal(router(x), router(x))


# --- balance ---


def test_over_the_batch_groups_of_opposite_imbalance_cancel_and_by_group_they_do_not():
    x = torch.eye(2, D).repeat_interleave(6, 0).view(2, 6, D)  # a group per kind of token
    weight = 50 * torch.eye(2, D)
    losses = {}
    for over in ("group", "batch"):
        layer = new_layer("switch", experts=2, balance_over=over)
        layer.router.weight.data = weight
        losses[over] = layer(x)[1].balance.item()
    assert losses["group"] == pytest.approx(2)  # collapsed in each group
    assert losses["batch"] == pytest.approx(1)  # even over all


def test_the_selection_bias_moves_towards_experts_with_too_little_by_its_rate():
    """arXiv 2408.15664, algorithm 1: b_i += u * sign(mean load - load_i)."""
    router = a_router(bias_rate=0.25)
    router.update_bias(torch.tensor([0.7, 0.1, 0.2, 0.0]))
    router.update_bias(torch.tensor([0.25, 0.25, 0.25, 0.25]))
    assert router.selection_bias.tolist() == [-0.25, 0.25, 0.25, 0.25]


def test_the_selection_bias_changes_the_choice_and_not_the_gate():
    layer = new_layer("switch", experts=2, bias_rate=0.1)
    x = torch.randn(1, 50, D)
    probs = layer.router(x).softmax(-1)
    layer.router.selection_bias.data = torch.tensor([-2.0, 2.0])
    routes = layer(x)[1].routes
    assert (routes.expert == 1).all()
    torch.testing.assert_close(routes.gate, probs[..., 1])
    assert not layer.router.selection_bias.requires_grad


def test_nudging_evens_out_a_crowded_layer_without_any_loss():
    torch.manual_seed(0)
    layer = new_layer("switch", bias_rate=0.02, balance_weight=0.0)
    layer.router.weight.data[0] += 0.5  # all tokens lean towards expert 0
    x = torch.randn(4, 64, D) + 1.0
    before = layer(x)[1].load.max()
    for _ in range(100):
        layer.router.update_bias(layer(x)[1].load)
    assert before > 0.5
    assert layer(x)[1].load.max() < 0.3


# --- switch attention (appendix A) ---


@pytest.mark.parametrize("layers", ["attention", "both"])
@pytest.mark.parametrize("strategy", ["switch", "top2"])
def test_parameters_and_flops_of_switch_attention_are_counted(layers, strategy):
    config = tiny(RoutingConfig(experts=4, layers=layers, strategy=strategy, bias_rate=0.1))
    model = SwitchTransformer(config)
    names = ["encoder.1.attention", "decoder.1.attention"]
    if layers == "both":
        names = ["encoder.1.attention", "encoder.1", "decoder.1.attention", "decoder.1"]
    assert list(model.switch_layers) == names
    assert flops_per_sequence(config, 10, 5) > flops_per_sequence(tiny(None), 10, 5)


def test_one_vector_serves_as_key_and_value_and_all_carry_the_gate():
    """Figure 10 and Mesh-TF `ExpertsSelfAttention`: shared_kv, q scaled by d_kv ** -0.5."""
    config = tiny(RoutingConfig(experts=4, layers="attention", jitter=0.0))
    attention = SwitchTransformer(config).encoder.blocks[1].self_attention
    x = torch.randn(1, 5, D)
    query, memory, routing = attention.qkv(x, None)
    assert memory.k is memory.v
    routes, experts = routing.routes, attention.switch.experts
    for t in range(5):
        hidden = (x[0, t] @ experts.w_in[routes.expert[0, t]]).relu()
        answer = routes.gate[0, t] * (hidden @ experts.w_out[routes.expert[0, t]])
        torch.testing.assert_close(query[0, :, t].flatten(), answer[:8] * 4**-0.5)
        torch.testing.assert_close(memory.k[0, :, t].flatten(), answer[8:])


def test_the_auxiliary_loss_sums_attention_and_ffn_layers():
    model = SwitchTransformer(tiny(RoutingConfig(experts=4, layers="both")))
    output = model(torch.randint(1, 50, (2, 9)), torch.randint(1, 50, (2, 5)))
    assert len(output.routing) == 4
    torch.testing.assert_close(output.losses.balance, 0.01 * sum(r.balance for r in output.routing))


# --- the whole model ---

KINDS = [
    RoutingConfig(experts=4, strategy=strategy, layers=layers, capacity_factor=1.0)
    for strategy in IN_DECODERS
    for layers in ("ffn", "attention", "both")
] + [
    RoutingConfig(experts=4, strategy=strategy, decoder_strategy="switch")
    for strategy in NON_CAUSAL
]
every_kind = pytest.mark.parametrize("routing", KINDS, ids=lambda r: f"{r.strategy}-{r.layers}")


@every_kind
def test_decoding_with_the_cache_gives_the_logits_of_the_full_pass(routing):
    model = SwitchTransformer(tiny(routing)).eval()
    inputs, targets = torch.randint(1, 50, (3, 9)), torch.randint(1, 50, (3, 6))
    inputs[1, 5:] = 0
    with torch.no_grad():
        expected = model(inputs, targets).logits
        memory = model.encode(inputs)
        cache = model.init_cache(memory, 6)
        previous = torch.cat([torch.zeros(3, 1, dtype=torch.long), targets[:, :-1]], dim=1)
        steps = [model.decode_step(previous[:, t : t + 1], cache) for t in range(6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-5)


@every_kind
def test_a_later_target_changes_no_earlier_logits(routing):
    model = SwitchTransformer(tiny(routing)).eval()
    inputs, targets = torch.randint(1, 50, (2, 9)), torch.randint(1, 50, (2, 6))
    other = targets.clone()
    other[:, 3:] = torch.randint(1, 50, (2, 3))
    with torch.no_grad():
        before, after = model(inputs, targets).logits, model(inputs, other).logits
    torch.testing.assert_close(after[:, :4], before[:, :4])  # position 3 reads targets before it


@every_kind
def test_in_evaluation_an_example_is_answered_as_if_it_were_alone(routing):
    model = SwitchTransformer(tiny(routing)).eval()
    inputs, targets = torch.randint(1, 50, (3, 9)), torch.randint(1, 50, (3, 6))
    inputs[1, 4:], targets[1, 3:] = 0, 0
    with torch.no_grad():
        together = model(inputs, targets).logits
        alone = model(inputs[1:2, :4], targets[1:2, :3]).logits
    torch.testing.assert_close(together[1:2, :3], alone, atol=1e-5, rtol=1e-5)


@every_kind
def test_every_kind_trains(routing):
    torch.manual_seed(0)
    model = SwitchTransformer(tiny(routing))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    inputs, targets = torch.randint(1, 50, (4, 9)), torch.randint(1, 50, (4, 6))
    losses = []
    for _ in range(10):
        loss = model(inputs, targets).losses.total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
