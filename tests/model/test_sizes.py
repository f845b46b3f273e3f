"""Sizes and costs against the figures that the paper prints."""

from dataclasses import replace

import pytest
import torch

from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.model.sizes import (
    active_parameters,
    flops_per_sequence,
    flops_per_token,
    num_parameters,
    training_flops_per_token,
)

BASE = ModelConfig(d_model=768, d_ff=3072, num_heads=12, num_layers=12)
LARGE = ModelConfig(d_model=1024, d_ff=4096, num_heads=16, num_layers=24)
XXL = ModelConfig(
    d_model=4096,
    d_ff=10240,
    num_heads=64,
    num_layers=24,
    activation="gelu",
    gated=True,
    tied_head=False,
)
SWITCH_C = ModelConfig(
    d_model=2080,
    d_ff=6144,
    num_heads=32,
    num_layers=15,
    tied_head=False,
    routing=RoutingConfig(experts=2048, every=1),
)


def switch(dense: ModelConfig, experts: int) -> ModelConfig:
    return replace(dense, routing=RoutingConfig(experts=experts))


def test_t5_base_has_the_parameters_of_the_paper_to_the_last_one():
    """Fedus et al. 2021, table 7: 223M."""
    assert num_parameters(BASE) == 222_903_552


@pytest.mark.parametrize(
    ("experts", "millions"),
    [(8, 619.3), (16, 1072.4), (32, 1978.5), (64, 3790.7), (128, 7415.2), (256, 14664.2)],
)
def test_switch_base_has_the_parameters_of_the_paper(experts, millions):
    """Fedus et al. 2021, table 7: 1.1B, 2.0B, 3.8B, 7.4B and 14.7B from 16 experts up."""
    assert round(num_parameters(switch(BASE, experts)) / 1e6, 1) == millions


def test_experts_twice_as_many_and_half_as_wide_cost_as_much_for_two_per_token():
    coarse = switch(BASE, 8)
    fine = replace(BASE, routing=RoutingConfig(experts=16, expert_d_ff=1536, strategy="top2"))
    routers = 12 * 768 * 8  # in each sparse block 8 columns more
    assert num_parameters(fine) == num_parameters(coarse) + routers
    assert active_parameters(fine) == active_parameters(coarse) + routers
    assert flops_per_sequence(fine, 512, 114) == flops_per_sequence(coarse, 512, 114)


@pytest.mark.parametrize(
    ("config", "billions"),
    [(switch(LARGE, 128), 26.3), (switch(XXL, 128), 394.7), (SWITCH_C, 1571.4)],
)
def test_the_large_switch_models_have_the_parameters_of_the_paper(config, billions):
    """Fedus et al. 2021, table 9: 26B, 395B (which takes 128 experts) and 1571B."""
    assert round(num_parameters(config) / 1e9, 1) == billions


def test_every_parameter_of_a_dense_model_is_active():
    assert active_parameters(BASE) == num_parameters(BASE)


def test_a_switch_model_uses_its_dense_twin_and_the_routers():
    """12 sparse layers, each with a router of 128 rows."""
    sparse = switch(BASE, 128)
    assert active_parameters(sparse) == num_parameters(BASE) + 12 * 128 * 768


@pytest.mark.parametrize(
    ("config", "gigaflops", "printed"),
    [(BASE, 124.6, "124"), (LARGE, 424.9, "425"), (XXL, 6260.2, "6300"), (SWITCH_C, 894.0, "890")],
)
def test_the_flops_of_a_sequence_are_those_of_the_paper(config, gigaflops, printed):
    """Fedus et al. 2021, table 9: 124B, 425B, 6.3T and 890B for 512 inputs and 114 targets."""
    flops = flops_per_sequence(config, 512, 114) / 1e9
    assert round(flops, 1) == gigaflops
    assert flops == pytest.approx(float(printed), rel=0.01)


def test_experts_cost_no_flops():
    assert flops_per_sequence(switch(BASE, 256), 512, 114) == flops_per_sequence(BASE, 512, 114)


def test_the_flops_of_a_sequence_are_shared_out_over_all_its_tokens():
    assert flops_per_token(BASE, 512, 114) * 626 == pytest.approx(
        flops_per_sequence(BASE, 512, 114)
    )


def test_training_takes_three_forward_passes():
    assert training_flops_per_token(BASE, 512, 114) == 3 * flops_per_token(BASE, 512, 114)


def test_the_products_of_a_built_model_cost_what_the_closed_form_says():
    """torch's own counter, which sees both products of attention and the router."""
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2)
    L, T, A = 6, 5, 16
    inputs, targets = torch.randint(1, 64, (1, L)), torch.randint(1, 64, (1, T))
    model = SwitchTransformer(config)
    with FlopCounterMode(display=False) as counter:
        model(inputs, targets)
    second_products = 2 * (2 * L * L * A + 2 * T * T * A + 2 * L * T * A)
    # Keys and values of the memory have length L; the paper's count takes T for all of them.
    memory = 2 * (2 * 2 * (L - T) * 16 * A)
    expected = flops_per_sequence(config, L, T) + second_products + memory
    assert counter.get_total_flops() == expected
