"""What a request has to pass before it is read: the key, its size, its time. And what is noted."""

import asyncio
import hmac
import json
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from switchworks.serve.config import ServeConfig

OPEN = frozenset({"/", "/openapi.json", "/health", "/ready"})
"""Paths without a key, and those below /static: pages, and what orchestrators ask."""

GONE = 499
"""The status that is noted when nobody was left to read an answer; nginx' number."""
LINGER = 5
"""Seconds in which the rest of a refused request is read and dropped."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def error_answer(
    status: int, message: str, kind: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


class _RefusedError(Exception):
    def __init__(self, response: JSONResponse) -> None:
        super().__init__()
        self.response = response


class _GoneError(Exception):
    """The client has left before it had sent all."""


class Guard:
    """Wraps the application. The body of a request is read whole before it is passed on."""

    def __init__(
        self, app: ASGIApp, config: ServeConfig, key: str | None, count: Callable[[str, int], None]
    ) -> None:
        self.app, self.config, self.key, self.count = app, config, key, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or lets the application answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, sent = time.perf_counter(), dict[str, Any]()
        scope.setdefault("state", {})["number"] = uuid.uuid4().hex
        noted: dict[str, Any] = scope["state"].setdefault("noted", {})

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update({"X-Request-Id": scope["state"]["number"], **HEADERS})
            await send(message)

        try:
            self._check_key(scope)
            _check_type(scope)
            body = await self._read(scope, receive)
            await self.app(scope, _replay(body, receive), note)
        except _RefusedError as refused:
            await _refuse(refused.response, scope, receive, note)
        except _GoneError:
            sent["status"] = GONE
        except Exception:
            sent.setdefault("status", 500)  # uvicorn logs it
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            status = sent.get("status", GONE)
            self.count(route, status)
            if scope["path"] not in OPEN:
                self._log(scope, status, time.perf_counter() - start, noted)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if self.key is None or path in OPEN or path.startswith("/static/"):
            return
        given = Headers(scope=scope).get("authorization", "")
        kind, _, key = given.partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(key.encode(), self.key.encode()):
            return
        message = "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`."
        headers = {"WWW-Authenticate": "Bearer"}
        raise _RefusedError(error_answer(401, message, "authentication_error", headers))

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        most, closing = self.config.max_body, {"Connection": "close"}
        too_large = f"The request is larger than this server's {most:,} bytes (--max-body)."
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise _RefusedError(error_answer(413, too_large, "invalid_request_error", closing))
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    body += message.get("body", b"")
                    if len(body) > most:
                        error = error_answer(413, too_large, "invalid_request_error", closing)
                        raise _RefusedError(error)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            message = f"The request had not arrived after {self.config.timeout:g} s (--timeout)."
            raise _RefusedError(error_answer(408, message, "timeout_error", closing)) from None

    def _log(self, scope: Scope, status: int, seconds: float, noted: dict[str, Any]) -> None:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": scope["state"]["number"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            **noted,
        }
        with suppress(OSError, ValueError):  # nobody reads the log any more
            print(json.dumps(line, ensure_ascii=True), file=sys.stderr, flush=True)


async def _refuse(response: JSONResponse, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends `response`, and drops what still arrives: a connection that is closed with bytes unread
    is reset, and the client may lose the answer."""

    async def send_open(message: Message) -> None:
        await send({**message, "more_body": True} if "body" in message else message)

    await response(scope, receive, send_open)
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _check_type(scope: Scope) -> None:
    """A page of another site may send plain text to this server, but no JSON."""
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and kind != "application/json":
        message = "The body has to be JSON, sent with the header Content-Type: application/json."
        raise _RefusedError(error_answer(415, message, "invalid_request_error"))


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives `body` once, then what comes: that the client has gone."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
