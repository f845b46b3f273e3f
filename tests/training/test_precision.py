"""Precision "auto": what this machine multiplies faster, settled once for a run."""

from dataclasses import replace

import pytest

from switchworks.recipes.tiny import tiny
from switchworks.training import machine
from switchworks.training.resolve import resolve_precision
from switchworks.training.run_directory import claim, settings_in

AUTO = replace(tiny(), precision="auto")


def machine_with_gain(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: gain)


def test_the_gain_of_bfloat16_is_measured_and_decides():
    gain = machine.bfloat16_gain()
    assert gain > 0
    assert machine.fastest_precision() == ("bfloat16" if gain > 1.2 else "float32")


@pytest.mark.parametrize(("gain", "chosen"), [(0.01, "float32"), (3.0, "bfloat16")])
def test_auto_becomes_what_is_faster_here(monkeypatch, tmp_path, gain, chosen):
    machine_with_gain(monkeypatch, gain)
    assert resolve_precision(AUTO, tmp_path).precision == chosen


def test_a_run_keeps_the_precision_it_began_with_on_any_machine(monkeypatch, tmp_path):
    machine_with_gain(monkeypatch, 3.0)
    claim(tmp_path, resolve_precision(AUTO, tmp_path))
    machine_with_gain(monkeypatch, 0.01)
    assert resolve_precision(AUTO, tmp_path) == settings_in(tmp_path)


def test_bfloat16_asked_for_where_it_is_slow_is_done_with_a_warning(monkeypatch, tmp_path, capsys):
    machine_with_gain(monkeypatch, 0.01)
    asked = replace(tiny(), precision="bfloat16")
    assert resolve_precision(asked, tmp_path) is asked
    assert "100 times slower" in capsys.readouterr().err


def test_float32_asked_for_is_not_second_guessed(monkeypatch, tmp_path, capsys):
    machine_with_gain(monkeypatch, 3.0)
    assert resolve_precision(tiny(), tmp_path).precision == "float32"
    assert capsys.readouterr() == ("", "")
