"""Models in 8 and 4 bits: how far off they are, how large, and the same from a file."""

import itertools
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import mostly_slow
from support.models import CAUSAL, DENSE, TINY
from torch import Tensor

import switchworks
from switchworks.checkpoint.model_files import stored_quantisation
from switchworks.cli.main import main
from switchworks.compress.directories import quantise_directory
from switchworks.config import CheckpointError, ConfigError
from switchworks.model import RoutingConfig, SwitchTransformer
from switchworks.model.experts import ExpertInput, Experts
from switchworks.model.sizes import num_parameters
from switchworks.quantise.matmul import MAX_ROWS, from_int4, to_int4
from switchworks.quantise.modules import (
    QuantiseConfig,
    QuantisedExperts,
    QuantisedLinear,
    dequantise,
    quantise,
    quantise_config_of,
    tensors_of,
)

KINDS = {
    "dense": DENSE,
    "sparse": TINY,
    "tied and gated": replace(TINY, tied_head=True, gated=True),
    "untied": replace(TINY, tied_head=False),
    "decoder alone": CAUSAL,
    "experts in attention": replace(TINY, routing=RoutingConfig(experts=4, layers="both")),
}
with_kernels = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="torch's kernels for AVX"
)
SCHEMES = ["int8", "int8-dynamic", "int4"]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
EACH_ONCE = [*zip(KINDS, SCHEMES * 2, strict=True)]
each_pair = pytest.mark.parametrize(
    ("kind", "scheme"), mostly_slow(itertools.product(KINDS, SCHEMES), EACH_ONCE)
)


def inputs() -> Tensor:
    ids = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[1, 5:] = 0
    return ids


@torch.no_grad()
def logits(model: SwitchTransformer) -> Tensor:
    given = inputs()[:, :0] if model.config.decoder_only else inputs()
    return model.eval()(given, inputs()).logits


# 4 bits


