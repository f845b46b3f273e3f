"""Every example runs and learns."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.models import TINY

from switchworks import ModelConfig, RoutingConfig, SwitchFFN, train
from switchworks.data import SOURCES
from switchworks.model import STRATEGIES, SwitchTransformer
from switchworks.optim import OPTIMIZERS, UpdateStats
from switchworks.training import LOGGERS, StepResult, build_state

EXAMPLES = Path(__file__).parent.parent / "examples"
TABLES = (LOGGERS, OPTIMIZERS, SOURCES, STRATEGIES)


@pytest.fixture(autouse=True)
def tables_as_they_were():
    """What an example adds to a table is gone after its test."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_language_model_learns_and_says_what_its_experts_do(capsys):
    before, after = load_example("causal_lm").main(["--steps", "40"])
    assert before > 5.3  # log(256) = 5.5 is a blind guess
    assert after < 3.2
    output = capsys.readouterr().out
    assert re.search(
        r"step  39  loss \d\.\d+  dropped \d+\.\d%  load per layer( +\d\.\d\d){8}", output
    )
    assert f"{after:.3f} after" in output


def run(*words: str) -> str:
    """What a fresh Python prints; the types that tests check would break up compiled graphs."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def held_out(output: str) -> tuple[float, float]:
    found = re.search(r"held-out loss (\S+) before, (\S+) after", output)
    assert found is not None
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_the_language_model_compiles_into_one_graph():
    """aot_eager traces forward and backward as inductor does, without its C++ compiler."""
    output = run(str(EXAMPLES / "causal_lm.py"), "--steps", "5", "--compile", "aot_eager")
    before, after = held_out(output)
    assert after < before - 0.5


@pytest.mark.slow
def test_the_language_model_trains_sharded_over_two_processes():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run(*launcher, str(EXAMPLES / "causal_lm.py"), "--fsdp", "--steps", "15")
    shares = re.findall(r"rank \d holds (\d+) of (\d+) parameters", output)
    assert len(shares) == 2
    assert all(int(held) * 2 == int(total) for held, total in shares)
    before, after = held_out(output)
    assert before > 5.3
    assert after < 4


def test_sharding_without_torchrun_is_explained(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        load_example("causal_lm").main(["--fsdp"])
    assert "torchrun" in capsys.readouterr().err


def test_the_language_model_sees_no_later_token():
    model = load_example("causal_lm").GPT().eval()
    rows = torch.randint(0, 256, (2, 20))
    changed = rows.clone()
    changed[:, 12:] = 7
    with torch.no_grad():
        logits, other = model(rows)[0], model(changed)[0]
    assert torch.allclose(logits[:, :12], other[:, :12], atol=1e-6)
    assert not torch.allclose(logits[:, 12:], other[:, 12:], atol=1e-6)


@pytest.mark.long
def test_the_vision_transformer_learns(capsys):
    before, after = load_example("vision_transformer").main(["--steps", "80"])
    assert before < 0.4  # a quarter is a blind guess
    assert after > 0.55
    assert "load per layer" in capsys.readouterr().out


def test_an_optimizer_of_ones_own_trains_and_resumes(corpus, tmp_path):
    recipe = load_example("own_optimizer").lion_tiny()
    recipe = replace(recipe, sample_every=0, data=replace(recipe.data, path=str(corpus)))
    run_dir = train(recipe, tmp_path / "run")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]
    assert losses[-1] < losses[0] - 1.0
    shutil.rmtree(run_dir / "checkpoints/step_00000060")
    train(recipe, run_dir, resume=True)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row] == losses


def test_the_three_lines_are_marked_in_every_example_of_the_layer():
    for file in map(EXAMPLES.joinpath, ("causal_lm.py", "vision_transformer.py")):
        marked = [line for line in file.read_text().splitlines() if line.endswith("# <-")]
        assert sum("import" in line for line in marked) == 1, file
        assert sum("SwitchFFN(" in line for line in marked) == 1, file
        assert sum("y, routing = " in line for line in marked) == 1, file


def test_a_strategy_of_one_s_own_is_balanced_by_its_bias():
    balanced, plain = load_example("own_strategy").main(["--steps", "40"])
    assert balanced < 2 < plain


def test_a_strategy_of_one_s_own_is_a_name_like_any_other():
    load_example("own_strategy")
    routing = RoutingConfig(experts=4, strategy="sigmoid_top2")
    assert routing.experts_per_token == 2
    y, report = SwitchFFN(8, 16, routing, causal=True)(torch.randn(2, 5, 8))
    assert y.shape == (2, 5, 8)
    gates = report.routes.gate.view(2, 5, 2)
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(2, 5))


def rotary_config(**settings) -> ModelConfig:
    sizes = {"vocab_size": 32, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2}
    return ModelConfig(**sizes, num_layers=2, routing=RoutingConfig(experts=4), **settings)


def test_rotary_positions_learn():
    before, after = load_example("rotary").main(["--steps", "25"])
    assert after < before - 0.5


def test_rotary_positions_are_rotations_in_float64():
    """Pair (i, i + K / 2) as a complex number, times exp(i position base ** (-2 i / K))."""
    rotary, x = load_example("rotary").Rotary(8), torch.randn(1, 2, 5, 8, dtype=torch.float64)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angle = (3 + torch.arange(5)).double()[:, None] * 10_000.0 ** -(torch.arange(4).double() / 4)
    expected = pairs * torch.polar(torch.ones_like(angle), angle)
    rotated = rotary.rotate(x, 3)
    torch.testing.assert_close(torch.complex(rotated[..., :4], rotated[..., 4:]), expected)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_rotary_positions_decode_with_the_cache_as_teacher_forcing_does(decoder_only):
    config = rotary_config(decoder_only=decoder_only)
    model = load_example("rotary").rotary_model(config, seed=1).eval()
    inputs, targets = torch.randint(2, 32, (2, 5)), torch.randint(2, 32, (2, 6))
    with torch.no_grad():
        expected = model(inputs, targets).logits
        if decoder_only:
            first, cache = model.prefill(inputs, 6)
            steps = [first, *(model.decode_step(t, cache) for t in targets[:, :-1].split(1, 1))]
        else:
            cache = model.init_cache(model.encode(inputs), 6)
            previous = torch.cat([torch.zeros(2, 1, dtype=torch.long), targets[:, :-1]], dim=1)
            steps = [model.decode_step(token, cache) for token in previous.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["own_hook", "own_strategy", "rotary"])
def test_examples_of_one_s_own_parts_are_under_80_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


def test_a_data_source_of_one_s_own_is_trained_on(tmp_path):
    run_dir = load_example("own_data_source").main([str(tmp_path / "run"), "--steps", "4"])
    about = json.loads((run_dir / "about.json").read_text())
    sums = [f"{a} and {b} make {a + b}." for a in range(100) for b in range(100)]
    held_out_text = (run_dir / "metrics.jsonl").read_text()
    assert 0.75 * len("\n".join(sums)) < about["train_tokens"] < len("\n".join(sums))
    assert '"val/loss"' in held_out_text


def test_the_logger_of_ones_own_has_every_number_of_the_run(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["own_logger.py", str(corpus), str(tmp_path / "run")])
    load_example("own_logger").main()
    lines = (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "step,name,value"
    assert [line.split(",")[0] for line in lines if ",val/loss," in line] == ["10", "20"]
    assert "validation losses: [" in capsys.readouterr().out


def test_the_hook_of_ones_own_tells_how_far_every_block_moved(corpus, tmp_path):
    words = [str(corpus), str(tmp_path / "run"), "--every", "10"]
    with load_example("own_hook").main(words).open(encoding="utf-8") as file:
        lines = [(int(step), block, float(share)) for step, _, block, share in csv.reader(file)]
    assert {step for step, *_ in lines} == {10, 20}
    assert {"embedding", "encoder.blocks.0", "decoder.blocks.1"} < {block for _, block, _ in lines}
    assert all(0 < share < 1 for *_, share in lines)


def test_the_hook_of_ones_own_measures_a_share_of_the_size(tiny_experiment, tmp_path):
    """Weights made a tenth larger have moved by a tenth of their size, whatever the block."""
    state = build_state(tiny_experiment)
    hook = load_example("own_hook").Moves(tmp_path / "moves.csv", every=1)
    result = StepResult(2.5, 2.5, UpdateStats(0.0, 0.0), {}, 0)
    hook.after_step(state, result)
    assert not hook.file.exists()
    with torch.no_grad():
        for weight in state.model.parameters():
            weight.mul_(1.1)
    hook.after_step(state, result)
    with hook.file.open(encoding="utf-8") as file:
        shares = [float(line[-1]) for line in csv.reader(file)]
    assert shares == pytest.approx([0.1] * len(shares), rel=1e-4)
    assert len(shares) >= 5


@pytest.mark.slow  # a minute for the exporter
@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("tied_head", [True, False])
def test_a_dense_model_computes_the_same_in_onnx_runtime(tied_head, tmp_path):
    """Exported with two texts of seven tokens, then used with other shapes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    example = load_example("onnx_export")
    config = replace(TINY, routing=None, gated=True, tied_head=tied_head, init_scale=1.0)
    model = SwitchTransformer(config, seed=2).eval()
    with torch.no_grad():
        example.export(model, tmp_path)
    padded = torch.tensor([[5, 6, 7, 8, 9, 1], [9, 8, 1, 0, 0, 0], [3, 4, 5, 1, 0, 0]])
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("encoder", "decoder")
    )
    for ids in (padded, torch.tensor([[7, 1]])):
        rows, room, tokens = len(ids), 6, torch.zeros(len(ids), 1, dtype=torch.long)
        memory, mask = encoder.run(None, {"ids": ids.numpy()})
        heads, width = config.num_heads, config.d_kv
        written = torch.zeros(len(memory), rows, heads, room, width).numpy()
        columns = []
        with torch.no_grad():
            cache = model.init_cache(model.encode(ids), room)
            for position in range(room):
                positions = torch.full((rows,), position).numpy()
                feed = {"tokens": tokens.numpy(), "positions": positions, "written": written}
                ours = model.decode_step(tokens, cache)[:, 0]
                theirs, written = decoder.run(None, feed | {"memory": memory, "mask": mask})
                torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4)
                columns.append(tokens := ours.argmax(dim=-1, keepdim=True))
        again = example.write(tmp_path, ids.numpy(), room, heads, width)
        assert again.tolist() == torch.cat(columns, dim=1).tolist()
