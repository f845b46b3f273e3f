"""`switchworks serve` as a process."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from switchworks.cli.main import main
from switchworks.generate import GenerationConfig, complete

COMMAND = [sys.executable, "-m", "switchworks", "serve"]
GENERATE = "/v1/generate"
TEXT = "The <extra_id_0> of the list."


@contextmanager
def started(*words):
    """A server, and the line in which it says its address."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, process.communicate(timeout=10)
        yield process, line
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tiny_run):
    """Serves one model twice, until it is interrupted."""
    with started(tiny_run, tiny_run, "--port", 0, "--int8") as (process, line):
        yield line.split()[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_model_that_is_served_twice_has_two_names(server, tiny_run):
    names = [card["id"] for card in httpx.get(server + "/v1/models").json()["data"]]
    assert names == [tiny_run.name, f"{tiny_run.name}-2"]
    for name in names:
        answer = httpx.post(server + GENERATE, json={"text": TEXT, "model": name}).json()
        assert answer["model"] == name


def test_the_command_answers_as_generate_does(server, tiny_run):
    answer = httpx.post(server + GENERATE, json={"text": TEXT, "max_length": 20})
    (text,) = complete(tiny_run, [TEXT], GenerationConfig(max_length=20), int8=True)
    assert answer.json()["choices"][0]["text"] == text


@pytest.mark.long
def test_sigterm_under_load_loses_no_request_and_waits_for_nobody_that_stalls(tiny_run):
    words = ("--port", 0, "--timeout", 6, "--max-rows", 2, "--host", "0.0.0.0")
    body = {"text": TEXT, "max_length": 60, "min_length": 59}
    with ExitStack() as stack:
        process, line = stack.enter_context(started(tiny_run, *words))
        client = stack.enter_context(httpx.Client(timeout=30))
        port = int(line.strip().rpartition(":")[2])
        assert line == f"serving {tiny_run.name} at http://0.0.0.0:{port}\n"
        address = f"http://127.0.0.1:{port}"
        stalled = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        stalled.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n")
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(client.post, address + GENERATE, json=body) for _ in range(6)]
            while sum(waits := load(address)) < 6:
                assert not any(each.done() for each in asked), [each.result() for each in asked]
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            answers = [each.result() for each in asked]
        assert waits[1] > 0
        assert [answer.status_code for answer in answers] == [200] * 6
        for answer in answers:
            (choice,) = answer.json()["choices"]
            assert (choice["finish_reason"], len(choice["tokens"])) == ("length", 60)
        assert process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(address + "/health")
        assert process.stderr is not None
        assert "anybody who reaches 0.0.0.0 may use it" in process.stderr.read()


def load(address):
    """Requests at work, and those that wait."""
    (model,) = httpx.get(address + "/v1/status").json()["models"].values()
    return model["running"], model["waiting"]


@pytest.fixture
def failing(tmp_path, monkeypatch, capsys):
    """What the command prints when it ends with status 2."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        assert main(["serve", *map(str, words)]) == 2
        return capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, before)


def test_a_port_that_is_taken_is_an_error_in_words(failing, tiny_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be used" in failing(tiny_run, "--port", port)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--port", "0"], "nowhere holds no model"),
        ([], "serve needs a model"),
        (["nowhere", "--port", "99999"], "0-65535"),
        (["nowhere", "--host", "300.0.0.1"], "cannot be used"),
        (["nowhere", "--timeout", "0"], "timeout = 0.0 must be positive"),
    ],
)
def test_what_cannot_be_served_is_an_error_in_words(words, message, failing):
    assert message in failing(*words)
