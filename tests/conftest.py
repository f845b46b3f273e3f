"""Fixtures every test shares: a small real corpus, and a tiny trained run."""

import csv
import gc
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import settings
from support.once import made_once, trained_once
from support.shapes import check_shapes, start_checking

PACKAGE = Path(__file__).parent.parent / "switchworks"


def shaped_modules() -> list[str]:
    """The modules that write shapes. To check the others too would make text slow to read."""
    files = [path for path in PACKAGE.rglob("*.py") if "jaxtyping" in path.read_text("utf-8")]
    names = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in files]
    return [".".join(name).removesuffix(".__init__") for name in names]


check_shapes(shaped_modules())
torch.set_num_threads(1)  # tiny shapes gain nothing from more
settings.register_profile("house", deadline=None)  # the machine may be busy
settings.load_profile("house")


gc.disable()  # until all is imported: a tenth of the time to collect tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: it need not be looked at again and again
    gc.enable()


@pytest.fixture(autouse=True)
def a_fresh_start():
    """A test that draws without a seed of its own draws the same in every run."""
    torch.manual_seed(0)
    start_checking()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all workers of this session have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True, scope="session")
def private_cache(shared_folder):
    """Nothing a test makes goes into the user's cache."""
    os.environ["SWITCHWORKS_CACHE"] = str(shared_folder / "cache")


@pytest.fixture(scope="session")
def corpus(shared_folder) -> Path:
    """A folder of English text files: Python's help topics, 0.2 MB."""
    return made_once(shared_folder / "corpus", write_topics)


def write_topics(folder: Path) -> None:
    folder.mkdir()
    for name, text in list(topics.items())[:24]:
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_experiment(corpus):
    """The tiny recipe on the small corpus, on one thread."""
    from switchworks.recipes.tiny import tiny

    recipe = tiny()
    return replace(recipe, threads=1, data=replace(recipe.data, path=str(corpus)))


@pytest.fixture(scope="session")
def trained(shared_folder):
    """Gives the run directory of an experiment, trained once for all tests. They only read it."""
    return partial(trained_once, shared_folder)


@pytest.fixture(scope="session")
def tiny_run(tiny_experiment, trained) -> Path:
    """The run directory of a finished tiny run. Tests only read it."""
    return trained(tiny_experiment)


@pytest.fixture(scope="session")
def classifier(tiny_experiment, trained, shared_folder):
    """A run on 200 sentences that name a colour, and whether it is warm."""
    table = made_once(shared_folder / "colours", write_colours) / "colours.csv"
    data = replace(
        tiny_experiment.data,
        path=None,
        tasks=(f"colours={table}:text:warm",),
        tokenizer="bytes",
        validation_share=0.1,
        input_length=48,
        target_length=8,
    )
    return trained(replace(tiny_experiment, data=data, steps=10, evaluate_every=0))


def write_colours(folder: Path) -> None:
    folder.mkdir()
    rows = [
        (f"The {'wall' if n % 3 else 'door'} number {n} is {colour}.", answer)
        for n in range(50)
        for answer, colours in (("yes", ("red", "orange")), ("no", ("blue", "green")))
        for colour in colours
    ]
    with (folder / "colours.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "warm"), *rows])


@pytest.fixture(scope="session")
def byte_model():
    """A tiny encoder-decoder over bytes, with random weights. Tests only read it."""
    from support.models import byte_transformer

    return byte_transformer(decoder_only=False)


@pytest.fixture(scope="session")
def byte_decoder():
    """The same as a causal model."""
    from support.models import byte_transformer

    return byte_transformer(decoder_only=True)
