"""/v1/generate and /v1/routing: holes put back in place, choices, experts of every token."""

import json
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

from starlette.concurrency import run_in_threadpool

from switchworks.config import ConfigError
from switchworks.engine import Answer, Experts, Request, Text, Token, Trace, trace
from switchworks.evaluate import token_text
from switchworks.generate import (
    BeamSearch,
    GenerationConfig,
    Sampling,
    continuation,
    make_prompts,
    parse_fills,
)
from switchworks.model import EOS
from switchworks.serve.hosting import Hosted, Pending
from switchworks.serve.schemas import (
    Choice,
    GenerateAnswer,
    GenerateRequest,
    GenerateUsage,
    ReadToken,
    RoutingAnswer,
    RoutingRequest,
    WrittenToken,
)

MOST_EXPERTS = 8
"""Told of each token by /v1/routing."""


class Generation:
    """One text of /v1/generate."""

    def __init__(self, hosted: Hosted, body: GenerateRequest, number: str) -> None:
        """Raises ConfigError for settings that do not go together, or are more than the server
        allows."""
        self.hosted, self.body, self.number = hosted, body, number
        check_length(hosted, "max_length", body.max_length)
        for name in ("top_k", "top_p"):
            if getattr(body, name) is not None and not body.temperature:
                raise ConfigError(f"{name} needs temperature > 0.\n  Set one, or leave it out.")
        self.config = GenerationConfig(
            max_length=body.max_length,
            max_input=hosted.config.max_input,
            sampling=Sampling(
                temperature=body.temperature, top_k=body.top_k, top_p=body.top_p, seed=body.seed
            ),
            beams=BeamSearch(beams=body.beams),
            min_length=body.min_length,
            repetition_penalty=body.repetition_penalty,
            no_repeat_ngram=body.no_repeat_ngram,
            stop=tuple(body.stop),
        )

    async def start(self) -> Pending:
        """Reads the text and gives it to the engine."""
        hosted, body = self.hosted, self.body
        arguments = hosted.engine.model, hosted.tokenizer, [body.text], self.config
        (self.prompt,) = await run_in_threadpool(make_prompts, *arguments)
        limit = hosted.config.timeout
        request = Request(
            ids=self.prompt.ids,
            config=self.config,
            candidates=body.candidates,
            priority=body.priority,
            timeout=min(limit, body.timeout or limit),
            stream=body.stream,
            experts=body.experts,
        )
        return Pending(hosted, request)

    def answer(self, answer: Answer) -> GenerateAnswer:
        """The engine's answer as the client gets it."""
        tokens = sum(len(text.tokens) for text in answer.texts)
        usage = GenerateUsage(
            prompt_tokens=len(self.prompt.ids),
            completion_tokens=tokens,
            seconds=answer.seconds,
            first_token_seconds=answer.first_token_seconds,
            tokens_per_second=tokens / max(answer.seconds, 1e-9),
        )
        return GenerateAnswer(
            id=self.number,
            model=self.hosted.name,
            choices=[self._choice(text) for text in answer.texts],
            input=self._read(self.prompt.ids, answer.input_experts),
            usage=usage,
        )

    def _choice(self, text: Text) -> Choice:
        ids = [token.id for token in text.tokens]
        return Choice(
            text=self.prompt.show(ids),
            fills=self._fills(ids),
            score=text.score,
            probability=math.exp(min(0.0, text.score)),
            tokens=[self._written(token) for token in text.tokens],
            finish_reason=text.reason,
        )

    def _fills(self, ids: Sequence[int]) -> dict[int, str]:
        fills = parse_fills(self.hosted.tokenizer.decode(ids)) if self.prompt.holes else {}
        return {n: fills[i] for i, n in enumerate(self.prompt.holes) if i in fills}

    def _read(self, ids: Sequence[int], experts: Sequence[Experts]) -> list[ReadToken]:
        pairs = zip_longest(ids, experts)
        return [
            ReadToken(id=id_, text=token_text(self.hosted.tokenizer, id_), experts=members)
            for id_, members in pairs
        ]

    def _written(self, token: Token) -> WrittenToken:
        text = token_text(self.hosted.tokenizer, token.id)
        experts = token.experts if self.body.experts else None
        return WrittenToken(id=token.id, text=text, log_prob=token.log_prob, experts=experts)

    async def events(
        self, pending: Sequence[Pending], answered: list[Answer]
    ) -> AsyncIterator[str]:
        """The lines of a stream; the answer is put into `answered`."""
        ids, shown = list[int](), 0
        before = self.prompt.ids if self.hosted.decoder_only else []
        head = {"id": self.number, "model": self.hosted.name}
        yield as_event(head | {"input": _plain(self._read(self.prompt.ids, []))})
        async for event in pending[0].events():
            if isinstance(event, Answer):
                answered.append(event)
                yield as_event(self.answer(event).model_dump(mode="json", exclude_none=True))
                continue
            ids.append(event.id)
            whole = continuation(self.hosted.tokenizer, before, ids)
            ready = len(whole.rstrip("\ufffd"))  # half a character waits for its rest
            piece, shown = whole[shown:ready], max(shown, ready)
            token = self._written(event).model_dump(exclude_none=True)
            told = {"piece": piece, "fills": self._fills(ids), "text": self.prompt.show(ids)}
            yield as_event({"token": token} | told)
        yield DONE


