"""What Prometheus reads, and what the log says."""

import json
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.serving import serving

from switchworks.engine import EngineConfig
from switchworks.serve import ServeConfig


@pytest.fixture
def server(filler, causal):
    """A server that nobody has asked yet."""
    limits = ServeConfig(engine=EngineConfig(max_rows=8), log_texts=True)
    with serving({"filler": filler, "causal": causal}, limits) as address:
        yield address


def samples(address):
    """(name, labels) -> value."""
    answer = httpx.get(address + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_requests_are_counted_by_path_and_status(server):
    for body in ({"text": "a", "max_length": 2}, {"text": "b", "max_length": 2}, {"text": 5}):
        httpx.post(server + "/v1/generate", json=body)
    httpx.get(server + "/secret/path")
    told = samples(server)
    assert told["switchworks_requests_total", "/v1/generate", "200"] == 2
    assert told["switchworks_requests_total", "/v1/generate", "422"] == 1
    assert told["switchworks_requests_total", "404", "other"] == 1


def test_tokens_times_and_rows_are_counted_for_each_model(server):
    body = {"text": "abc", "max_length": 9, "min_length": 8, "beams": 3}
    tokens = httpx.post(server + "/v1/generate", json=body).json()["usage"]["completion_tokens"]
    told = samples(server)
    assert told["switchworks_tokens_total", "filler", "input"] == len("abc ") + 2
    assert told["switchworks_tokens_total", "filler", "output"] == tokens
    assert told["switchworks_tokens_total", *sorted(("output", "causal"))] == 0
    for name in ("time_to_first_token", "time_per_token", "request"):
        assert told[f"switchworks_{name}_seconds_count", "filler"] == 1
    assert (
        told["switchworks_batch_size_sum", "filler"]
        == 3 * (told["switchworks_batch_size_count", "filler"])
    )
    assert told["switchworks_queue_size", "filler"] == told["switchworks_running", "filler"] == 0


def test_tokens_of_each_expert_are_counted(server):
    body = {"text": "abc", "max_length": 9, "experts": True}
    answer = httpx.post(server + "/v1/generate", json=body).json()
    told = samples(server)
    read = [token["experts"]["encoder.1"] for token in answer["input"]]
    for expert in range(4):
        counted = told["switchworks_expert_tokens_total", str(expert), "encoder.1", "filler"]
        assert counted == read.count([expert])


def logged(capfd) -> str:
    """The line of /v1/generate. It comes after the answer, and others may write beside it."""
    said, deadline = "", time.monotonic() + 10
    while time.monotonic() < deadline:
        said += capfd.readouterr().err
        if lines := [line for line in said.splitlines() if '"/v1/generate"' in line]:
            return lines[0]
        time.sleep(0.01)
    raise AssertionError(said)


@pytest.mark.parametrize(("log_texts", "is_logged"), [(True, True), (False, False)])
def test_a_line_of_the_log_has_texts_only_if_they_are_wanted(log_texts, is_logged, filler, capfd):
    with serving({"filler": filler}, ServeConfig(log_texts=log_texts)) as address:
        body = {"text": "something secret", "max_length": 3}
        answer = httpx.post(address + "/v1/generate", json=body)
        httpx.get(address + "/health")
    line = logged(capfd)
    told = json.loads(line)
    assert told["id"] == answer.json()["id"] == answer.headers["X-Request-Id"]
    assert (told["status"], told["model"], told["tokens"]) == (200, "filler", 3)
    assert ("secret" in line) == is_logged


def test_a_stream_is_noted_as_well(server, capfd):
    body = {"text": "a", "max_length": 3, "min_length": 2, "stream": True}
    httpx.post(server + "/v1/generate", json=body)
    assert samples(server)["switchworks_time_to_first_token_seconds_count", "filler"] == 1
    told = json.loads(logged(capfd))
    assert told["tokens"] == 3
    assert told["finish"] == ["length"]
