"""A server with two models over bytes, for tests that only ask it."""

import pytest
from support.models import varied_transformer
from support.serving import serving

from switchworks.engine import EngineConfig
from switchworks.serve import ServeConfig

LIMITS = ServeConfig(
    max_input=200, max_length=100, engine=EngineConfig(max_rows=8, cache_memory=2**19)
)


@pytest.fixture(scope="session")
def filler():
    """An encoder-decoder. Tests only read it."""
    return varied_transformer(decoder_only=False)


@pytest.fixture(scope="session")
def writer():
    """A decoder-only model. Tests only read it."""
    return varied_transformer(decoder_only=True)


@pytest.fixture(scope="session")
def address(filler, writer):
    """Of a server of both under these names."""
    with serving({"filler": filler, "writer": writer}, LIMITS) as address:
        yield address
