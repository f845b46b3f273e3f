"""EleutherAI's lm-evaluation-harness drives our models: `lm_eval` asks, `Scorer` answers.

    import lm_eval
    from switchworks.evaluate.harness import harness_model

    lm_eval.simple_evaluate(harness_model("runs/quickstart_lm"), tasks=["arc_easy"])

An encoder-decoder model reads the context, with EOS, in its encoder, and what is scored or written
is its decoder's; context and continuation are tokenised apart. A decoder-only model reads both as
one text, tokenised together, unless a token would lie across the seam. Neither is asked for EOS
after a continuation. Contexts that are too long lose their beginning, as in the harness's own
models.

`lm_eval` is not a dependency. It is imported by `harness_model` only.
Letters: B sequences, T tokens of a continuation, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchworks.checkpoint import load
from switchworks.config import CheckpointError, ConfigError
from switchworks.data import Tokenizer
from switchworks.device import compute_device
from switchworks.generate import (
    BeamSearch,
    Sampling,
    batches_by_length,
    continuation,
    generate,
    pad,
)
from switchworks.model import SwitchTransformer


class Pair(NamedTuple):
    """A context and what is scored after it, as ids."""

    context: list[int]
    continuation: list[int]


class Scorer:
    """The three questions of the harness, in text and without it."""

    def __init__(
        self,
        model: SwitchTransformer,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        max_length: int = 512,
        max_gen_toks: int = 128,
    ) -> None:
        """`max_length`: tokens read at most; a decoder-only model's continuation is among them."""
        for name, value in (("batch_size", batch_size), ("max_gen_toks", max_gen_toks)):
            if value < 1:
                raise ConfigError(f"{name} = {value} must be at least 1.")
        if max_length < 2:
            raise ConfigError(f"max_length = {max_length} must be at least 2.")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.max_length, self.max_gen_toks = batch_size, max_length, max_gen_toks

    @property
    def alone(self) -> bool:
        """Whether there is no encoder."""
        return self.model.config.decoder_only

    def pair(self, context: str, text: str) -> Pair:
        """The ids of both. Spaces at the end of the context go to the continuation."""
        stripped = context.rstrip()
        text = context[len(stripped) :] + text
        before = self.tokenizer.encode(stripped) if stripped else []
        if not (self.alone and before):
            return Pair(before, self.tokenizer.encode(text))
        whole = self.tokenizer.encode(stripped + text)
        if whole[: len(before)] != before or len(whole) == len(before):
            # They grow together at the seam ("under" + "stand"), so each is read for itself.
            return Pair(before, self.tokenizer.encode(text))
        return Pair(before, whole[len(before) :])

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """For each pair ln p(continuation | context) in nats, and whether it is the greedy one."""
        found = [(0.0, True)] * len(pairs)
        kept = [(self._cut(pair), pair.continuation) for pair in pairs]
        lengths = [len(context) + len(text) for context, text in kept]
        device = self.model.embedding.weight.device
        for places in batches_by_length(lengths, self.batch_size):
            inputs = pad([torch.tensor(kept[place][0], dtype=torch.long) for place in places])
            targets = pad([torch.tensor(kept[place][1], dtype=torch.long) for place in places])
            inputs, targets = inputs.to(device), targets.to(device)
            if not targets.shape[1]:
                continue  # nothing is certain
            nats, greedy = likelihoods(self.model(inputs, targets).logits, targets)
            for place, values in zip(
                places, zip(nats.tolist(), greedy.tolist(), strict=True), strict=True
            ):
                found[place] = values
        return found

    def rolling(self, text: str, windows: Any) -> float:
        """ln p(text) in nats, each token predicted once. `windows` cuts (ids, prefix id, size) into
        the harness's pairs of ids; its prefix, id 0, is how decoding starts anyway."""
        pairs = [
            Pair([token for token in context if token != 0], list(predicted))
            for context, predicted in windows(self.tokenizer.encode(text), 0, self.max_length - 1)
        ]
        return sum(nats for nats, _ in self.score(pairs))

    def write(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What is written after each context, up to the first of its stop texts."""
        answers = [""] * len(requests)
        asked: dict[str, list[int]] = {}
        for place, (_, settings) in enumerate(requests):
            asked.setdefault(repr(sorted(settings.items())), []).append(place)
        for group in asked.values():  # those of the same settings are written together
            how = _Writing.of(requests[group[0]][1], self.max_gen_toks)
            prompts = [self._prompt(requests[place][0], how.length) for place in group]
            for places in batches_by_length([len(ids) for ids in prompts], self.batch_size):
                texts = self._write([prompts[place] for place in places], how)
                for place, text in zip(places, texts, strict=True):
                    answers[group[place]] = until(text, how.stops)
        return answers

    def _write(self, prompts: Sequence[list[int]], how: "_Writing") -> list[str]:
        inputs = pad([torch.tensor(prompt, dtype=torch.long) for prompt in prompts])
        written = generate(
            self.model,
            inputs.to(self.model.embedding.weight.device),
            max_length=how.length,
            sampling=how.sampling,
            beams=how.beams,
        ).tolist()
        if not self.alone:
            return [self.tokenizer.decode(ids) for ids in written]
        pairs = zip(prompts, written, strict=True)
        return [continuation(self.tokenizer, prompt, ids) for prompt, ids in pairs]

    def _prompt(self, context: str, length: int) -> list[int]:
        room = self.max_length - (length if self.alone else 0)
        if room < 1:
            raise ConfigError(
                f"max_gen_toks = {length} leave no room for a prompt in max_length = "
                f"{self.max_length}.\n  Raise max_length, or write less."
            )
        return self._end_of(self.tokenizer.encode(context.rstrip()), room)

    def _cut(self, pair: Pair) -> list[int]:
        used = len(pair.continuation) if self.alone else 0
        return self._end_of(pair.context, self.max_length - used)

    def _end_of(self, ids: list[int], room: int) -> list[int]:
        """The last `room` tokens, for an encoder EOS among them."""
        if self.alone:
            return ids[max(0, len(ids) - room) :] if room > 0 else []
        return [*ids[max(0, len(ids) - room + 1) :], self.tokenizer.eos_id]


class _Writing(NamedTuple):
    """The harness's settings of generation, as ours."""

    length: int
    stops: tuple[str, ...]
    sampling: Sampling
    beams: BeamSearch

    @staticmethod
    def of(settings: Mapping[str, Any], length: int) -> "_Writing":
        """Raises ConfigError for a setting that is not known here."""
        left = dict(settings)
        stops = left.pop("until", ()) or ()
        samples = left.pop("do_sample", False)
        temperature, top_k, top_p = (
            left.pop(name, None) for name in ("temperature", "top_k", "top_p")
        )
        if samples:
            sampling = Sampling(
                temperature=1.0 if temperature is None else temperature, top_k=top_k, top_p=top_p
            )
        else:
            sampling = Sampling()
        beams = BeamSearch(
            beams=left.pop("num_beams", 1), length_penalty=left.pop("length_penalty", 1.0)
        )
        length = left.pop("max_gen_toks", length)
        if left:
            raise ConfigError(
                f"The harness asks for {', '.join(map(repr, left))}, which is not known "
                "here.\n  Leave it out of the task's generation_kwargs, or of --gen_kwargs."
            )
        return _Writing(
            length, (stops,) if isinstance(stops, str) else tuple(stops), sampling, beams
        )


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

    Raises ConfigError if lm-eval is not installed, CheckpointError if the model cannot read text.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
        from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
            get_rolling_token_windows,
            make_disjoint_window,
        )
    except ImportError as error:
        raise ConfigError(
            f"lm-eval, which is to ask the questions, cannot be imported: {error}.\n"
            "  Install it beside switchworks: pip install lm-eval"
        ) from error
    model, tokenizer = load(Path(path), compute_device())
    if tokenizer is None:
        raise CheckpointError(
            f"{path} holds a model without a tokenizer, so it cannot read text.\n"
            "  Save it with one: switchworks.save(model, directory, tokenizer)."
        )
    scorer = Scorer(model, tokenizer, **settings)

    def windows(ids: list[int], prefix: int, size: int) -> Iterable[tuple[list[int], list[int]]]:
        return map(make_disjoint_window, get_rolling_token_windows(ids, prefix, size, 1))

    class HarnessModel(LM):
        """`scorer` as the harness wants it: a list of requests, each with its `args`."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            found = scorer.score([scorer.pair(*request.args) for request in requests])
            return self._noted("loglikelihood", requests, found)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            found = [scorer.rolling(request.args[0], windows) for request in requests]
            return self._noted("loglikelihood_rolling", requests, found)

        def generate_until(self, requests: list[Any]) -> list[str]:
            found = scorer.write([request.args for request in requests])
            return self._noted("generate_until", requests, found)

        def _noted(self, kind: str, requests: list[Any], found: list[Any]) -> list[Any]:
            for request, answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial(kind, request.args, answer)
            return found

    return HarnessModel()
