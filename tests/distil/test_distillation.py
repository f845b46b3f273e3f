"""A student beside its teacher: first weights, loss, whole runs, refusals (section 4.2)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.scripts import run_script

import switchworks
from switchworks.batch import Batch
from switchworks.checkpoint.hugging_face.weights import save_hf
from switchworks.checkpoint.training_state import Checkpoints
from switchworks.cli.main import main
from switchworks.config import CheckpointError, ConfigError, from_toml
from switchworks.data.open import open_dataset
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.data.tokens.train import train_sentencepiece
from switchworks.distil import fraction_of_gain, initialise_from_teacher
from switchworks.distil.config import DistilConfig
from switchworks.distil.teacher import Teacher
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.recipes import RECIPES
from switchworks.recipes.tiny import tiny
from switchworks.training import Experiment, train
from switchworks.training.distillation import (
    COUNTED_ROWS,
    dense_teacher,
    precompute_teacher,
    rows_to_count,
)
from switchworks.training.state import build_state
from switchworks.training.step import DivergenceError, train_step

DENSE = """
from dataclasses import replace
from switchworks.recipes.tiny import tiny
def dense():
    return replace(tiny(), model=replace(tiny().model, routing=None))
"""
"""A recipe of one's own: the dense twin of `tiny`."""


def dense(experiment: Experiment, **settings) -> Experiment:
    """`experiment` without experts."""
    return replace(experiment, model=replace(experiment.model, routing=None), **settings)


def some_batch() -> Batch:
    """Four rows of two packed examples each, with unequally many targets."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(3, 384, (4, 24), generator=generator)
    targets = torch.randint(3, 384, (4, 12), generator=generator)
    targets[0, 5:] = 0
    input_segments = torch.ones_like(inputs)
    input_segments[:, 15:] = 2
    target_segments = (targets != 0).long()
    target_segments[1:, 7:] = 2
    return Batch(
        inputs=inputs,
        targets=targets,
        input_segments=input_segments,
        target_segments=target_segments,
    )


def state_with(teacher_seed: int = 5, **settings):
    """A dense student of the tiny shape at step 0, with a sparse teacher of first values."""
    distil = DistilConfig(teacher="in memory", **settings.pop("distil", {}))
    teacher = SwitchTransformer(tiny().model, seed=teacher_seed)
    return build_state(dense(tiny(), distil=distil, **settings), teacher=teacher)


# First weights


SPARSE = ModelConfig(
    vocab_size=40,
    d_model=16,
    d_ff=24,
    d_kv=4,
    num_heads=4,
    num_layers=4,
    routing=RoutingConfig(experts=3),
)


def test_a_student_begins_with_every_weight_of_the_teacher_but_experts_and_routers():
    """Fedus et al. 2021, section 4.2; the FFNs of blocks 1 and 3 stand where the teacher is
    sparse."""
    teacher = SwitchTransformer(SPARSE, seed=1)
    student = SwitchTransformer(replace(SPARSE, routing=None), seed=2)
    first = {name: p.detach().clone() for name, p in student.named_parameters()}
    copied, fresh = initialise_from_teacher(student, teacher)
    assert fresh == [
        f"{stack}.blocks.{block}.ffn.{matrix}.weight"
        for stack in ("encoder", "decoder")
        for block in (1, 3)
        for matrix in ("w_in", "w_out")
    ]
    after = dict(student.named_parameters())
    assert sorted(copied + fresh) == sorted(after)
    assert all(torch.equal(after[name], first[name]) for name in fresh)
    assert all(torch.equal(after[name], teacher.get_parameter(name)) for name in copied)


@pytest.mark.parametrize("ffn", ["average", "most_used"])
def test_a_student_s_ffns_may_begin_with_what_the_teacher_s_experts_do(ffn):
    """With experts that are all alike: a third of one's output each, since their gates are."""
    teacher = SwitchTransformer(SPARSE, seed=1)
    with torch.no_grad():
        for layer in teacher.switch_layers.values():
            layer.router.weight.zero_()
            for weight in layer.experts.parameters():
                weight[:] = weight[:1]
    tokens = torch.randint(2, 40, (2, 9))
    batch = Batch(inputs=tokens, targets=tokens)
    student = SwitchTransformer(replace(SPARSE, routing=None), seed=2)
    copied, fresh = initialise_from_teacher(student, dense_teacher(teacher, [batch], ffn))
    assert not fresh
    assert len(copied) == len(list(student.parameters()))
    with torch.no_grad():
        theirs, ours = (m.eval()(tokens, tokens).logits for m in (teacher, student))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layers", ["ffn", "attention", "both"])
