"""What a run adds to the card of its model: data, compute, command and figures."""

from pathlib import Path

from switchworks.checkpoint import CARD, CardFacts, copy_card, stored_config, write_card
from switchworks.evaluate import measure_perplexity
from switchworks.report.figures import compact, duration, recorded
from switchworks.report.runs import Run, read_run


def write_run_card(run_dir: Path) -> None:
    """Write the card of the model/ in `run_dir` anew, with what the run knows."""
    write_card(run_dir / "model", stored_config(run_dir), run_facts(read_run(run_dir)))


def carry_card(source: Path, destination: Path, *, change: str = "") -> None:
    """Give the model in `destination`, made of the one in `source`, its card.

    Its own one if only the format differs (no `change`), else that of its run and the `change`, a
    command. Without either the card that the model was saved with stays."""
    is_ours = (destination / "config.toml").is_file()
    library = "switchworks" if is_ours else "transformers"
    model = source / "model" if (source / "model").is_dir() else source
    if not change and (model / CARD).is_file():
        copy_card(model, destination, library)
    elif change and (model.parent / "metrics.jsonl").is_file():
        facts = run_facts(read_run(model.parent), change=change)
        write_card(destination, stored_config(destination), facts, library)


def run_facts(run: Run, change: str = "") -> CardFacts:
    """Of a model as `run` wrote it; after a `change` its figures are of the model before."""
    loss, step = run.last("val/loss"), run.rows[-1]["step"] if run.rows else None
    if run.best.get("metric") == "val/loss":
        loss, step = run.best.get("value"), run.best.get("step")
    figures = {} if loss is None else {"Validation loss": f"{loss:.4f} nats per target token"}
    if loss is not None:
        figures |= {"Perplexity": f"{measure_perplexity(loss):.2f}", "At step": compact(step)}
    if change:
        figures = {f"{name}, before the change": value for name, value in figures.items()}
    return CardFacts(
        name=str(run.settings.get("name") or run.name),
        data=_data(run),
        training=_training(run) | {"Changed by": _code(change)},
        figures=figures,
        loss=None if change else loss,
    )


def _data(run: Run) -> dict[str, str]:
    return {
        "Source": str(run.about.get("text") or ""),
        "Digest of the text": _code(str(run.about.get("text_digest") or "")),
        "Tokens in the text": compact(recorded(run, "train_tokens")),
        "Tokens seen": compact(run.last("tokens")),
    }


def _training(run: Run) -> dict[str, str]:
    per_token, tokens = recorded(run, "flops_per_token"), run.last("tokens")
    flops = None if per_token is None or tokens is None else 3 * per_token * tokens
    return {
        "Recipe": str(run.settings.get("name", "")),
        "Command": _code(str(run.about.get("command") or "")),
        "Steps": compact(run.rows[-1]["step"]) if run.rows else "",
        "FLOPs": "" if flops is None else f"{flops:.3g} (three forward passes per token)",
        "Time": duration(run.last("seconds")),
        "Started from": str(run.about.get("init") or "initial weights"),
        "Version": f"switchworks {run.about.get('version', '?')}",
    }


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
