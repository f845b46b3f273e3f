"""What happens beside training: progress, validation, samples of text, checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from switchworks.batch import Batch
from switchworks.checkpoint import Checkpoints
from switchworks.data import Mixture, Tokenizer, ValidationSet
from switchworks.evaluate import held_out_losses, measure_perplexity
from switchworks.generate import continuation, fill, generate, parse_fills
from switchworks.training.recorder import Recorder
from switchworks.training.state import TrainState
from switchworks.training.step import StepResult


class Progress:
    """Every `every` steps a line on the screen and in the metrics, averaged since the last."""

    def __init__(self, recorder: Recorder, every: int, state: TrainState) -> None:
        self.recorder = recorder
        self.every = every
        self._since: list[StepResult] = []
        self._mark = (state.tokens, state.seconds)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Keep the step's result; report when it is time."""
        self._since.append(result)
        if self.every and state.step % self.every == 0:
            self._report(state)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Report the steps that no line covers yet."""
        if self._since and self.every:
            self._report(state)

    def _report(self, state: TrainState) -> None:
        values = averages(self._since)
        tokens, seconds = state.tokens - self._mark[0], state.seconds - self._mark[1]
        values["tokens_per_second"] = tokens / max(seconds, 1e-9)
        per_step = seconds / len(self._since)
        values["seconds_left"] = per_step * (state.experiment.steps - state.step)
        self.recorder.write(state, values)
        print(progress_line(state, values), flush=True)
        self._since, self._mark = [], (state.tokens, state.seconds)


def averages(results: Sequence[StepResult]) -> dict[str, Any]:
    """The metrics of consecutive steps: means over the steps, and over layers where one number
    stands for all of them."""
    values: dict[str, Any] = {
        "train/loss": fmean(result.cross_entropy for result in results),
        "train/total": fmean(result.total for result in results),
        "train/lr": results[-1].update.lr,
        "train/grad_norm": fmean(result.update.grad_norm for result in results),
    }
    softs = [result.soft for result in results if result.soft is not None]
    if softs:
        values["train/soft"] = fmean(softs)
    names = results[0].layers
    if not names:
        return values
    for field in ("balance", "router_z", "dropped", "confidence"):
        values[f"train/{field}"] = fmean(
            getattr(layer, field) for result in results for layer in result.layers.values()
        )
    loads = {name: _mean_load([result.layers[name].load for result in results]) for name in names}
    values["train/experts_in_use"] = fmean(
        sum(share > 0 for share in load) for load in loads.values()
    )
    for name, load in loads.items():
        values[f"load/{name}"] = [round(share, 5) for share in load]
        values[f"dropped/{name}"] = fmean(result.layers[name].dropped for result in results)
    return values


def _mean_load(loads: Sequence[list[float]]) -> list[float]:
    return [fmean(shares) for shares in zip(*loads, strict=True)]


def progress_line(state: TrainState, values: dict[str, Any]) -> str:
    """One line for people: loss, balance, dropped share, experts in use, speed, time left."""
    parts = [f"step {state.step}/{state.experiment.steps}", f"loss {values['train/loss']:.3f}"]
    if "train/soft" in values:
        parts.append(f"soft {values['train/soft']:.3f}")
    routing = state.experiment.model.routing
    if routing is not None:
        parts += [
            f"balance {values['train/balance']:.2f}",
            f"dropped {values['train/dropped']:.1%}",
            f"experts in use {values['train/experts_in_use']:.1f}/{routing.experts}",
        ]
    parts += [
        f"{values['tokens_per_second'] / 1000:.1f}k tok/s",
        f"{clock(values['seconds_left'])} left",
    ]
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Validate:
    """Every `every` steps the loss on the same held-out batches.

    Of a mixture, the loss of each corpus besides, and how often each has been read.
    """

    def __init__(
        self,
        recorder: Recorder,
        every: int,
        held_out: ValidationSet,
        mixture: Mixture | None = None,
    ) -> None:
        self.recorder = recorder
        self.every = every
        self.held_out = held_out
        self.mixture = mixture
        self._done = -1

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Validate when it is time."""
        if self.every and state.step % self.every == 0:
            self._validate(state)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Validate the last step, unless a signal wants the process gone."""
        if self.every and not interrupted and self._done != state.step:
            self._validate(state)

    def _validate(self, state: TrainState) -> None:
        loss, by_corpus = held_out_losses(state.model, self.held_out, state.ranks)
        epochs = {} if self.mixture is None else self.mixture.epochs(state.step)
        self._done = state.step
        self.recorder.write(
            state,
            {"val/loss": loss}
            | {f"val/loss/{name}": of_it for name, of_it in by_corpus.items()}
            | {bits_key(name): of_it for name, of_it in self._bits(loss, by_corpus).items()}
            | {f"epoch/{name}": times for name, times in epochs.items()},
        )
        perplexity = measure_perplexity(loss)
        line = f"step {state.step}  held-out loss {loss:.3f}  perplexity {perplexity:.1f}"
        print(line + in_few_words(by_corpus) + read_in_few_words(epochs), flush=True)

    def _bits(self, loss: float, by_corpus: Mapping[str, float]) -> dict[str, float]:
        """Bits per byte of each corpus."""
        losses = by_corpus or {"": loss}
        return {name: self.held_out.bits_per_byte(name, nats) for name, nats in losses.items()}


def bits_key(name: str) -> str:
    """What the metrics call a corpus's bits per byte; of one alone, whose name is empty, too."""
    return f"val/bits_per_byte/{name}".rstrip("/")


