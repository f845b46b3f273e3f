"""The application: paths, and what becomes of errors."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from switchworks.config import ConfigError
from switchworks.engine import Answer, BusyError, Engine
from switchworks.paging import expert_cache
from switchworks.serve.completions import Completions
from switchworks.serve.config import ServeConfig
from switchworks.serve.generation import Generation, as_event, routing
from switchworks.serve.guard import GONE, Guard, error_answer
from switchworks.serve.hosting import Hosted, Pending
from switchworks.serve.metrics import Metrics
from switchworks.serve.schemas import (
    CacheStatus,
    Completion,
    CompletionRequest,
    EngineStatus,
    ErrorAnswer,
    GenerateAnswer,
    GenerateRequest,
    ModelList,
    RoutingAnswer,
    RoutingRequest,
    Status,
)

STATIC = Path(__file__).parent / "static"
KEY = "SWITCHWORKS_API_KEY"
"""The environment variable with the key that clients have to send; without it none is needed."""
EVENTS = "text/event-stream"

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "Not JSON",
        401: "The API key is missing or wrong",
        404: "No such model",
        408: "The request took too long to arrive",
        413: "The request is too large",
        415: "The body is not sent as application/json",
        422: "A setting is wrong, or more than the server allows",
        429: "Too many requests wait; Retry-After says when to come back",
        503: "The server is shutting down",
    }.items()
}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {EVENTS: {"schema": _EVENT}}, "description": "The answer"}
}


_REASONS = {
    "Not Found": "There is no such path. GET /openapi.json lists them.",
    "Method Not Allowed": "This path has another method. GET /openapi.json tells which.",
    "There was an error parsing the body": "The body is not JSON: it nests too deep, is not UTF-8, "
    "or holds a number of too many digits.",
}
"""What Starlette and FastAPI say, in more words."""
FAILED = "The server has failed at this request. Its log says why."


class GoneError(Exception):
    """The client has left before its answer was there."""


class Server:
    """The models that are served, and what handlers share."""

    def __init__(self, models: Mapping[str, Engine], config: ServeConfig) -> None:
        self.models = {name: Hosted(name, engine, config) for name, engine in models.items()}
        self.config, self.metrics = config, Metrics(self.models)
        self.start, self.is_closing = time.monotonic(), False

    def model(self, name: str | None) -> Hosted:
        """The model of that name, None: the first. Raises HTTPException 404."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise HTTPException(404, f"There is no model {name[:80]!r}. There are: {known}.")
        return self.models[name]

    def note(self, request: HttpRequest, hosted: Hosted, answers: Sequence[Answer]) -> None:
        """Counts `answers`, and puts them into the log line of the request."""
        for answer in answers:
            self.metrics.answered(hosted.name, answer)
        texts = [text for answer in answers for text in answer.texts]
        firsts = [a.first_token_seconds for a in answers if a.first_token_seconds is not None]
        request.state.noted |= {
            "model": hosted.name,
            "tokens": sum(len(text.tokens) for text in texts),
            "first_token_seconds": round(min(firsts), 4) if firsts else None,
            "finish": sorted({text.reason for text in texts}),
        }

    def note_texts(self, request: HttpRequest, **texts: Any) -> None:
        """Puts `texts` into the log line, if that is wanted."""
        if self.config.log_texts:
            request.state.noted |= texts