def test_a_sparse_student_takes_no_expert_and_no_router(layers):
    shape = replace(SPARSE, routing=RoutingConfig(experts=3, layers=layers))
    student = SwitchTransformer(shape, seed=2)
    _, fresh = initialise_from_teacher(student, SwitchTransformer(shape, seed=1))
    sparse = {name for name, _ in student.named_parameters() if ".experts." in name}
    sparse |= {name for name, _ in student.named_parameters() if ".router." in name}
    assert set(fresh) == sparse
    assert sparse


def test_a_weight_of_another_shape_is_not_copied():
    student = SwitchTransformer(replace(SPARSE, routing=None, d_ff=32), seed=2)
    copied, fresh = initialise_from_teacher(student, SwitchTransformer(SPARSE, seed=1))
    assert all(".ffn.w_" in name for name in fresh)
    assert not any(".ffn.w_" in name for name in copied)


def test_attention_of_other_heads_and_ffns_of_another_activation_begin_afresh():
    """Their matrices have the teacher's shapes and mean something else."""
    teacher = SwitchTransformer(SPARSE, seed=1)
    for change, part in (
        ({"num_heads": 2, "d_kv": 8}, "attention."),
        ({"activation": "gelu"}, ".ffn.w_"),
    ):
        student = SwitchTransformer(replace(SPARSE, routing=None, **change), seed=2)
        copied, _ = initialise_from_teacher(student, teacher)
        assert copied
        assert not any(part in name for name in copied)


def test_a_student_shares_no_memory_with_its_teacher():
    teacher = SwitchTransformer(SPARSE, seed=1)
    student = SwitchTransformer(replace(SPARSE, routing=None), seed=2)
    initialise_from_teacher(student, teacher)
    before = teacher.embedding.weight.detach().clone()
    student.embedding.weight.data.zero_()
    assert torch.equal(teacher.embedding.weight, before)


def test_the_share_of_the_gain_is_the_paper_s():
    """Fedus et al. 2021, table 6, last row (29 %), and the rows of table 7."""
    kept = fraction_of_gain(baseline=-1.636, teacher=-1.444, student=-1.580)
    assert kept == pytest.approx(0.292, abs=5e-4)
    assert fraction_of_gain(baseline=1.636, teacher=1.444, student=1.580) == pytest.approx(kept)
    teachers = (-1.505, -1.474, -1.444, -1.432, -1.427)
    students = (-1.587, -1.585, -1.579, -1.582, -1.578)
    gains = [
        round(100 * fraction_of_gain(baseline=-1.636, teacher=teacher, student=student), 1)
        for teacher, student in zip(teachers, students, strict=True)
    ]
    assert gains == [37.4, 31.5, 29.7, 26.5, 27.8]


def test_where_the_teacher_gains_nothing_no_share_of_it_is_kept():
    kept = fraction_of_gain(baseline=1.0, teacher=1.0, student=0.5)
    assert kept != kept  # nan


# The loss of a step


def test_a_fresh_setting_is_three_quarters_hard_and_a_quarter_soft():
    """Fedus et al. 2021, section 4.2: 0.75 ground truth, 0.25 teacher."""
    state, batch = state_with(), some_batch()
    given = {"input_segments": batch.input_segments, "target_segments": batch.target_segments}
    teacher = SwitchTransformer(tiny().model, seed=5).eval()
    taught = teacher(batch.inputs, batch.targets, **given).logits
    output = state.model(batch.inputs, batch.targets, **given)
    real = batch.targets != 0
    hard = F.cross_entropy(output.logits[real], batch.targets[real])
    soft = F.cross_entropy(output.logits[real], taught[real].softmax(-1))
    result = train_step(state, batch)
    assert result.cross_entropy == pytest.approx(hard.item(), rel=1e-6)
    assert result.soft == pytest.approx(soft.item(), rel=1e-6)
    total = 0.75 * hard + 0.25 * soft + output.losses.output_z
    assert result.total == pytest.approx(total.item(), rel=1e-6)


