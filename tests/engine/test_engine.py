"""The engine writes what `generate` writes, whatever else it writes at the same time."""

import threading
import time
from dataclasses import replace
from queue import SimpleQueue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import TINY

from switchworks.config import ConfigError
from switchworks.engine import Answer, BusyError, Engine, EngineConfig, Failure, Request, Token
from switchworks.generate import BeamSearch, GenerationConfig, Sampling, generate_candidates
from switchworks.model import RoutingConfig, SwitchTransformer

SHAPE = replace(TINY, vocab_size=64, init_scale=1.0, routing=RoutingConfig(experts=4, every=1))
CONFIGS = {
    "switch": SHAPE,
    "dense": replace(SHAPE, routing=None),
    "causal": replace(SHAPE, decoder_only=True),
    "top2": replace(SHAPE, routing=RoutingConfig(experts=4, every=1, strategy="top2"), gated=True),
    "attention": replace(SHAPE, routing=RoutingConfig(experts=4, every=1, layers="both")),
}
"""In float64, so that no rounding decides between two tokens."""
GREEDY = GenerationConfig(max_length=9)
WAYS = {
    "greedy": (GREEDY, 1),
    "sampled": (replace(GREEDY, sampling=Sampling(temperature=1.5, top_k=20, seed=3)), 1),
    "candidates": (replace(GREEDY, sampling=Sampling(temperature=1.0, seed=5)), 3),
    "beams": (replace(GREEDY, beams=BeamSearch(beams=4)), 2),
    "constraints": (replace(GREEDY, min_length=4, repetition_penalty=1.3, no_repeat_ngram=2), 1),
    "limited beams": (replace(GREEDY, beams=BeamSearch(beams=3), no_repeat_ngram=2), 3),
}


def model_of(kind: str) -> SwitchTransformer:
    return SwitchTransformer(CONFIGS[kind], seed=4).eval().double()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> SwitchTransformer:
    return model_of(request.param)


def offline(model: SwitchTransformer, ids: list[int], config: GenerationConfig, candidates: int):
    return generate_candidates(model, [ids], config, candidates)[0]


def check(answer: Answer, expected: list) -> None:
    assert [[token.id for token in text.tokens] for text in answer.texts] == [
        text.tokens for text in expected
    ]
    for text, other in zip(answer.texts, expected, strict=True):
        assert text.score == pytest.approx(other.score, abs=1e-5)
        assert [token.log_prob for token in text.tokens] == pytest.approx(other.log_probs, abs=1e-5)


IDS = st.lists(st.integers(2, 63), min_size=1, max_size=40)
ARRIVALS = st.lists(
    st.tuples(IDS, st.sampled_from(sorted(WAYS)), st.integers(1, 20), st.booleans()),
    min_size=1,
    max_size=8,
)


@settings(max_examples=12, deadline=None)
@given(arrivals=ARRIVALS)
def test_a_text_does_not_depend_on_what_is_written_beside_it(model, arrivals):
    """Requests of all kinds and lengths, which come while others are written, some cancelled."""
    engine, pending = Engine(model, config=EngineConfig(max_rows=8, encode_tokens=50)), []
    for ids, way, length, is_cancelled in arrivals:
        config, candidates = WAYS[way]
        config = replace(config, max_length=max(length, 1 + config.min_length))
        events: SimpleQueue = SimpleQueue()
        request = Request(ids=ids, config=config, candidates=candidates)
        ticket = engine.submit(request, events.put)
        if is_cancelled:
            ticket.cancel()
        else:
            pending.append((events, ids, config, candidates))
    answers = [events.get(timeout=60) for events, *_ in pending]
    assert engine.close(timeout=60)
    for answer, (_, *asked) in zip(answers, pending, strict=True):
        check(answer, offline(model, *asked))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_is_that_of_generate(model, way):
    config, candidates = WAYS[way]
    texts = [[7, 9, 30, 1], [5], list(range(2, 45))]
    engine = Engine(model)
    answers = engine.answer(Request(ids=t, config=config, candidates=candidates) for t in texts)
    engine.close()
    for ids, answer in zip(texts, answers, strict=True):
        check(answer, offline(model, ids, config, candidates))