def in_few_words(losses: Mapping[str, float], most: int = 6) -> str:
    """The losses of corpora for the end of a line: all, or of more than `most` the extremes."""
    if not losses:
        return ""
    ranked = sorted(losses, key=losses.__getitem__)
    if len(ranked) <= most:
        return "  " + "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    best, worst = ranked[0], ranked[-1]
    return (
        f"  lowest {best} {losses[best]:.3f}  highest {worst} {losses[worst]:.3f} of {len(ranked)}"
    )


def read_in_few_words(epochs: Mapping[str, float]) -> str:
    """How often corpora have been read, for the end of a line: the extremes."""
    if not epochs:
        return ""
    least, most = (choose(epochs, key=epochs.__getitem__) for choose in (min, max))
    return f"  read {epochs[least]:.2g} ({least}) to {epochs[most]:.2g} times ({most})"


class Samples:
    """Every `every` steps the model fills the holes in the same pieces of held-out text.

    A decoder-only model continues them: it gets the first half of each row's longest piece.
    """

    def __init__(
        self, recorder: Recorder, every: int, batch: Batch, tokenizer: Tokenizer, show: int = 1
    ) -> None:
        self.recorder = recorder
        self.every = every
        self.batch = batch
        self.tokenizer = tokenizer
        self.show = show
        self._done = -1

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Write fill-ins when it is time."""
        if self.every and state.step % self.every == 0:
            self._write(state)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Write them after the last step too, unless a signal wants the process gone."""
        if self.every and not interrupted and self._done != state.step:
            self._write(state)

    def _write(self, state: TrainState) -> None:
        self._done = state.step
        continues = state.model.config.decoder_only
        samples = self._continuations(state) if continues else self._fill_ins(state)
        for row, sample in enumerate(samples):
            self.recorder.write_sample({"step": state.step} | sample)
            if row < self.show:
                print(f"step {state.step}  {_in_a_line(sample, continues)}", flush=True)

    def _fill_ins(self, state: TrainState) -> list[dict[str, str]]:
        inputs, targets = first_pieces(self.batch)
        answers = self._generate(state, inputs, targets.shape[1])
        return [
            {
                "inputs": self.tokenizer.decode(inputs[row].tolist()),
                "truth": self.tokenizer.decode(targets[row].tolist()),
                "prediction": self.tokenizer.decode(answer),
            }
            for row, answer in enumerate(answers)
        ]

    def _continuations(self, state: TrainState) -> list[dict[str, str]]:
        texts = longest_pieces(self.batch)
        halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
        prompts = pad_sequence([prompt for prompt, _ in halves], batch_first=True)
        answers = self._generate(state, prompts, max(len(rest) for _, rest in halves))
        return [
            {
                "inputs": self.tokenizer.decode(prompt.tolist()),
                "truth": continuation(self.tokenizer, prompt.tolist(), rest.tolist()),
                "prediction": continuation(self.tokenizer, prompt.tolist(), answer[: len(rest)]),
            }
            for (prompt, rest), answer in zip(halves, answers, strict=True)
        ]

    def _generate(self, state: TrainState, inputs: Tensor, max_length: int) -> list[list[int]]:
        """Ranks go on equally long, with texts equally wide."""
        ranks, device = state.ranks, state.model.embedding.weight.device
        inputs = F.pad(inputs, (0, ranks.all_max(inputs.shape[1]) - inputs.shape[1])).to(device)
        most = ranks.all_max(max_length)
        return generate(state.model, inputs, max_length=most, ranks=ranks).tolist()