def create_app(models: Mapping[str, Engine], config: ServeConfig | None = None) -> FastAPI:
    """The application that serves `models` by their names; closes their engines at its end.

    Clients have to send the key in the environment variable SWITCHWORKS_API_KEY, if there is one.
    """
    server = Server(models, config or ServeConfig())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.is_closing = True
        closing = (
            asyncio.to_thread(engine.close, server.config.timeout) for engine in models.values()
        )
        await asyncio.gather(*closing)

    app = FastAPI(
        title="switchworks",
        description="Sparse encoder-decoders and language models over HTTP.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = server
    app.add_middleware(
        Guard, config=server.config, key=os.environ.get(KEY) or None, count=server.metrics.count
    )
    _add_errors(app)
    _add_writing(app, server)
    _add_looking(app, server)
    return app


def _add_errors(app: FastAPI) -> None:
    async def refuse_settings(_: HttpRequest, error: Exception) -> JSONResponse:
        return error_answer(422, str(error), "invalid_request_error")

    async def turn_away(_: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, BusyError)
        status = 503 if error.is_closing else 429
        headers = {"Retry-After": str(round(error.retry_after))}
        return error_answer(status, str(error), "overloaded_error", headers)

    async def pass_on(_: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        message = _REASONS.get(error.detail, error.detail)
        return error_answer(error.status_code, message, "invalid_request_error", headers)

    async def no_answer(_: HttpRequest, _error: Exception) -> Response:
        return Response(status_code=GONE)  # nobody reads it

    async def fail(request: HttpRequest, _error: Exception) -> JSONResponse:
        headers = {"X-Request-Id": request.state.number}
        return error_answer(500, FAILED, "server_error", headers)

    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(ConfigError, refuse_settings)
    app.add_exception_handler(BusyError, turn_away)
    app.add_exception_handler(HTTPException, pass_on)
    app.add_exception_handler(GoneError, no_answer)
    app.add_exception_handler(Exception, fail)


async def _refuse_body(_: HttpRequest, error: Exception) -> JSONResponse:
    """Says what is wrong with the first field that is. Never repeats what was sent: it may be
    long, or no text at all."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return error_answer(400, f"The body is not JSON: {reason}", "invalid_request_error")
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    reason = first["msg"].removeprefix("Value error, ")
    message = f"{place[:80]}: {reason}".encode(errors="replace").decode()
    return error_answer(422, message, "invalid_request_error")


def _add_writing(app: FastAPI, server: Server) -> None:
    responses = _REFUSALS | _STREAMED

    @app.post("/v1/completions", responses=responses, response_model=Completion)
    async def completions(request: HttpRequest, body: CompletionRequest) -> Any:
        """Writes texts, in OpenAI's shape. With `stream` server-sent events that end in [DONE]."""
        hosted = server.model(body.model)
        work = Completions(hosted, body, request.state.number)
        pending = await work.start()
        if body.stream:
            return _streamed(server, request, hosted, work, pending)
        with ExitStack() as stack:
            for each in pending:
                stack.enter_context(each)
            answers = [await _unless_gone(request, each) for each in pending]
        server.note(request, hosted, answers)
        answer = work.answer(answers)
        server.note_texts(request, prompt=body.prompt, answers=[c.text for c in answer.choices])
        return answer

    @app.post(
        "/v1/generate",
        responses=responses,
        response_model=GenerateAnswer,
        response_model_exclude_none=True,
    )
    async def generate(request: HttpRequest, body: GenerateRequest) -> Any:
        """Fills the holes of a text, or continues it. With `stream` server-sent events."""
        hosted = server.model(body.model)
        work = Generation(hosted, body, request.state.number)
        pending = await work.start()
        if body.stream:
            return _streamed(server, request, hosted, work, [pending])
        with pending:
            result = await _unless_gone(request, pending)
        server.note(request, hosted, [result])
        answer = work.answer(result)
        server.note_texts(request, prompt=body.text, answers=[c.text for c in answer.choices])
        return answer

    @app.post("/v1/routing", responses=_REFUSALS, response_model_exclude_none=True)
    async def routes(body: RoutingRequest) -> RoutingAnswer:
        """Which experts a text and what was written for it were sent to, and how surely."""
        return await routing(server.model(body.model), body)


def _streamed(
    server: Server,
    request: HttpRequest,
    hosted: Hosted,
    work: Completions | Generation,
    pending: list[Pending],
) -> Any:
    """The events of `work`. Starlette closes the generator when the client leaves."""
    answered = list[Answer]()

    async def events() -> AsyncIterator[str]:
        with ExitStack() as stack:
            for each in pending:
                stack.enter_context(each)
            try:
                async for line in work.events(pending, answered):
                    yield line
            except Exception:
                error = {"message": FAILED, "type": "server_error", "param": None, "code": None}
                yield as_event({"error": error})
                raise
            server.note(request, hosted, answered)

    return StreamingResponse(events(), media_type=EVENTS, headers={"Cache-Control": "no-store"})


async def _unless_gone(request: HttpRequest, pending: Pending) -> Answer:
    """The answer. Raises GoneError if the client leaves before."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.ensure_future(pending.answer()), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise GoneError
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


def _add_looking(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", responses={401: _REFUSALS[401]})
    async def list_models() -> ModelList:
        """The models, the one first that is used where none is named."""
        return ModelList(data=[hosted.card() for hosted in server.models.values()])

    @app.get("/v1/status", responses={401: _REFUSALS[401]})
    async def status() -> Status:
        """What the server is doing."""
        engines = {name: hosted.engine for name, hosted in server.models.items()}
        models = {name: _status(engine) for name, engine in engines.items()}
        uptime = time.monotonic() - server.start
        return Status(models=models, resident_bytes=resident_bytes(), uptime_seconds=uptime)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: _REFUSALS[503]})
    async def ready() -> dict[str, str]:
        """Whether requests are taken."""
        if server.is_closing:
            raise HTTPException(503, "The server is shutting down.")
        return {"status": "ready"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


def _status(engine: Engine) -> EngineStatus:
    counts = engine.counts
    rate = counts.tokens / counts.seconds if counts.seconds else 0.0
    cache = None
    if (figures := expert_cache(engine.model)) is not None:
        whole = figures.cold + figures.steady
        cache = CacheStatus(hits=whole.hits, misses=whole.misses, bytes=whole.bytes_read)
    return EngineStatus(
        running=engine.working, waiting=engine.waiting, tokens_per_second=rate, expert_cache=cache
    )


def resident_bytes() -> int:
    """Memory of this process, where the system tells (Linux); else 0."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