def test_micro_batches_give_a_student_the_loss_and_the_update_of_the_whole_batch():
    distil = {"temperature": 2.0, "soft_weight": 0.5}
    whole, parts = state_with(distil=distil), state_with(distil=distil, micro_batches=2)
    one, two = train_step(whole, some_batch()), train_step(parts, some_batch())
    assert two.total == pytest.approx(one.total, rel=1e-6)
    assert two.soft == pytest.approx(one.soft, rel=1e-6)
    for name, parameter in whole.model.named_parameters():
        twin = parts.model.get_parameter(name)
        torch.testing.assert_close(twin, parameter, rtol=1e-4, atol=1e-6, msg=name)


def test_a_teacher_without_weight_leaves_a_run_with_dropout_as_it_would_be_alone():
    """It does not run."""
    model = replace(tiny().model, dropout=0.1)
    distil = DistilConfig(teacher="in memory", soft_weight=0.0)
    teacher = SwitchTransformer(model, seed=5)
    alone = build_state(replace(tiny(), model=model))
    beside = build_state(replace(tiny(), model=model, distil=distil), teacher=teacher)
    for _ in range(2):
        taught = train_step(beside, some_batch())
        assert taught.soft is None
        assert taught.total == train_step(alone, some_batch()).total
    assert all(
        torch.equal(p, alone.model.get_parameter(name))
        for name, p in beside.model.named_parameters()
    )


def test_a_teacher_draws_no_noise_of_its_own():
    model = replace(tiny().model, dropout=0.1)
    teacher = SwitchTransformer(model, seed=5)
    alone = build_state(replace(tiny(), model=model))
    experiment = replace(tiny(), model=model, distil=DistilConfig(teacher="in memory"))
    taught = train_step(build_state(experiment, teacher=teacher), some_batch())
    assert taught.cross_entropy == train_step(alone, some_batch()).cross_entropy


def test_the_teacher_stays_as_it_was_and_is_in_no_checkpoint(tmp_path):
    state = state_with()
    before = {name: p.clone() for name, p in state.teacher.named_parameters()}
    alone = Checkpoints(tmp_path / "alone", 1)
    alone.save(0, build_state(dense(tiny())).state_dict(), {})
    train_step(state, some_batch())
    assert all(torch.equal(before[name], p) for name, p in state.teacher.named_parameters())
    assert not state.teacher.training
    contents = state.state_dict()
    alone.load(tmp_path / "alone" / "step_00000000", contents)  # it holds neither more nor less


def test_the_teacher_computes_in_the_run_s_precision_with_routers_in_float32():
    state = state_with(precision="bfloat16")
    assert state.teacher.embedding.weight.dtype == torch.bfloat16
    assert state.teacher.encoder.blocks[1].ffn.router.weight.dtype == torch.float32
    assert train_step(state, some_batch()).soft > 0


def test_a_student_comes_closer_to_its_teacher():
    state = state_with(distil={"soft_weight": 1.0})
    softs = [train_step(state, some_batch()).soft for _ in range(8)]
    assert softs[-1] < softs[0] - 0.1


def test_a_teacher_that_overflows_is_named_and_the_student_stays():
    state = state_with()
    state.teacher.encoder.blocks[0].ffn.w_in.weight.data.fill_(1e30)
    state.teacher.encoder.blocks[0].ffn.w_out.weight.data.fill_(1e30)
    before = {name: p.clone() for name, p in state.model.named_parameters()}
    with pytest.raises(DivergenceError, match="the output of the teacher"):
        train_step(state, some_batch())
    assert all(torch.equal(before[name], p) for name, p in state.model.named_parameters())


def test_without_a_teacher_nothing_is_said_of_one():
    assert train_step(build_state(tiny()), some_batch()).soft is None


# Whole runs


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return switchworks.load(run_dir)[0].state_dict()


@pytest.fixture(scope="module")
def student(tiny_experiment, tiny_run) -> Experiment:
    """The dense twin of the tiny run, taught by it, in the paper's mixture at temperature 2."""
    distil = DistilConfig(teacher=str(tiny_run), temperature=2.0)
    return dense(tiny_experiment, name="student", micro_batches=2, distil=distil)


