"""Language models end to end: the causal objective, and a run that continues text."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from switchworks.batch import Batch
from switchworks.cli.main import main
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.data.rows.pipeline import (
    VALIDATION_SEED,
    Pipeline,
    RunRows,
    causal_row,
    validation_batches,
)
from switchworks.data.tokens.prepare import prepare
from switchworks.data.tokens.tokenizer import load_tokenizer
from switchworks.generate.texts import continuation
from switchworks.plan.explain import explain_experiment
from switchworks.recipes.tiny import tiny
from switchworks.training import train
from switchworks.training.hooks.samples import first_pieces, longest_pieces

EOS = 1


def row_of(tokens: list[int], starts: list[int]) -> tuple[list[int], list[int]]:
    targets, segments = causal_row(np.array(tokens), np.array(starts, dtype=np.int64), EOS)
    return targets.tolist(), segments.tolist()


def test_eos_follows_each_document_that_ends_and_pushes_the_last_tokens_out():
    assert row_of([50, 51, 60, 61, 62, 70], [2, 5]) == (
        [50, 51, EOS, 60, 61, 62],
        [1, 1, 1, 2, 2, 2],
    )


def test_an_eos_belongs_to_the_document_it_ends():
    assert row_of([50, 60, 61, 70, 71, 72], [1, 3]) == (
        [50, EOS, 60, 61, EOS, 70],
        [1, 1, 2, 2, 2, 3],
    )


def test_a_window_inside_one_document_stays_as_it_is():
    assert row_of([50, 51, 52], []) == ([50, 51, 52], [1, 1, 1])


def test_of_documents_of_one_token_half_are_pushed_out():
    assert row_of([50, 60, 70, 80], [1, 2, 3]) == ([50, EOS, 60, EOS], [1, 1, 2, 2])


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [f"{i} is the number of document {i}." * (1 + i % 3) for i in range(60)]


@pytest.fixture(scope="module")
def data(documents, tmp_path_factory) -> DataConfig:
    """60 documents on disk, as bytes."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return DataConfig(
        path=str(file),
        tokenizer="bytes",
        workers=1,
        objective="causal",
        input_length=0,
        target_length=128,
    )


def pipeline_of(data: DataConfig) -> Pipeline:
    prepared = prepare(data, vocab_size=384)
    return Pipeline(data, prepared.train, prepared.tokenizer, RunRows(batch_size=2, seed=0))


def test_rows_are_full_and_all_of_them_is_target(data):
    batch = pipeline_of(data).batch(0)
    assert batch.inputs.shape == (2, 0)
    assert batch.targets.shape == (2, 128)
    assert not batch.padding
    assert batch.num_tokens == 2 * 128


def test_a_prefix_and_its_continuation_are_the_row_of_a_causal_model_cut_in_two(data):
    whole = pipeline_of(data).batch(3).targets
    half = replace(data, objective="prefix", input_length=50, target_length=78)
    batch = pipeline_of(half).batch(3)
    assert (batch.inputs.shape, batch.targets.shape) == ((2, 50), (2, 78))
    assert torch.equal(torch.cat([batch.inputs, batch.targets], dim=1), whole)


def test_a_prefix_of_packed_documents_is_refused(data):
    with pytest.raises(ConfigError, match=r"--data\.packing stream"):
        replace(data, objective="prefix", input_length=50, packing="documents")


def test_an_encoder_decoder_learns_to_continue_prefixes(tiny_experiment, tmp_path, capsys):
    half = replace(tiny_experiment.data, objective="prefix", input_length=20, target_length=20)
    run_dir = train(replace(tiny_experiment, data=half, steps=8), tmp_path / "run")
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.1
    assert main(["evaluate", str(run_dir), "--batches", "1"]) == 0
    with pytest.raises(ConfigError, match="'prefix' needs an encoder"):
        replace(tiny(), data=half, model=replace(tiny().model, decoder_only=True))


