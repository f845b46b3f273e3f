"""/v1/completions, in OpenAI's shape.

Texts go in and come out as they are: no hole is added or put back. Of an encoder-decoder the prompt
is the input, of a decoder-only model what is continued.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from jaxtyping import Float
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from switchworks.config import ConfigError
from switchworks.engine import Answer, Request, Text, likeliest, log_probs, trace
from switchworks.evaluate import token_text
from switchworks.generate import GenerationConfig, Sampling, continuation
from switchworks.model import EOS, PAD
from switchworks.serve.generation import DONE, as_event, check_length, check_tokens
from switchworks.serve.hosting import Hosted, Pending
from switchworks.serve.schemas import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    LogProbs,
    Usage,
)


class Likelihood(NamedTuple):
    """A token, and how likely it was among others; None of a prompt's first."""

    id: int
    log_prob: float | None
    top: list[tuple[int, float]]


_Merged = asyncio.Queue[CompletionChoice | Answer | Exception]


class Completions:
    """The texts of one request to /v1/completions."""

    def __init__(self, hosted: Hosted, body: CompletionRequest, number: str) -> None:
        """Raises ConfigError for settings that do not go together, or are more than the server
        allows."""
        self.hosted, self.body, self.number = hosted, body, number
        self.created = int(time.time())
        check_length(hosted, "max_tokens", body.max_tokens)
        if body.echo and not hosted.decoder_only:
            raise ConfigError(
                "echo needs a decoder-only model: an encoder-decoder writes no prompt.\n"
                "  Leave it out."
            )
        if not body.max_tokens and not body.echo:
            raise ConfigError("max_tokens = 0 without echo asks for nothing.\n  Set either.")
        if body.n > 1 and (body.stream or not body.temperature):
            raise ConfigError(
                f"n = {body.n} needs temperature > 0, and no stream.\n  Leave n out, or set them."
            )
        seed = secrets.randbits(32) if body.seed is None else body.seed % 2**63
        top_p = body.top_p if body.temperature and body.top_p < 1 else None
        top_k = body.top_k if body.temperature else None
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self.stop = tuple(filter(None, stop))
        self.config = GenerationConfig(
            max_length=max(1, body.max_tokens),
            sampling=Sampling(temperature=body.temperature, top_p=top_p, top_k=top_k, seed=seed),
            stop=self.stop,
        )

    async def start(self) -> list[Pending]:
        """Reads the prompts and gives them to the engine."""
        self.prompts = await run_in_threadpool(self._read_prompts)
        self.echoed = [await self._echo(ids) for ids in self.prompts]
        if not self.body.max_tokens:
            return []
        started = list[Pending]()
        try:
            for ids in self.prompts:
                started.append(Pending(self.hosted, self._request(ids)))
        except Exception:
            for pending in started:
                pending.__exit__()
            raise
        return started

    def _request(self, ids: list[int]) -> Request:
        return Request(
            ids=ids if self.hosted.decoder_only else [*ids, EOS],
            config=self.config,
            candidates=self.body.n,
            timeout=self.hosted.config.timeout,
            stream=self.body.stream,
            top=self.body.logprobs or 0,
        )

    def _read_prompts(self) -> list[list[int]]:
        """The prompts as tokens. Raises ConfigError for too many, too long ones, and none."""
        prompt = self.body.prompt
        is_single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        given: list[Any] = [prompt] if is_single else list(prompt)
        most, tokenizer = self.hosted.config, self.hosted.tokenizer
        if not 0 < len(given) <= most.max_prompts:
            raise ConfigError(
                f"prompt holds {len(given)} texts, and there may be 1 to {most.max_prompts}.\n"
                "  Send several requests."
            )
        prompts = [
            tokenizer.encode(each) if isinstance(each, str) else list(each) for each in given
        ]
        for ids in prompts:
            check_tokens(self.hosted, ids)
            if PAD in ids:
                raise ConfigError(
                    f"Token {PAD} pads texts and stands in none.\n  Leave it out of prompts."
                )
            if len(ids) > most.max_input:
                raise ConfigError(
                    f"A prompt has {len(ids):,} tokens, and this server reads {most.max_input:,}.\n"
                    "  Shorten it, or raise --max-input."
                )
        return prompts

    async def _echo(self, ids: list[int]) -> list[Likelihood]:
        """What is told of a prompt that is echoed."""
        if not self.body.echo or not ids:
            return []
        if self.body.logprobs is None:
            return [Likelihood(id_, None, []) for id_ in ids]
        return await self.hosted.call(partial(self._score, ids))

    def _score(self, ids: list[int]) -> list[Likelihood]:
        logits: Float[Tensor, "L V"] = trace(self.hosted.engine.model, [], ids).logits
        count = self.body.logprobs or 0
        top = likeliest(logits, count) if count else [[]] * len(ids)
        first, *rest = map(Likelihood, ids, log_probs(logits, ids), top)
        return [Likelihood(first.id, None, []), *rest]

    def answer(self, answers: Sequence[Answer]) -> Completion:
        """The engine's answers as the client gets them."""
        choices = list[CompletionChoice]()
        for place, echoed in enumerate(self.echoed):
            texts = answers[place].texts if answers else [Text([], 0.0, "length")]
            choices += [
                self._choice(place * self.body.n + number, place, echoed, text)
                for number, text in enumerate(texts)
            ]
        return self._completion(choices, self._usage(answers))

    def _choice(
        self, index: int, place: int, echoed: list[Likelihood], text: Text
    ) -> CompletionChoice:
        told = [Likelihood(each.id, each.log_prob, each.top) for each in text.tokens]
        ids = [each.id for each in told]
        is_echoed = self.body.echo
        before = self.hosted.tokenizer.decode(self.prompts[place]) if is_echoed else ""
        return CompletionChoice(
            index=index,
            text=before + self._cut(self._text(place, ids)),
            logprobs=None if self.body.logprobs is None else self._log_probs([*echoed, *told]),
            finish_reason="stop" if text.reason == "stop" else "length",
        )

    def _text(self, place: int, ids: Sequence[int]) -> str:
        before = self.prompts[place] if self.hosted.decoder_only else []
        return continuation(self.hosted.tokenizer, before, ids)

    def _cut(self, text: str) -> str:
        """`text` up to the first stop text, which is left out as OpenAI does."""
        ends = [end for stop in self.stop if (end := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def _log_probs(self, told: Sequence[Likelihood]) -> LogProbs:
        tokens = [token_text(self.hosted.tokenizer, each.id) for each in told]
        return LogProbs(
            tokens=tokens,
            token_logprobs=[each.log_prob for each in told],
            top_logprobs=[self._top(each.top) if each.top else None for each in told],
            text_offset=[0, *accumulate(map(len, tokens))][: len(tokens)],
        )

    def _top(self, tokens: Sequence[tuple[int, float]]) -> dict[str, float]:
        top = dict[str, float]()
        for id_, value in tokens:  # of those that read alike, as parts of a character do, the first
            top.setdefault(token_text(self.hosted.tokenizer, id_), value)
        return top

    def _usage(self, answers: Sequence[Answer]) -> Usage:
        read = sum(map(len, self.prompts))
        written = sum(len(text.tokens) for answer in answers for text in answer.texts)
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        head = {"id": f"cmpl-{self.number}", "created": self.created, "model": self.hosted.name}
        return Completion(**head, choices=choices, usage=usage)

    async def events(
        self, pending: Sequence[Pending], answered: list[Answer]
    ) -> AsyncIterator[str]:
        """The lines of a stream; the answers are put into `answered`."""
        merged: _Merged = asyncio.Queue()
        if not pending:  # a prompt that is echoed and not continued
            for choice in self.answer([]).choices:
                yield as_event(self._completion([choice], None).model_dump(mode="json"))
        tasks = [
            asyncio.ensure_future(self._forward(place, each, merged))
            for place, each in enumerate(pending)
        ]
        try:
            while len(answered) < len(pending):
                event = await merged.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Answer):
                    answered.append(event)
                else:
                    yield as_event(self._completion([event], None).model_dump(mode="json"))
        finally:
            for task in tasks:
                task.cancel()
        if (self.body.stream_options or {}).get("include_usage"):
            usage = self._completion([], self._usage(answered))
            yield as_event(usage.model_dump(mode="json"))
        yield DONE

    async def _forward(self, place: int, pending: Pending, merged: _Merged) -> None:
        """Puts the pieces of one text into `merged`, and its answer."""
        ids, told, shown = list[int](), self.echoed[place], 0
        before = self.hosted.tokenizer.decode(self.prompts[place]) if self.body.echo else ""
        # The beginning of a stop text is not shown before it is clear that it is none.
        held = max(map(len, self.stop), default=1) - 1
        try:
            async for event in pending.events():
                is_last = isinstance(event, Answer)
                if not is_last:
                    ids.append(event.id)
                    told = [*told, Likelihood(event.id, event.log_prob, event.top)]
                text = self._cut(self._text(place, ids))
                ready = len(text) if is_last else len(text.rstrip("\ufffd")) - held
                piece, shown = text[shown : max(shown, ready)], max(shown, ready)
                reason = None
                if is_last:
                    reason = "stop" if event.texts[0].reason == "stop" else "length"
                scores = None if self.body.logprobs is None else self._log_probs(told)
                choice = CompletionChoice(
                    index=place, text=before + piece, logprobs=scores, finish_reason=reason
                )
                before, told = "", []
                merged.put_nowait(choice)
                if is_last:
                    merged.put_nowait(event)
        except Exception as error:
            merged.put_nowait(error)
