"""The flags of `switchworks generate` that say what may be written, and how much is shown of it."""

import json
import re

import pytest
import torch
from support.compiling import compiling
from support.models import byte_transformer

from switchworks import load, save
from switchworks.cli.main import main
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.fast import CompiledDecoder
from switchworks.generate import (
    BeamSearch,
    Constraints,
    GenerationConfig,
    continuation,
    generate,
    generate_all,
    generate_candidates,
)

BYTES = ByteTokenizer()


@pytest.fixture(scope="module", params=[False, True], ids=["encoder-decoder", "decoder-only"])
def directory(request, tmp_path_factory):
    """A model directory over bytes, with random weights."""
    folder = tmp_path_factory.mktemp("model") / "m"
    save(byte_transformer(decoder_only=request.param), folder, BYTES)
    return folder


def written(directory, capsys, *words: str) -> str:
    assert main(["generate", str(directory), "The list", "--max-length", "12", *words]) == 0
    return capsys.readouterr().out.rstrip("\n")


def fill_of(directory, capsys, *words: str) -> str:
    """What is written behind the forced beginning."""
    text = written(directory, capsys, "--prefix", "<extra_id_0>=", *words)
    return text.partition("=")[2].rstrip("]")


@pytest.mark.parametrize(
    ("words", "letters"),
    [
        (["--allow", "xy", "--min-length", "11"], "xy"),
        (["--allow", "xy", "--forbid", "x", "--min-length", "11"], "y"),
        (["--allow", "uvw", "--no-repeat-ngram", "2", "--repetition-penalty", "1.5"], "uvw"),
    ],
)
def test_only_allowed_letters_are_written(directory, capsys, words, letters):
    text = fill_of(directory, capsys, *words)
    assert set(text) <= set(letters)
    assert "--min-length" not in words or len(text) >= 8


def test_writing_stops_with_the_stop_text(directory, capsys):
    words = ["--allow", "x", "--min-length", "11", "--stop", "xx", "q"]
    assert fill_of(directory, capsys, *words) == "xx"


def test_a_stream_prints_what_is_written(directory, capsys):
    model, _ = load(directory)
    causal = model.config.decoder_only
    prompt = BYTES.encode("The list" if causal else "The list <extra_id_0>") + [1] * (not causal)
    (ids,) = generate(model, torch.tensor([prompt]), max_length=12).tolist()
    before = prompt if causal else []
    assert written(directory, capsys, "--stream") == continuation(BYTES, before, ids).rstrip("\n")


def test_candidates_are_printed_and_written_with_their_scores(directory, tmp_path, capsys):
    place = tmp_path / "c.json"
    words = ["--beams", "3", "--candidates", "3", "--json", str(place)]
    lines = written(directory, capsys, *words)
    figures = json.loads(place.read_text("utf-8"))
    scores = [candidate["score"] for candidate in figures["candidates"]]
    assert figures["text"] == "The list"
    assert scores == sorted(scores, reverse=True)
    assert lines.startswith(f"{scores[0]:8.3f}  ")
    for candidate in figures["candidates"]:
        total = sum(candidate["log_probs"]) / len(candidate["log_probs"])
        assert candidate["score"] == pytest.approx(total, abs=1e-4)
        assert len(candidate["tokens"]) == len(candidate["log_probs"]) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stream", "--beams", "2"], "--stream prints tokens"),
        (["--stream", "--json", "c.json"], "--stream prints tokens"),
        (["--candidates", "2"], "candidates = 2 must be 1 for greedy"),
        (["--candidates", "3", "--beams", "2"], "between 1 and beams = 2"),
        (["--min-length", "12"], "max_length = 12 leaves no room"),
        (["--stop", ""], 'stop = .* holds ""'),
    ],
)
def test_flags_that_cannot_be_are_refused(directory, capsys, words, message):
    assert main(["generate", str(directory), "a", "--max-length", "12", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_candidates_of_many_texts_are_those_of_each_alone():
    model, inputs = byte_transformer(decoder_only=True), [[70, 71, 72], [80], [90, 91]]
    config = GenerationConfig(max_length=5, beams=BeamSearch(beams=3), batch_size=2, min_length=2)
    together = generate_candidates(model, inputs, config, 2)
    assert [len(candidates) for candidates in together] == [2, 2, 2]
    for ids, candidates in zip(inputs, together, strict=True):
        (alone,) = generate_candidates(model, [ids], config, 2)
        assert [each.tokens for each in candidates] == [each.tokens for each in alone]
        best = generate_all(model, [ids], config)[0]
        assert candidates[0].tokens == best[: len(candidates[0].tokens)]


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_under_constraints():
    model, inputs = byte_transformer(decoder_only=True), torch.tensor([[70, 71], [80, 0]])
    constraints = Constraints(repetition_penalty=1.5, no_repeat_ngram=2, forbid=((90,),))
    with compiling():
        graph = CompiledDecoder(model)
        for beams in (None, BeamSearch(beams=2)):
            plain, compiled = (
                generate(
                    model, inputs, max_length=6, beams=beams, constraints=constraints, compiled=step
                )
                for step in (None, graph)
            )
            assert torch.equal(plain, compiled)


def test_a_text_that_would_fill_the_memory_is_refused_with_the_flag_that_raises_the_limit(
    directory, tmp_path, capsys
):
    (tmp_path / "long.txt").write_text("x" * 5000 + "\n")
    assert main(["generate", str(directory), "--file", str(tmp_path / "long.txt")]) == 2
    said = capsys.readouterr().err
    assert re.search(r"'x{40}'\.\.\. has 5,0\d\d tokens, and at most 4,096 are read", said)
    assert "raise --max-input" in said
    words = ["generate", str(directory), "x" * 50, "--max-length", "2", "--max-input"]
    assert main([*words, "40"]) == 2
    assert main([*words, "100"]) == 0