@pytest.fixture(scope="module")
def student_run(student, tmp_path_factory) -> Path:
    return train(student, tmp_path_factory.mktemp("students") / "student")


def test_a_student_of_a_sparse_run_trains_from_the_command_line(
    tiny_run, corpus, tmp_path, monkeypatch, capsys
):
    (tmp_path / "students.py").write_text(DENSE)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["train", "students:dense", "--run-dir", str(tmp_path / "run")]
    words += ["--data.path", str(corpus), "--steps", "5", "--threads", "1"]
    assert main([*words, "--distil.teacher", str(tiny_run), "--distil.soft-weight", "0.5"]) == 0
    output = capsys.readouterr().out
    assert f"student: 43 of 47 tensors from {tiny_run}" in output
    assert "fresh: encoder.blocks.1.ffn.w_in.weight" in output
    assert " soft " in output
    settings = (tmp_path / "run" / "experiment.toml").read_text()
    assert "soft_weight = 0.5" in settings


def test_hard_and_soft_loss_are_in_the_metrics_of_a_student_alone(student_run, tiny_run):
    training = [line for line in lines_of(student_run) if "train/loss" in line]
    assert len(training) == 4
    assert all(line["train/soft"] > 0 for line in training)
    assert not any("train/soft" in line for line in lines_of(tiny_run))


def test_a_student_interrupted_and_resumed_ends_bitwise_the_same(student, student_run, tmp_path):
    half = tmp_path / "half"
    train(replace(student, steps=10), half)
    train(student, half, resume=True)
    whole, resumed = weights_of(student_run), weights_of(half)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert lines_of(half)[-1]["val/loss"] == lines_of(student_run)[-1]["val/loss"]


