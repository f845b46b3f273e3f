"""`switchworks doctor`: every kind of fault is made, and found."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import BYTES, TINY
from test_locks import holder

from switchworks import checkpoint
from switchworks.cli.main import main
from switchworks.data import DataConfig
from switchworks.doctor import (
    as_text,
    check_machine,
    check_path,
    check_recipe,
    check_text,
    machine,
    recipe,
    run,
    text,
)
from switchworks.doctor import finding as findings
from switchworks.model import ModelConfig, SwitchTransformer
from switchworks.optim import OptimConfig
from switchworks.quantise import quantise
from switchworks.recipes import RECIPES
from switchworks.recipes.quickstart import quickstart
from switchworks.recipes.tiny import tiny
from switchworks.training.machine import available_memory


def faults(found) -> dict[str, str]:
    """Name -> level of what is not ok."""
    return {each.name: each.level for each in found if each.level != "ok"}


def subjects(found, name: str) -> str:
    return "\n".join(each.subject for each in found if each.name == name)


# What is said


def test_every_fault_has_a_reason_and_something_to_do():
    for name, entry in findings.advice().items():
        assert entry.keys() == {"why", "do"}, name
        assert all(text.strip().endswith((".", "}")) for text in entry.values()), name


def test_every_fault_that_is_judged_has_advice_and_all_advice_is_given():
    sources = "".join(path.read_text() for path in Path(run.__file__).parent.glob("*.py"))
    unused = [name for name in findings.advice() if f'"{name}"' not in sources]
    assert not unused


def test_what_is_ok_takes_a_line_and_the_rest_three_with_the_worst_last():
    bad = findings.judge("b", "problem", "no-text")
    lines = as_text([bad, findings.Finding("ok", "a")]).splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "problem", "why", "do", "1"]
    assert lines[-1] == "1 ok, 0 notes, 0 warnings, 1 problem"


def test_an_error_of_any_kind_is_a_finding_with_its_own_advice():
    def broken():
        yield findings.Finding("ok", "before")
        raise ZeroDivisionError("torn\n  Fetch it again.")

    before, after = findings.guarded("file", broken)
    assert before.level == "ok"
    assert (after.level, after.subject, after.fix) == ("problem", "file: torn", "Fetch it again.")


@pytest.mark.parametrize(
    ("levels", "status"), [([], 0), (["ok", "note"], 0), (["warning", "note"], 3), (["problem"], 4)]
)
def test_the_exit_status_is_that_of_the_worst(levels, status):
    assert findings.exit_status([findings.Finding(level, "x") for level in levels]) == status


# The machine


def test_a_machine_is_looked_at_within_a_few_lines(tmp_path):
    found = list(check_machine(tmp_path / "not" / "yet"))
    assert {each.subject.split()[0].rstrip(":") for each in found} == {
        *("torch", "threads", "instructions", "bfloat16", "memory", "disk", "compiler", "GPU")
    }


def test_a_poor_machine_has_a_finding_for_each_lack(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(machine.machine, "available_memory", lambda: 2**30)
    monkeypatch.setattr(machine, "usable_cores", lambda: 0.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(machine.machine, "bfloat16_gain", lambda: 0.03)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = faults(check_machine(tmp_path))
    assert {name: level for name, level in found.items() if name != "unused-gpu"} == {
        "torch-build": "warning",
        "too-many-threads": "warning",
        "no-vectors": "warning",
        "slow-bfloat16": "note",
        "little-memory": "warning",
        "little-disk": "problem",
        "no-compiler": "note",
    }


def test_a_container_s_limits_count_in_either_version(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert (available_memory(), machine.usable_cores()) == (2000, 0.5)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert (available_memory() or 0) > 2000
    for name, number in (("limit_in_bytes", "70"), ("usage_in_bytes", "30")):
        (tmp_path / "memory").mkdir(exist_ok=True)
        (tmp_path / "memory" / f"memory.{name}").write_text(number)
    assert available_memory() == 40


# A recipe


@pytest.fixture(autouse=True)
def a_machine_with_room(monkeypatch):
    """Recipes are judged as on a machine that holds any of them."""
    monkeypatch.setattr(machine.machine, "available_memory", lambda: 2**50)
    monkeypatch.setattr(recipe, "free_bytes", lambda folder: 2**50)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_the_house_have_no_problem_and_few_warnings(name, tmp_path):
    found = faults(check_recipe(RECIPES[name](), tmp_path))
    known = {"c4_switch_c": {"few-slots"}}
    assert {fault for fault, level in found.items() if level != "note"} == known.get(name, set())


def routed(**settings):
    model = replace(tiny().model, routing=replace(tiny().model.routing, **settings))
    return replace(tiny(), model=model)


def trained_by(**settings):
    return replace(tiny(), optim=OptimConfig(**settings))


@pytest.mark.parametrize(
    ("experiment", "fault", "level"),
    [
        (routed(capacity_factor=0.05), "few-slots", "warning"),
        (routed(capacity_factor=0.5), "always-drops", "warning"),
        (routed(experts=2, capacity_factor=1.01), "little-slack", "note"),
        (replace(routed(experts=14, group_sequences=1), batch_size=1), "few-tokens", "warning"),
        (routed(balance_weight=0.0), "no-balance", "warning"),
        (routed(balance_weight=1.0), "much-balance", "warning"),
        (trained_by(lr=30.0, warmup_steps=100), "high-rate", "warning"),
        (trained_by(name="adamw", lr=0.5, schedule="constant"), "high-rate", "warning"),
        (trained_by(lr=0.001, warmup_steps=100), "low-rate", "note"),
        (trained_by(lr=0.03, schedule="cosine", warmup_steps=20), "all-warmup", "warning"),
    ],
)
def test_an_absurd_setting_is_found(experiment, fault, level, tmp_path):
    assert faults(check_recipe(experiment, tmp_path)).get(fault) == level


def test_a_low_rate_is_usual_for_a_model_that_is_trained_already(tmp_path):
    low = trained_by(lr=0.001, warmup_steps=100)
    assert "low-rate" not in faults(check_recipe(low, tmp_path, tuned=True))


def test_the_rows_that_are_proposed_give_four_slots(tmp_path):
    few = routed(capacity_factor=0.05)
    (fix,) = {each.fix for each in check_recipe(few, tmp_path) if "decoder" in each.subject}
    rows = int(fix.split("group-sequences ")[1].split()[0])
    assert (rows, int(rows * 14 * 0.05 / 4), int((rows - 1) * 14 * 0.05 / 4)) == (23, 4, 3)


def test_a_model_that_fits_neither_memory_nor_disk_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.machine, "available_memory", lambda: 1000)
    monkeypatch.setattr(recipe, "free_bytes", lambda folder: 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = faults(check_recipe(quickstart(), tmp_path))
    assert (found["no-memory"], found["no-disk"]) == ("problem", "problem")


@pytest.mark.parametrize(("steps", "level"), [(20, None), (100, "note"), (1000, "warning")])
def test_a_text_read_over_and_over_is_found_from_its_size(steps, level, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 1000)
    data = replace(tiny().data, path=str(tmp_path))
    found = faults(check_recipe(replace(tiny(), steps=steps, data=data), tmp_path))
    assert found.get("many-epochs") == level
    assert found["rare-ids"] == "note"


# A text


def sentences(first: int, number: int) -> list[str]:
    """Documents of some thirty words that have no run of five in common."""
    return [" ".join(f"w{n}x{k}" for k in range(30)) for n in range(first, first + number)]


def write_texts(folder: Path, documents: list[str]) -> DataConfig:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": each}) + "\n" for each in documents)
    (folder / "a.jsonl").write_text(lines)
    return DataConfig(path=str(folder), validation_share=0.2)


def test_a_good_text_has_no_fault(tmp_path):
    assert not faults(check_text(write_texts(tmp_path, sentences(0, 60))))


def test_copies_within_a_text_and_across_its_split_are_found(tmp_path):
    documents = sentences(0, 40)
    config = write_texts(tmp_path, [*documents, *documents, *(f"{x} more" for x in documents)])
    found = list(check_text(config))
    assert faults(found) == {"duplicates": "warning", "copies-across": "warning"}
    assert "33.3% of the documents are copies" in subjects(found, "duplicates")
    dropped = faults(check_text(replace(config, near_copies="drop")))
    assert dropped == {"duplicates": "warning"}


def test_empty_files_bad_lines_and_a_second_script_are_notes(tmp_path):
    russian = [text.translate(str.maketrans("wx", "ыю")) for text in sentences(100, 20)]
    config = write_texts(tmp_path, [*sentences(0, 40), *russian])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{torn\n")
    (tmp_path / "b.txt").write_text("")
    found = list(check_text(config))
    assert faults(found) == dict.fromkeys(["empty-files", "left-out", "several-scripts"], "note")
    assert "Latin 67%, Cyrillic 33%" in subjects(found, "several-scripts")
    assert "1 not JSON" in subjects(found, "left-out")


def test_a_text_too_small_to_hold_any_of_it_out_is_warned_of(tmp_path):
    config = replace(write_texts(tmp_path, ["one document"]), validation_share=1e-9)
    assert faults(check_text(config)) == {"none-held-out": "warning"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b""), ("a.txt", b"\0\0"), ("a.parquet", b"PAR1"), ("a.txt", b" \n"), ("a.pdf", b"")],
)
def test_a_text_that_cannot_be_read_is_a_problem(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert "problem" in faults(check_path(tmp_path)).values()


def test_a_tokenizer_that_spells_the_text_in_bytes_is_found(tmp_path):
    config = write_texts(tmp_path, [text.replace("w", "жы") for text in sentences(0, 60)])
    found = faults(check_text(replace(config, tokenizer="bytes")))
    assert found["poor-coverage"] == "warning"


def test_ids_that_never_occur_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "SMALL_VOCABULARY", 100)
    config = write_texts(tmp_path, sentences(0, 400))
    assert faults(check_text(replace(config, tokenizer="bytes")))["unused-ids"] == "note"


def test_no_more_than_the_beginning_of_a_large_text_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, "MAX_DOCUMENTS", 10)
    monkeypatch.setattr(text, "MAX_CHARACTERS", 8000)
    first = next(iter(check_text(write_texts(tmp_path, sentences(0, 60)))))
    assert "beginning: 10 documents" in first.subject
    assert "reading at most 10 documents" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_is_a_problem_beside_what_the_text_has(tmp_path):
    config = replace(write_texts(tmp_path / "t", sentences(0, 60)), tokenizer=str(tmp_path / "no"))
    found = list(check_text(config))
    assert faults(found) == {"unreadable": "problem"}
    assert len(found) > 3


# A model


def saved(folder: Path, config: ModelConfig = TINY, change=lambda model: None) -> Path:
    built = SwitchTransformer(config, seed=0)
    with torch.no_grad():
        change(built)
    checkpoint.save(built, folder / "m")
    return folder / "m"


def copy_an_expert(built: SwitchTransformer) -> None:
    experts = built.get_submodule("encoder.blocks.1.ffn.experts")
    for stack in experts.parameters():
        stack[3] = stack[1]


def test_a_sound_model_lacks_a_tokenizer_and_nothing_else(tmp_path):
    assert faults(check_path(saved(tmp_path))) == {"no-tokenizer": "note"}


def test_an_expert_that_is_another_is_found_in_its_layer(tmp_path):
    found = list(check_path(saved(tmp_path, change=copy_an_expert)))
    assert faults(found)["equal-experts"] == "warning"
    assert "encoder.blocks.1.ffn.experts: experts 1, 3 of 4" in subjects(found, "equal-experts")


def test_an_expert_of_zeros_and_a_value_that_is_not_finite_are_found(tmp_path):
    def change(built: SwitchTransformer) -> None:
        for stack in built.get_submodule("decoder.blocks.1.ffn.experts").parameters():
            stack[2] = 0
        built.embedding.weight[0, 0] = torch.nan

    found = list(check_path(saved(tmp_path, change=change)))
    assert faults(found)["dead-experts"] == "warning"
    assert faults(found)["not-finite"] == "problem"
    assert "embedding.weight" in subjects(found, "not-finite")


def test_a_flipped_byte_is_found_by_its_file(tmp_path):
    path = saved(tmp_path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    found = list(check_path(path))
    assert "model.safetensors has changed" in subjects(found, "unreadable")


@pytest.mark.parametrize("name", ["config.toml", "model.safetensors", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 64, None])
def test_no_damage_of_a_model_ends_the_doctor(name, content, tmp_path):
    path = saved(tmp_path)
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    if (path / "config.toml").exists():
        assert "problem" in faults(check_path(path)).values()
    else:  # then it is a folder without text
        assert faults(check_path(path)) == {"unreadable": "problem"}


def test_a_hugging_face_model_is_looked_into_too(tmp_path):
    built = SwitchTransformer(BYTES, seed=0)
    with torch.no_grad():
        for stack in built.get_submodule("encoder.blocks.1.ffn.experts").parameters():
            stack[1] = stack[0]
    checkpoint.save_hf(built, tmp_path / "hf")
    assert faults(check_path(tmp_path / "hf")) == {
        "equal-experts": "warning",
        "no-tokenizer": "note",
    }


def test_what_of_a_quantised_model_is_not_is_counted(tmp_path):
    checkpoint.save(quantise(SwitchTransformer(TINY, seed=0)), tmp_path / "q")
    found = list(check_path(tmp_path / "q"))
    assert faults(found)["much-unquantised"] == "note"
    assert "router" in subjects(found, "much-unquantised")


def test_a_model_larger_than_the_memory_is_compared_with_its_hashes_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.machine, "available_memory", lambda: 1000)
    (only,) = check_path(saved(tmp_path))
    assert (only.name, "hashes are as written" in only.subject) == ("large-model", True)


# A run


def a_run(folder: Path, losses, **more) -> Path:
    folder.mkdir()
    lines = [
        {"step": n, "seconds": float(n), "train/loss": loss} | {k: v[n] for k, v in more.items()}
        for n, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


FALLING = [5 - 0.1 * n for n in range(20)]


def test_a_run_that_learns_and_has_ended_has_no_fault(tiny_run):
    assert faults(check_path(tiny_run)) == {}


def test_a_run_that_nobody_writes_and_that_has_no_model_is_unfinished(tmp_path):
    assert faults(check_path(a_run(tmp_path / "r", FALLING))) == {"unfinished": "note"}


@pytest.mark.parametrize(
    ("losses", "fault", "level"),
    [
        ([*FALLING, 3.5, 3.8, 4.2], "diverging", "warning"),
        ([*FALLING, 5.0, 7.0, 9.0], "diverging", "problem"),
        ([*FALLING[:10], 9.0, *FALLING[10:]], "spikes", "warning"),
        ([*FALLING, float("nan")], "diverged", "problem"),
    ],
)
def test_a_loss_that_rises_jumps_or_ends_is_found(losses, fault, level, tmp_path):
    found = list(check_path(a_run(tmp_path / "r", losses)))
    assert faults(found)[fault] == level
    assert fault != "spikes" or "at 10 step" in subjects(found, "spikes")


def test_a_noisy_loss_that_falls_is_no_fault(tmp_path):
    noisy = [loss + 0.3 * (n % 2) for n, loss in enumerate(FALLING)]
    assert faults(check_path(a_run(tmp_path / "r", noisy))) == {"unfinished": "note"}


def test_idle_experts_dropped_tokens_and_overfitting_are_found(tmp_path):
    loads = [[0.5, 0.5, 0.0, 0.0]] * 20
    more = {"load/encoder.1": loads, "train/dropped": [0.4] * 20, "val/loss": FALLING[::-1]}
    found = list(check_path(a_run(tmp_path / "r", FALLING, **more)))
    names = ["idle-experts", "much-dropped", "overfits"]
    assert [faults(found)[name] for name in names] == ["warning"] * 3
    assert "encoder.1: experts 2, 3 of 4" in subjects(found, "idle-experts")


def test_a_router_that_has_collapsed_is_a_problem(tmp_path):
    loads = {"load/encoder.1": [[1.0, 0.0, 0.0, 0.0]] * 20}
    found = faults(check_path(a_run(tmp_path / "r", FALLING, **loads)))
    assert found["idle-experts"] == "problem"


def test_text_read_too_often_is_found_in_a_run(tmp_path):
    found = faults(check_path(a_run(tmp_path / "r", FALLING, **{"epoch/en": range(20)})))
    assert found["many-epochs"] == "warning"


def test_who_holds_the_lock_is_named_and_silence_is_a_stall(tmp_path):
    path = a_run(tmp_path / "r", FALLING)
    with holder(path) as process:
        lively = list(check_path(path))
        old = time.time() - run.STALLED_SECONDS - 60
        os.utime(path / "metrics.jsonl", (old, old))
        silent = list(check_path(path))
    assert faults(lively) == {}
    assert any(f"process {process.pid} on" in each.subject for each in lively)
    assert faults(silent) == {"stalled": "warning"}
    assert faults(check_path(path)) == {"unfinished": "note"}


def test_damaged_lines_and_settings_of_a_run_are_findings(tmp_path):
    path = a_run(tmp_path / "r", FALLING, **{"load/encoder.1": [[0.5], *[[0.5, 0.5]] * 19]})
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "train')
    (path / "experiment.toml").write_bytes(b"\xff=")
    assert faults(check_path(path)) == {"torn-lines": "warning", "unreadable": "problem"}


def test_a_run_without_a_line_is_a_note(tmp_path):
    (tmp_path / "experiment.toml").write_text("")
    assert faults(check_path(tmp_path)) == {"no-metrics": "note"}


def test_a_checkpoint_is_compared_with_its_hashes_and_looked_into(tiny_run, tmp_path):
    newest = shutil.copytree(tiny_run / "checkpoints" / "step_00000020", tmp_path / "c")
    assert faults(check_path(newest)) == {}
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "has changed" in subjects(list(check_path(newest)), "unreadable")


def test_a_value_in_a_checkpoint_that_is_not_finite_is_found(tmp_path):
    state = {"model": {"a": torch.tensor([1.0, torch.inf]), "b": torch.ones(2)}}
    path = checkpoint.Checkpoints(tmp_path, keep=1).save(1, state, {})
    found = list(check_path(path))
    assert faults(found) == {"not-finite": "problem"}
    assert subjects(found, "not-finite").endswith("model.a")


# The verb


def test_the_verb_looks_at_the_machine_a_recipe_and_its_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) in (0, 3, 4)
    assert "torch" in capsys.readouterr().out
    write_texts(tmp_path / "texts", sentences(0, 60))
    assert main(["doctor", "tiny", "--optim.lr", "30", "--data.path", "texts"]) in (3, 4)
    out = capsys.readouterr().out
    assert "warning  rate: 3 at its highest" in out
    assert "text texts, all: 60 documents" in out


def test_json_has_what_is_printed_and_the_status(tmp_path, capsys):
    path = saved(tmp_path, change=copy_an_expert)
    assert main(["doctor", str(path), "--json", str(tmp_path / "a.json")]) == 3
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["status"] == 3
    assert figures["counts"] == {"ok": 3, "note": 1, "warning": 1, "problem": 0}
    (equal,) = (each for each in figures["findings"] if each["name"] == "equal-experts")
    assert equal["level"] == "warning"
    out = capsys.readouterr().out
    assert all(equal[part] in out for part in ("subject", "reason", "fix"))


def test_the_exit_status_is_0_3_or_4(tmp_path, tiny_run):
    assert main(["doctor", str(tiny_run)]) == 0
    assert main(["doctor", str(saved(tmp_path, change=copy_an_expert))]) == 3
    (tmp_path / "m" / "manifest.json").unlink()
    (tmp_path / "m" / "model.safetensors").unlink()
    assert main(["doctor", str(tmp_path / "m")]) == 4


@pytest.mark.parametrize("words", [["no/where"], ["nothing"], ["--init", "m"], ["tiny", "--what"]])
def test_words_that_mean_nothing_are_refused(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *words]) == 2


def test_the_page_names_every_fault():
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    assert [name for name in findings.advice() if f"`{name}`" not in page] == []


def test_dense_recipes_have_no_routing_to_judge(tmp_path):
    dense = replace(tiny(), model=replace(tiny().model, routing=None))
    found = list(check_recipe(dense, tmp_path))
    assert not any("expert" in each.subject for each in found)
