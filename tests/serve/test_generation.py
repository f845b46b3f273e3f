"""/v1/generate and /v1/routing answer what the library writes."""

import json
import math
from dataclasses import replace

import httpx
import pytest

from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.generate import (
    BeamSearch,
    GenerationConfig,
    Sampling,
    stream_text,
    write_candidates,
    write_texts,
)

TEXT = "The <extra_id_0> of the <extra_id_1>."
SHORT = GenerationConfig(max_length=20)


def post(address, path="/v1/generate", **body):
    return httpx.post(address + path, json=body, timeout=30)


def generate(address, **body):
    answer = post(address, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_holes_are_filled_as_the_library_fills_them(address, filler):
    answer = generate(address, text=TEXT, max_length=20)
    (choice,) = answer["choices"]
    assert [choice["text"]] == write_texts(filler, ByteTokenizer(), [TEXT], SHORT)
    assert answer["model"] == "filler"
    assert answer["usage"]["prompt_tokens"] == len(answer["input"]) == len("The  of the .") + 3
    assert answer["usage"]["completion_tokens"] == len(choice["tokens"])
    assert choice["score"] == pytest.approx(sum(t["log_prob"] for t in choice["tokens"]), abs=1e-4)


def test_numbers_of_holes_are_those_of_the_text(address):
    (first,) = generate(address, text=TEXT, max_length=30)["choices"]
    (other,) = generate(address, text="The <extra_id_9> of the <extra_id_2>.", max_length=30)[
        "choices"
    ]
    assert all(first["fills"][number] for number in "01")
    assert other["fills"] == {"9": first["fills"]["0"], "2": first["fills"]["1"]}
    assert other["text"] == first["text"]
    assert other["tokens"] == first["tokens"]


@pytest.mark.parametrize(
    ("body", "config", "count"),
    [
        ({"beams": 4, "candidates": 3}, replace(SHORT, beams=BeamSearch(beams=4)), 3),
        (
            {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "seed": 7, "candidates": 3},
            replace(SHORT, sampling=Sampling(temperature=1.2, top_k=50, top_p=0.9, seed=7)),
            3,
        ),
        (
            {"min_length": 15, "no_repeat_ngram": 2, "repetition_penalty": 1.3},
            replace(SHORT, min_length=15, no_repeat_ngram=2, repetition_penalty=1.3),
            1,
        ),
        ({"stop": ["e", "\n"]}, replace(SHORT, stop=("e", "\n")), 1),
    ],
    ids=["beams", "samples", "constraints", "stop"],
)
@pytest.mark.parametrize("name", ["filler", "causal"])
def test_every_setting_does_what_it_does_offline(
    name, body, config, count, address, filler, causal
):
    model = {"filler": filler, "causal": causal}[name]
    answer = generate(address, model=name, text="The list", max_length=20, **body)
    (expected,) = write_candidates(model, ByteTokenizer(), ["The list"], config, count)
    choices = answer["choices"]
    assert [choice["text"] for choice in choices] == [each.text for each in expected]
    for choice, each in zip(choices, expected, strict=True):
        assert [token["id"] for token in choice["tokens"]] == each.ids
        assert [t["log_prob"] for t in choice["tokens"]] == pytest.approx(each.log_probs, abs=1e-4)
        assert choice["score"] == pytest.approx(each.score, abs=1e-4)
        assert choice["probability"] == pytest.approx(math.exp(each.score), rel=1e-3)


@pytest.mark.parametrize("name", ["filler", "causal"])
def test_experts_of_every_token_are_those_that_its_router_likes_best(name, address, filler, causal):
    body = {"text": "The list", "max_length": 12, "min_length": 11, "model": name}
    answer = generate(address, experts=True, **body)
    tokens = answer["choices"][0]["tokens"]
    ids = [token["id"] for token in tokens]
    routed = post(address, "/v1/routing", text="The list", output=ids, model=name).json()
    both = [*answer["input"], *tokens]
    told = {"filler": {"e": answer["input"], "d": tokens}, "causal": {"d": both}}[name]
    assert set(routed["layers"]) == set({"filler": filler, "causal": causal}[name].switch_layers)
    for layer, rows in routed["layers"].items():
        experts = [token["experts"].get(layer) for token in told[layer[0]]]
        assert experts == [[row[0][0]] for row in rows]
        assert len({expert for (expert,) in experts}) > 1
        for row in rows:
            assert sum(probability for _, probability in row) == pytest.approx(1, abs=1e-5)


def test_routing_of_a_text_alone_tells_of_its_tokens(address):
    routed = post(address, "/v1/routing", text="abc", model="causal").json()
    assert [token["text"] for token in routed["input"]] == ["a", "b", "c"]
    assert routed["output"] == []
    assert {len(rows) for rows in routed["layers"].values()} == {3}


def events_of(address, path="/v1/generate", **body):
    body |= {"stream": True}
    with httpx.stream("POST", address + path, json=body, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("name", ["filler", "causal"])
def test_a_stream_tells_tokens_and_then_the_plain_answer(name, address, filler, causal):
    body = {"text": "Ein Bär", "max_length": 30, "min_length": 29, "experts": True, "model": name}
    first, *pieces, last = events_of(address, **body)
    plain = generate(address, **body)
    assert [token["id"] for token in first["input"]] == [token["id"] for token in plain["input"]]
    told = [piece["token"] for piece in pieces]
    assert [t["id"] for t in told] == [t["id"] for t in plain["choices"][0]["tokens"]]
    assert last["choices"] == plain["choices"]
    model = {"filler": filler, "causal": causal}[name]
    config = GenerationConfig(max_length=30, min_length=29)
    streamed = list(stream_text(model, ByteTokenizer(), "Ein Bär", config))
    assert [piece["piece"] for piece in pieces] == streamed[: len(pieces)]


@pytest.mark.parametrize(
    ("body", "flag"),
    [
        ({"text": "a", "max_length": 101}, "--max-length"),
        ({"text": "a" * 201}, "--max-input"),
        ({"text": "a", "beams": 9}, "--max-rows"),
        ({"text": "a" * 190, "beams": 8, "candidates": 8, "max_length": 100}, "--cache-memory"),
    ],
)
def test_more_than_the_server_allows_names_the_flag(body, flag, address):
    answer = post(address, **body)
    assert answer.status_code == 422
    assert flag in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "text: Field required"),
        ({"text": " "}, "no text to fill in"),
        ({"text": 5}, "text: Input should be a valid string"),
        ({"text": "a", "beans": 2}, "beans: Extra inputs are not permitted"),
        ({"text": "a", "top_k": 5}, "top_k needs temperature > 0"),
        ({"text": "a", "temperature": -1}, "temperature: Input should be greater"),
        ({"text": "a", "temperature": 1e-300}, "must be 0 or at least 0.0001"),
        ({"text": "a", "beams": 2, "temperature": 1}, "Choose one of them"),
        ({"text": "a", "beams": 2, "stream": True}, "stream needs one text"),
        ({"text": "a", "candidates": 2}, "must lie between 1 and beams = 1"),
        ({"text": "a", "max_length": 3, "min_length": 5}, "leaves no room"),
        ({"text": "<extra_id_0>", "model": "causal"}, "decoder-only"),
        ({"text": "".join(f"<extra_id_{n}>" for n in range(130))}, "130 holes"),
    ],
)
def test_settings_that_are_wrong_are_422_in_words(body, message, address):
    answer = post(address, **body)
    assert answer.status_code == 422
    assert message in answer.json()["error"]["message"]


