"""A dense model made sparse computes what it did, and can be trained on."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.cases import mostly_slow

from switchworks.checkpoint.hugging_face.weights import load_hf, save_hf
from switchworks.checkpoint.model_files import load, save
from switchworks.cli.main import main
from switchworks.compress import upcycle_model
from switchworks.config import ConfigError
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.training import train

SHAPE = ModelConfig(
    vocab_size=100, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=4, init_scale=1.0
)
INPUTS = torch.randint(1, 100, (8, 40), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(1, 100, (8, 20), generator=torch.Generator().manual_seed(2))


def free(experts: int, every: int = 2) -> RoutingConfig:
    """Routing that drops nothing."""
    return RoutingConfig(experts=experts, every=every, capacity_factor=None)


def nats(model: SwitchTransformer) -> float:
    return float(model(INPUTS, TARGETS).losses.cross_entropy.detach())


@pytest.mark.parametrize(
    ("experts", "training"),
    mostly_slow(
        itertools.product([1, 6, 8, 64], [True, False]), [(1, True), (6, True), (8, False)]
    ),
)
@pytest.mark.parametrize(
    "shape",
    [SHAPE, replace(SHAPE, activation="gelu", gated=True, tied_head=False)],
    ids=["t5_1.0", "t5_1.1"],
)
def test_the_first_loss_is_the_dense_model_s(shape, experts, training):
    dense = SwitchTransformer(shape, seed=1).train(training)
    sparse = upcycle_model(dense, free(experts, every=1))
    assert sparse.training == training
    assert len(sparse.switch_layers) == 8
    assert nats(sparse) == pytest.approx(nats(dense), abs=1e-5)


@pytest.mark.parametrize(
    "routing",
    [
        replace(free(8), strategy="top2", second_threshold=0.0),
        replace(free(8), strategy="switch_max", decoder_strategy="top2", second_threshold=0.0),
        replace(free(8), bias_rate=1e-3),
    ],
    ids=["top2", "mixed", "bias"],
)
def test_other_strategies_start_at_the_dense_loss_too(routing):
    """The gates of top2 sum to 1, so there is nothing to undo."""
    dense = SwitchTransformer(SHAPE, seed=1)
    assert nats(upcycle_model(dense, routing)) == pytest.approx(nats(dense), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"layers": "both"}, "layers = both cannot be upcycled"),
        ({"expert_d_ff": 8}, "expert_d_ff = 8 cannot be upcycled"),
        ({"strategy": "expert_choice", "decoder_strategy": "switch"}, "varies"),
    ],
)
def test_routing_that_cannot_give_the_dense_answer_is_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        upcycle_model(SwitchTransformer(SHAPE), RoutingConfig(experts=4, **settings))


def test_a_trained_norm_does_not_spread_the_gates():
    dense = SwitchTransformer(SHAPE, seed=1)
    for block in dense.encoder:
        torch.nn.init.constant_(block.ffn_norm.weight, 30.0)
    assert nats(upcycle_model(dense, free(8))) == pytest.approx(nats(dense), abs=1e-5)


def test_tokens_are_spread_and_all_have_the_same_gate():
    reports = upcycle_model(SwitchTransformer(SHAPE), free(8, every=1))(INPUTS, TARGETS).routing
    for report in reports:
        assert report.load.max() < 0.8  # 1 if all logits were equal
        assert torch.allclose(report.routes.gate, torch.tensor(1 / 8), rtol=1e-4)


def test_tokens_go_where_a_router_of_full_size_would_send_them():
    sparse = upcycle_model(SwitchTransformer(SHAPE), free(8)).eval()
    layer = sparse.switch_layers["encoder.1"]
    x = torch.randn(4, 50, 32)
    small = layer(x)[1].routes.expert
    weight = layer.router.weight.data
    weight.copy_((weight - weight.mean(dim=0)) * 1e5)
    agree = (layer(x)[1].routes.expert == small).float().mean()
    assert agree > 0.95  # the rest tie to within float32


def test_the_router_is_as_large_as_a_fresh_one():
    """Adafactor moves a matrix in proportion to its size."""
    fresh = SwitchTransformer(replace(SHAPE, routing=free(8)))
    upcycled = upcycle_model(SwitchTransformer(SHAPE), free(8))
    sizes = [
        torch.stack([layer.router.weight.detach().norm() for layer in m.switch_layers.values()])
        for m in (fresh, upcycled)
    ]
    assert float(sizes[1].mean()) == pytest.approx(float(sizes[0].mean()), rel=0.25)


def test_every_weight_outside_switch_layers_is_a_copy():
    dense = SwitchTransformer(SHAPE, seed=1)
    kept = {name: weight.clone() for name, weight in dense.state_dict().items()}
    sparse = upcycle_model(dense, free(4))
    with torch.no_grad():
        for name, weight in sparse.named_parameters():
            assert ".ffn.experts." in name or ".ffn.router." in name or name in kept
            if name in kept:
                assert torch.equal(weight, kept[name])
            weight.zero_()
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, kept[name])


def test_experts_without_noise_are_equal_and_with_noise_differ_by_that_share():
    dense = SwitchTransformer(SHAPE, seed=1)
    original = dense.encoder.blocks[1].ffn.w_in.weight.T
    exact = upcycle_model(dense, free(4)).switch_layers["encoder.1"].experts.w_in
    assert torch.equal(exact, original.expand_as(exact))
    noisy = upcycle_model(dense, free(4), noise=0.1).switch_layers["encoder.1"].experts.w_in
    share = (noisy - exact).square().mean().sqrt() / original.square().mean().sqrt()
    assert float(share.detach()) == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(noisy[0], noisy[1])


def test_seeds_decide_router_and_noise():
    dense = SwitchTransformer(SHAPE, seed=1)
    first, again, other = (
        upcycle_model(dense, free(4), noise=0.1, seed=seed) for seed in (0, 0, 1)
    )
    for layer in ("router.weight", "experts.w_out"):
        name = f"encoder.blocks.1.ffn.{layer}"
        assert torch.equal(first.get_parameter(name), again.get_parameter(name))
        assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_a_bfloat16_model_keeps_its_dtype_and_gets_a_float32_router():
    sparse = upcycle_model(SwitchTransformer(SHAPE).bfloat16(), free(4))
    layer = sparse.switch_layers["encoder.1"]
    assert layer.experts.w_in.dtype == torch.bfloat16
    assert layer.router.weight.dtype == torch.float32


def test_limited_capacity_costs_only_what_it_drops():
    dense = SwitchTransformer(SHAPE, seed=1)
    routing = RoutingConfig(experts=8, capacity_factor=1.25)
    sparse = upcycle_model(dense, routing).train()
    reports = sparse(INPUTS, TARGETS).routing
    assert all(report.dropped > 0.05 for report in reports)
    assert abs(nats(sparse) - nats(dense)) > 1e-4
    assert nats(sparse.eval()) == pytest.approx(nats(dense.eval()), abs=1e-5)


def test_the_result_is_a_switch_transformer_for_transformers_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    dense = SwitchTransformer(replace(SHAPE, num_layers=2), seed=1).eval()
    save_hf(upcycle_model(dense, free(4)), tmp_path / "hf")
    theirs = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "hf"
    ).eval()
    with torch.no_grad():
        logits = theirs(input_ids=INPUTS, labels=TARGETS).logits
        ours = dense(INPUTS, TARGETS).logits
    assert torch.allclose(logits, ours, atol=1e-4)


def test_the_first_step_gives_router_and_every_expert_a_gradient():
    sparse = upcycle_model(SwitchTransformer(SHAPE, seed=1), free(8))
    sparse(INPUTS, TARGETS).losses.total.backward()
    layer = sparse.switch_layers["encoder.1"]
    assert (layer.router.weight.grad.norm(dim=1) > 0).all()
    assert (layer.experts.w_in.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_noise_that_is_no_share_is_refused(noise):
    with pytest.raises(ConfigError, match="noise"):
        upcycle_model(SwitchTransformer(SHAPE), free(4), noise=noise)


def test_a_sparse_model_is_refused():
    sparse = SwitchTransformer(replace(SHAPE, routing=free(2)))
    with pytest.raises(ConfigError, match="sparse already: it has 2 experts"):
        upcycle_model(sparse, free(4))


def test_a_frequency_beyond_the_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"routing\.every = 5"):
        upcycle_model(SwitchTransformer(SHAPE), free(4, every=5))


@pytest.fixture(scope="module")
def dense_experiment(tiny_experiment):
    return replace(
        tiny_experiment, name="dense", model=replace(tiny_experiment.model, routing=None)
    )


@pytest.fixture(scope="module")
def dense_run(dense_experiment, tmp_path_factory):
    threads = torch.get_num_threads()
    run_dir = train(dense_experiment, tmp_path_factory.mktemp("dense") / "run")
    torch.set_num_threads(threads)
    return run_dir


def test_a_dense_run_is_upcycled_and_trained_on(
    dense_run, dense_experiment, corpus, tmp_path, capsys
):
    start = tmp_path / "start"
    assert main(["convert", str(dense_run), str(start), "--upcycle", "4"]) == 0
    assert "4 experts in 2 layers" in capsys.readouterr().out
    model, tokenizer = load(start)
    assert tokenizer is not None
    dense, _ = load(dense_run)
    assert nats(model) == pytest.approx(nats(dense), abs=1e-5)

    words = ["train", "tiny", "--init", str(start), "--data.path", str(corpus), "--steps", "2"]
    more = ["--threads", "1", "--run-dir", str(tmp_path / "on"), "--routing.capacity-factor"]
    assert main([*words, *more, "none"]) == 0
    assert main(["evaluate", str(tmp_path / "on")]) == 0


def test_a_hugging_face_directory_is_upcycled(tmp_path, capsys):
    dense = SwitchTransformer(SHAPE, seed=1).eval()
    save_hf(dense, tmp_path / "hf")
    words = ["convert", str(tmp_path / "hf"), str(tmp_path / "sparse"), "--upcycle", "8"]
    assert main([*words, "--every", "1"]) == 0
    sparse, _ = load(tmp_path / "sparse")
    assert len(sparse.switch_layers) == 8
    assert nats(sparse) == pytest.approx(nats(load_hf(tmp_path / "hf")), abs=1e-5)
    capsys.readouterr()


def test_spare_rows_of_a_released_vocabulary_stay_through_upcycling_and_training(
    dense_experiment, corpus, tmp_path, capsys
):
    """T5's embedding has 32128 rows for 32100 ids; here it is 512 for the 384 of bytes."""
    dense = SwitchTransformer(replace(dense_experiment.model, vocab_size=512), seed=1)
    save(dense, tmp_path / "dense", ByteTokenizer())
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "u"), "--upcycle", "4"]) == 0
    words = ["train", "tiny", "--init", str(tmp_path / "u"), "--data.path", str(corpus)]
    assert main([*words, "--steps", "1", "--threads", "1", "--run-dir", str(tmp_path / "on")]) == 0
    assert load(tmp_path / "on")[0].config.vocab_size == 512
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--upcycle", "0"], "routing.experts = 0"),
        (["--upcycle", "4", "--every", "0"], "routing.every = 0"),
        (["--upcycle", "4", "--noise", "-1"], "noise = -1.0"),
        (["--every", "1"], "Add --upcycle"),
    ],
)
def test_wrong_requests_are_explained(dense_run, tmp_path, capsys, flags, message):
    assert main(["convert", str(dense_run), str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_upcycling_a_sparse_run_is_explained(tiny_run, tmp_path, capsys):
    assert main(["convert", str(tiny_run), str(tmp_path / "out"), "--upcycle", "4"]) == 2
    assert "sparse already" in capsys.readouterr().err