async def routing(hosted: Hosted, body: RoutingRequest) -> RoutingAnswer:
    """Where the routers send each token, and how surely. Raises ConfigError for tokens that there
    are not, or too many."""
    config = GenerationConfig(max_input=hosted.config.max_input)
    arguments = hosted.engine.model, hosted.tokenizer, [body.text], config
    (prompt,) = await run_in_threadpool(make_prompts, *arguments)
    check_length(hosted, "output", len(body.output))
    check_tokens(hosted, body.output)
    if not (prompt.ids or body.output):
        raise ConfigError("There is no token to route.\n  Give a text.")
    text = body.output or [EOS]  # the decoder needs a token to stand at
    traced = await hosted.call(partial(trace, hosted.engine.model, prompt.ids, text))
    layers = {name: _likeliest(traced, name) for name in traced.routed}
    if not body.output:
        layers = {
            n: v[: len(prompt.ids)] if n.startswith("e") else v[:-1] for n, v in layers.items()
        }
    texts = (
        [ReadToken(id=id_, text=token_text(hosted.tokenizer, id_)) for id_ in ids]
        for ids in (prompt.ids, body.output)
    )
    return RoutingAnswer(**dict(zip(("input", "output"), texts, strict=True)), layers=layers)


def _likeliest(traced: Trace, name: str) -> list[list[tuple[int, float]]]:
    batch = traced.routed[name]
    probs = batch.layer.config.rule.score(batch.logits).flatten(0, 1)
    values, experts = probs.topk(min(MOST_EXPERTS, probs.shape[1]))
    rows = zip(experts.tolist(), values.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def check_length(hosted: Hosted, name: str, length: int) -> None:
    """Raises ConfigError for more tokens than the server writes."""
    if length > (most := hosted.config.max_length):
        raise ConfigError(
            f"{name} = {length:,} tokens are more than this server's {most:,}.\n"
            "  Ask for fewer, or raise --max-length."
        )


def check_tokens(hosted: Hosted, ids: Iterable[int]) -> None:
    """Raises ConfigError for ids that the model has no row for."""
    size = hosted.engine.model.config.vocab_size
    if (largest := max(ids, default=0)) >= size:
        raise ConfigError(f"Token {largest} is not in the vocabulary.\n  Use ids below {size}.")


def _plain(tokens: list[ReadToken]) -> list[dict[str, Any]]:
    return [token.model_dump(exclude_none=True) for token in tokens]


def as_event(content: Any) -> str:
    """`content` as a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