def test_a_model_that_is_not_there_is_404_and_names_those_that_are(address):
    answer = post(address, text="a", model="gpt")
    assert answer.status_code == 404
    assert "filler, causal" in answer.json()["error"]["message"]


def test_a_hole_with_a_number_of_a_thousand_digits_is_text(address):
    answer = generate(address, text=f"<extra_id_{'9' * 150}> b", max_length=2)
    assert list(answer["choices"][0]["fills"]) in ([], ["0"])
    assert len(answer["input"]) == len("<extra_id_> b ") + 150 + 2


def test_a_text_ends_at_its_timeout_with_what_there_is(address):
    body = {"max_length": 100, "min_length": 99, "text": "a" * 150}
    (choice,) = generate(address, timeout=0.02, **body)["choices"]
    assert choice["finish_reason"] == "deadline"
    assert len(choice["tokens"]) < 99


def test_models_are_described(address, causal):
    cards = {card["id"]: card for card in httpx.get(address + "/v1/models").json()["data"]}
    assert list(cards) == ["filler", "causal"]
    assert [card["decoder_only"] for card in cards.values()] == [False, True]
    assert cards["causal"]["layers"] == {"decoder.0": 4, "decoder.1": 4}
    assert cards["causal"]["parameters"] == sum(p.numel() for p in causal.parameters())
    assert (cards["causal"]["max_input"], cards["causal"]["max_length"]) == (200, 100)
