"""Fine-tuning on several ranks: the metrics, the best step and the adapters of one process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import Case, batch_of, spawn, state_of

import switchworks
from switchworks.adapt.config import LoraConfig
from switchworks.config import ConfigError
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.evaluate.answers import DecodingConfig, write
from switchworks.generate import generate
from switchworks.model import SwitchTransformer
from switchworks.model.init import initialise
from switchworks.optim import dimension_letters
from switchworks.parallel import MeshConfig, Ranks, build_mesh, parallelize
from switchworks.training import Experiment, train
from switchworks.training.experiment import BestConfig
from switchworks.training.step import train_step

CASES: dict[str, dict] = {
    "tasks, experts apart": {"mesh": MeshConfig(expert=2)},
    "adapters, experts apart": {"mesh": MeshConfig(expert=2), "lora": LoraConfig(rank=2)},
    "experts alone": {"mesh": MeshConfig(data=2), "freeze": ("all-but-experts",)},
}


@pytest.fixture(scope="module")
def experiment(tiny_experiment, tmp_path_factory) -> Experiment:
    """The tiny recipe on a table of two colours, without noise, which ranks draw for themselves."""
    table = tmp_path_factory.mktemp("tables") / "colours.csv"
    lines = [
        f"ball {i} is {c},{w}" for i in range(60) for c, w in (("red", "warm"), ("blue", "cold"))
    ]
    table.write_text("\n".join(["text,answer", *lines, ""]))
    data = replace(
        tiny_experiment.data,
        path=None,
        tasks=(f"colours={table}:text:answer",),
        task_metrics=("chrf",),
        validation_share=0.2,
        input_length=48,
        target_length=8,
    )
    model = tiny_experiment.model
    return replace(
        tiny_experiment,
        steps=4,
        data=data,
        model=replace(
            model, num_layers=1, dropout=0.0, routing=replace(model.routing, every=1, jitter=0.0)
        ),
        optim=replace(tiny_experiment.optim, lr=0.02, warmup_steps=0),
        best=BestConfig(metric="val/loss"),
        validate_every=2,
        evaluate_every=2,
        evaluate_examples=5,  # no multiple of two
        sample_every=0,
        checkpoint_every=2,
    )


def run_all(rank: int, experiment: Experiment, folder: Path, *, together: bool = True) -> None:
    for number, settings in enumerate(CASES.values()):
        own = dict(settings) if together else settings | {"mesh": MeshConfig()}
        train(replace(experiment, **own), folder / str(number))


def measured(run_dir: Path) -> dict[tuple[int, str], float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name.startswith(("val/", "task/", "best/"))
    }


@pytest.mark.slow
def test_two_ranks_measure_and_leave_what_one_process_does(experiment, on_two, tmp_path):
    alone, two = tmp_path / "alone", on_two[0]["runs"]
    run_all(0, experiment, alone, together=False)
    for number, settings in enumerate(CASES.values()):
        runs = [folder / str(number) for folder in (alone, two)]
        figures = [measured(run_dir) for run_dir in runs]
        assert figures[1] == pytest.approx(figures[0], rel=1e-3, abs=1e-3)
        assert {step for step, name in figures[0] if name == "task/mean"} == {2, 4}
        models = [switchworks.load(run_dir)[0].state_dict() for run_dir in runs]
        for name, weight in models[0].items():
            torch.testing.assert_close(models[1][name], weight, rtol=1e-3, atol=1e-4)
        there = {(run_dir / "adapters" / "lora.toml").is_file() for run_dir in runs}
        assert there == {"lora" in settings}
        best = [json.loads((run_dir / "best.json").read_text()) for run_dir in runs]
        assert best[0]["step"] == best[1]["step"]


WORDS = (("model.vocab_size", 384),)
MESHES = {
    "experts apart": Case(MeshConfig(expert=2), more=WORDS),
    "width apart": Case(MeshConfig(model=2), more=WORDS),
    "rows apart": Case(MeshConfig(data=2), more=WORDS),
    "rows apart, weights whole": Case(MeshConfig(data=2, shard=False), more=WORDS),
}
TEXTS = ["one", "two and three", "a much longer text than all the others", "", "five"]


def write_between_steps(cases: list[Case]) -> list[tuple[list[float], list[str]]]:
    """Losses of two steps, and what the model writes before and between them."""
    found = []
    for case in cases:
        state = state_of(case)
        how, losses, said = DecodingConfig(input_length=24, max_length=4, batch_size=2), [], []
        for step in range(2):
            said += write(state.model, ByteTokenizer(), TEXTS, how, state.ranks)
            losses.append(train_step(state, batch_of(step, state.ranks)).total)
        found.append((losses, said))
    return found


def continued(meshes: list[MeshConfig | None]) -> list[list[list[int]]]:
    """What a decoder-only model writes after prompts, spread over each of `meshes`."""
    found = []
    for mesh in meshes:
        model = SwitchTransformer(replace(Case().experiment().model, decoder_only=True))
        initialise(model.double(), 1)
        ranks = Ranks(None if mesh is None else build_mesh(mesh))
        if ranks.mesh is not None:
            parallelize(model, ranks.mesh, dimension_letters(model))
        prompts = torch.tensor([[5, 9, 3, 7], [4, 2, 0, 0]])
        found.append(generate(model, prompts, max_length=5, ranks=ranks).tolist())
    return found


def all_of_it(rank: int, experiment: Experiment, folder: Path) -> dict[str, Any]:
    run_all(rank, experiment, folder)
    written = write_between_steps(list(MESHES.values()))
    prompts = continued([MeshConfig(model=2), MeshConfig(expert=2)])
    return {"runs": folder, "written": written, "continued": prompts}


@pytest.fixture(scope="module")
def on_two(experiment, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks made of everything here: to start them takes longest."""
    runs, pickles = (tmp_path_factory.mktemp(name) for name in ("runs", "pickles"))
    return spawn(2, all_of_it, pickles, experiment, runs)


@pytest.mark.slow
def test_ranks_that_share_a_model_write_what_one_process_writes(on_two):
    for number, case in enumerate(MESHES.values()):
        losses, said = write_between_steps([replace(case, mesh=MeshConfig())])[0]
        assert len(set(said)) > 3  # they have something to get wrong
        for rank in on_two:
            assert rank["written"][number][0] == pytest.approx(losses, rel=1e-10)
            assert rank["written"][number][1] == said


@pytest.mark.slow
def test_prompts_are_continued_alike(on_two):
    (alone,) = continued([None])
    assert [rank["continued"] for rank in on_two] == [[alone] * 2] * 2


def test_adapters_of_matrices_in_parts_are_refused(experiment, tmp_path):
    from switchworks.training.resolve import check_mesh

    with pytest.raises(ConfigError, match=r"mesh\.model = 2.*\n.*--mesh\.model 1"):
        check_mesh(replace(experiment, mesh=MeshConfig(model=2), lora=LoraConfig(rank=2)))
