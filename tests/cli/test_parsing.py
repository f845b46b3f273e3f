"""Sizes in bytes as words."""

import pytest

from switchworks.cli.parsing import parse_bytes
from switchworks.config import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MB", 512_000_000),
        ("2GB", 2_000_000_000),
        ("1.5GiB", 1_610_612_736),
        ("2 gib", 2_147_483_648),
        (".5KiB", 512),
        ("1TB", 10**12),
        (None, None),
    ],
)
def test_a_size_is_a_number_and_a_unit(text, size):
    assert parse_bytes(text, "--expert-memory") == size


@pytest.mark.parametrize("text", ["", "2", "2G", "GB", "-1GB", "1,5GB", "1e3MB", "2GBs", "nan GB"])
def test_anything_else_is_refused_with_the_units(text):
    with pytest.raises(ConfigError, match=r"is no size\.\n.*1\.5GiB.*TiB"):
        parse_bytes(text, "--expert-memory")
