"""EleutherAI's lm-evaluation-harness drives our models: `lm_eval` asks, `Scorer` answers.

A decoder-only model reads context and continuation as one text, tokenised together unless a token
would span the boundary; an encoder reads the context, with EOS. EOS is not scored after a
continuation. Contexts that are too long lose their beginning, as in the harness's own models.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchworks import generate
from switchworks.config import ConfigError, check_at_least
from switchworks.data import Tokenizer
from switchworks.evaluate.answers import score_all
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
        self.decoder_only = model.config.decoder_only
        self.batch_size, self.max_length, self.max_gen_toks = batch_size, max_length, max_gen_toks
        check_at_least(self, "", 1, "batch_size", "max_gen_toks")
        check_at_least(self, "", 2, "max_length")

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

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """ln p(continuation | context) in nats of each pair (0 if empty), and whether it is the
        greedy one."""
        contexts = [self._context(pair) for pair in pairs]
        return score_all(
            self.model, contexts, [pair.continuation for pair in pairs], self.batch_size
        )

    def rolling(self, text: str, windows: Windows) -> float:
        """ln p(text) in nats, each token predicted once, in the harness's disjoint `windows`.

        One position is left for what precedes the first token. The harness's prefix token is id 0
        here and removed again, since a decoder starts from id 0 anyway.
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
            config, stops = self._parse(requests[group[0]][1])
            prompts = [self._prompt(requests[place][0], config.max_length) for place in group]
            written = generate.generate_all(self.model, prompts, config)
            for place, prompt, ids in zip(group, prompts, written, strict=True):
                before = prompt if self.decoder_only else []
                answers[place] = until(generate.continuation(self.tokenizer, before, ids), stops)
        return answers

    def _parse(
        self, settings: Mapping[str, Any]
    ) -> tuple[generate.GenerationConfig, Sequence[str]]:
        """The harness's settings as ours, and its stop texts. Raises ConfigError for an unknown
        setting."""
        left = dict(settings)
        stops = left.pop("until", ()) or ()
        choice = {name: left.pop(name, None) for name in ("temperature", "top_k", "top_p")}
        if choice["temperature"] is None:
            choice["temperature"] = 1.0
        sampling = generate.Sampling(**(choice if left.pop("do_sample", False) else {}))
        penalty = left.pop("length_penalty", 1.0)
        beams = generate.BeamSearch(beams=left.pop("num_beams", 1), length_penalty=penalty)
        length = left.pop("max_gen_toks", self.max_gen_toks)
        if left:
            raise ConfigError(
                f"The harness asks for {', '.join(map(repr, left))}, which is not known "
                "here.\n  Leave it out of the task's generation_kwargs, or of --gen_kwargs."
            )
        config = generate.GenerationConfig(
            max_length=length, sampling=sampling, beams=beams, batch_size=self.batch_size
        )
        return config, (stops,) if isinstance(stops, str) else tuple(stops)

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


def until(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first of `stops` in it."""
    for stop in stops:
        if stop:
            text = text.partition(stop)[0]
    return text


def harness_model(path: Path | str, **settings: int) -> Any:
    """The model in `path` as an `lm_eval.api.model.LM`; `settings` are those of `Scorer`. Raises
    ConfigError if lm-eval is not installed, CheckpointError if there is no tokenizer."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"lm-eval, which asks the questions, cannot be imported: {error}.\n"
            "  Install it beside switchworks: pip install lm-eval"
        ) from error
    scorer = Scorer(*generate.load_with_tokenizer(Path(path)), **settings)

    def windows(ids: list[int], prefix: int, size: int) -> Iterable[tuple[list[int], list[int]]]:
        return map(make_disjoint_window, get_rolling_token_windows(ids, prefix, size, 1))

    class HarnessModel(LM):
        """`scorer` behind the harness's interface: lists of requests, each with its `args`."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return scorer.score([scorer.pair(*request.args) for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [scorer.rolling(request.args[0], windows) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return scorer.write([request.args for request in requests])

    return HarnessModel()