def test_what_stands_between_two_eos_is_one_whole_document(data, documents):
    pipeline, whole = pipeline_of(data), 0
    for step in range(pipeline.windows // 2):
        for row in pipeline.batch(step).targets:
            pieces = np.split(row.numpy(), np.flatnonzero(row.numpy() == EOS) + 1)
            for piece in pieces[1:-1]:
                assert pipeline.tokenizer.decode(piece) in documents  # type: ignore[attr-defined]
                whole += 1
    assert whole > 15


def test_packing_documents_gives_the_same_rows_and_ids_that_change_after_eos(data):
    stream = pipeline_of(data).batch(0)
    packed = pipeline_of(replace(data, packing="documents")).batch(0)
    assert torch.equal(packed.targets, stream.targets)
    assert packed.target_segments is not None
    assert packed.input_segments is not None
    assert packed.input_segments.shape == (2, 0)
    steps = packed.target_segments.diff(dim=1)
    assert torch.equal(steps == 1, packed.targets[:, :-1] == EOS)
    assert (packed.target_segments[:, 0] == 1).all()


def test_only_what_eos_pushes_out_is_left_out(data):
    pipeline = pipeline_of(data)
    assert pipeline.raw_length == 128
    rows = torch.cat([pipeline.batch(step).targets for step in range(pipeline.windows // 2)])
    share = float((rows == EOS).float().mean())
    assert 0.01 < share < 0.03


def test_validation_rows_are_causal_and_never_change(data):
    prepared = prepare(data, vocab_size=384)
    run = RunRows(batch_size=2, seed=VALIDATION_SEED)
    first, again = (
        validation_batches(Pipeline(data, prepared.train, prepared.tokenizer, run), 2)
        for _ in range(2)
    )
    assert [torch.equal(a.targets, b.targets) for a, b in zip(first, again, strict=True)] == [
        True,
        True,
    ]
    assert first[0].inputs.shape == (2, 0)


def test_a_corpus_under_one_row_is_refused_with_the_length_that_decides(data):
    with pytest.raises(DataError, match=r"one row of data.target_length = 99999 needs 99999"):
        pipeline_of(replace(data, target_length=99999))


def test_inputs_are_refused_with_the_lengths_that_keep_the_row():
    with pytest.raises(ConfigError, match=r"--data.input-length 0 --data.target-length 78"):
        DataConfig(objective="causal", input_length=64, target_length=14)


def test_a_row_of_one_token_is_refused():
    with pytest.raises(ConfigError, match=r"data.target_length = 1 leaves nothing to continue"):
        DataConfig(objective="causal", input_length=0, target_length=1)


def test_a_decoder_only_model_is_refused_for_span_corruption_with_the_fix():
    recipe = tiny()
    with pytest.raises(ConfigError, match=r"--data.objective causal .* --data.target-length 78"):
        replace(recipe, model=replace(recipe.model, decoder_only=True))


def test_an_encoder_is_refused_for_the_causal_objective_with_the_fix():
    recipe = tiny()
    causal = replace(recipe.data, objective="causal", input_length=0)
    with pytest.raises(ConfigError, match=r"Set --model\.decoder-only, or"):
        replace(recipe, data=causal)


def test_a_recipe_becomes_a_language_model_by_the_flags_that_the_errors_name(capsys):
    words = ["explain", "quickstart", "--model.decoder-only"]
    assert main(words) == 2
    error = capsys.readouterr().err
    flags = re.findall(r"--data[\w.-]+ \w+", error)
    assert main([*words, *shlex.split(" ".join(flags))]) == 0
    assert "decoder            4992 tokens" in capsys.readouterr().out


def test_the_prompts_for_samples_are_each_rows_longest_document():
    batch = Batch(
        inputs=torch.zeros(2, 0, dtype=torch.long),
        targets=torch.tensor([[5, 1, 6, 7, 8, 0], [9, 9, 1, 4, 4, 1]]),
        input_segments=torch.zeros(2, 0, dtype=torch.long),
        target_segments=torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 2]]),
    )
    assert [piece.tolist() for piece in longest_pieces(batch)] == [[6, 7, 8], [9, 9, 1]]


def test_samples_of_packed_rows_are_of_each_rows_first_example():
    batch = Batch(
        inputs=torch.tensor([[5, 9, 1, 6, 9, 1, 0]]),
        targets=torch.tensor([[9, 7, 1, 9, 8, 1]]),
        input_segments=torch.tensor([[1, 1, 1, 2, 2, 2, 0]]),
        target_segments=torch.tensor([[1, 1, 1, 2, 2, 2]]),
    )
    inputs, targets = first_pieces(batch)
    assert inputs.tolist() == [[5, 9, 1, 0, 0, 0, 0]]
    assert targets.tolist() == [[9, 7, 1, 0, 0, 0]]


def test_a_continuation_keeps_a_character_that_the_prompt_began():
    tokenizer = load_tokenizer("bytes")
    prompt, rest = tokenizer.encode("caf\u00e9 noir")[:4], tokenizer.encode("caf\u00e9 noir")[4:]
    assert continuation(tokenizer, prompt, rest) == "\u00e9 noir"


@pytest.fixture(scope="module")
def lm_experiment(corpus):
    """The tiny recipe as a language model."""
    recipe = tiny()
    return replace(
        recipe,
        threads=1,
        model=replace(recipe.model, decoder_only=True),
        data=replace(
            recipe.data, path=str(corpus), objective="causal", input_length=0, target_length=64
        ),
    )


@pytest.fixture(scope="module")
def lm_run(lm_experiment, tmp_path_factory) -> Path:
    threads = torch.get_num_threads()
    run_dir = train(lm_experiment, tmp_path_factory.mktemp("runs") / "lm")
    torch.set_num_threads(threads)
    return run_dir


def test_a_run_learns_and_continues_held_out_text(lm_run):
    lines = [json.loads(line) for line in (lm_run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    assert losses[-1] < losses[0] < 6.0
    sample = json.loads((lm_run / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["inputs"].encode()) == len(sample["truth"].encode()) == 32
    assert sample["prediction"]
    assert "Validation text, continued" in (lm_run / "report.html").read_text()


def test_generate_prints_the_text_and_what_follows(lm_run, capsys):
    assert main(["generate", str(lm_run), "The list ", "--max-length", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("The list")
    assert len(printed) > len("The list\n")


def test_a_hole_is_refused_by_a_model_that_only_continues(lm_run, capsys):
    assert main(["generate", str(lm_run), "The <extra_id_0> list"]) == 2
    assert "continues a text and cannot fill holes" in capsys.readouterr().err


def test_evaluate_measures_the_run_s_own_held_out_text(lm_run, tmp_path):
    assert main(["evaluate", str(lm_run), "--batches", "1", "--json", str(tmp_path / "f")]) == 0
    figures = json.loads((tmp_path / "f").read_text())
    assert figures["target_tokens"] == 16 * 64
    assert 0 < figures["loss"] < 6.0


def test_a_run_can_begin_with_the_weights_of_another(lm_run, lm_experiment, tmp_path):
    run_dir = train(replace(lm_experiment, steps=1), tmp_path / "run", init=lm_run)
    assert (run_dir / "model" / "model.safetensors").exists()


def test_explain_knows_of_one_stack(lm_experiment):
    routing = explain_experiment(lm_experiment)["routing"]
    assert routing["switch_layers"] == 1
    assert routing["decoder"]["group_tokens"] == 2 * 64
    assert "encoder" not in routing
