"""The step of decoding as one graph: the same tokens, and one graph for all lengths."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compiling
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from switchworks.cli.main import main
from switchworks.config import ConfigError
from switchworks.fast import CompiledDecoder
from switchworks.fast.compile_step import require_compiler
from switchworks.fast.decode import attend_once, one_row_linear
from switchworks.generate import BeamSearch, generate
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer, first_logits
from switchworks.model.attention import attend, mask_to_bias
from switchworks.model.layers import SharedDropout
from switchworks.quantise.modules import QuantiseConfig, quantise

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=32,
    d_ff=64,
    d_kv=8,
    num_heads=4,
    num_layers=2,
    routing=RoutingConfig(experts=4, every=1),
)

SPARSE = RoutingConfig(experts=4, every=1)
ONE_LAYER = ModelConfig(
    vocab_size=512, d_model=128, d_ff=512, d_kv=128, num_heads=4, num_layers=1, routing=SPARSE
)
MODELS = {
    "dense": replace(ONE_LAYER, routing=None, gated=True, tied_head=False),
    "top2": replace(ONE_LAYER, routing=replace(SPARSE, strategy="top2")),
    "attention": replace(ONE_LAYER, routing=replace(SPARSE, layers="both")),
    "limited": replace(ONE_LAYER, routing=replace(SPARSE, eval_capacity_factor=0.5)),
    "alone": replace(ONE_LAYER, decoder_only=True),
}
ROUNDED = {
    "int8": QuantiseConfig(),
    "dynamic": QuantiseConfig(product="int8_dynamic"),
    "dequantised": QuantiseConfig(product="dequantised"),
    "int4": QuantiseConfig(bits=4),
}


def texts(rows: int, length: int) -> Tensor:
    drawn = torch.randint(2, 512, (rows, length), generator=torch.Generator().manual_seed(rows))
    drawn[-1, -2:] = 0
    return drawn


HOW = [
    *(
        "switch float32",
        "dense float32",
        "top2 float32",
        "attention float32",
        "limited float32",
        "alone float32",
    ),
    *("int8 float32", "dynamic float32", "dequantised float32", "int4 float32"),
    *("switch bfloat16", "alone bfloat16", "int8 bfloat16"),
]
ROUNDS_INPUTS = ("int8", "int4", "dynamic")
"""Where the last digit of an input may turn what it is rounded to."""


@pytest.mark.slow  # what the graph writes: test_the_command_line_writes_the_same below
@pytest.mark.parametrize("how", HOW)
def test_one_graph_of_all_lengths_scores_as_the_plain_step_does(how):
    """Rows padded and not, also after the weights have changed; one graph per number of rows."""
    kind, precision = how.split()
    model = SwitchTransformer(MODELS.get(kind, ONE_LAYER), seed=1).eval()
    model = model.to(getattr(torch, precision))
    if kind in ROUNDED:
        model = quantise(model, ROUNDED[kind])
    compiled = []

    def counted(graph: Any, inputs: Any, **_: Any) -> Any:
        compiled.append(graph)
        return aot_eager(graph, inputs)

    def largest_difference(rows: int, length: int, tokens: int) -> float:
        # All tokens are given, so that no tie decides which come after.
        caches = [first_logits(model, texts(rows, length), tokens + 1)[1] for _ in range(2)]
        step, worst = graph.start(caches[1]), 0.0
        for token in torch.randint(2, 512, (tokens, rows, 1)):
            with torch.no_grad():
                plain = model.decode_step(token, caches[0])
            worst = max(worst, float((step(token) - plain).abs().max() / plain.abs().max()))
        return worst

    with compiling(counted):
        graph = CompiledDecoder(model)
        found = [largest_difference(1, 9, 4), largest_difference(1, 6, 7)]
        assert len(compiled) == 1
        found += [largest_difference(3, 7, 4)]
        for weight in (*model.parameters(), *model.buffers()):
            if weight.dtype.is_floating_point:
                weight.data.mul_(1.01)  # the graph sees it
        found += [largest_difference(3, 5, 4)]
        assert len(compiled) == 2
        exact = precision == "float32" and not how.startswith(ROUNDS_INPUTS)
        assert max(found) < (1e-5 if exact else 3e-2)
        if precision == "float32":
            for beams in (None, BeamSearch(beams=3)):
                ways = [
                    generate(model, texts(1, 8), max_length=6, beams=beams, compiled=way)
                    for way in (None, graph)
                ]
                assert torch.equal(*ways)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_product_of_one_row_is_the_product(dtype):
    x, weight = torch.randn(1, 1, 96, dtype=dtype), torch.randn(40, 96, dtype=dtype)
    exact = F.linear(x.double(), weight.double())
    assert one_row_linear(x, weight).dtype == dtype
    precise = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(
        one_row_linear(x, weight).double(), exact, rtol=precise, atol=precise
    )


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_one_query_attends_as_many_do(rows):
    q, k, v = torch.randn(rows, 4, 1, 8), torch.randn(rows, 4, 7, 8), torch.randn(rows, 4, 7, 8)
    hidden = mask_to_bias(torch.arange(7)[None, None, None] < 5, q.dtype)
    none = SharedDropout(0.0)
    for bias in (None, hidden, hidden + torch.randn(1, 4, 1, 7), hidden.expand(rows, 1, 1, 7)):
        expected = attend(q, k, v, bias, none)
        torch.testing.assert_close(attend_once(q, k, v, bias, none), expected)


def test_a_graph_of_another_model_is_refused():
    model, other = (SwitchTransformer(CONFIG, seed=seed) for seed in (0, 1))
    with pytest.raises(ConfigError, match="of another model"):
        generate(model, torch.tensor([[5, 1]]), compiled=CompiledDecoder(other))


def test_a_graph_made_before_the_weights_were_rounded_is_refused():
    model = SwitchTransformer(CONFIG)
    graph = CompiledDecoder(model)
    assert graph.matches(model)
    assert not graph.matches(quantise(model))


def test_a_model_that_is_on_no_processor_has_no_graph():
    with torch.device("meta"):
        model = SwitchTransformer(CONFIG)
    with pytest.raises(ConfigError, match="on a CPU, and this one is on meta"):
        CompiledDecoder(model)


def test_making_a_graph_leaves_the_model_as_it_was_and_holds_no_second_copy():
    model = SwitchTransformer(CONFIG).train()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    graph = CompiledDecoder(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.training
    copied = {weight.data_ptr() for weight in graph._model.parameters()}
    assert copied < {weight.data_ptr() for weight in model.parameters()}  # experts are the model's


def test_the_command_line_writes_the_same_with_and_without_a_graph(tiny_run, tmp_path, capsys):
    """Three texts, two at once: the last batch is smaller, and is not compiled for."""
    texts = tmp_path / "texts.txt"
    texts.write_text("The <extra_id_0> of the list.\nA list <extra_id_0>\nIf the\n", "utf-8")
    words = ["generate", str(tiny_run), "--file", str(texts), "--batch-size", "2"]
    words += ["--max-length", "8"]
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert len(plain.splitlines()) == 3
    with compiling():
        assert main([*words, "--compile"]) == 0
    assert capsys.readouterr().out == plain


def test_without_a_compiler_the_command_line_says_what_to_do(tiny_run, capsys):
    from torch._inductor import config as inductor

    require_compiler.cache_clear()
    with inductor.patch({"cpp.cxx": ("no-such",)}):  # what the environment's CXX sets
        assert main(["generate", str(tiny_run), "If the", "--compile"]) == 2
    assert "Install g++" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_by_inductor_the_command_line_writes_the_same(tiny_run):
    words = ["-m", "switchworks", "generate", str(tiny_run), "The <extra_id_0> of", "--max-length"]
    outputs = [
        subprocess.run(
            [sys.executable, *words, "12", *more], capture_output=True, text=True, check=True
        ).stdout
        for more in ([], ["--compile"])
    ]
    assert outputs[0] == outputs[1]
