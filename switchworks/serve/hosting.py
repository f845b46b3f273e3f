"""A model that is served, and requests to it on the event loop.

The engine works in a thread of its own; what it tells comes to the loop through a queue.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from switchworks.data import Tokenizer
from switchworks.engine import Answer, Engine, Event, Failure, Request, Token
from switchworks.model import active_parameters, num_parameters
from switchworks.serve.config import ServeConfig
from switchworks.serve.schemas import ModelCard

T = TypeVar("T")


@dataclass(frozen=True)
class Hosted:
    """An engine under the name that clients ask for."""

    name: str
    engine: Engine
    config: ServeConfig
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the model."""
        assert self.engine.tokenizer is not None, "a server needs a tokenizer"
        return self.engine.tokenizer

    @property
    def decoder_only(self) -> bool:
        """Whether the model continues texts and fills no holes."""
        return self.engine.model.config.decoder_only

    def card(self) -> ModelCard:
        """What there is to say of it."""
        model = self.engine.model
        return ModelCard(
            id=self.name,
            created=self.created,
            decoder_only=self.decoder_only,
            layers={name: layer.config.experts for name, layer in model.switch_layers.items()},
            parameters=num_parameters(model.config),
            active_parameters=active_parameters(model.config),
            max_input=self.config.max_input,
            max_length=self.config.max_length,
        )

    async def call(self, job: Callable[[], T]) -> T:
        """What `job` returns, called on the engine's thread."""
        return await asyncio.wrap_future(self.engine.call(job))


class Pending:
    """A request that the engine has taken. Left early, it is cancelled: use it in `with`."""

    def __init__(self, hosted: Hosted, request: Request) -> None:
        """Raises what `Engine.submit` raises."""
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody listens any more
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._ticket = hosted.engine.submit(request, emit)

    def __enter__(self) -> "Pending":
        return self

    def __exit__(self, *_: object) -> None:
        self._ticket.cancel()

    async def events(self) -> AsyncIterator[Token | Answer]:
        """Tokens, if it streams, and the answer. Raises what has stopped the engine."""
        while True:
            event = await self._events.get()
            if isinstance(event, Failure):
                raise event.error
            yield event
            if isinstance(event, Answer):
                return

    async def answer(self) -> Answer:
        """The answer."""
        async for event in self.events():
            if isinstance(event, Answer):
                return event
        raise AssertionError("the last event is an answer")
