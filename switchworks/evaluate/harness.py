"""EleutherAI's lm-evaluation-harness drives our models: `lm_eval` asks, `Scorer` answers.

    import lm_eval
    from switchworks.evaluate.harness import harness_model

    lm_eval.simple_evaluate(harness_model("runs/quickstart_lm"), tasks=["arc_easy"])

An encoder-decoder model reads the context, with EOS, in its encoder, and its decoder scores or
writes the continuation; the two are tokenised separately. A decoder-only model reads both as one
text, tokenised together, unless a token would span the boundary. EOS is not scored after a
continuation. Contexts that are too long lose their beginning, as in the harness's own models.

`lm_eval` is not a dependency; only `harness_model` imports it.
Letters: B sequences, T tokens of a continuation, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchworks.config import ConfigError, check_at_least
from switchworks.data import Tokenizer
from switchworks.evaluate.run import load_with_tokenizer
from switchworks.generate import (
    BeamSearch,
    Sampling,
    batches_by_length,
    continuation,
    generate,
    pad,
)
from switchworks.model import SwitchTransformer

Windows = Callable[[list[int], int, int], Iterable[tuple[list[int], list[int]]]]
"""(ids, prefix id, window size) -> (context, predicted) ids of each window."""


class Pair(NamedTuple):
    """A context and what is scored after it, as ids."""

    context: list[int]
    continuation: list[int]


class Scorer:
    """The three kinds of requests of the harness, as functions of texts and ids."""

    def __init__(
        self,
        model: SwitchTransformer,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        max_length: int = 512,
        max_gen_toks: int = 128,
    ) -> None:
        """`max_length`: tokens read at most, a decoder-only model's continuation included."""
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.max_length, self.max_gen_toks = batch_size, max_length, max_gen_toks
        check_at_least(self, "", 1, "batch_size", "max_gen_toks")
        check_at_least(self, "", 2, "max_length")

    @property
    def decoder_only(self) -> bool:
        """Whether there is no encoder."""
        return self.model.config.decoder_only

    def pair(self, context: str, text: str) -> Pair:
        """The ids of both. Spaces at the end of the context go to the continuation."""
        stripped = context.rstrip()
        text = context[len(stripped) :] + text
        before = self.tokenizer.encode(stripped) if stripped else []
        if not (self.decoder_only and before):
            return Pair(before, self.tokenizer.encode(text))
        joined = self.tokenizer.encode(stripped + text)
        if joined[: len(before)] != before or len(joined) == len(before):
            # A token spans the boundary ("under" + "stand"), so each side is tokenised by itself.
            return Pair(before, self.tokenizer.encode(text))
        return Pair(before, joined[len(before) :])

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """ln p(continuation | context) in nats of each pair, and whether it is the greedy one.

        An empty continuation has probability 1.
        """
        scores = [(0.0, True)] * len(pairs)
        contexts = [self._context(pair) for pair in pairs]
        lengths = [
            len(context) + len(pair.continuation)
            for context, pair in zip(contexts, pairs, strict=True)
        ]
        for places in batches_by_length(lengths, self.batch_size):
            targets = self._batch([pairs[place].continuation for place in places])
            if not targets.shape[1]:
                continue
            inputs = self._batch([contexts[place] for place in places])
            nats, greedy = likelihoods(self.model(inputs, targets).logits, targets)
            values = zip(nats.tolist(), greedy.tolist(), strict=True)
            for place, value in zip(places, values, strict=True):
                scores[place] = value
        return scores

    def rolling(self, text: str, windows: Windows) -> float:
        """ln p(text) in nats, each token predicted once.

        `windows` cuts the ids into the harness's disjoint pairs: each window predicts the tokens
        that no earlier one did, and the rest of it is context. One position is left for what
        precedes the first token. The harness's prefix token is id 0 here and removed again, since
        a decoder starts from id 0 anyway.
        """
        pairs = [
            Pair([token for token in context if token != 0], list(predicted))
            for context, predicted in windows(self.tokenizer.encode(text), 0, self.max_length - 1)
        ]
        return sum(nats for nats, _ in self.score(pairs))

    def write(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The text generated after each context, up to the first of its stop texts."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # requests with the same settings share batches
        for place, (_, settings) in enumerate(requests):
            groups.setdefault(repr(sorted(settings.items())), []).append(place)
        for group in groups.values():
            config = _Settings.parse(requests[group[0]][1], self.max_gen_toks)
            prompts = [self._prompt(requests[place][0], config.length) for place in group]
            for places in batches_by_length([len(ids) for ids in prompts], self.batch_size):
                texts = self._write([prompts[place] for place in places], config)
                for place, text in zip(places, texts, strict=True):
                    answers[group[place]] = until(text, config.stops)
        return answers

    def _write(self, prompts: Sequence[list[int]], config: "_Settings") -> list[str]:
        written = generate(
            self.model,
            self._batch(prompts),
            max_length=config.length,
            sampling=config.sampling,
            beams=config.beams,
        ).tolist()
        if not self.decoder_only:
            return [self.tokenizer.decode(ids) for ids in written]
        pairs = zip(prompts, written, strict=True)
        return [continuation(self.tokenizer, prompt, ids) for prompt, ids in pairs]

    def _batch(self, rows: Sequence[list[int]]) -> Int[Tensor, "B _"]:
        """`rows` padded to one length, on the model's device."""
        ids = pad([torch.tensor(row, dtype=torch.long) for row in rows])
        return ids.to(self.model.embedding.weight.device)

    def _prompt(self, context: str, length: int) -> list[int]:
        room = self.max_length - (length if self.decoder_only else 0)
        if room < 1:
            raise ConfigError(
                f"max_gen_toks = {length} leave no room for a prompt in max_length = "
                f"{self.max_length}.\n  Raise max_length, or write less."
            )
        return self._last(self.tokenizer.encode(context.rstrip()), room)

    def _context(self, pair: Pair) -> list[int]:
        used = len(pair.continuation) if self.decoder_only else 0
        return self._last(pair.context, self.max_length - used)

    def _last(self, ids: list[int], room: int) -> list[int]:
        """The last `room` tokens; for an encoder with EOS as the last of them."""
        if self.decoder_only:
            return ids[max(0, len(ids) - room) :] if room > 0 else []
        return [*ids[max(0, len(ids) - room + 1) :], self.tokenizer.eos_id]


class _Settings(NamedTuple):
    """The harness's settings of generation, as ours."""

    length: int
    stops: tuple[str, ...]
    sampling: Sampling
    beams: BeamSearch

    @staticmethod
    def parse(settings: Mapping[str, Any], length: int) -> "_Settings":
        """Raises ConfigError for an unknown setting."""
        left = dict(settings)
        stops = left.pop("until", ()) or ()
        samples, temperature = left.pop("do_sample", False), left.pop("temperature", None)
        top_k, top_p = left.pop("top_k", None), left.pop("top_p", None)
        sampling = Sampling()
        if samples:
            temperature = 1.0 if temperature is None else temperature
            sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        beams = BeamSearch(
            beams=left.pop("num_beams", 1), length_penalty=left.pop("length_penalty", 1.0)
        )
        length = left.pop("max_gen_toks", length)
        if left:
            raise ConfigError(
                f"The harness asks for {', '.join(map(repr, left))}, which is not known "
                "here.\n  Leave it out of the task's generation_kwargs, or of --gen_kwargs."
            )
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        return _Settings(length, stops, sampling, beams)


def likelihoods(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B"], Bool[Tensor, "B"]]:
    """The sums of the targets' log-probabilities in float32, and whether all are the likeliest."""
    real = targets != 0
    logs = logits.float().log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1)
    greedy = (logits.argmax(dim=-1) == targets) | ~real
    return logs.masked_fill(~real, 0.0).sum(dim=-1), greedy.all(dim=-1)


def until(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first of `stops` in it."""
    for stop in stops:
        if stop:
            text = text.partition(stop)[0]
    return text


def harness_model(path: Path | str, **settings: int) -> Any:
    """The model in `path` as an `lm_eval.api.model.LM`; `settings` are those of `Scorer`.

    Raises ConfigError if lm-eval is not installed, CheckpointError if there is no tokenizer.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
        from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
            get_rolling_token_windows,
            make_disjoint_window,
        )
    except ImportError as error:
        raise ConfigError(
            f"lm-eval, which asks the questions, cannot be imported: {error}.\n"
            "  Install it beside switchworks: pip install lm-eval"
        ) from error
    scorer = Scorer(*load_with_tokenizer(Path(path)), **settings)

    def windows(ids: list[int], prefix: int, size: int) -> Iterable[tuple[list[int], list[int]]]:
        return map(make_disjoint_window, get_rolling_token_windows(ids, prefix, size, 1))

    class HarnessModel(LM):
        """`scorer` behind the harness's interface: lists of requests, each with its `args`."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            scores = scorer.score([scorer.pair(*request.args) for request in requests])
            return self._cache("loglikelihood", requests, scores)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            scores = [scorer.rolling(request.args[0], windows) for request in requests]
            return self._cache("loglikelihood_rolling", requests, scores)

        def generate_until(self, requests: list[Any]) -> list[str]:
            texts = scorer.write([request.args for request in requests])
            return self._cache("generate_until", requests, texts)

        def _cache(self, kind: str, requests: list[Any], answers: list[Any]) -> list[Any]:
            for request, result in zip(requests, answers, strict=True):
                self.cache_hook.add_partial(kind, request.args, result)
            return answers

    return HarnessModel()
