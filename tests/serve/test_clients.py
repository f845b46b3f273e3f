"""Clients that err, stall, leave or mean harm get the right status and harm nobody."""

import json
import socket
import threading
import time
from contextlib import closing, contextmanager
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import httpx
import pytest
from support.models import varied_transformer
from support.serving import listening, serving

from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.engine import Engine, EngineConfig
from switchworks.serve import ServeConfig

JSON = {"Content-Type": "application/json"}
GENERATE = "/v1/generate"
FEW_ROWS = EngineConfig(max_rows=2, max_waiting=1)
LONG = {"text": "a", "max_length": 20_000, "min_length": 19_999}
"""Takes minutes."""


def connect(address):
    host, port = urlsplit(address).hostname, urlsplit(address).port
    return closing(socket.create_connection((host, port), timeout=10))


def head(path=GENERATE, *headers, method="POST"):
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def status_of(connection):
    """The status of the answer, and that the server then closes."""
    answer = b""
    while data := connection.recv(65536):
        answer += data
    return int(answer.split()[1])


def works(address):
    """Whether a usual request is answered, and at once."""
    answer = httpx.post(address + GENERATE, json={"text": "a", "max_length": 3}, timeout=5)
    return answer.status_code == 200


def until(condition, seconds=10):
    """Whether `condition` comes true in time."""
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return result


def running(address):
    models = httpx.get(address + "/v1/status").json()["models"]
    return sum(model["running"] + model["waiting"] for model in models.values())


@contextmanager
def small_server(filler, **limits):
    limits = {"max_length": 20_000, "engine": FEW_ROWS, "timeout": 60} | limits
    with serving({"filler": filler}, ServeConfig(**limits)) as address:
        yield address


@pytest.fixture
def locked(filler, monkeypatch):
    monkeypatch.setenv("SWITCHWORKS_API_KEY", "schlüssel")
    with serving({"filler": filler}) as address:
        yield address


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer schl\xc3\xbcssel", 401),  # headers are latin-1
        (b"Bearer schl\xfcssel", 200),
        (b"bearer schl\xfcssel", 200),
        (b"Bearer wrong", 401),
        (b"Bearer", 401),
        (b"schl\xfcssel", 401),
        (b"Basic schl\xfcssel", 401),
        (b"", 401),
    ],
)
def test_a_key_has_to_be_right(header, status, locked):
    for path in ("/v1/models", "/v1/status", "/metrics"):
        answer = httpx.get(locked + path, headers=[(b"Authorization", header)])
        assert answer.status_code == status
        assert ("WWW-Authenticate" in answer.headers) == (status == 401)


def test_a_key_is_needed_to_write_and_not_to_look_at_the_page(locked):
    assert httpx.post(locked + GENERATE, json={"text": "a"}).status_code == 401
    assert httpx.get(locked + "/nowhere").status_code == 401
    for path in ("/", "/health", "/ready", "/openapi.json"):
        assert httpx.get(locked + path).status_code == 200


def test_a_hundred_megabytes_are_too_large_for_clients_of_any_kind(address):
    body = b'{"text": "' + b"a" * 100_000_000 + b'"}'
    assert httpx.post(address + GENERATE, content=body, headers=JSON).status_code == 413
    # urllib sends all before it reads: a server that just closed would reset its connection.
    with pytest.raises(HTTPError, match="413") as error:
        urlopen(Request(address + GENERATE, body, JSON), timeout=10)
    assert "--max-body" in json.load(error.value)["error"]["message"]
    assert works(address)


def test_what_is_sent_in_chunks_may_be_too_large_as_well(address):
    sent = []

    def chunks():
        for _ in range(20):
            sent.append(100_000)
            yield b"a" * 100_000

    answer = httpx.post(address + GENERATE, content=chunks(), headers=JSON)
    assert answer.status_code == 413
    assert sum(sent) > 1_000_000


def test_an_upload_that_stalls_is_ended(filler):
    with small_server(filler, timeout=0.3) as address, connect(address) as connection:
        connection.sendall(head(GENERATE, "Content-Length: 100") + b'{"text":')
        assert works(address)
        start = time.monotonic()
        connection.settimeout(3)
        answer = connection.recv(65536)
        assert answer.split()[1] == b"408"
        assert time.monotonic() - start < 2


def test_an_upload_that_breaks_off_is_no_request(address):
    with connect(address) as connection:
        connection.sendall(head(GENERATE, "Content-Length: 100") + b'{"text":"a"}')
    assert until(lambda: 'status="499"' in httpx.get(address + "/metrics").text)
    assert works(address)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_read(kind, address):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = httpx.post(address + GENERATE, content=b'{"text":"a"}', headers=headers)
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"text": "a"',
        b'{"text": a}',
        b"\xff\xfe{}",
        b'{"text": "\xff"}',
        b"[" * 500_000,
        b'{"text": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "brace", "open", "bare", "bom", "latin1", "deep", "digits"],
)
def test_what_is_no_json_is_400_or_422_in_words(body, address):
    answer = httpx.post(address + GENERATE, content=body, headers=JSON)
    assert answer.status_code == (422 if not body else 400)
    assert ("body" if not body else "not JSON") in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b"5",
        b'{"text": null}',
        b'{"text": ["a"]}',
        b'{"text": "a", "beams": "two"}',
        b'{"text": "a", "beams": 1.5}',
        b'{"text": "a", "temperature": NaN}',
        b'{"text": "a", "temperature": 1e999}',
        b'{"text": "a", "stream": 7}',
        b'{"text": "\\ud800"}',
        b'{"text": "a", "stop": ["\\udfff"]}',
        b'{"text": "a", "\\ud800": 1}',
        b'{"text": "a", "max_length": ' + b"9" * 4000 + b"}",
        b'{"text": "a", "seed": -1}',
        b'{"text": "a", "repetition_penalty": 1e-300}',
    ],
)
def test_wrong_types_and_values_are_422_in_few_words(body, address):
    answer = httpx.post(address + GENERATE, content=body, headers=JSON)
    assert answer.status_code == 422
    assert 10 < len(answer.json()["error"]["message"]) < 300