@pytest.mark.parametrize("width", [64, 50, 33, 7])
def test_a_weight_in_4_bits_is_off_by_half_a_step_of_its_group_at_most(width):
    """Whatever the width: the last group may be shorter, and the last byte half full."""
    weight = torch.randn(5, width) * torch.tensor([[1e-3], [1.0], [50.0], [1e-30], [0.0]])
    packed, scale = to_int4(weight, 32)
    back = from_int4(packed, scale, 32, width)
    steps = scale.float().repeat_interleave(32, dim=1)[:, :width]
    assert ((back - weight).abs() <= steps * 0.5001).all()
    assert back[4].count_nonzero() == 0
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, -(-width // 2))
    assert scale.shape == (5, -(-width // 32))
    assert scale.dtype == torch.bfloat16


def test_a_step_of_4_bits_is_a_seventh_of_the_largest_weight_of_the_group():
    weight = torch.zeros(1, 64)
    weight[0, 3], weight[0, 40] = -7.0, 14.0
    weight[0, 41] = 6.9
    packed, scale = to_int4(weight, 32)
    assert scale.tolist() == [[1.0, 2.0]]
    assert from_int4(packed, scale, 32, 64)[0, [3, 40, 41, 0]].tolist() == [-7.0, 14.0, 6.0, 0.0]


def test_two_weights_share_a_byte_the_first_in_the_low_half():
    packed, _ = to_int4(torch.tensor([[1.0, -7.0, 7.0, 0.0]]), 4)
    assert packed.tolist() == [[(1 + 8) | (-7 + 8) << 4, (7 + 8) | 8 << 4]]


def test_smaller_groups_are_closer():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    off = [
        (from_int4(*to_int4(weight, group), group, 128) - weight).norm().item()
        for group in (16, 32, 64, 128)
    ]
    assert off == sorted(off)


def test_a_product_with_4_bits_is_the_product_with_the_dequantise_weights():
    layer = QuantisedLinear(torch.randn(9, 33), QuantiseConfig(bits=4))
    x = torch.randn(7, 33)
    torch.testing.assert_close(layer(x), x @ layer.dequantise("weight").T)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@with_kernels
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS])
def test_few_rows_by_4_bits_as_they_are_are_off_by_what_bfloat16_rounds(rows, group):
    """Inputs, weights and answers lose 2^-9 of themselves each, beside a product in float64."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 128), torch.randn(48, 128) * torch.logspace(-6, 3, 48)[:, None]
    weight[5] = 0.0
    layer = QuantisedLinear(weight, QuantiseConfig(bits=4, group=group))
    wide = layer.dequantise("weight").double()
    exact = x.double() @ wide.T
    bound = (x.double().abs() @ wide.T.abs()) * 2**-8 + exact.abs() * 2**-9
    y = layer(x)
    assert ((y - exact).abs() <= bound * 1.01).all()
    assert not torch.equal(y, (x @ layer.dequantise("weight").T))
    reference = QuantisedLinear(weight, QuantiseConfig(bits=4, group=group, product="dequantised"))
    assert torch.equal(reference(x), x @ layer.dequantise("weight").T)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group"),
    [(17, 16, 64, 32), (2, 15, 64, 32), (2, 16, 40, 32), (2, 16, 64, 16), (0, 16, 64, 32)],
)
def test_what_the_kernel_for_4_bits_does_not_take_is_dequantise(rows, outputs, inputs, group):
    layer = QuantisedLinear(torch.randn(outputs, inputs), QuantiseConfig(bits=4, group=group))
    x = torch.randn(rows, inputs)
    assert torch.equal(layer(x), x @ layer.dequantise("weight").T)


def test_other_weights_are_not_multiplied_in_the_order_of_the_old_ones():
    old, new = (QuantisedLinear(torch.randn(16, 32), QuantiseConfig(bits=4)) for _ in range(2))
    x = torch.randn(2, 32)
    assert not torch.equal(old(x), new(x))
    old.load_state_dict(new.state_dict())
    assert torch.equal(old(x), new(x))


@with_kernels
def test_every_expert_in_4_bits_has_an_order_of_its_own():
    torch.manual_seed(0)
    experts = Experts(4, 32, 64, gated=True, d_out=32).eval()
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x, counts = torch.randn(6, 32), [3, 0, 2, 1]
    how = [QuantiseConfig(bits=4, product=product) for product in ("int8_kernel", "dequantised")]
    with torch.no_grad():
        ours, reference = (QuantisedExperts(experts, each)(ExpertInput(x, counts)) for each in how)
    assert 0 < (ours - reference).norm() < 0.01 * reference.norm()


# Whole models


@each_pair
def test_a_rounded_model_scores_nearly_as_before(kind, scheme):
    model = SwitchTransformer(KINDS[kind], seed=1)
    expected = logits(model)
    off = (logits(quantise(model, QuantiseConfig.from_scheme(scheme))) - expected).norm()
    assert off < {"int4": 0.3, "int8": 0.03, "int8-dynamic": 0.05}[scheme] * expected.norm()


@each_pair
def test_every_matrix_is_rounded_and_every_tensor_listed(kind, scheme):
    """Nothing but routers, norms and relative biases is left, and embeddings have 8 bits."""
    model = quantise(SwitchTransformer(KINDS[kind], seed=1), QuantiseConfig.from_scheme(scheme))
    found = tensors_of(model)
    small = ("router", "norm", "relative_bias")
    low = 4 if scheme == "int4" else 8
    for tensor in found:
        stays = any(part in tensor.name for part in small)
        expected = 32 if stays else 8 if "embedding" in tensor.name else low
        assert tensor.bits == expected, tensor.name
    assert sum(torch.Size(t.shape).numel() for t in found) == num_parameters(KINDS[kind])
    assert sorted(t.name for t in found) == sorted(
        name for name, _ in SwitchTransformer(KINDS[kind]).named_parameters()
    )


@each_pair
def test_a_rounded_model_comes_back_from_its_file_bit_for_bit(kind, scheme, tmp_path):
    model = quantise(SwitchTransformer(KINDS[kind], seed=1), QuantiseConfig.from_scheme(scheme))
    switchworks.save(model, tmp_path / "m")
    back, _ = switchworks.load(tmp_path / "m")
    assert quantise_config_of(back) == QuantiseConfig.from_scheme(scheme)
    ours, theirs = back.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert torch.equal(logits(back), logits(model))
    assert torch.equal(
        back.generate(inputs(), max_length=5), model.generate(inputs(), max_length=5)
    )


@pytest.mark.parametrize("config", [TINY, KINDS["untied"]], ids=["tied", "untied"])
@each_scheme
def test_the_file_is_as_large_as_computed(scheme, config, tmp_path):
    """By hand, from shapes alone: 8 bits and a float32 per channel; 4 bits and a bfloat16 per 32
    inputs; the rest in float32."""
    expected = 0
    for name, weight in SwitchTransformer(config).named_parameters():
        if any(part in name for part in ("router", "norm", "relative_bias")):
            expected += 4 * weight.numel()
            continue
        shape = weight.mT.shape if ".experts." in name else weight.shape
        *channels, wide = shape
        rows = torch.Size(channels).numel()
        if scheme == "int4" and "embedding" not in name:
            expected += rows * (-(-wide // 2) + 2 * -(-wide // 32))
        else:
            expected += rows * (wide + 4)
    model = quantise(SwitchTransformer(config), QuantiseConfig.from_scheme(scheme))
    assert sum(tensor.bytes for tensor in tensors_of(model)) == expected
    switchworks.save(model, tmp_path / "m")
    content = (tmp_path / "m" / "model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    assert len(content) == 8 + header + expected
    assert json.loads(content[8 : 8 + header])


@each_pair
def test_a_dequantise_model_is_an_ordinary_one_that_computes_the_same(kind, scheme):
    model = quantise(SwitchTransformer(KINDS[kind], seed=1), QuantiseConfig.from_scheme(scheme))
    wide = dequantise(model)
    assert all(parameter.dtype == torch.float32 for parameter in wide.parameters())
    if scheme != "int8-dynamic":
        torch.testing.assert_close(logits(wide), logits(model), rtol=1e-4, atol=1e-4)
    again = quantise(wide, QuantiseConfig.from_scheme(scheme))
    torch.testing.assert_close(logits(again), logits(model), rtol=2e-2, atol=2e-2)


def test_a_rounded_model_may_compute_in_bfloat16(tmp_path):
    switchworks.save(quantise(SwitchTransformer(TINY, seed=1), QuantiseConfig()), tmp_path / "m")
    model, _ = switchworks.load(tmp_path / "m", dtype=torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert model.encoder.blocks[1].ffn.router.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["sparse", "decoder alone"])
def test_a_model_stored_in_bfloat16_is_rounded_and_the_rest_dequantise(name, tmp_path):
    model = SwitchTransformer(KINDS[name], seed=1).bfloat16()
    for layer in model.switch_layers.values():
        layer.router.float()
    switchworks.save(model, tmp_path / "m")
    quantise_directory(tmp_path / "m", tmp_path / "rounded", "int8")
    rounded, _ = switchworks.load(tmp_path / "rounded")
    wide, _ = switchworks.load(tmp_path / "rounded", to_float32=True)
    for one in (rounded, wide):
        assert {parameter.dtype for parameter in one.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(wide), logits(rounded), rtol=1e-4, atol=1e-4)
    switchworks.save(quantise(model, QuantiseConfig()), tmp_path / "half")  # not by the command
    assert logits(switchworks.load(tmp_path / "half")[0]).dtype == torch.float32


def test_a_model_is_rounded_once():
    model = quantise(SwitchTransformer(TINY), QuantiseConfig(bits=4))
    with pytest.raises(ConfigError, match="quantised already, to int4"):
        quantise(model)


def test_a_model_that_diverged_is_not_rounded_into_one_that_looks_well():
    model = SwitchTransformer(TINY)
    with torch.no_grad():
        model.encoder.blocks[1].ffn.experts.w_in[0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"encoder\.blocks\.1\.ffn\.experts\.w_in holds values"):
        quantise(model, QuantiseConfig(bits=4))


def test_a_file_whose_settings_are_gone_is_refused(tmp_path):
    switchworks.save(quantise(SwitchTransformer(TINY), QuantiseConfig()), tmp_path / "m")
    (tmp_path / "m" / "quantised.toml").unlink()
    with pytest.raises(CheckpointError, match=r"quantised\.toml is missing"):
        switchworks.load(tmp_path / "m")


@pytest.mark.parametrize("group", [0, 3, 1])
def test_groups_that_do_not_fill_bytes_are_refused(group):
    with pytest.raises(ConfigError, match=f"group = {group} must be an even number"):
        QuantiseConfig(bits=4, group=group)


# From the command line


@pytest.fixture(scope="module")
def rounded(tiny_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "int4"
    assert main(["convert", str(tiny_run), str(out), "--quantise", "int4", "--group", "16"]) == 0
    return out


def test_the_command_lists_every_tensor_with_its_bits(tiny_run, tmp_path, capsys):
    out = str(tmp_path / "int8")
    assert main(["convert", str(tiny_run), out, "--quantise", "int8-dynamic"]) == 0
    said = capsys.readouterr().out
    model, _ = switchworks.load(out)
    total = sum(tensor.bytes for tensor in tensors_of(model))
    assert f"{total / 1e6:,.2f} MB" in said
    assert "encoder.blocks.1.ffn.experts.w_in" in said
    assert "router" in said
    assert stored_quantisation(Path(out)) == QuantiseConfig(product="int8_dynamic")


def test_generate_reads_a_rounded_model(rounded, capsys):
    assert main(["generate", str(rounded), "The <extra_id_0> list", "--max-length", "4"]) == 0
    assert "list" in capsys.readouterr().out


def test_training_goes_on_from_rounded_weights(rounded, corpus, tmp_path):
    words = ["train", "tiny", "--init", str(rounded), "--steps", "1", "--data.path", str(corpus)]
    assert main([*words, "--run-dir", str(tmp_path / "run"), "--threads", "1"]) == 0


def test_a_rounded_model_loses_experts_like_any_other(rounded, corpus, tmp_path):
    words = ["convert", str(rounded), str(tmp_path / "two"), "--prune", "2", "--batches", "1"]
    assert main([*words, "--text", str(corpus)]) == 0
    model, _ = switchworks.load(tmp_path / "two")
    assert model.config.routing.experts == 2
    assert quantise_config_of(model) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group", "64"], "--group needs --quantise"),
        (["--quantise", "int8", "--group", "64"], "--group 64 is for int4"),
        (["--quantise", "int8", "--prune", "2"], "are different changes"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, tiny_run, tmp_path, capsys):
    assert main(["convert", str(tiny_run), str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_rounded_directory_is_not_rounded_again(rounded, tmp_path, capsys):
    assert main(["convert", str(rounded), str(tmp_path / "out"), "--quantise", "int8"]) == 2
    assert "quantised already, to int4" in capsys.readouterr().err


def test_the_product_of_8_bits_is_refused_for_4():
    with pytest.raises(
        ConfigError, match=r"int8_dynamic is for 8 bits, not 4\.\n  Use int8_kernel"
    ):
        QuantiseConfig(bits=4, product="int8_dynamic")


@with_kernels
def test_weights_written_in_place_are_ordered_anew_in_the_memory_of_the_copy():
    first, second = (QuantisedLinear(torch.randn(64, 32), QuantiseConfig(bits=4)) for _ in "ab")
    x = torch.randn(3, 32)
    assert not torch.equal(first(x), second(x))
    before = [tensor.data_ptr() for pair in first.ordered.values() for tensor in pair]
    for name, buffer in second.named_buffers():
        first.get_buffer(name).copy_(buffer)
    first.weights_changed()
    assert torch.equal(first(x), second(x))
    assert [tensor.data_ptr() for pair in first.ordered.values() for tensor in pair] == before