def test_tokens_are_told_one_by_one_as_they_are_written():
    engine, events = Engine(model_of("switch")), SimpleQueue()
    engine.submit(Request(ids=[5, 6, 1], config=GREEDY, stream=True), events.put)
    told = []
    while isinstance(event := events.get(timeout=10), Token):
        told.append(event)
    engine.close()
    assert isinstance(event, Answer)
    assert told == event.texts[0].tokens


def test_a_cancelled_text_ends_with_what_there_is_and_frees_its_row():
    model, written = model_of("switch"), threading.Event()
    engine, events = Engine(model, config=EngineConfig(max_rows=1)), SimpleQueue()

    def emit(event: object) -> None:
        events.put(event)
        written.set()

    endless = GenerationConfig(max_length=5000, min_length=4999)
    ticket = engine.submit(Request(ids=[5, 1], config=endless, stream=True), emit)
    assert written.wait(10)
    (after,) = (SimpleQueue() for _ in range(1))
    engine.submit(Request(ids=[6, 1], config=GREEDY), after.put)
    ticket.cancel()
    while isinstance(event := events.get(timeout=10), Token):
        pass
    assert isinstance(event, Answer)
    assert event.texts[0].reason == "cancelled"
    check(after.get(timeout=10), offline(model, [6, 1], GREEDY, 1))
    engine.close()


def test_a_text_that_takes_too_long_ends_at_its_deadline():
    engine = Engine(model_of("switch"))
    endless = GenerationConfig(max_length=100_000, min_length=99_999)
    start = time.monotonic()
    (answer,) = engine.answer([Request(ids=[5, 1], config=endless, timeout=0.3)])
    engine.close()
    assert answer.texts[0].reason == "deadline"
    assert 0.2 < time.monotonic() - start < 5
    assert answer.texts[0].tokens


def test_the_highest_priority_goes_first():
    engine = Engine(model_of("switch"), config=EngineConfig(max_rows=1))
    finished, done = [], threading.Event()

    def note(name: str, event: object) -> None:
        finished.append(name)
        if len(finished) == 3:
            done.set()

    barrier = threading.Event()
    engine.call(barrier.wait)  # nothing begins before all have come
    for name, priority in (("low", -1), ("usual", 0), ("high", 1)):
        request = Request(ids=[5, 1], config=GREEDY, priority=priority)
        engine.submit(request, lambda event, name=name: note(name, event))
    barrier.set()
    assert done.wait(10)
    engine.close()
    assert finished == ["high", "usual", "low"]


def test_a_full_queue_turns_requests_away_and_says_when_to_come_back():
    engine = Engine(model_of("switch"), config=EngineConfig(max_waiting=1))
    barrier, events = threading.Event(), SimpleQueue()
    engine.call(barrier.wait)
    engine.submit(Request(ids=[5, 1], config=GREEDY), events.put)
    with pytest.raises(BusyError, match="1 requests wait already") as error:
        engine.submit(Request(ids=[5, 1], config=GREEDY), events.put)
    assert 1 <= error.value.retry_after <= 60
    barrier.set()
    assert isinstance(events.get(timeout=10), Answer)
    engine.close()


def test_closing_waits_for_what_was_taken_and_takes_nothing_more():
    engine, events = Engine(model_of("switch"), config=EngineConfig(max_rows=2)), SimpleQueue()
    for _ in range(6):
        engine.submit(Request(ids=[5, 1], config=GREEDY), events.put)
    assert engine.close(timeout=30)
    answers = [events.get_nowait() for _ in range(6)]
    assert {text.reason for answer in answers for text in answer.texts} <= {"stop", "length"}
    with pytest.raises(BusyError, match="shutting down"):
        engine.submit(Request(ids=[5, 1], config=GREEDY), events.put)


def test_a_small_budget_lets_fewer_texts_be_written_at_once_and_changes_none():
    model = model_of("switch")
    texts = [[5, 6, 7, 1], list(range(2, 60)), [9, 1]]
    # A row of 32 + 64 positions, of 2 layers' keys and values of 2 heads of 8 numbers of 8 bytes.
    row = (32 + 64) * 2 * 2 * 2 * 8 * 8
    engine = Engine(model, config=EngineConfig(cache_memory=row))
    most = []
    engine.on_step = most.append
    answers = engine.answer(Request(ids=ids, config=GREEDY) for ids in texts)
    with pytest.raises(ConfigError, match="--cache-memory"):
        engine.submit(Request(ids=list(range(2, 70)), config=GREEDY), print)
    engine.close()
    assert max(most) == 1
    for ids, answer in zip(texts, answers, strict=True):
        check(answer, offline(model, ids, GREEDY, 1))