def test_another_teacher_is_another_experiment(student, student_run, tmp_path):
    other = replace(student, distil=replace(student.distil, teacher=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"distil\.teacher: .* now"):
        train(other, student_run, resume=True)
    with pytest.raises(ConfigError, match=r"distil\.soft_weight: 0\.25 there, \(absent\) now"):
        train(replace(student, distil=None), student_run, resume=True)


def test_a_student_may_begin_with_values_of_its_own(student, tmp_path):
    slow = replace(student.optim, lr=1e-12)
    own = replace(student.distil, initialise=False)
    run_dir = train(replace(student, steps=1, optim=slow, distil=own), tmp_path / "run")
    first = SwitchTransformer(student.model, seed=student.seed).state_dict()
    assert all(torch.allclose(w, first[n], atol=1e-7) for n, w in weights_of(run_dir).items())


def test_a_teacher_may_be_in_hugging_face_s_format(student, tiny_run, corpus, tmp_path):
    tokenizer = train_sentencepiece([p.read_text() for p in corpus.glob("*.txt")], 512)
    model = replace(student.model, vocab_size=tokenizer.vocab_size + 28, routing=RoutingConfig())
    save_hf(SwitchTransformer(model, seed=1), tmp_path / "hf", tokenizer)
    short = replace(
        student,
        steps=1,
        sample_every=0,
        distil=replace(student.distil, teacher=str(tmp_path / "hf")),
        data=replace(student.data, tokenizer=str(tmp_path / "hf")),
    )
    run_dir = train(short, tmp_path / "run")
    assert switchworks.load(run_dir)[0].config.vocab_size == model.vocab_size


def test_a_run_can_begin_with_the_average_of_the_teacher_s_experts(student, tmp_path, capsys):
    average = replace(student.distil, ffn="average")
    train(replace(student, steps=1, sample_every=0, distil=average), tmp_path / "run")
    first = capsys.readouterr().out
    total = len(list(switchworks.load(tmp_path / "run")[0].parameters()))
    assert f"student: {total} of {total} tensors from" in first


def test_a_teacher_s_experts_are_weighed_by_the_same_rows_on_every_rank(student, tiny_run):
    data = replace(student.data, tokenizer=str(tiny_run))
    corpora = open_dataset(data, vocab_size=student.model.vocab_size)
    seen = Batch.join(rows_to_count(corpora, student.seed))
    assert len(seen.inputs) == COUNTED_ROWS
    of_ranks = [
        corpora.training(batch_size=8, seed=student.seed, rank=rank, world=2).batch(0)
        for rank in range(2)
    ]
    assert torch.equal(seen.inputs[:8], Batch.join(of_ranks).inputs)


def test_a_teacher_whose_weights_have_changed_does_not_go_on_teaching(student, tiny_run, tmp_path):
    teacher = tmp_path / "teacher"
    model, tokenizer = switchworks.load(tiny_run)
    switchworks.save(model, teacher, tokenizer)
    taught = replace(student, distil=replace(student.distil, teacher=str(teacher)), steps=2)
    train(taught, tmp_path / "run")
    shutil.rmtree(teacher)
    switchworks.save(SwitchTransformer(model.config, seed=9), teacher, tokenizer)
    with pytest.raises(CheckpointError, match="its weights have changed"):
        train(replace(taught, steps=4), tmp_path / "run", resume=True)


def test_a_dense_language_model_learns_from_a_sparse_one_live_and_from_a_store(
    tiny_experiment, tmp_path
):
    """Decoders alone: the same first weights, and the same losses from either source."""
    data = replace(tiny_experiment.data, objective="causal", input_length=0, target_length=32)
    short = {"steps": 2, "sample_every": 0, "log_every": 1, "validate_every": 2}
    model = replace(tiny_experiment.model, decoder_only=True)
    sparse = replace(tiny_experiment, name="lm", model=model, data=data, **short)
    teacher = train(sparse, tmp_path / "teacher")
    distil = DistilConfig(teacher=str(teacher), soft_weight=0.5)
    live = dense(sparse, distil=distil)
    beside = train(live, tmp_path / "live")
    copied, fresh = initialise_from_teacher(
        SwitchTransformer(live.model, seed=0), switchworks.load(teacher)[0]
    )
    assert fresh == [f"decoder.blocks.1.ffn.{matrix}.weight" for matrix in ("w_in", "w_out")]
    assert not any("encoder" in name for name in copied)
    stored = replace(live, distil=replace(distil, store=str(tmp_path / "store")))
    precompute_teacher(stored, top_k=384, dtype="float32")
    learnt = train(stored, tmp_path / "stored")
    losses = [
        [line["train/soft"] for line in lines_of(run_dir) if "train/soft" in line]
        for run_dir in (beside, learnt)
    ]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_student_is_taught_a_task_live_and_from_a_store(student, tiny_run, tmp_path):
    """The rows of a task, padded and packed, have probabilities of their own to be known by."""
    table = tmp_path / "colours.csv"
    table.write_text("text,answer\n" + "".join(f"number {i},{i % 7}\n" for i in range(60)))
    tasks = {"tasks": (f"colours={table}:text:answer",), "validation_share": 0.2}
    data = replace(student.data, tokenizer=str(tiny_run), **tasks)
    short = {"steps": 2, "sample_every": 0, "log_every": 1, "validate_every": 2}
    live = replace(student, data=data, evaluate_every=2, micro_batches=1, **short)
    stored = replace(live, distil=replace(live.distil, store=str(tmp_path / "store")))
    precompute_teacher(stored, top_k=384, dtype="float32")
    lines = [lines_of(train(one, tmp_path / name)) for name, one in (("a", live), ("b", stored))]
    soft = [[line["train/soft"] for line in some if "train/soft" in line] for some in lines]
    assert len(soft[0]) == 2
    assert soft[1] == pytest.approx(soft[0], abs=1e-5)
    assert any("task/colours/accuracy" in line for line in lines[0])


def test_dense_ffns_of_a_teacher_s_experts_have_no_place_in_a_sparse_student(student):
    distil = replace(student.distil, ffn="average")
    assert replace(student, distil=distil).distil.ffn == "average"
    sparse = replace(student.model, routing=RoutingConfig(experts=2))
    with pytest.raises(ConfigError, match="this student has experts"):
        replace(student, distil=distil, model=sparse)


def test_experts_without_the_teacher_s_weights_are_a_contradiction():
    with pytest.raises(ConfigError, match=r"distil\.ffn = average"):
        DistilConfig(teacher="x", ffn="average", initialise=False)


# What is refused


def refusal(student: Experiment, tmp_path: Path, kind: type[Exception], **more) -> str:
    """What `train` says instead of beginning."""
    with pytest.raises(kind) as error:
        train(student, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "reason"), [("nowhere", "does not exist"), ("", "none is named")]
)
def test_a_teacher_that_is_not_there_is_explained(given, reason, student, tmp_path):
    lost = replace(student, distil=replace(student.distil, teacher=given))
    message = refusal(lost, tmp_path, CheckpointError)
    assert reason in message
    assert "--distil.teacher PATH" in message