def test_nul_is_a_character_like_others(address):
    answer = httpx.post(address + GENERATE, json={"text": "\0a\0", "max_length": 3})
    assert answer.status_code == 200
    assert answer.json()["input"][0]["id"] == 3  # of byte 0


@pytest.mark.parametrize(
    "prompt",
    ["[" + "1," * 10**6 + "1]", "[" + "-1," * 10**6 + "1]", '["' + "a " * 10**6 + '"]'],
    ids=["tokens", "no tokens", "text"],
)
def test_a_million_tokens_are_refused_and_nobody_waits_for_it(prompt, filler):
    with small_server(filler, max_body=10**7) as address:
        start = time.monotonic()
        answer = httpx.post(
            address + "/v1/completions", content=f'{{"prompt":{prompt}}}', headers=JSON
        )
        assert answer.status_code == 422
        assert time.monotonic() - start < 3
        assert works(address)


def test_paths_and_methods_that_there_are_not(address):
    assert httpx.get(address + "/v1/generates").status_code == 404
    answer = httpx.get(address + GENERATE)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/%00", "/%00"):
        with connect(address) as connection:
            connection.sendall(head(path, "Connection: close", method="GET"))
            assert status_of(connection) == 404


def test_a_stream_whose_client_leaves_frees_its_row(filler):
    with small_server(filler) as address:
        body = {**LONG, "stream": True}
        with httpx.stream("POST", address + GENERATE, json=body, timeout=10) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines)[6:])["input"]
            assert running(address) == 1
        assert until(lambda: running(address) == 0)


def test_a_client_that_leaves_before_its_answer_frees_its_row(filler):
    with small_server(filler) as address:
        body = json.dumps({**LONG, "candidates": 2, "temperature": 1.0}).encode()
        with connect(address) as connection:
            connection.sendall(head(GENERATE, f"Content-Length: {len(body)}") + body)
            assert until(lambda: running(address) == 1)
        assert until(lambda: running(address) == 0)
        assert works(address)


def test_a_client_that_reads_nothing_keeps_neither_its_row_nor_others(filler):
    with small_server(filler, timeout=0.5) as address, connect(address) as connection:
        body = json.dumps({**LONG, "stream": True}).encode()
        connection.sendall(head(GENERATE, f"Content-Length: {len(body)}") + body)
        # After its stream so many pages that no buffer holds them.
        connection.setblocking(False)
        pages = head("/openapi.json", method="GET") * 5000
        while pages:
            try:
                pages = pages[connection.send(pages) :]
            except BlockingIOError:
                break
        assert until(lambda: running(address) == 0)
        assert works(address)


def metrics(address):
    return httpx.get(address + "/metrics").text


def test_a_full_queue_says_when_to_come_back(filler):
    with small_server(filler) as address, httpx.Client(timeout=20) as client:
        body = {**LONG, "timeout": 1.5, "candidates": 2, "temperature": 1.0}
        answers = []

        def ask():
            answers.append(client.post(address + GENERATE, json=body))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for place, thread in enumerate(threads, 1):  # the first works, the second waits
            thread.start()
            assert until(lambda place=place: running(address) == place)
        refused = client.post(address + GENERATE, json={"text": "a"})
        for thread in threads:
            thread.join()
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert "1 requests wait already" in refused.json()["error"]["message"]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert works(address)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATE, {"text": "a"}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/routing", {"text": "a"}),
    ],
)
def test_a_model_that_closes_takes_nothing_more(path, body, filler):
    engine = Engine(filler, ByteTokenizer(), FEW_ROWS)
    with listening({"filler": engine}, ServeConfig(engine=FEW_ROWS)) as address:
        engine.close()
        answer = httpx.post(address + path, json=body, timeout=5)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert "shutting down" in answer.json()["error"]["message"]


def test_an_error_inside_is_500_in_json_and_is_counted(capfd):
    model = varied_transformer(decoder_only=False)
    with small_server(model) as address:
        del model.encoder.blocks[0].ffn  # as a bug would
        answer = httpx.post(address + GENERATE, json={"text": "a"}, timeout=5)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert answer.headers["X-Request-Id"]
        assert 'path="/v1/generate",status="500"' in metrics(address)
        body = json.dumps({"prompt": "a", "stream": True}).encode()
        with connect(address) as connection:
            connection.sendall(head("/v1/completions", f"Content-Length: {len(body)}") + body)
            told = b"".join(iter(lambda: connection.recv(65536), b""))
        assert told.startswith(b"HTTP/1.1 200")
        assert b'data: {"error": {"message": "The server has failed' in told
        assert b"[DONE]" not in told
    assert "AttributeError" in capfd.readouterr().err


def test_every_answer_says_that_browsers_should_be_careful(address):
    for path in ("/", "/health", "/nowhere"):
        headers = httpx.get(address + path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert len(headers["X-Request-Id"]) == 32
