"""Tokens a second at many clients: our server against transformers behind FastAPI.

    python experiments/serving/against_transformers.py --experts 8 --clients 32

Ours is the application that `switchworks serve` runs. transformers' side is what its users write:
`generate` behind a lock, one request after another; and a kinder one, which writes all that wait
together, padded. All answer the same requests in the same process, with the same weights (random),
as many threads and as many new tokens, greedily, in turns; tokens are compared.

Then requests come to ours at random times (a Poisson process) at 60 % of what `--below` clients
get from it: how long do they wait for the first token of a stream?
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import uvicorn
from fastapi import Body, FastAPI
from torch import Tensor

from switchworks.bench.config import Shape
from switchworks.bench.peers import peer_model
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.disk import write_json
from switchworks.engine import Engine, EngineConfig
from switchworks.model import EOS, SwitchTransformer
from switchworks.serve import ServeConfig, create_app
from switchworks.training.state import cast_for_compute

PATH = "/v1/generate"
Request = dict[str, Any]
Write = Callable[[list[list[int]]], list[list[int]]]


def requests(flags: argparse.Namespace) -> list[Request]:
    """Texts of a hole and letters, a quarter of `--longest` tokens to all of it, two others in."""
    draws = random.Random(0)
    bodies: list[Request] = []
    for _ in range(flags.requests):
        letters = draws.randint(flags.longest // 4, flags.longest) - 2
        text = "<extra_id_0>" + "".join(draws.choices("abcdefghijklmnopqrstuvwxyz ", k=letters))
        bodies.append({"text": text, "max_length": flags.new, "min_length": flags.new - 1})
    return bodies


def ours(model: SwitchTransformer, rows: int) -> FastAPI:
    """What `switchworks serve` runs."""
    engine = EngineConfig(max_rows=rows, encode_tokens=4096)
    config = ServeConfig(max_input=4096, max_length=4096, timeout=3600, engine=engine)
    return create_app({"model": Engine(model, ByteTokenizer(), engine)}, config)


def theirs(write: Write) -> FastAPI:
    """One request after another, each by `generate`."""
    app, lock = FastAPI(), threading.Lock()

    @app.post(PATH)
    def answer(body: Annotated[Request, Body()]) -> Any:  # in a thread, as FastAPI calls these
        with lock:
            return as_answer(write([read(body)])[0])

    return app


def theirs_together(write: Write) -> FastAPI:
    """All that wait, by one call of `generate`."""
    app, busy = FastAPI(), asyncio.Lock()
    waiting: list[tuple[list[int], asyncio.Future[list[int]]]] = []

    async def work() -> None:
        async with busy:
            taken, waiting[:] = list(waiting), []
            if taken:
                texts = await asyncio.to_thread(write, [ids for ids, _ in taken])
                for (_, future), text in zip(taken, texts, strict=True):
                    future.set_result(text)

    @app.post(PATH)
    async def answer(body: Annotated[Request, Body()]) -> Any:
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        waiting.append((read(body), future))
        await asyncio.sleep(0)  # for others that have come at once
        await work()
        return as_answer(await future)

    return app


def read(body: Request) -> list[int]:
    """The input of a request, as our server reads it."""
    return [*ByteTokenizer().encode(body["text"]), EOS]


def as_answer(ids: list[int]) -> Any:
    """The part of our answer that is compared."""
    return {"choices": [{"tokens": [{"id": id_} for id_ in ids]}]}


def peer_write(model: Any, new: int) -> Write:
    """`generate` of transformers, for inputs of different lengths."""

    def write(inputs: list[list[int]]) -> list[list[int]]:
        rows = [torch.tensor(ids) for ids in inputs]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        settings = {"max_new_tokens": new, "min_new_tokens": new - 1, "do_sample": False}
        mask = (padded != 0).long()
        written: Tensor = model.generate(padded, attention_mask=mask, **settings)
        return written[:, 1:].tolist()

    return write


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The address of `app`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


async def ask_all(address: str, bodies: Sequence[Request], clients: int) -> list[list[int]]:
    """The tokens of all answers; each client asks when it has its answer."""
    answers: dict[int, list[int]] = {}
    places = iter(range(len(bodies)))

    async def ask(client: httpx.AsyncClient) -> None:
        for place in places:
            response = await client.post(PATH, json=bodies[place])
            (choice,) = response.raise_for_status().json()["choices"]
            answers[place] = [token["id"] for token in choice["tokens"]]

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        await asyncio.gather(*(ask(client) for _ in range(clients)))
    return [answers[place] for place in range(len(bodies))]


def rate(address: str, bodies: Sequence[Request], clients: int) -> tuple[float, list[list[int]]]:
    """Tokens a second, and the tokens."""
    start = time.perf_counter()
    written = asyncio.run(ask_all(address, bodies, clients))
    return sum(map(len, written)) / (time.perf_counter() - start), written


async def first_tokens(
    address: str, bodies: Sequence[Request], per_second: float, seconds: float
) -> list[float]:
    """Seconds to the first token of every request that came within `seconds`."""
    draws, waits = random.Random(1), list[float]()

    async def ask(client: httpx.AsyncClient, body: Request) -> None:
        start, is_first = time.perf_counter(), True
        async with client.stream("POST", PATH, json=body | {"stream": True}) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if is_first and line.startswith('data: {"token"'):
                    waits.append(time.perf_counter() - start)
                    is_first = False

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        asking, end = list[asyncio.Task[None]](), time.perf_counter() + seconds
        while time.perf_counter() < end:
            asking.append(asyncio.create_task(ask(client, draws.choice(bodies))))
            await asyncio.sleep(draws.expovariate(per_second))
        await asyncio.gather(*asking)
    return waits


def below_saturation(address: str, bodies: list[Request], flags: argparse.Namespace) -> Any:
    """How long ours lets wait at 60 % of what `--below` clients get from it."""
    tokens, _ = rate(address, bodies, flags.below)
    per_second = 0.6 * tokens / flags.new
    waits = asyncio.run(first_tokens(address, bodies, per_second, flags.seconds))
    median, p99 = statistics.median(waits), sorted(waits)[int(0.99 * len(waits))]
    return {
        "requests": len(waits),
        "requests a second": round(per_second, 2),
        "median": round(median, 4),
        "p99": round(p99, 4),
        "p99 over median": round(p99 / median, 2),
    }


def compare(sides: Mapping[str, str], bodies: list[Request], flags: argparse.Namespace) -> Any:
    """Rates of all sides in turns, ours first, and how many texts are the same."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    written: dict[str, list[list[int]]] = {}
    for _ in range(flags.rounds):
        for name, address in sides.items():
            tokens, written[name] = rate(address, bodies, flags.clients)
            rates[name].append(tokens)
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    first, *others = sides
    equal = {name: sum(map(list.__eq__, written[first], written[name])) for name in others}
    return {
        "tokens a second": medians,
        "ratio": {name: round(medians[first] / medians[name], 2) for name in others},
        "equal texts": {name: f"{count} of {len(bodies)}" for name, count in equal.items()},
    }


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--below", type=int, default=16, help="clients of the second measurement")
    parser.add_argument("--seconds", type=float, default=60.0, help="that the second takes")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--longest", type=int, default=128, help="tokens of an input")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Prints the report, and writes it."""
    flags = parse(words)
    dtype = getattr(torch, flags.precision)
    shape = Shape(d_model=flags.d_model, d_ff=4 * flags.d_model, input_length=flags.longest)
    model = SwitchTransformer(shape.model(flags.experts), seed=0).eval()
    write = peer_write(peer_model(model).eval().to(dtype), flags.new)
    cast_for_compute(model, dtype)
    apps = {
        "ours": ours(model, max(flags.clients, flags.below)),
        "transformers, one after another": theirs(write),
        "transformers, together": theirs_together(write),
    }
    bodies = requests(flags)
    settings = {name: str(value) for name, value in vars(flags).items() if name != "output"}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(serving(app)) for name, app in apps.items()}
        report = {"settings": settings | {"threads": torch.get_num_threads()}}
        report |= compare(sides, bodies, flags)
        report["first token below saturation"] = below_saturation(sides["ours"], bodies, flags)
    write_json(flags.output, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
