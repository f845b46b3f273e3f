"""The sizes of the papers by name: parameters against transformers and against printed figures."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import mostly_slow
from torch import nn

from switchworks.cli.main import main
from switchworks.config import ConfigError
from switchworks.model import ModelConfig
from switchworks.model.sizes import flops_per_sequence, num_parameters
from switchworks.optim import OptimConfig
from switchworks.recipes import RECIPES, find_recipe
from switchworks.recipes.sizes import FAMILIES, SIZES

DENSE = [name for name, size in SIZES.items() if size.routing is None]
# transformers has no gated experts (its issue 25347)
SPARSE = [name for name, size in SIZES.items() if size.routing is not None and not size.gated]


def their_parameters(name: str, size: ModelConfig) -> int:
    """How many parameters the model of transformers with the shape of `size` has."""
    import transformers

    shape: dict[str, Any] = {
        field: getattr(size, field)
        for field in ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers")
    } | {"num_decoder_layers": size.num_layers}
    with torch.device("meta"):
        if size.routing is not None:
            sparse_layers = size.num_layers // size.routing.every
            config = transformers.SwitchTransformersConfig(
                **shape,
                num_experts=size.routing.experts,
                num_sparse_encoder_layers=sparse_layers,
                num_sparse_decoder_layers=sparse_layers,
            )
            model = transformers.SwitchTransformersForConditionalGeneration(config)
        elif name.startswith("mt5"):
            model = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**shape))
        else:
            kind = "gated-gelu" if size.gated else "relu"
            config = transformers.T5Config(**shape, feed_forward_proj=kind)
            model = transformers.T5ForConditionalGeneration(config)
        if not size.tied_head:  # new models of transformers 5 are tied, those released are not
            model.lm_head.weight = nn.Parameter(torch.empty(size.vocab_size, size.d_model))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_size_has_the_parameters_of_the_same_model_in_transformers(name):
    assert num_parameters(SIZES[name]) == their_parameters(name, SIZES[name])


@pytest.mark.parametrize("name", SPARSE)
def test_a_switch_size_has_the_parameters_of_the_same_model_in_transformers(name):
    """Each expert adds as many as any other, so theirs are counted with 2 and with 3 experts:
    with 2048, even a model without memory takes half a minute there."""
    size = SIZES[name]
    assert size.routing is not None
    two, three = (
        their_parameters(name, replace(size, routing=replace(size.routing, experts=experts)))
        for experts in (2, 3)
    )
    assert num_parameters(size) == two + (size.routing.experts - 2) * (three - two)


@pytest.mark.parametrize(
    ("name", "printed", "unit"),
    [
        ("t5_base", "223", 1e6),
        ("switch_base_16", "1.1", 1e9),
        ("switch_base_32", "2.0", 1e9),
        ("switch_base_64", "3.8", 1e9),
        ("switch_base_128", "7.4", 1e9),
        ("switch_base_256", "14.7", 1e9),
        ("t5_v1_1_xxl", "11", 1e9),
        ("switch_large_128", "26", 1e9),
        ("switch_xxl_128", "395", 1e9),
        ("switch_c_2048", "1571", 1e9),
    ],
)
def test_a_size_has_the_parameters_the_paper_prints(name, printed, unit):
    """Fedus et al. 2021, tables 7, 8 and 9, to the last digit printed."""
    digits = len(printed.partition(".")[2])
    assert f"{num_parameters(SIZES[name]) / unit:.{digits}f}" == printed


@pytest.mark.parametrize(("name", "millions"), [("t5_large", 739), ("switch_base_128", 7410)])
def test_two_sizes_come_within_two_thousandths_of_the_paper_s_text(name, millions):
    """Fedus et al. 2021, sections 3 and 4: 739M and 7,410M, where 737.7M and 7,415.2M come out."""
    assert num_parameters(SIZES[name]) / 1e6 == pytest.approx(millions, rel=0.002)


def test_t5_base_has_223_million_parameters_exactly():
    assert num_parameters(SIZES["t5_base"]) == 222_903_552


@pytest.mark.parametrize(
    ("name", "millions"),
    [(2, 279.5), (4, 392.8), (8, 619.3), (16, 1072.4), (32, 1978.5), (64, 3790.7), (128, 7415.2)],
)
def test_switch_base_has_the_parameters_of_its_experts(name, millions):
    assert round(num_parameters(SIZES[f"switch_base_{name}"]) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [
        ("t5_base", 124),
        ("t5_large", 425),
        ("t5_v1_1_xxl", 6300),
        ("switch_base_2", 124),
        ("switch_base_128", 124),
        ("switch_large_128", 425),
        ("switch_xxl_128", 6300),
        ("switch_c_2048", 890),
    ],
)
def test_a_size_takes_the_flops_of_table_9(name, gigaflops):
    """Fedus et al. 2021, table 9, at the lengths of the C4 recipes."""
    data = find_recipe(name)().data
    assert (data.input_length, data.target_length) == (512, 114)
    flops = flops_per_sequence(SIZES[name], data.input_length, data.target_length)
    assert flops / 1e9 == pytest.approx(gigaflops, rel=0.01)


def test_switch_base_plus_costs_as_much_more_as_it_is_slower():
    """Fedus et al. 2021, table 1: 1000 and 780 examples a second, at the same capacity factor."""
    base, plus = (
        flops_per_sequence(SIZES[name], 512, 114)
        for name in ("switch_base_128", "switch_base_plus")
    )
    assert plus / base == pytest.approx(1000 / 780, rel=0.03)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_a_recipe_of_its_own_name(name):
    experiment = find_recipe(name)()
    assert (experiment.name, experiment.model) == (name, SIZES[name])
    tokens = experiment.batch_size * experiment.data.input_length
    assert tokens == 2**20


def test_a_size_is_trained_on_c4_as_the_paper_says():
    """Fedus et al. 2021, section 4.1: 550k steps of 2^20 tokens; Adafactor at T5's rate."""
    experiment = find_recipe("switch_base_128")()
    assert (experiment.steps, experiment.batch_size) == (550_000, 2048)
    assert experiment.optim == OptimConfig()
    assert (experiment.data.dataset, experiment.data.dataset_config) == ("allenai/c4", "en")
    assert replace(find_recipe("c4_base_128")(), name="switch_base_128") == experiment


def test_the_released_spelling_of_a_size_is_understood():
    assert find_recipe("switch-base-8")().model == SIZES["switch_base_8"]
    assert find_recipe("t5-v1_1-xl")().model == SIZES["t5_v1_1_xl"]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("c4_base")])
def test_the_recipes_of_the_paper_train_the_sizes_of_its_names(name):
    assert RECIPES[name]().model == SIZES[name.replace("c4", "switch")]


@pytest.mark.parametrize("name", mostly_slow(SIZES, [next(iter(f)) for f in FAMILIES.values()]))
def test_every_size_can_be_explained(name, capsys):
    assert main(["explain", name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}\n  parameters  ")
    assert "per sequence" in printed


def test_mt5_is_explained_at_its_own_lengths():
    """mT5's README: 1024 inputs; 229 targets follow from them."""
    data = find_recipe("mt5_base")().data
    assert (data.input_length, data.target_length) == (1024, 229)


def test_every_size_is_listed_under_its_family(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for family, sizes in FAMILIES.items():
        start = lines.index(f"  {family}")
        listed = [line.split()[0] for line in lines[start + 1 : start + 1 + len(sizes)]]
        assert listed == list(sizes)


def test_an_unknown_name_is_told_that_sizes_are_recipes_too():
    with pytest.raises(ConfigError, match="Names of sizes are recipes too"):
        find_recipe("t5_enormous")
