"""One server of two models with random weights, for tests that leave it as it was."""

from collections.abc import Iterator

import httpx
import pytest
from support.models import byte_transformer
from support.serving import serving

from switchworks.model import SwitchTransformer


@pytest.fixture(scope="package")
def models() -> dict[str, SwitchTransformer]:
    return {name: byte_transformer(decoder_only=name == "causal") for name in ("filler", "causal")}


@pytest.fixture(scope="package")
def address(models: dict[str, SwitchTransformer]) -> Iterator[str]:
    with serving(models) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client
