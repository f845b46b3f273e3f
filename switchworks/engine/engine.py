"""The engine: a thread in which one model writes many texts at once.

A request joins between two steps: its input is encoded, together with others of similar length, and
its rows then take part in every step until they end. What a request gets does not depend on what
else is there: rows meet in no layer (`routing.eval_capacity_factor`, by which they would, is
refused). Sums of a product may be taken in another order when it has other rows, so log-probs
agree to rounding.

"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from switchworks.config import ConfigError, check_at_least
from switchworks.data import Tokenizer
from switchworks.engine.requests import (
    Answer,
    Emit,
    Event,
    Experts,
    Failure,
    Reason,
    Request,
    Text,
    Token,
)
from switchworks.engine.slots import Room, Slots
from switchworks.engine.trace import by_token, experts_by_row, likeliest, log_probs, trace
from switchworks.engine.writers import Beams, Scores, Writer, Written, make_writer
from switchworks.fast import decode_rows, for_decoding, routes_recorded
from switchworks.generate import pad
from switchworks.model import Routes, SwitchTransformer, evaluating

T = TypeVar("T")


class BusyError(Exception):
    """The queue is full, or the engine is closing."""

    def __init__(self, message: str, retry_after: float, *, is_closing: bool = False) -> None:
        super().__init__(message)
        self.is_closing = is_closing
        self.retry_after = retry_after
        """Seconds after which to ask again."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine takes on."""

    max_rows: int = 32
    """Texts, or beams of texts, that are written at once."""
    max_waiting: int = 256
    """Requests that wait for a row. More are turned away (429)."""
    cache_memory: int = 2**30
    """Bytes for keys and values of the texts that are written at once."""
    encode_tokens: int = 2048
    """Tokens of inputs, padding included, that are encoded between two steps: more delay the tokens
    of texts at work, fewer those of new ones. A single longer input is encoded whole."""

    def __post_init__(self) -> None:
        check_at_least(self, "", 1, "max_rows", "max_waiting", "cache_memory", "encode_tokens")


@dataclass
class Counts:
    """What an engine has done, for metrics. Written by its thread alone."""

    steps: int = 0
    rows: int = 0
    """Of all steps together: tokens decoded, beams and ended candidates included."""
    inputs: int = 0
    """Tokens of inputs."""
    tokens: int = 0
    """Tokens of answers."""
    seconds: float = 0.0
    """At work."""
    load: dict[str, list[int]] = field(default_factory=dict)
    """Tokens that each expert of each switch layer was sent."""


class Ticket:
    """A request that was taken."""

    def __init__(self, request: Request, emit: Emit, writer: Writer, order: int) -> None:
        self.request, self.emit, self.writer = request, emit, writer
        self.place = (-request.priority, order)
        self.is_cancelled = False
        self.arrival, limit = time.monotonic(), request.timeout
        self.deadline = None if limit is None else self.arrival + limit
        self.first_token: float | None = None
        self.rows = list[int]()
        """In the slots, while it is at work."""
        self.last: list[int] = [0] * request.rows
        """The token that each row's next follows."""
        self.tokens: list[list[Token]] = [[] for _ in range(request.rows)]
        self.input_experts = list[Experts]()

    def cancel(self) -> None:
        """Ends it soon, with what there is."""
        self.is_cancelled = True

    def __lt__(self, other: "Ticket") -> bool:
        return self.place < other.place

    def answer(self, texts: list[Text]) -> Answer:
        """Its answer, now."""
        experts = self.input_experts if self.request.experts else []
        return Answer(texts, experts, self.first_token, time.monotonic() - self.arrival)

    @property
    def interruption(self) -> Reason | None:
        """Why it has to end now, if it has to."""
        if self.is_cancelled:
            return "cancelled"
        late = self.deadline is not None and time.monotonic() > self.deadline
        return "deadline" if late else None


