"""Many clients at one server for minutes: is every answer right, and does memory stay?

    python experiments/serving/load.py runs/quickstart --minutes 10 --clients 64 --output load.json

Clients ask one request after another, each drawn from the same few dozen: short and long inputs,
greedy, beams, samples with their seed; a fifth are streamed and a tenth are left before their end.
Every answer is compared with the one that was computed offline before. LOAD.png shows latencies and
memory beside the JSON.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from switchworks.disk import write_json
from switchworks.generate import (
    BeamSearch,
    GenerationConfig,
    Sampling,
    load_with_tokenizer,
    write_texts,
)

SENTENCE = "the value of a list is returned when function reads each line in order and model has"


def requests(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Bodies of /v1/generate."""
    draws, vocabulary = random.Random(seed), SENTENCE.split()
    bodies: list[dict[str, Any]] = []
    for place in range(number):
        words: list[str] = draws.choices(vocabulary, k=draws.choice((6, 20, 60, 150)))
        for hole in range(2):
            words[draws.randrange(len(words))] = f"<extra_id_{hole}>"
        body: dict[str, Any] = {"text": " ".join(words), "max_length": draws.choice((8, 24, 64))}
        if place % 5 == 3:
            body["beams"] = 4
        if place % 5 == 4:
            body |= {"temperature": 1.0, "seed": place}
        bodies.append(body)
    return bodies


def offline(path: Path, bodies: Sequence[dict[str, Any]]) -> list[str]:
    """The texts that `generate` writes for them, one by one."""
    model, tokenizer = load_with_tokenizer(path)
    texts = []
    for body in bodies:
        config = GenerationConfig(
            max_length=body["max_length"],
            beams=BeamSearch(beams=body.get("beams", 1)),
            sampling=Sampling(temperature=body.get("temperature", 0.0), seed=body.get("seed", 0)),
        )
        texts += write_texts(model, tokenizer, [body["text"]], config)
    return texts


def start(path: Path, *flags: str) -> tuple["subprocess.Popen[str]", str]:
    """The server, and its address."""
    command = [sys.executable, "-m", "switchworks", "serve", str(path), "--port", "0", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    return server, server.stdout.readline().split()[-1]


def resident(process: int) -> int:
    """Bytes of memory of a process."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


class Clients:
    """What all clients have seen."""

    def __init__(self, bodies: list[dict[str, Any]], expected: list[str]) -> None:
        self.bodies, self.expected = bodies, expected
        self.errors: list[str] = []
        self.answered, self.different, self.left = 0, 0, 0
        self.first: list[float] = []
        self.each: list[float] = []
        self.whole: list[float] = []

    async def ask_on(self, client: httpx.AsyncClient, number: int, until: float) -> None:
        """One client, until then."""
        draws = random.Random(number)
        while time.monotonic() < until:
            place = draws.randrange(len(self.bodies))
            try:
                if draws.random() < 0.1:
                    await self._leave(client, self.bodies[place])
                else:
                    await self._ask(client, place, is_streamed=draws.random() < 0.2)
            except (httpx.HTTPError, AssertionError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")

    async def _leave(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        plain = {name: value for name, value in body.items() if name != "beams"}
        async with client.stream("POST", "/v1/generate", json=plain | {"stream": True}) as response:
            assert response.status_code == 200, response.status_code
            async for _ in response.aiter_lines():
                break
        self.left += 1

    async def _ask(self, client: httpx.AsyncClient, place: int, *, is_streamed: bool) -> None:
        body, start = self.bodies[place], time.monotonic()
        if is_streamed and "beams" not in body:
            answer = await self._stream(client, body)
        else:
            response = await client.post("/v1/generate", json=body)
            assert response.status_code == 200, f"{response.status_code} {response.text}"
            answer = response.json()
        self.whole.append(time.monotonic() - start)
        usage = answer["usage"]
        self.first.append(usage["first_token_seconds"])
        if usage["completion_tokens"] > 1:
            between = usage["seconds"] - usage["first_token_seconds"]
            self.each.append(between / (usage["completion_tokens"] - 1))
        self.answered += 1
        self.different += answer["choices"][0]["text"] != self.expected[place]

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        last = ""
        async with client.stream("POST", "/v1/generate", json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.status_code
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    last = line
        return json.loads(last.removeprefix("data: "))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    ordered = sorted(values)
    return {
        f"p{share}": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 5)
        for share in (50, 95, 99)
    }


async def run(address: str, process: int, clients: Clients, number: int, minutes: float) -> Any:
    """Lets them ask; resident memory by second."""
    memory: list[tuple[float, int]] = []
    start = time.monotonic()
    until = start + 60 * minutes
    limits = httpx.Limits(max_connections=number)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        asking = [asyncio.ensure_future(clients.ask_on(client, n, until)) for n in range(number)]
        while not all(task.done() for task in asking):
            memory.append((round(time.monotonic() - start, 1), resident(process)))
            await asyncio.sleep(min(1.0, minutes * 6))
        await asyncio.gather(*asking)
    return memory


def draw(report: dict[str, Any], memory: list[tuple[float, int]], path: Path) -> None:
    """Latencies as bars and memory as a line."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    names = ("first token", "whole answer")
    for offset, share in enumerate(("p50", "p95", "p99")):
        heights = [report["seconds"][name][share] for name in names]
        left.bar([x + 0.25 * offset for x in range(len(names))], heights, 0.23, label=share)
    left.set_xticks([0.25, 1.25], names)
    left.set_ylabel("seconds")
    left.legend(frameon=False)
    right.plot([at / 60 for at, _ in memory], [size / 1e6 for _, size in memory])
    right.set_ylim(bottom=0)
    right.set_xlabel("minutes")
    right.set_ylabel("MB of the server")
    figure.suptitle(f"{report['clients']} clients, {report['answered']:,} answers")
    figure.savefig(path, dpi=110)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints and returns the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("path", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=40, help="different ones")
    parser.add_argument("--output", type=Path, default=Path("load.json"))
    flags = parser.parse_args(words)
    bodies = requests(flags.requests)
    clients = Clients(bodies, offline(flags.path, bodies))
    server, address = start(flags.path)
    try:
        memory = asyncio.run(run(address, server.pid, clients, flags.clients, flags.minutes))
    finally:
        server.terminate()
        status = server.wait(60)
    settled = [size for at, size in memory if at >= min(60, 20 * flags.minutes)] or [memory[-1][1]]
    report = {
        "clients": flags.clients,
        "minutes": flags.minutes,
        "answered": clients.answered,
        "left by the client": clients.left,
        "errors": len(clients.errors),
        "first errors": clients.errors[:3],
        "different from offline": clients.different,
        "seconds": {
            "first token": percentiles(clients.first),
            "token": percentiles(clients.each),
            "whole answer": percentiles(clients.whole),
        },
        "resident MB after a minute": round(settled[0] / 1e6, 1),
        "resident MB at the end": round(settled[-1] / 1e6, 1),
        "growth": round(settled[-1] / settled[0] - 1, 4),
        "exit status": status,
    }
    write_json(flags.output, report)
    draw(report, memory, flags.output.with_suffix(".png"))
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
