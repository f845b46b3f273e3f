"""Tokens a second at many clients: our server against transformers behind FastAPI.

    python experiments/serving/against_transformers.py --experts 8 --clients 32

transformers' side is what its users write: `generate` behind a lock, one request after another; and
a kinder one, which writes all that wait together, padded. Same weights (random), same inputs, 64
new tokens of each, two threads; in turns, three rounds; texts compared.
"""

import argparse
import asyncio
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import uvicorn
from fastapi import Body, FastAPI
from torch import Tensor

from switchworks.bench.config import Shape
from switchworks.bench.peers import peer_model
from switchworks.disk import write_json
from switchworks.engine import Engine, EngineConfig, Request
from switchworks.generate import GenerationConfig
from switchworks.model import SwitchTransformer
from switchworks.training.state import cast_for_compute

Write = Callable[[list[list[int]]], list[list[int]]]


def ours(model: SwitchTransformer, new: int, clients: int) -> tuple[FastAPI, Engine]:
    """Our engine behind the same path as the others."""
    engine = Engine(model, config=EngineConfig(max_rows=clients, encode_tokens=4096))
    app = FastAPI()
    config = GenerationConfig(max_length=new, min_length=new - 1)

    @app.post("/write")
    async def write(ids: Annotated[list[int], Body()]) -> list[int]:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        events: list[Any] = []

        def emit(event: Any) -> None:
            events.append(event)
            loop.call_soon_threadsafe(done.set)

        engine.submit(Request(ids=ids, config=config), emit)
        await done.wait()
        return [token.id for token in events[-1].texts[0].tokens]

    return app, engine


def theirs(model: Any, new: int) -> FastAPI:
    """One request after another, each by `generate`."""
    app, lock = FastAPI(), threading.Lock()

    @app.post("/write")
    def write(
        ids: Annotated[list[int], Body()],
    ) -> list[int]:  # in a thread, as FastAPI calls these
        with lock:
            return peer_write(model, new)([ids])[0]

    return app


def theirs_together(model: Any, new: int) -> FastAPI:
    """All that wait, by one call of `generate`."""
    app = FastAPI()
    waiting: list[tuple[list[int], asyncio.Future[list[int]]]] = []
    busy = asyncio.Lock()

    async def work() -> None:
        async with busy:
            if not waiting:
                return
            taken, waiting[:] = list(waiting), []
            texts = await asyncio.to_thread(peer_write(model, new), [ids for ids, _ in taken])
            for (_, answer), text in zip(taken, texts, strict=True):
                answer.set_result(text)

    @app.post("/write")
    async def write(ids: Annotated[list[int], Body()]) -> list[int]:
        answer: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        waiting.append((ids, answer))
        await asyncio.sleep(0)  # others that have come at once
        await work()
        return await answer

    return app


def peer_write(model: Any, new: int) -> Write:
    """`generate` of transformers, for inputs of different lengths."""

    def write(inputs: list[list[int]]) -> list[list[int]]:
        rows = [torch.tensor(ids) for ids in inputs]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = (padded != 0).long()
        written: Tensor = model.generate(
            padded, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return written[:, 1:].tolist()

    return write


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The address of `app`."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


async def ask_all(address: str, inputs: list[list[int]], clients: int) -> list[list[int]]:
    """The answers; each client asks when it has its answer."""
    answers: dict[int, list[int]] = {}
    places = iter(range(len(inputs)))

    async def ask(client: httpx.AsyncClient) -> None:
        for place in places:
            answers[place] = (await client.post("/write", json=inputs[place])).json()

    async with httpx.AsyncClient(base_url=address, timeout=None) as client:
        await asyncio.gather(*(ask(client) for _ in range(clients)))
    return [answers[place] for place in range(len(inputs))]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints and returns tokens a second of each side, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    flags = parser.parse_args(words)
    dtype = getattr(torch, flags.precision)
    shape = Shape(d_model=flags.d_model, d_ff=4 * flags.d_model, input_length=flags.longest)
    model = SwitchTransformer(shape.model(flags.experts), seed=0).eval()
    peer = peer_model(model).eval().to(dtype)
    cast_for_compute(model, dtype)
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(
        flags.longest // 4, flags.longest + 1, (flags.requests,), generator=draws
    )
    inputs = [
        [*torch.randint(3, 8000, (int(length) - 1,), generator=draws).tolist(), 1]
        for length in lengths
    ]
    app, engine = ours(model, flags.new, flags.clients)
    sides = {
        "ours": app,
        "transformers, one after another": theirs(peer, flags.new),
        "transformers, together": theirs_together(peer, flags.new),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    written: dict[str, list[list[int]]] = {}
    for _ in range(flags.rounds):
        for name, side in sides.items():
            with serving(side) as address:
                start = time.perf_counter()
                written[name] = asyncio.run(ask_all(address, inputs, flags.clients))
                seconds = time.perf_counter() - start
            rates[name].append(flags.requests * flags.new / seconds)
    engine.close()
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    first, *others = sides
    same = {
        other: sum(a == b for a, b in zip(written[first], written[other], strict=True))
        for other in others
    }
    report = {
        "settings": {k: str(v) for k, v in vars(flags).items() if k != "output"},
        "tokens a second": medians,
        "ratio": {other: round(medians[first] / medians[other], 2) for other in others},
        "equal texts": {other: f"{count} of {flags.requests}" for other, count in same.items()},
    }
    write_json(flags.output, report)
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