def test_a_teacher_whose_run_has_not_ended_is_explained(student, tiny_run, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "experiment.toml").write_text("")
    early = replace(student, distil=replace(student.distil, teacher=str(tmp_path / "half")))
    assert "a run without a model" in refusal(early, tmp_path, CheckpointError)


def test_a_teacher_with_another_vocabulary_is_refused_with_the_flag_that_helps(
    student, tiny_run, tmp_path
):
    data = replace(student.data, tokenizer="train")
    other = replace(student, data=data, model=replace(student.model, vocab_size=512))
    message = refusal(other, tmp_path, CheckpointError)
    assert f"--data.tokenizer {tiny_run}" in message


def test_the_flag_that_helps_does(student, tiny_run, tmp_path):
    data = replace(student.data, tokenizer=str(tiny_run))
    assert train(replace(student, steps=1, data=data), tmp_path / "run").exists()


def test_a_teacher_without_a_tokenizer_is_refused(student, tmp_path):
    switchworks.save(SwitchTransformer(student.model), tmp_path / "bare")
    bare = replace(student, distil=replace(student.distil, teacher=str(tmp_path / "bare")))
    assert "no tokenizer" in refusal(bare, tmp_path, CheckpointError)


def test_a_decoder_does_not_learn_from_an_encoder_and_a_decoder(student, tmp_path):
    causal = replace(
        student,
        model=replace(student.model, decoder_only=True),
        data=replace(student.data, objective="causal", input_length=0, target_length=64),
    )
    assert "they read different rows" in refusal(causal, tmp_path, ConfigError)


def test_two_sources_of_first_weights_are_refused(student, tiny_run, tmp_path):
    message = refusal(student, tmp_path, ConfigError, init=tiny_run)
    assert "--distil.no-initialise" in message


def test_a_share_beyond_one_and_a_temperature_of_zero_are_refused():
    for settings, message in (
        ({"soft_weight": 1.5}, "soft_weight = 1.5"),
        ({"temperature": 0.0}, "temperature = 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            DistilConfig(teacher="x", **settings)


# The experiment


def test_the_experiment_trains_all_three_and_goes_on_with_what_is_there(
    corpus, tmp_path, monkeypatch
):
    """Share of the gain and compression are taken from the runs' own files."""
    monkeypatch.chdir(tmp_path)
    dense = replace(tiny(), model=replace(tiny().model, routing=None))
    monkeypatch.setitem(RECIPES, "tiny_dense", lambda: dense)
    words = ["tiny", "--out", "runs", "--data.path", str(corpus), "--steps", "2"]
    words += ["--threads", "1", "--sample-every", "0", "--distil.temperature", "2.0"]

    def call() -> str:
        return run_script("distillation.py", *words)

    first = call()
    rows = json.loads((tmp_path / "runs" / "table.json").read_text())
    assert [row["run"] for row in rows] == ["teacher", "baseline", "student"]
    teacher, baseline, student = (row["loss"] for row in rows)
    kept = (student - baseline) / (teacher - baseline)
    assert [row["gain kept"] for row in rows] == pytest.approx([1.0, 0.0, kept])
    sizes = [row["parameters"] for row in rows]
    assert rows[2]["compression"] == pytest.approx(1 - sizes[2] / sizes[0])
    settings = from_toml(Experiment, tmp_path / "runs" / "seed_0" / "student" / "experiment.toml")
    assert settings.distil == DistilConfig(teacher="runs/seed_0/teacher", temperature=2.0)
    again = call()
    assert "step" not in again
    assert again.splitlines() == first.splitlines()[-len(again.splitlines()) :]


def test_a_student_with_more_rows_than_its_teacher_is_refused(byte_model):
    teacher = Teacher("runs/t", byte_model, ByteTokenizer())
    teacher.require_same_ids(ByteTokenizer(), 384)
    with pytest.raises(CheckpointError, match=r"384 rows .* the student 400\.\n  Leave --init out"):
        teacher.require_same_ids(ByteTokenizer(), 400)
