"""A server of two models with random weights, for tests that leave it as it was."""

from collections.abc import Iterator

import httpx
import pytest
from support.models import varied_transformer
from support.serving import serving

from switchworks.engine import EngineConfig
from switchworks.model import SwitchTransformer
from switchworks.serve import ServeConfig

LIMITS = ServeConfig(
    max_input=200, max_length=100, engine=EngineConfig(max_rows=8, cache_memory=2**19)
)


@pytest.fixture(scope="package")
def filler() -> SwitchTransformer:
    """An encoder-decoder."""
    return varied_transformer(decoder_only=False)


@pytest.fixture(scope="package")
def causal() -> SwitchTransformer:
    """A decoder-only model."""
    return varied_transformer(decoder_only=True)


@pytest.fixture(scope="package")
def models(filler, causal) -> dict[str, SwitchTransformer]:
    return {"filler": filler, "causal": causal}


@pytest.fixture(scope="package")
def address(models) -> Iterator[str]:
    """Of a server of both."""
    with serving(models, LIMITS) as address:
        yield address


@pytest.fixture
def client(address) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client
