"""Requests made from the OpenAPI document: none of them is an error of the server, and what is
answered has the form that the document tells."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from support.serving import serving

from switchworks.engine import EngineConfig
from switchworks.serve import ServeConfig

LIMITS = ServeConfig(max_length=20, max_input=100, engine=EngineConfig(max_rows=4))
PATHS = ("/v1/completions", "/v1/generate", "/v1/routing", "/v1/models", "/v1/status", "/health")
MODES = {"as it says": GenerationMode.POSITIVE, "otherwise": GenerationMode.NEGATIVE}


@pytest.fixture(scope="module")
def document(filler, causal):
    """The OpenAPI document of a server that answers at once."""
    with serving({"filler": filler, "causal": causal}, LIMITS) as address:
        yield schemathesis.openapi.from_url(address + "/openapi.json")


def fuzz(operation, mode, count):
    """Asks `count` times. The document cannot tell which settings go together: 422 is no error."""

    @settings(
        max_examples=count,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    ask()


@pytest.mark.parametrize("path", PATHS[:3])
@pytest.mark.parametrize("mode", MODES)
def test_bodies_made_from_the_document_are_answered_as_it_says(path, mode, document):
    fuzz(document[path]["POST"], MODES[mode], 20)


@pytest.mark.parametrize("path", PATHS[3:])
def test_what_is_only_read_is_answered_as_the_document_says(path, document):
    fuzz(document[path]["GET"], GenerationMode.POSITIVE, 3)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS[:3])
@pytest.mark.parametrize("mode", MODES)
def test_many_bodies_are_answered_as_the_document_says(path, mode, document):
    fuzz(document[path]["POST"], MODES[mode], 400)