def _in_a_line(sample: Mapping[str, str], continues: bool) -> str:
    if continues:
        beginning, rest = (" ".join(sample[name].split()) for name in ("inputs", "prediction"))
        return f"continued: ... {beginning[-150:]} [{rest[:150]}] ..."
    return f"fill-in: {fill(sample['inputs'], parse_fills(sample['prediction']))[:300]} ..."


def first_pieces(batch: Batch) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B T"]]:
    """Inputs and targets of each row's first example; holes are counted anew in every example."""
    if batch.input_segments is None or batch.target_segments is None:
        return batch.inputs, batch.targets
    return (
        batch.inputs.masked_fill(batch.input_segments != 1, 0),
        batch.targets.masked_fill(batch.target_segments != 1, 0),
    )


def longest_pieces(batch: Batch) -> list[Int[Tensor, "T"]]:
    """Per row the targets of its longest packed example, without padding; the first if several."""
    segments = batch.target_segments
    if segments is None:
        segments = (batch.targets != 0).long()
    pieces = []
    for row, of in zip(batch.targets, segments, strict=True):
        sizes = torch.bincount(of)
        sizes[0] = 0  # padding is no example
        pieces.append(row[of == sizes.argmax()])
    return pieces


class SaveCheckpoints:
    """Every `every` steps, and whenever the loop ends, everything needed to go on."""

    def __init__(self, checkpoints: Checkpoints, every: int) -> None:
        self.checkpoints = checkpoints
        self.every = every
        self._done = -1

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Save when it is time."""
        if self.every and state.step % self.every == 0:
            self._save(state)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Save the last step, and leave when all of it is on the disk."""
        if self._done != state.step:
            self._save(state)
        self.checkpoints.wait()

    def _save(self, state: TrainState) -> None:
        self._done = state.step
        self.checkpoints.save(state.step, state.state_dict(), state.about())


class ReportProgress:
    """`reached` hears of every step that is done, with all that comes after it."""

    def __init__(self, reached: Callable[[int], None]) -> None:
        self.reached = reached

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Tell it."""
        self.reached(state.step)

    def finish(self, state: TrainState, *, interrupted: bool) -> None:
        """Tell it of the end."""
        self.reached(state.step)


def first_rows(batch: Batch, rows: int) -> Batch:
    """The first `rows` rows of a batch."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:rows]

    return Batch(
        inputs=batch.inputs[:rows],
        targets=batch.targets[:rows],
        input_segments=cut(batch.input_segments),
        target_segments=cut(batch.target_segments),
        padding=batch.padding,
    )