def test_experts_of_every_token_are_told(model):
    layers = model.switch_layers
    engine = Engine(model)
    for config, candidates in WAYS.values():
        asked = Request(ids=[5, 6, 7, 1], config=config, candidates=candidates, experts=True)
        (answer,) = engine.answer([asked])
        assert len(answer.input_experts) == 4
        for text in answer.texts:
            for token in text.tokens:
                assert set(token.experts) == {n for n in layers if n.startswith("decoder")}
    engine.close()


def test_the_load_of_the_experts_is_counted():
    model = model_of("switch")
    engine = Engine(model)
    (answer,) = engine.answer([Request(ids=[5, 6, 7, 1], config=GREEDY, experts=True)])
    engine.close()
    load = engine.expert_load()
    assert sum(load["encoder.0"]) == 4
    for name, layer in load.items():
        told = (
            answer.input_experts
            if name.startswith("encoder")
            else [token.experts for token in answer.texts[0].tokens]
        )
        counted = [0] * 4
        for experts in told:
            for expert in experts[name]:
                counted[expert] += 1
        assert layer == counted


def test_a_step_that_fails_fails_its_requests_and_no_later_one(monkeypatch):
    model = model_of("switch")
    engine, events = Engine(model), SimpleQueue()
    with monkeypatch.context() as patch:
        patch.setattr("switchworks.engine.engine.decode_rows", lambda *_: 1 / 0)
        engine.submit(Request(ids=[5, 1], config=GREEDY), events.put)
        assert isinstance(failure := events.get(timeout=10), Failure)
    assert isinstance(failure.error, ZeroDivisionError)
    (answer,) = engine.answer([Request(ids=[5, 1], config=GREEDY)])
    engine.close()
    check(answer, offline(model, [5, 1], GREEDY, 1))


def test_a_listener_that_fails_ends_its_own_request_and_no_other():
    model, events = model_of("switch"), SimpleQueue()
    engine, barrier = Engine(model), threading.Event()
    engine.call(barrier.wait)  # both begin at once
    engine.submit(Request(ids=[6, 1], config=GREEDY, stream=True), lambda _: 1 / 0)
    engine.submit(Request(ids=[5, 1], config=GREEDY), events.put)
    barrier.set()
    check(events.get(timeout=10), offline(model, [5, 1], GREEDY, 1))
    assert engine.working == 0
    assert engine.close(timeout=10)


def test_an_engine_that_has_closed_takes_no_job():
    engine = Engine(model_of("switch"))
    engine.close()
    with pytest.raises(BusyError, match="shutting down"):
        engine.call(list)


def test_the_likeliest_token_is_as_likely_among_others_as_alone():
    """To the bit: lm-eval takes a token for the greedy one if both are equal."""
    engine = Engine(model_of("causal").float())
    (answer,) = engine.answer([Request(ids=[5, 6, 7], config=GREEDY, top=3)])
    engine.close()
    for token in answer.texts[0].tokens:
        assert token.top[0] == (token.id, token.log_prob)
        assert len(token.top) == 3


def test_a_model_whose_texts_depend_on_their_neighbours_is_refused():
    limited = replace(SHAPE, routing=RoutingConfig(experts=4, eval_capacity_factor=1.0))
    with pytest.raises(ConfigError, match=r"eval_capacity_factor = 1\.0"):
        Engine(SwitchTransformer(limited))


def test_buffers_are_given_back_when_there_is_nothing_to_do():
    engine = Engine(model_of("switch"))
    engine.answer([Request(ids=[5, 1], config=GREEDY)])
    deadline = time.monotonic() + 5
    while engine._slots.layers and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine._slots.layers
    engine.close()


def test_weights_stay_as_they_are():
    model = model_of("switch")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    engine = Engine(model)
    engine.answer([Request(ids=[5, 1], config=GREEDY)])
    engine.close()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
