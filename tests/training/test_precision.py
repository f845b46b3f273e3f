"""Settings that may be "auto": resolved once, when a run is assembled, and printed."""

from dataclasses import replace

import pytest

from switchworks.config import ConfigError
from switchworks.recipes.quickstart import quickstart, quickstart_lm
from switchworks.recipes.tiny import tiny
from switchworks.training import machine
from switchworks.training.resolve import resolve_auto
from switchworks.training.run_directory import claim, settings_in

AUTO = replace(tiny(), precision="auto")


def machine_with_gain(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: gain)


def test_the_gain_of_bfloat16_is_measured_and_decides():
    gain = machine.bfloat16_gain()
    assert gain > 0
    assert machine.fastest_precision() == ("bfloat16" if gain > 1.2 else "float32")


@pytest.mark.parametrize(("gain", "chosen"), [(0.01, "float32"), (3.0, "bfloat16")])
def test_auto_becomes_what_is_faster_here_and_is_printed(
    monkeypatch, tmp_path, capsys, gain, chosen
):
    machine_with_gain(monkeypatch, gain)
    assert resolve_auto(AUTO, tmp_path).precision == chosen
    printed = capsys.readouterr().out
    assert f"precision auto -> {chosen}: bfloat16 products run at {gain:.2g} times" in printed


@pytest.mark.parametrize(("gain", "steps"), [(0.01, (550, 385)), (3.0, (1000, 700))])
def test_the_steps_of_quickstart_follow_from_the_precision(monkeypatch, tmp_path, gain, steps):
    machine_with_gain(monkeypatch, gain)
    recipes = quickstart(), quickstart_lm()
    assert tuple(resolve_auto(recipe, tmp_path).steps for recipe in recipes) == steps


def test_steps_that_are_asked_for_win(monkeypatch, tmp_path):
    machine_with_gain(monkeypatch, 3.0)
    assert resolve_auto(replace(quickstart(), steps=7), tmp_path).steps == 7


def test_automatic_steps_need_a_number_for_either_precision():
    with pytest.raises(ConfigError, match="steps = 'auto' needs two numbers"):
        replace(tiny(), steps="auto")


def test_a_run_keeps_what_it_began_with_on_any_machine(monkeypatch, tmp_path):
    experiment = replace(quickstart(), kernels="auto")
    machine_with_gain(monkeypatch, 3.0)
    claim(tmp_path, resolve_auto(experiment, tmp_path))
    machine_with_gain(monkeypatch, 0.01)
    assert resolve_auto(experiment, tmp_path) == settings_in(tmp_path)


def test_bfloat16_asked_for_where_it_is_slow_is_done_with_a_warning(monkeypatch, tmp_path, capsys):
    machine_with_gain(monkeypatch, 0.01)
    asked = replace(tiny(), precision="bfloat16")
    assert resolve_auto(asked, tmp_path).precision == "bfloat16"
    assert "100 times slower" in capsys.readouterr().err


def test_what_is_asked_for_is_not_second_guessed(monkeypatch, tmp_path, capsys):
    machine_with_gain(monkeypatch, 3.0)
    asked = replace(tiny(), kernels="reference")
    assert resolve_auto(asked, tmp_path) == asked
    assert capsys.readouterr() == ("", "")


def test_automatic_kernels_are_the_fast_ones_where_they_were_measured_faster(tmp_path):
    dense = replace(tiny(), model=replace(tiny().model, routing=None))
    settings = {
        "sparse, float32": (tiny(), "fast"),
        "dense, float32": (dense, "reference"),
        "sparse, bfloat16": (replace(tiny(), precision="bfloat16"), "reference"),
        "compiled": (replace(tiny(), compile=True), "reference"),
    }
    for name, (experiment, kernels) in settings.items():
        assert resolve_auto(experiment, tmp_path).kernels == kernels, name
