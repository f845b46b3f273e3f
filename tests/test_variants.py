"""experiments/variants.py: models beside switchworks' own do what they are named after."""

import sys
from dataclasses import replace

import pytest
import torch
from support.scripts import EXPERIMENTS

from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.training import state

sys.path.insert(0, str(EXPERIMENTS))
import variants

ROUTING = RoutingConfig(experts=4, every=1, capacity_factor=None)
SMALL = ModelConfig(
    vocab_size=40,
    d_model=16,
    d_ff=32,
    d_kv=8,
    num_heads=2,
    num_layers=2,
    decoder_only=True,
    routing=ROUTING,
)
TEXT = torch.tensor([[5, 7, 5, 9, 7, 5], [9, 5, 5, 7, 9, 9]])
NOTHING = TEXT[:, :0]


def test_a_hash_sends_a_token_to_one_expert_wherever_it_stands():
    routing = variants.Hashed(SMALL).eval()(NOTHING, TEXT).routing
    before = torch.cat([torch.zeros(2, 1, dtype=torch.long), TEXT[:, :-1]], dim=1).flatten()
    for layer in routing:
        expert = layer.routes.expert.flatten()
        assert all(len(set(expert[before == token].tolist())) == 1 for token in (5, 7, 9))
        torch.testing.assert_close(layer.routes.gate, torch.ones_like(layer.routes.gate))
    assert torch.equal(routing[0].routes.expert, routing[1].routes.expert)


def test_a_pair_of_tokens_has_a_vector_of_its_own():
    model = variants.WithBigrams(replace(SMALL, routing=None))
    vectors = model.embedding(TEXT)
    plain = SwitchTransformer(replace(SMALL, routing=None)).embedding(TEXT)
    added = vectors - plain
    torch.testing.assert_close(added[0, 1], added[1, 3])  # 5 7 in both
    assert not torch.allclose(added[0, 1], added[0, 4])  # 5 7 and 9 7
    assert model.bigrams.std().item() == pytest.approx(0.1, rel=0.01)


def test_a_shared_expert_is_added_for_every_token():
    model = variants.WithShared(SMALL).eval()
    layer = model.decoder.blocks[0].ffn
    assert layer is model.switch_layers["decoder.0"]
    x = torch.randn(2, 3, 16)
    y, _ = layer(x)
    sparse, _ = super(variants.SharedSwitchFFN, layer).forward(x)
    torch.testing.assert_close(y - sparse, layer.shared(x))


def test_a_narrow_router_and_a_small_one_score_as_they_say():
    x = torch.randn(1, 6, 16)
    plain, narrow, small = (
        kind(SMALL).eval().switch_layers["decoder.0"].router
        for kind in (SwitchTransformer, variants.Narrow, variants.SmallRouters)
    )
    assert narrow(x).dtype == torch.bfloat16
    torch.testing.assert_close(narrow(x).float(), plain(x), atol=0.01, rtol=0.02)
    torch.testing.assert_close(small(x) * 10**0.5, plain(x))


def test_what_layers_hand_on_is_rounded_and_routers_are_not():
    plain, selective = SwitchTransformer(SMALL).eval(), variants.Selective(SMALL).eval()
    norm, router = selective.decoder.blocks[0].ffn_norm, selective.switch_layers["decoder.0"].router
    x = torch.randn(1, 6, 16)
    assert torch.equal(norm(x), norm(x).bfloat16().float())
    assert not torch.equal(router(x), router(x).bfloat16().float())
    here, there = (model(NOTHING, TEXT).losses.cross_entropy for model in (plain, selective))
    assert 0 < (here - there).detach().abs().item() < 0.02
    there.backward()
    gradient = selective.decoder.blocks[0].self_attention.o.weight.grad
    assert torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_is_trained_by_the_package(name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "SwitchTransformer", SwitchTransformer)  # and so put back after it
    words = ["train", "tiny", "--data.path", str(corpus), "--steps", "2", "--threads", "1"]
    words += ["--model.decoder-only", "--data.objective", "causal", "--data.input-length", "0"]
    words += ["--validate-every", "2", "--sample-every", "0", "--run-dir", str(tmp_path / "run")]
    if name == "bigrams":
        words += ["--model.routing", "none"]
    assert variants.run([name, *words, "--optim.warmup-steps", "1"]) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_an_unknown_variant_is_told_with_those_there_are(capsys):
    assert variants.run(["nope"]) == 2
    assert "hash,bigrams" in capsys.readouterr().err


def test_the_script_is_experiments_variants_py():
    assert variants.__file__ == str(EXPERIMENTS / "variants.py")
