"""docs/serving.md: its commands do what it says."""

import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from switchworks.engine import EngineConfig
from switchworks.serve import ServeConfig

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCK = next(block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) if "curl" in block)
COMMANDS = BLOCK.strip().split("\n\n")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda command: command.split()[1 + command.startswith("curl -N")]
)
def test_a_line_of_curl_is_answered(address, command):
    script = command.replace("localhost:8000", address).replace("curl ", "curl --fail --silent ", 1)
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_python_of_the_page_runs(address, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    code = code.replace("http://127.0.0.1:8000", address).replace('"quickstart"', '"filler"')
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_every_limit_is_told_with_its_default():
    for config in (ServeConfig(), EngineConfig()):
        for field in fields(config):
            if field.name not in ("engine", "log_texts"):
                assert f"`--{field.name.replace('_', '-')}`" in PAGE
    assert "1,000,000 bytes" in PAGE
    assert (ServeConfig().max_body, ServeConfig().max_input) == (1_000_000, 2048)


def test_every_path_is_told(address):
    import httpx

    for path in httpx.get(f"{address}/openapi.json").json()["paths"]:
        assert f"{path}`" in PAGE
