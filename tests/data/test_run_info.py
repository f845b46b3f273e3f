"""What a run directory says of its text."""

import pytest

from switchworks.config import ConfigError
from switchworks.data.run_info import run_data_config


def test_settings_without_data_are_not_those_of_a_run(tmp_path):
    (tmp_path / "experiment.toml").write_text("steps = 3")
    with pytest.raises(ConfigError, match=r"experiment\.toml has no \[data\], .*\n  Name a run"):
        run_data_config(tmp_path)


def test_another_folder_has_no_settings(tmp_path):
    assert run_data_config(tmp_path) is None
