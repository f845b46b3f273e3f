"""Validation: the loss on the same held-out batches, of a mixture also that of each corpus."""

from collections.abc import Mapping

from switchworks.data import Mixture, ValidationSet
from switchworks.evaluate import measure_perplexity, validation_losses
from switchworks.training.loggers import Recorder
from switchworks.training.state import TrainState


class Validate:
    """Measures the validation loss; of a mixture per corpus too, and the epochs read so far."""

    def __init__(
        self, recorder: Recorder, data: ValidationSet, mixture: Mixture | None = None
    ) -> None:
        self.recorder = recorder
        self.data = data
        self.mixture = mixture

    def __call__(self, state: TrainState) -> None:
        """Write and print the losses, in nats per target token, and bits per byte."""
        loss, per_corpus = validation_losses(state.model, self.data, state.ranks)
        epochs = {} if self.mixture is None else self.mixture.epochs(state.step)
        values = {"val/loss": loss} | {f"val/loss/{name}": x for name, x in per_corpus.items()}
        for name, nats in (per_corpus or {"": loss}).items():
            values[f"val/bits_per_byte/{name}".rstrip("/")] = self.data.bits_per_byte(name, nats)
        values |= {f"epoch/{name}": times for name, times in epochs.items()}
        self.recorder.write(state, values)
        perplexity = measure_perplexity(loss)
        line = f"step {state.step}  validation loss {loss:.3f}  perplexity {perplexity:.1f}"
        print(line + losses_text(per_corpus) + epochs_text(epochs), flush=True)


def losses_text(losses: Mapping[str, float], most: int = 6) -> str:
    """End of a line: the losses of the corpora, or lowest and highest of more than `most`."""
    if not losses:
        return ""
    if len(losses) <= most:
        return "  " + "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    best, worst = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    return (
        f"  lowest {best} {losses[best]:.3f}  highest {worst} {losses[worst]:.3f} of {len(losses)}"
    )


def epochs_text(epochs: Mapping[str, float]) -> str:
    """End of a line: which corpora were read least and most often."""
    if not epochs:
        return ""
    least, most = min(epochs, key=epochs.__getitem__), max(epochs, key=epochs.__getitem__)
    return f"  read {epochs[least]:.2g} ({least}) to {epochs[most]:.2g} times ({most})"
