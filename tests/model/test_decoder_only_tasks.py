"""Decoder-only models on tasks: the input is a prompt, and only the target is learnt."""

import json
from dataclasses import replace

import pytest
import torch

from switchworks.cli.main import main
from switchworks.config import ConfigError, to_toml
from switchworks.data.config import DataConfig
from switchworks.data.open import open_dataset
from switchworks.data.tasks import Example, Hub, Task
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.evaluate.answers import DecodingConfig, answer, log_likelihoods, write
from switchworks.evaluate.tasks import named_tasks
from switchworks.generate import BeamSearch, generate
from switchworks.model import SwitchTransformer
from switchworks.recipes.tiny import tiny

TOKENIZER = ByteTokenizer()
TEXTS = ["a", "a much longer text than that", "ab", "x" * 60]
HOW = DecodingConfig(input_length=48, max_length=6, batch_size=2)
FLAGS = ["--model.decoder-only", "--data.objective", "causal", "--threads", "1"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """300 sentences that name a colour, and whether it is warm."""
    path = tmp_path_factory.mktemp("tables") / "colours.csv"
    warmth = {"red": "warm", "blue": "cold"}
    pairs = [(f"ball {i} is {name}", warmth[name]) for i in range(150) for name in warmth]
    path.write_text("text,answer\n" + "".join(f"{a},{b}\n" for a, b in pairs))
    return path


def prompt_of(text: str) -> list[int]:
    return [*TOKENIZER.encode(text)[:47], 1]


def test_an_answer_is_what_follows_the_input_and_its_end(byte_decoder):
    for how in (HOW, replace(HOW, beams=BeamSearch(beams=2))):
        answers = write(byte_decoder, TOKENIZER, TEXTS, how)
        for text, together in zip(TEXTS, answers, strict=True):
            prompt = torch.tensor([prompt_of(text)])
            alone = generate(byte_decoder, prompt, max_length=6, beams=how.beams)
            assert together == TOKENIZER.decode(alone[0].tolist())


def test_likelihoods_are_those_of_the_target_after_the_prompt_in_one_text(byte_decoder):
    pairs = [(TEXTS[1], "yes"), (TEXTS[0], "perhaps"), (TEXTS[3], "")]
    found = log_likelihoods(byte_decoder, TOKENIZER, pairs, HOW)
    exact = SwitchTransformer(byte_decoder.config).double().eval()
    exact.load_state_dict(byte_decoder.state_dict())
    nothing = torch.zeros(1, 0, dtype=torch.long)
    for (text, target), nats in zip(pairs, found, strict=True):
        prompt, after = prompt_of(text), [*TOKENIZER.encode(target), 1]
        whole = torch.tensor([[*prompt, *after]])
        logs = exact(nothing, whole).logits.detach().log_softmax(dim=-1)[0, len(prompt) :]
        by_hand = sum(float(logs[place, token]) for place, token in enumerate(after))
        assert nats == pytest.approx(by_hand, rel=1e-4)


def test_answers_are_ranked_too(byte_decoder):
    task = Task(
        name="t",
        source=Hub(dataset=None, folder="t"),
        to_text=lambda record: [],
        labels=("yes", "no"),
    )
    how = DecodingConfig(decode="rank", input_length=48)
    (chosen,) = answer(byte_decoder, TOKENIZER, task, [Example(inputs="a", target="yes")], how)
    nats = log_likelihoods(byte_decoder, TOKENIZER, [("a", "yes"), ("a", "no")], how)
    assert chosen == ("yes" if nats[0] >= nats[1] else "no")


def test_rows_are_a_prompt_and_its_target_and_only_targets_count(table, byte_decoder, tmp_path):
    data = DataConfig(
        objective="causal",
        tasks=(f"colours={table}:text:answer",),
        tokenizer="bytes",
        cache=str(tmp_path),
        input_length=32,
        target_length=8,
    )
    batch = open_dataset(data, vocab_size=384).training(batch_size=4, seed=0).batch(0)
    assert (batch.inputs.shape, batch.targets.shape) == ((4, 32), (4, 8))
    assert batch.input_segments is None
    texts = [TOKENIZER.decode(row) for row in batch.targets.tolist()]
    assert set(texts) <= {"warm", "cold"}
    output = byte_decoder(batch.inputs, batch.targets)
    logs = output.logits.detach().log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)
    real = batch.targets != 0
    expected = -float(logs[real].mean())
    assert float(output.losses.cross_entropy.detach()) == pytest.approx(expected, rel=1e-5)


def test_one_command_trains_and_evaluates(table, tmp_path, capsys):
    run_dir = tmp_path / "run"
    words = ["train", "tiny", "--run-dir", str(run_dir), "--steps", "4", *FLAGS]
    words += ["--data.tasks", f"colours={table}:text:answer", "--data.task-labels", "warm", "cold"]
    words += ["--data.input-length", "32", "--data.target-length", "8"]
    words += ["--evaluate-every", "4", "--evaluate-examples", "4", "--validate-every", "4"]
    assert main(words) == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any("task/colours/accuracy" in line for line in lines)
    assert main(["evaluate", str(run_dir), "--examples", "3", "--decode", "rank"]) == 0
    assert "colours" in capsys.readouterr().out


def test_lengths_and_packing_that_cannot_be_are_refused_with_the_fix():
    causal = {"objective": "causal", "tasks": ("glue_rte",)}
    fix = "for example --data.input-length 62 --data.target-length 16"
    with pytest.raises(ConfigError, match=fix):
        DataConfig(**causal, input_length=0, target_length=78)
    with pytest.raises(ConfigError, match=r"Set --data\.task-packing padded"):
        DataConfig(**causal, task_packing="packed")
    recipe = tiny()
    model = replace(recipe.model, decoder_only=True)
    data = replace(recipe.data, tasks=("glue_rte",))
    with pytest.raises(ConfigError, match=r"Set --data\.objective causal\.$"):
        replace(recipe, model=model, data=data)


def test_a_model_of_plain_text_is_asked_with_room_for_inputs(tmp_path):
    recipe = tiny()
    plain = replace(
        recipe,
        model=replace(recipe.model, decoder_only=True),
        data=replace(recipe.data, objective="causal", input_length=0, target_length=78),
    )
    (tmp_path / "experiment.toml").write_text(to_toml(plain))
    assert named_tasks(tmp_path, ("glue_rte",), None).input_length == 512
