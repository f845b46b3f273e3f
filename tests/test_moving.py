"""Every snippet of docs/moving.md runs, and what it says of the others is so.

transformers is run itself. The formulas of the others are written out here, after their sources;
st-moe-pytorch 0.1.8, mixture-of-experts 0.2.3 and labml-nn 0.5.1 gave the same numbers.
"""

import ast
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.models import DENSE, TINY
from torch import Tensor

import switchworks
from switchworks import RoutingConfig, SwitchFFN, SwitchTransformer, load, load_hf, save_hf
from switchworks.cli.main import main
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.generate import (
    BeamSearch,
    Constraints,
    Sampling,
    StopTexts,
    generate,
    generate_scored,
    stream,
)
from switchworks.recipes.sizes import SIZES

PAGE = (Path(__file__).parent.parent / "docs" / "moving.md").read_text(encoding="utf-8")
SECTIONS = {section.split()[1]: section for section in PAGE.split("\n## ")[1:]}
SNIPPETS = {
    name: re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    for name, section in SECTIONS.items()
}


def ran(section: str, number: int = 0, **names) -> dict:
    """The names after running a snippet of the page, beside those it needs."""
    names = {"x": torch.randn(2, 6, 512), "task_loss": torch.zeros(())} | names
    exec(SNIPPETS[section][number], names)
    return names