class Engine:
    """Writes the texts of many requests with one model, which does nothing else meanwhile."""

    def __init__(
        self,
        model: SwitchTransformer,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        """Starts the thread. Raises ConfigError for a model whose texts would depend on others."""
        routing = model.config.routing
        if routing is not None and routing.eval_capacity_factor is not None:
            raise ConfigError(
                f"routing.eval_capacity_factor = {routing.eval_capacity_factor} lets a text depend "
                "on those it shares a batch with.\n  Set it to none in the model's config.toml."
            )
        self.model, self.tokenizer, self.config = model, tokenizer, config or EngineConfig()
        self.counts = Counts()
        self.on_step: Callable[[float], None] = _ignore
        """Hears the rows of every step, on the engine's thread."""
        layers = model.switch_layers.items()
        self._load = {n: torch.zeros(layer.config.experts, dtype=torch.long) for n, layer in layers}
        self._decoder_layers = [name for name in self._load if name.startswith("decoder")]
        self._slots, self._orders = Slots(model), itertools.count()
        self._waiting, self._working = list[Ticket](), list[Ticket]()
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._change, self._is_closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def working(self) -> int:
        """Requests whose texts are being written."""
        return len(self._working)

    def submit(self, request: Request, emit: Emit) -> Ticket:
        """Takes `request`; its events go to `emit`. Raises BusyError if the queue is full or the
        engine closes, ConfigError for a request that can never be met."""
        self._check(request)
        ticket = Ticket(request, emit, make_writer(self.model, request, self.tokenizer), 0)
        with self._change:
            self._check_open()
            if len(self._waiting) >= self.config.max_waiting:
                raise BusyError(
                    f"{len(self._waiting)} requests wait already, which is the most.",
                    retry_after=self._wait_expected(),
                )
            ticket.place = (-request.priority, next(self._orders))
            heapq.heappush(self._waiting, ticket)
            self._change.notify()
        return ticket

    def _check(self, request: Request) -> None:
        most = self.config
        if request.rows > most.max_rows:
            raise ConfigError(
                f"beams or candidates = {request.rows} are more than the {most.max_rows} rows that "
                "are written at once.\n  Ask for fewer, or raise --max-rows."
            )
        if (needed := self._slots.num_bytes(self._needs(request).padded())) > most.cache_memory:
            raise ConfigError(
                f"The keys and values of this text need {needed / 2**20:.0f} MB, and there are "
                f"{most.cache_memory / 2**20:.0f} MB.\n  Shorten it, or raise --cache-memory."
            )

    def _wait_expected(self) -> float:
        """Seconds until half of those that wait have begun, judged by the tokens per second."""
        rate = self.counts.tokens / self.counts.seconds if self.counts.seconds else 0.0
        tokens = sum(ticket.request.config.max_length for ticket in self._waiting)
        return min(60.0, max(1.0, tokens / rate / 2)) if rate else 1.0

    def answer(self, requests: Iterable[Request]) -> list[Answer]:
        """The answers to `requests`, in their order. Raises what stopped one of them."""
        queues: list[SimpleQueue[Event]] = []
        for request in requests:
            queues.append(SimpleQueue())
            self.submit(request, queues[-1].put)
        return [_last(queue) for queue in queues]

    def call(self, job: Callable[[], T]) -> "Future[T]":
        """Calls `job` on the engine's thread between two steps: anything else the model is for.
        Raises BusyError if the engine closes."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except Exception as error:
                    future.set_exception(error)

        with self._change:
            self._check_open()
            self._jobs.put(run)
            self._change.notify()
        return future

    def _check_open(self) -> None:
        if self._is_closing:
            raise BusyError("The server is shutting down.", retry_after=10, is_closing=True)

    def close(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits until those there are have ended; whether they have.
        After `timeout` seconds the rest is cancelled."""
        with self._change:
            self._is_closing = True
            self._change.notify()
        self._thread.join(timeout)
        if drained := not self._thread.is_alive():
            return drained
        for ticket in (*self._waiting, *self._working):
            ticket.cancel()
        self._thread.join()
        return False

    def _serve(self) -> None:
        """The thread."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.model))
            stack.enter_context(for_decoding(self.model))
            while self._wait_for_work():
                start = time.perf_counter()
                while not self._jobs.empty():
                    self._jobs.get()()
                try:
                    self._work()
                except Exception as error:  # of one step: later requests may fare better
                    self._fail(error)
                self.counts.seconds += time.perf_counter() - start

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do; False once there will be nothing more."""
        with self._change:
            while not (self._waiting or self._working or not self._jobs.empty()):
                if self._is_closing:
                    return False
                self._slots.clear()
                self._change.wait()
        return True

    def _work(self) -> None:
        for ticket in [ticket for ticket in self._working if ticket.interruption]:
            self._end(ticket, ticket.interruption)
        self._turn_away()
        if admitted := self._admit():
            self._working += admitted  # at once, so that a failure reaches all of them
            self._begin(admitted)
        if self._working:
            self._step()

    def _admit(self) -> list[Ticket]:
        """Those that begin now, in their order: as many as there are rows, memory, and time for
        before the next step."""
        admitted, tokens, room = list[Ticket](), 0, self._slots.room
        with self._change:
            while self._waiting:
                first = self._waiting[0]
                wider = self._room([*self._working, *admitted, first])
                tokens += len(first.request.ids)
                if wider is None or (admitted and tokens > self.config.encode_tokens):
                    break
                room = wider
                admitted.append(heapq.heappop(self._waiting))
        self._slots.resize(room)
        return admitted

    def _turn_away(self) -> None:
        """Ends those that wait and were cancelled, or have waited for too long."""
        with self._change:
            late = [ticket for ticket in self._waiting if ticket.interruption]
            if late:
                self._waiting = [ticket for ticket in self._waiting if ticket not in late]
                heapq.heapify(self._waiting)
        for ticket in late:
            reason = ticket.interruption or "cancelled"
            ticket.emit(ticket.answer([Text([], 0.0, reason)]))

    def _room(self, tickets: Sequence[Ticket]) -> Room | None:
        """The buffers for all of `tickets`; None if there is no room."""
        needs = [self._needs(ticket.request) for ticket in tickets]
        rows = sum(need.rows for need in needs)
        if rows > self.config.max_rows:
            return None
        _, positions, memory = (max(sizes) for sizes in zip(*needs, strict=True))
        least = Room(rows, positions, memory).padded()
        most = Room(*map(max, self._slots.room, least))
        # Buffers that are longer than needed stay as they are, unless that takes too much.
        limit = self.config.cache_memory
        return next((each for each in (most, least) if self._slots.num_bytes(each) <= limit), None)

    def _needs(self, request: Request) -> Room:
        """The buffers for this one alone."""
        read, written = len(request.ids), request.config.max_length
        if self.model.config.decoder_only:  # one cache holds the start, the prompt and the text
            return Room(request.rows, 1 + read + written, 0)
        return Room(request.rows, written, read)

    def _begin(self, tickets: list[Ticket]) -> None:
        """Reads the inputs of `tickets`, those of similar length together."""
        tickets = sorted(tickets, key=lambda ticket: len(ticket.request.ids))
        for _, batch in itertools.groupby(tickets, lambda ticket: len(ticket.request.ids) // 16):
            group = list(batch)
            inputs = pad([ticket.request.ids for ticket in group])
            inputs = inputs.to(self.model.embedding.weight.device)
            self.counts.inputs += sum(len(ticket.request.ids) for ticket in group)
            read = self._prefill if self.model.config.decoder_only else self._encode
            read(group, inputs)

    def _encode(self, tickets: list[Ticket], inputs: Tensor) -> None:
        with routes_recorded(self.model) as routed:
            memory = self.model.encode(inputs)
        for number, ticket in enumerate(tickets):
            length = len(ticket.request.ids)
            states = memory.states[number : number + 1, :length]
            ticket.rows = self._slots.add_memory(states, ticket.request.rows)
        plans = {name: batch.routes for name, batch in routed.items()}
        self._count_load(plans)
        if any(ticket.request.experts for ticket in tickets):
            layers = {name: experts_by_row(p, inputs.numel()) for name, p in plans.items()}
            experts = by_token(layers, inputs.numel())
            for number, ticket in enumerate(tickets):
                start = number * inputs.shape[1]
                ticket.input_experts = experts[start : start + len(ticket.request.ids)]

    def _prefill(self, tickets: list[Ticket], prompts: Tensor) -> None:
        with routes_recorded(self.model) as routed:
            logits, cache = self.model.prefill(prompts, 1)
        plans = {name: batch.routes for name, batch in routed.items()}
        self._count_load(plans)
        for number, ticket in enumerate(tickets):
            length = len(ticket.request.ids) + 1  # with the start
            ticket.rows = self._slots.add_prompt(cache, number, length, ticket.request.rows)
        width = prompts.shape[1] + 1
        experts = list[Experts]()
        if any(ticket.request.experts for ticket in tickets):
            rows = len(tickets) * width
            experts = by_token({n: experts_by_row(p, rows) for n, p in plans.items()}, rows)
        for number, ticket in enumerate(tickets):
            end = (number + 1) * width  # prompts stand at the right
            count = len(ticket.request.ids) + 1
            *ticket.input_experts, last = experts[end - count : end] or [{}]
            rows = ticket.request.rows
            self._advance(
                ticket, Scores(logits[number].expand(rows, -1)), range(rows), [last] * rows
            )

    def _step(self) -> None:
        """One token more for every row."""
        rows = self._slots.used
        tokens = [0] * rows
        for ticket in self._working:
            for row, token in zip(ticket.rows, ticket.last, strict=True):
                tokens[row] = token
        column = torch.tensor(tokens, device=self.model.embedding.weight.device)[:, None]
        memory = max(len(ticket.request.ids) for ticket in self._working)
        positions = self._slots.positions[:rows]
        buffers = self._slots.buffers(memory)
        logits, plans = decode_rows(self.model, column, positions, *buffers)
        logits = self.model.gather_logits(logits)[:, 0]
        positions += 1
        named = dict(zip(self._decoder_layers, plans, strict=True))
        self._count_load(named)
        experts = [Experts()] * rows
        if any(ticket.request.experts for ticket in self._working):
            experts = by_token({n: experts_by_row(p, rows) for n, p in named.items()}, rows)
        scores = Scores(logits)
        for ticket, places in [(ticket, list(ticket.rows)) for ticket in self._working]:
            self._advance(ticket, scores, places, [experts[row] for row in places])
        self.counts.steps, self.counts.rows = self.counts.steps + 1, self.counts.rows + rows
        self.on_step(rows)

    def _advance(
        self, ticket: Ticket, scores: Scores, rows: Sequence[int], experts: Sequence[Experts]
    ) -> None:
        """Lets `ticket` choose its next tokens from `rows` of `scores`, and ends it if they are its
        last. An error is that of this request alone."""
        try:
            self._choose(ticket, scores, rows, experts)
        except Exception as error:
            if ticket in self._working:
                self._leave(ticket)
            _tell(ticket, Failure(error))

    def _choose(
        self, ticket: Ticket, scores: Scores, rows: Sequence[int], experts: Sequence[Experts]
    ) -> None:
        move = ticket.writer.advance(scores, rows)
        if ticket.first_token is None:
            ticket.first_token = time.monotonic() - ticket.arrival
        request, places = ticket.request, list(rows)
        told = experts if request.experts else [Experts()] * len(rows)
        top = likeliest(scores.logits[places], request.top) if request.top else [[]] * len(rows)
        for row, token in enumerate(map(Token, move.tokens, move.log_probs, told, top)):
            ticket.tokens[row].append(token)
            if request.stream:
                ticket.emit(token)
        if move.is_over:
            self._end(ticket)
            return
        if move.parents is not None:
            self._slots.reorder(ticket.rows, move.parents)
        ticket.last = move.tokens

    def _end(self, ticket: Ticket, reason: Reason | None = None) -> None:
        """Frees the rows of `ticket` and gives its answer."""
        self._leave(ticket)
        texts = [
            self._text(ticket, row, written, reason)
            for row, written in enumerate(ticket.writer.texts())
        ]
        texts.sort(key=lambda text: -text.score)
        self.counts.tokens += sum(len(text.tokens) for text in texts)
        ticket.emit(ticket.answer(texts))

    def _leave(self, ticket: Ticket) -> None:
        self._working.remove(ticket)
        owners = {row: each for each in self._working for row in each.rows}
        for row in sorted(ticket.rows, reverse=True):
            last = self._slots.remove(row)
            if last != row:
                owner = owners[last]
                owner.rows[owner.rows.index(last)] = row
                owners[row] = owner

    def _text(self, ticket: Ticket, row: int, written: Written, reason: Reason | None) -> Text:
        if isinstance(ticket.writer, Beams):
            tokens = self._read_again(ticket.request, written.ids)
        else:
            tokens = ticket.tokens[row][: len(written.ids)]
        score = sum(token.log_prob for token in tokens) if written.score is None else written.score
        return Text(tokens, score, "stop" if written.has_ended else reason or "length")

    def _read_again(self, request: Request, ids: list[int]) -> list[Token]:
        """The tokens of a text that beams have found, whose likelihoods nobody has noted."""
        if not ids:
            return []
        again = trace(self.model, request.ids, ids)
        experts = [Experts()] * len(ids)
        if request.experts:
            layers = {name: again.routed[name] for name in self._decoder_layers}
            plans = {
                name: experts_by_row(b.routes, b.real.numel())[-len(ids) :]
                for name, b in layers.items()
            }
            experts = by_token(plans, len(ids))
        top = likeliest(again.logits, request.top) if request.top else [[]] * len(ids)
        return list(map(Token, ids, log_probs(again.logits, ids), experts, top))

    def _count_load(self, plans: dict[str, Routes]) -> None:
        for name, plan in plans.items():
            load = self._load[name]
            load += torch.bincount(plan.expert[plan.kept], minlength=len(load)).cpu()

    def expert_load(self) -> dict[str, list[int]]:
        """Tokens that each expert of each switch layer was sent until now."""
        return {name: load.tolist() for name, load in self._load.items()}

    def _fail(self, error: Exception) -> None:
        """Gives up what is at work: a step has failed for all of it."""
        for ticket in self._working:
            _tell(ticket, Failure(error))
        self._working.clear()
        self._slots.clear()


def _tell(ticket: Ticket, failure: Failure) -> None:
    with suppress(Exception):  # its listener may be what has failed
        ticket.emit(failure)


def _ignore(_rows: float) -> None:
    pass


def _last(queue: "SimpleQueue[Any]") -> Answer:
    while isinstance(event := queue.get(), Token):
        pass
    if isinstance(event, Failure):
        raise event.error
    return event