@pytest.fixture
def hf_directory(tmp_path) -> Path:
    save_hf(SwitchTransformer(replace(TINY, vocab_size=100), seed=1), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def theirs(hf_directory):
    transformers = pytest.importorskip("transformers")
    kind = transformers.SwitchTransformersForConditionalGeneration
    return kind.from_pretrained(hf_directory).eval()


def padded() -> Tensor:
    inputs = torch.randint(2, 100, (2, 9))
    inputs[0, 6:] = 0
    return inputs


# transformers


def test_every_section_has_a_snippet_and_every_snippet_a_test():
    counts = {name: len(snippets) for name, snippets in SNIPPETS.items()}
    assert counts == {
        "transformers": 1,
        "st-moe-pytorch": 1,
        "mixture-of-experts": 1,
        "labml": 2,
        "kyegomez/SwitchTransformers": 1,
        "flaxformer": 1,
    }


def test_the_snippet_for_transformers_runs(hf_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = SNIPPETS["transformers"][0]
    assert "path/to/switch-base-8" in snippet
    labels, input_ids = torch.randint(2, 100, (2, 6)), torch.randint(2, 100, (2, 9))
    labels[0, 4:] = -100
    names: dict = {"labels": labels, "input_ids": input_ids}
    names["attention_mask"] = torch.ones_like(input_ids)
    exec(snippet.replace("path/to/switch-base-8", str(hf_directory)), names)
    assert names["answers"].shape[0] == 2
    assert (tmp_path / "path" / "to" / "back" / "config.json").exists()


def test_our_cross_entropy_is_the_loss_of_transformers(hf_directory, theirs):
    inputs, labels = padded(), torch.randint(2, 100, (2, 6))
    labels[0, 4:] = -100
    with torch.no_grad():
        loss = theirs(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels).loss
        losses = load_hf(hf_directory)(inputs, labels.masked_fill(labels == -100, 0)).losses
    assert float(losses.cross_entropy) == pytest.approx(float(loss), abs=1e-5)
    assert losses.balance > 0


def test_without_a_mask_transformers_attends_to_padding(hf_directory, theirs):
    inputs, labels = padded(), torch.randint(2, 100, (2, 6))
    with torch.no_grad():
        loss = theirs(input_ids=inputs, labels=labels).loss
        ours = load_hf(hf_directory)(inputs, labels).losses.cross_entropy
    assert float(ours) != pytest.approx(float(loss), abs=1e-3)


def test_their_max_length_counts_the_start_token(hf_directory, theirs):
    inputs = padded()
    written = theirs.generate(inputs, max_length=8)
    assert (written[:, 0] == 0).all()
    assert torch.equal(load_hf(hf_directory).generate(inputs, max_length=7), written[:, 1:])


@pytest.mark.filterwarnings("ignore:The following generation flags:UserWarning")
def test_beams_write_the_tokens_of_transformers(hf_directory, theirs):
    inputs = padded()
    written = theirs.generate(inputs, max_length=8, num_beams=4)
    ours = generate(load_hf(hf_directory), inputs, beams=BeamSearch(beams=4), max_length=7)
    assert torch.equal(ours, written[:, 1:])


def test_the_capacity_of_transformers_is_a_number_and_no_factor(hf_directory):
    """A factor of 64 * experts / L is the same capacity on paper, and one less by rounding."""
    factor = RoutingConfig(experts=8, capacity_factor=64 * 8 / 98)
    assert factor.capacity(98, training=True) == 63
    number = RoutingConfig(experts=8, expert_capacity=64)
    for length, training in ((98, True), (512, True), (512, False)):
        assert number.capacity(length, training=training) == 64
    taken = load_hf(hf_directory, capacity="hf").config.routing
    assert taken is not None
    assert taken.padding_takes_slots
    assert taken.expert_capacity == 2**31 - 1  # save_hf wrote no limit


def test_the_auxiliary_losses_of_transformers_are_unweighted(theirs):
    inputs = torch.randint(2, 100, (2, 9))
    with torch.no_grad():
        output = theirs(input_ids=inputs, labels=inputs, output_router_logits=True)
    assert float(output.encoder_aux_loss) == pytest.approx(1, abs=0.3)


def test_convert_and_load_open_a_directory_of_transformers(hf_directory, tmp_path):
    assert "`switchworks convert dir NEW`, then `load(NEW)`" in SECTIONS["transformers"]
    assert main(["convert", str(hf_directory), str(tmp_path / "new")]) == 0
    assert load(tmp_path / "new")[0].config == load_hf(hf_directory).config


def test_upcycling_makes_a_dense_t5_sparse_at_the_same_output(tmp_path):
    dense, places = SwitchTransformer(DENSE, seed=1).eval(), [tmp_path / "t5", tmp_path / "new"]
    save_hf(dense, places[0])
    assert main(["convert", *map(str, places), "--upcycle", "8"]) == 0
    sparse, inputs = load(places[1])[0], torch.randint(2, 40, (2, 9))
    assert sparse.config.routing is not None
    assert sparse.config.routing.experts == 8
    torch.testing.assert_close(
        sparse(inputs, inputs).losses.cross_entropy, dense(inputs, inputs).losses.cross_entropy
    )


# Two experts per token


def top2_by_hand(
    x: Tensor, logits: Tensor, experts: int, capacity: int
) -> tuple[list[dict[int, float]], Tensor, Tensor]:
    """Of one row: for each token expert -> gate, and the shares of first choices, wanted and kept.

    First choices queue before all second ones; gates are scaled before anything is dropped.
    """
    probs, load = logits.softmax(dim=-1), [0] * experts
    gates: list[dict[int, float]] = [{} for _ in x]
    wanted, kept = torch.zeros(experts), torch.zeros(experts)
    for rank in range(2):
        for token, (values, chosen) in enumerate(zip(*probs.topk(2), strict=True)):
            expert = int(chosen[rank])
            if rank == 0:
                wanted[expert] += 1 / len(x)
            if load[expert] < capacity:
                gates[token][expert] = float(values[rank] / values.sum())
                kept[expert] += (rank == 0) / len(x)
                load[expert] += 1
    return gates, wanted, kept


@torch.no_grad()
def expected(layer: SwitchFFN, row: Tensor, capacity: int) -> Tensor:
    """The output of `layer` for one row, from the gates above and each expert by itself."""
    logits = row @ layer.router.weight.T
    gates, _, _ = top2_by_hand(row, logits, layer.config.experts, capacity)
    w_in, w_gate, w_out = layer.experts.w_in, layer.experts.w_gate, layer.experts.w_out
    out = torch.zeros_like(row)
    for token, experts in enumerate(gates):
        for expert, gate in experts.items():
            hidden = row[token] @ w_in[expert]
            if w_gate is None:
                hidden = hidden.relu()
            else:  # the exact GELU, as in theirs
                hidden = F.gelu(row[token] @ w_gate[expert]) * hidden
            out[token] += gate * (hidden @ w_out[expert])
    return out


def test_the_layer_for_st_moe_computes_its_formula():
    layer = ran("st-moe-pytorch")["moe"].eval()
    x = torch.randn(1, 40, 512)
    capacity = max(4, min(40, int(40 * 2.0 / 16)))
    difference = layer(x)[0][0] - expected(layer, x[0], capacity)
    exact = expected(layer, x[0], capacity).abs().max()
    assert difference.abs().max() < 2e-3 * exact  # tanh GELU for the exact one
    assert not layer(x)[1].routes.kept.all()


def test_st_moe_balances_what_got_a_slot_and_we_what_is_wanted():
    layer = ran("st-moe-pytorch")["moe"]  # in training
    for length, same in ((5, True), (200, False)):
        x = torch.randn(1, length, 512)
        if length == 200:
            x += 3 * layer.router.weight[0].detach()  # one expert is preferred
        logits = (x[0] @ layer.router.weight.T).detach()
        capacity = max(4, int(length * 1.25 / 16))
        _, wanted, kept = top2_by_hand(x[0], logits, 16, capacity)
        mean = logits.softmax(dim=-1).mean(dim=0)
        ours = float(layer(x)[1].balance.detach())
        assert ours == pytest.approx(float(16 * (mean * wanted).sum()), rel=1e-4)
        assert (ours == pytest.approx(float(16 * (mean * kept).sum()), rel=1e-4)) is same


def test_our_second_threshold_is_their_threshold_train():
    """A second gate of 0.1 is used half of the time, one of 0.3 always; in evaluation both."""
    config = RoutingConfig(experts=2, strategy="top2", capacity_factor=None, jitter=0.0)
    layer = SwitchFFN(2, 4, config)
    for gate, used in ((0.1, 0.5), (0.3, 1.0)):
        layer.router.weight.data = torch.tensor([[gate / (1 - gate), 0], [1.0, 0]]).log()
        layer.router.weight.data[:, 1] = 0
        x = torch.tensor([1.0, 0]).expand(1, 4000, 2)
        share = float(layer.train()(x)[1].routes.kept[0, 4000:].float().mean())
        assert share == pytest.approx(used, abs=0.04)
        assert layer.eval()(x)[1].routes.kept.all()


def test_weights_of_mixture_of_experts_carry_over():
    experts = SimpleNamespace(
        w1=torch.randn(16, 512, 2048) / 20, w2=torch.randn(16, 2048, 512) / 40
    )
    gate = SimpleNamespace(w_gating=torch.randn(512, 16) / 20)
    names = ran("mixture-of-experts", theirs=SimpleNamespace(gate=gate, experts=experts))
    layer, x = names["moe"].eval(), torch.randn(1, 40, 512)
    assert torch.equal(layer.router.weight, gate.w_gating.T)
    torch.testing.assert_close(layer(x)[0][0], expected(layer, x[0], 5), atol=1e-5, rtol=1e-4)


# One expert per token


@pytest.mark.parametrize("section", ["st-moe-pytorch", "kyegomez/SwitchTransformers"])
def test_the_snippets_for_layers_train(section):
    names = ran(section)
    assert names["out"].shape == names["x"].shape
    names["loss"].backward()
    assert names["moe"].router.weight.grad is not None


def test_the_gate_of_a_single_choice_teaches_the_router():
    layer = ran("kyegomez/SwitchTransformers")
    layer["out"].sum().backward()
    assert layer["moe"].router.weight.grad.norm() > 0


def test_the_mask_of_kyegomez_marks_positions_of_expert_0():
    scores = torch.rand(2, 6, 4)
    choice = scores.argmax(dim=-1, keepdim=True)
    mask = torch.zeros_like(scores).scatter_(1, choice, 1)
    assert mask[..., 1:].sum() == 0
    assert mask[:, 4:].sum() == 0
    with pytest.raises(RuntimeError, match="must match"):
        (scores * mask).sum(0) - (scores * mask).sum(1)  # its auxiliary loss


def test_the_layer_for_labml_computes_its_formula():
    x = torch.randn(6, 3, 128)
    names = ran("labml", x=x)
    layer, flat = names["moe"], x.flatten(0, 1)
    probs = (flat @ layer.router.weight.T).softmax(dim=-1)
    best, routes = probs.max(dim=-1)
    w_in, w_out = layer.experts.w_in[routes], layer.experts.w_out[routes]
    hidden = torch.einsum("sd,sdf->sf", flat, w_in).relu()
    out = torch.einsum("sf,sfd->sd", hidden, w_out) * best[:, None]
    torch.testing.assert_close(names["out"], out.view_as(x), atol=1e-6, rtol=1e-5)
    fractions = F.one_hot(routes, 4).float().mean(dim=0)
    balance = 4 * (fractions * probs.mean(dim=0)).sum()
    torch.testing.assert_close(names["routing"].balance, balance)


def test_labml_s_random_drops_are_ours_in_training():
    x = torch.randn(40, 3, 128)
    settings = {"strategy": "switch_random", "min_capacity": 1, "group_sequences": 3}
    layer = SwitchFFN(128, 256, RoutingConfig(experts=4, capacity_factor=0.5, jitter=0, **settings))
    routing = layer(x.transpose(0, 1))[1]
    wanted = F.one_hot((x.flatten(0, 1) @ layer.router.weight.T).argmax(dim=-1), 4).sum(dim=0)
    dropped = (wanted - int(0.5 * 120 / 4)).clamp(min=0).sum()  # len(x) / experts * factor
    assert float(routing.dropped) * 120 == pytest.approx(float(dropped))


def test_the_language_model_for_labml_is_causal_and_all_sparse():
    model = ran("labml", 1)["model"]
    assert model.config.sparse_blocks(decoder=True) == tuple(range(6))
    assert model.config.decoder_only


# flaxformer and t5x


def test_the_settings_of_flaxformer_describe_switch_base():
    names = ran("flaxformer")
    model, paper = names["model"], SIZES["switch_base_64"]
    assert model.routing is not None
    assert replace(model, routing=None) == replace(paper, routing=None)
    assert replace(names["experiment"], steps=1).model == model


def test_a_mean_over_layers_is_our_sum_with_a_twelfth_of_the_weight():
    model = ran("flaxformer")["model"]
    layers = [model.sparse_blocks(decoder=decoder) for decoder in (False, True)]
    mixed = tuple(layer for layer in range(12) if layer % (12 // 6) == 12 // 6 - 1)
    assert layers == [mixed, mixed]
    assert model.routing.balance_weight == pytest.approx(0.01 / sum(map(len, layers)))


def test_a_group_of_flaxformer_is_so_many_rows_and_has_as_many_slots():
    routing = ran("flaxformer")["model"].routing
    assert routing.group_sequences * 512 == 8192
    assert routing.capacity(8192, training=True) == round(1.25 * 8192 / 64)
    assert routing.capacity(8192, training=False) == round(2.0 * 8192 / 64)


def test_from_a_half_on_flaxformer_has_one_slot_more():
    config = RoutingConfig(experts=8, capacity_factor=1.0)
    assert config.capacity(60, training=True) == 7
    assert config.capacity(62, training=True) == 7 == round(62 / 8) - 1


def test_every_routing_setting_the_page_names_exists():
    named = set(re.findall(r"`routing\.(\w+)", PAGE)) - {"loss", "balance", "router_z"}
    named -= {"load", "dropped"}
    assert {"capacity_factor", "group_sequences", "jitter", "every", "z_weight"} <= named
    assert named <= set(vars(RoutingConfig()))


@pytest.mark.parametrize("section", ["model", "data", "optim", "mesh"])
def test_every_other_setting_the_page_names_exists(section):
    named = set(re.findall(rf"`{section}\.(\w+)", PAGE)) - {"md", "init_scale"}
    named -= {"generate", "encode"}  # methods of a model
    assert named <= set(vars(getattr(ran("flaxformer")["experiment"], section)))


# What stands in the tables


def ours(section: str) -> set[str]:
    """What the second column of a section's first table shows as code."""
    table = re.findall(r"(?:^\|.*\n)+", SECTIONS[section], flags=re.MULTILINE)[0]
    rows = [line.strip()[1:-1].split("|") for line in table.splitlines()[2:]]
    return {code for row in rows if len(row) > 1 for code in re.findall(r"`([^`]+)`", row[1])}


CALLS = {
    "model(inputs, targets)": "model(inputs, targets)",
    "generate(inputs, max_length=, temperature=, top_k=, top_p=, seed=)": (
        "model.generate(inputs, max_length=3, temperature=0.5, top_k=5, top_p=0.9, seed=1)"
    ),
    "max_length=20": "model.generate(inputs, max_length=20)",
    "constraints=Constraints(min_length=, repetition_penalty=)": (
        "generate(model, inputs, constraints=Constraints(min_length=2, repetition_penalty=1.5))"
    ),
    "Constraints(no_repeat_ngram=, forbid=((5, 6), (7,)))": (
        "generate(model, inputs, constraints=Constraints(no_repeat_ngram=2, forbid=((5, 6), (7,))))"
    ),
    "Constraints(prefix=(7, 3))": "generate(model, inputs, constraints=Constraints(prefix=(7, 3)))",
    "Constraints(allow=(1, 4, 8))": (
        "generate(model, inputs, constraints=Constraints(allow=(1, 4, 8)))"
    ),
    'Constraints(ends=StopTexts(tokenizer, ("stop",)))': (
        'generate(model, inputs, constraints=Constraints(ends=StopTexts(tokenizer, ("stop",))))'
    ),
    "candidates=3": "generate(model, inputs, sampling=Sampling(temperature=1.0), candidates=3)",
    "generate_scored(...).scores": "generate_scored(model, inputs, max_length=3).scores",
    "generate_scored(...).log_probs": "generate_scored(model, inputs, max_length=3).log_probs",
    "for tokens in stream(model, inputs):": "for tokens in stream(model, inputs): pass",
    "switchworks.generate.generate(model, inputs, beams=BeamSearch(beams=4))": (
        "switchworks.generate.generate(model, inputs, beams=BeamSearch(beams=4))"
    ),
}
OF_FILES = {  # tests/checkpoint/test_hub.py runs those that speak to the Hub
    "load_hf(dir)",
    "load(NEW)",
    'load_hf("org/name")',
    'push_to_hub(dir, "org/name")',
}


def test_every_call_of_the_table_for_transformers_is_run_by_a_test():
    shown = ours("transformers")
    calls = {code for code in shown if "(" in code and "/ experts" not in code}
    assert calls <= set(CALLS) | OF_FILES <= shown


@pytest.mark.parametrize("cell", CALLS)
def test_a_call_of_the_table_for_transformers_runs(cell):
    model = SwitchTransformer(replace(TINY, vocab_size=384), seed=1).eval()
    names = {
        "Constraints": Constraints,
        "Sampling": Sampling,
        "StopTexts": StopTexts,
        "BeamSearch": BeamSearch,
        "generate": generate,
        "generate_scored": generate_scored,
        "inputs": padded(),
        "model": model,
        "stream": stream,
        "switchworks": switchworks,
        "targets": padded(),
        "tokenizer": ByteTokenizer(),
    }
    exec(CALLS[cell], names)


@pytest.mark.parametrize(
    ("line", "expected"),
    [("moe(x, real=mask)", (2, 6, 512)), ("x = x + moe(norm(x))[0]", (2, 6, 512))],
)
def test_a_call_of_the_table_for_st_moe_runs(line, expected):
    assert line in ours("st-moe-pytorch")
    mask = torch.ones(2, 6, dtype=torch.bool)
    names = ran("st-moe-pytorch", mask=mask, norm=torch.nn.LayerNorm(512))
    exec(line, names)
    assert names["x"].shape == expected


@pytest.mark.parametrize("section", SECTIONS)
def test_a_routing_setting_with_a_value_is_a_valid_one(section):
    lines = [re.fullmatch(r"(?:routing\.)?(\w+) ?= ?(.+)", code) for code in ours(section)]
    pairs = {line[1]: line[2] for line in lines if line and line[1] in vars(RoutingConfig())}
    for name, value in pairs.items():
        given = {"expert_capacity": {"capacity_factor": 1.25}}.get(name, {})
        given = given | {name: ast.literal_eval(value)}
        if given.get("strategy") in {"switch_max", "expert_choice", "switch_random"}:
            given["decoder_strategy"] = "switch"
        assert getattr(RoutingConfig(experts=8, **given), name) == ast.literal_eval(value)
