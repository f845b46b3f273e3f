"""Low-rank adapters: what they compute, what they train, and how they become weights again."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.compiling import compiling

import switchworks
from switchworks.adapt import LoraConfig, adapt, merged
from switchworks.adapt.files import merge_adapters, merge_directory
from switchworks.adapt.lora import MARK, AdaptedExperts
from switchworks.batch import Batch
from switchworks.cli.main import main
from switchworks.config import CheckpointError, ConfigError
from switchworks.model import RoutingConfig, SwitchTransformer
from switchworks.model.experts import ExpertInput, Experts, ExpertWeights
from switchworks.plan.explain import explain_experiment
from switchworks.recipes.tiny import tiny
from switchworks.training import Interrupted, train
from switchworks.training.state import build_state
from switchworks.training.step import train_step

EVERY = ("attention", "ffn", "experts", "routers")


def a_model(**more) -> SwitchTransformer:
    return SwitchTransformer(replace(tiny().model, **more), seed=1)


def some_batch(rows: int = 4) -> Batch:
    ids = torch.randint(3, 300, (rows, 30), generator=torch.Generator().manual_seed(0))
    return Batch(inputs=ids[:, :16], targets=ids[:, 16:])


def shake(model: SwitchTransformer, size: float = 0.1) -> None:
    """Give every B values, as if it had been trained."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if MARK in name and name.endswith(".b"):
                parameter.normal_(std=size, generator=generator)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_linear_layer_adds_a_scaled_product_by_hand(rank):
    model = a_model()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    q = model.encoder.blocks[0].self_attention.q.weight.detach().double()
    adapt(model, LoraConfig(rank=rank, alpha=6.0, targets=("attention",)))
    shake(model)
    layer = model.double().encoder.blocks[0].self_attention.q
    a, b = layer.lora["weight"].a, layer.lora["weight"].b
    assert (a.shape, b.shape) == ((32, rank), (rank, 32))
    torch.testing.assert_close(layer(x), F.linear(x, q + (6.0 / rank) * (a @ b).T))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", [None, (3, 0, 4, 1)])
def test_each_expert_has_a_pair_of_its_own(gated, counts):
    model = a_model(gated=gated, activation="gelu")
    adapt(model, LoraConfig(rank=2, targets=("experts",)))
    shake(model)
    experts = model.double().encoder.blocks[1].ffn.experts
    assert isinstance(experts, AdaptedExperts)
    assert experts.lora["w_in"].a.shape == (4, 32, 2)
    assert experts.lora["w_in"].b.shape == (4, 2, 64)
    assert experts.lora["w_out"].a.shape == (4, 64, 2)
    x = torch.randn(8, 32, dtype=torch.float64)
    sizes = [2] * 4 if counts is None else list(counts)
    pairs = experts.weights
    merged = ExpertWeights(*(p and p.weight + p.scale * p.a @ p.b for p in pairs))
    plain = Experts(4, 32, 64, gated=gated, activation="gelu")
    slow = torch.cat(
        [plain.feed_forward(part, merged.select(e)) for e, part in enumerate(x.split(sizes))]
    )
    torch.testing.assert_close(experts(ExpertInput(x, counts)), slow)


def test_a_merged_model_computes_what_the_adapted_one_does():
    routing = RoutingConfig(experts=4, group_sequences=2, layers="both")
    for config in (
        replace(tiny().model, routing=routing),
        replace(tiny().model, gated=True, activation="gelu", tied_head=False),
    ):
        lora = LoraConfig(rank=3, targets=EVERY)
        model = SwitchTransformer(config, seed=1).eval()
        adapt(model, lora)
        shake(model)
        plain = SwitchTransformer(config).eval()
        plain.load_state_dict(merged(dict(model.named_parameters()), lora))
        batch = some_batch()
        with torch.no_grad():
            got, want = (m(batch.inputs, batch.targets).logits for m in (plain, model))
            base = SwitchTransformer(config, seed=1).eval()(batch.inputs, batch.targets).logits
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert (got - base).abs().max() > 0.01  # the adapters do something


def test_the_first_loss_is_exactly_that_of_the_model_without_adapters():
    # The fast kernels sort the tokens of plain experts, and would draw their dropout in that order.
    recipe = replace(tiny(), model=replace(tiny().model, dropout=0.1), kernels="reference")
    plain = train_step(build_state(recipe), some_batch())
    adapted = train_step(
        build_state(replace(recipe, lora=LoraConfig(rank=2, targets=EVERY))), some_batch()
    )
    assert adapted.cross_entropy == plain.cross_entropy
    assert adapted.total == plain.total


def test_only_the_adapters_are_trained_and_every_one_of_them_is():
    state = build_state(replace(tiny(), lora=LoraConfig(rank=2, targets=EVERY)))
    before = {name: t.clone() for name, t in state.updater.masters.float_state().items()}
    assert state.state_dict()["optimizer"].keys() == {name for name in before if MARK in name}
    for _ in range(2):  # A learns from the second step on, when B is no longer 0
        train_step(state, some_batch())
    after = state.updater.masters.float_state()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if MARK in name}


def test_the_table_says_what_is_adapted_and_what_is_not():
    table = adapt(a_model(), LoraConfig(rank=2, targets=("attention", "experts")))
    assert len(table.rows) == 6 * 4 + 2 * 2  # three attentions in each of two pairs of blocks
    experts = [row for row in table.rows if row.kind == "experts"]
    assert [(row.letters, row.shape) for row in experts[:2]] == [
        ("E D F", (4, 32, 64)),
        ("E F D", (4, 64, 32)),
    ]
    assert experts[0].parameters == 4 * (32 * 2 + 2 * 64)
    text = str(table)
    assert "2 x ffn.experts.w_in" in text
    assert "E D F" in text
    assert "not adapted: ffn, 4 matrices or stacks" in text
    assert "not adapted: routers, 2 matrices or stacks" in text


def test_experts_that_are_left_out_are_named():
    assert "not adapted: experts, 4" in str(adapt(a_model(), LoraConfig(targets=("attention",))))


def test_a_target_that_the_model_has_not_is_said():
    text = str(adapt(a_model(routing=None), LoraConfig()))
    assert "lora.targets has experts, and this model has none" in text


def test_nothing_to_adapt_is_an_error():
    with pytest.raises(ConfigError, match=r"nothing of these.\n  It has attention, ffn"):
        adapt(a_model(routing=None), LoraConfig(targets=("experts",)))


def test_a_rank_that_is_not_low_is_an_error():
    with pytest.raises(ConfigError, match=r"lora.rank = 4 is not low for .*router.weight.* 4 x 32"):
        adapt(a_model(), LoraConfig(rank=4, targets=("routers",)))


def test_adapters_and_frozen_names_together_are_refused():
    with pytest.raises(ConfigError, match=r"lora.also-train"):
        replace(tiny(), lora=LoraConfig(), freeze=("experts",))


def test_first_values_depend_on_seed_and_name_alone():
    one, other, third = a_model(), a_model(), a_model()
    adapt(one, LoraConfig(targets=("attention",)), seed=3)
    adapt(other, LoraConfig(targets=("attention", "ffn")), seed=3)
    adapt(third, LoraConfig(targets=("attention",)), seed=4)
    name = "encoder.blocks.0.self_attention.q.lora.weight.a"
    a, b, c = (dict(m.named_parameters())[name] for m in (one, other, third))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.abs().max() <= 32**-0.5


def test_explain_counts_the_adapters_without_making_them():
    figures = explain_experiment(replace(tiny(), lora=LoraConfig(rank=2, targets=("experts",))))
    experts = 2 * 4 * ((32 + 64) * 2 + (64 + 32) * 2)
    assert figures["adapter_parameters"] == figures["trainable_parameters"] == experts
    assert figures["bytes_per_rank"]["gradients"] == 4 * experts
    assert figures["bytes_per_rank"]["weights"] == 4 * (figures["parameters"] + experts)


def test_an_adapted_layer_compiles_as_one_graph():
    model = SwitchTransformer(tiny().model, seed=1)
    adapt(model, LoraConfig(rank=2, targets=("attention", "ffn", "experts", "routers")))
    layer = model.encoder.blocks[1].ffn.train()
    torch.nn.init.normal_(layer.experts.lora["w_in"].b)
    x = torch.randn(4, 16, 32)
    with compiling():
        for module in (layer, model.encoder.blocks[0].ffn):
            found = []
            for call in (module, torch.compile(module, fullgraph=True)):
                torch.manual_seed(0)
                y = call(x)
                found.append(y[0] if isinstance(y, tuple) else y)
            torch.testing.assert_close(*found[::-1], rtol=1e-5, atol=1e-6)
            found[1].sum().backward()
    assert layer.experts.lora["w_in"].a.grad is not None
    assert layer.experts.w_in.grad is None


@pytest.fixture(scope="module")
def adapted_experiment(tiny_experiment):
    """In bfloat16, so that masters, routers in float32 and adapters are all there."""
    return replace(
        tiny_experiment,
        steps=8,
        checkpoint_every=4,
        precision="bfloat16",
        lora=LoraConfig(rank=2, targets=EVERY, also_train=("norms",)),
        optim=replace(tiny_experiment.optim, lr=0.05),
    )


@pytest.fixture(scope="module")
def adapted_run(adapted_experiment, tiny_run, tmp_path_factory):
    threads = torch.get_num_threads()
    run_dir = train(adapted_experiment, tmp_path_factory.mktemp("lora") / "run", init=tiny_run)
    torch.set_num_threads(threads)
    return run_dir


def test_a_run_leaves_an_ordinary_model_and_the_adapters_alone(adapted_run, tiny_run):
    model, _ = switchworks.load(adapted_run)
    stored = load_file(adapted_run / "adapters" / "adapters.safetensors")
    lora = {name for name in stored if MARK in name}
    assert {name for name in stored if name not in lora} == {
        name for name, _ in model.named_parameters() if name.endswith("norm.weight")
    }
    assert {t.dtype for t in stored.values()} == {torch.float32}
    base = switchworks.load(tiny_run)[0].state_dict()
    ours = model.state_dict()
    same = {name for name in base if torch.equal(base[name], ours[name])}
    assert same == {
        "embedding.weight",
        "encoder.relative_bias.weight",
        "decoder.relative_bias.weight",
    }


def test_merging_the_adapters_gives_the_exported_model_bit_for_bit(adapted_run, tiny_run, tmp_path):
    said = merge_directory(tiny_run, tmp_path / "merged", adapted_run)
    assert "merged in" in said
    ours, theirs = (switchworks.load(d)[0].state_dict() for d in (tmp_path / "merged", adapted_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_command_merges_too_and_takes_no_other_flag(adapted_run, tiny_run, tmp_path, capsys):
    words = ["convert", str(tiny_run), str(tmp_path / "out"), "--merge-lora", str(adapted_run)]
    assert main([*words, "--upcycle", "4"]) == 2
    assert "different changes" in capsys.readouterr().err
    assert main(words) == 0
    assert switchworks.load(tmp_path / "out")[1] is not None


def test_adapters_of_another_model_are_refused(adapted_run, tmp_path):
    other = SwitchTransformer(switchworks.load(adapted_run)[0].config, seed=5)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        merge_adapters(other, adapted_run)
    with pytest.raises(CheckpointError, match="do not fit this model"):
        merge_adapters(SwitchTransformer(replace(other.config, d_ff=96)), adapted_run)
    with pytest.raises(CheckpointError, match="holds no adapters"):
        merge_adapters(other, tmp_path)


def test_an_adapted_run_resumes_exactly(
    adapted_experiment, adapted_run, tiny_run, tmp_path, monkeypatch
):
    from adapt.test_freeze import interrupted_after

    interrupted_after(5, monkeypatch)
    with pytest.raises(Interrupted):
        train(adapted_experiment, tmp_path / "run", init=tiny_run)
    monkeypatch.undo()
    run_dir = train(adapted_experiment, tmp_path / "run", resume=True)
    for file in ("adapters/adapters.safetensors", "model/model.safetensors"):
        whole, parts = load_file(adapted_run / file), load_file(run_dir / file)
        assert all(torch.equal(whole[name], parts[name]) for name in whole), file


def test_the_exported_model_goes_to_transformers(adapted_run, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, _ = switchworks.load(adapted_run)
    switchworks.save_hf(ours, tmp_path / "hf")
    theirs = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "hf"
    )
    batch = some_batch()
    with torch.no_grad():
        want = theirs.eval()(input_ids=batch.inputs, labels=batch.targets.contiguous()).logits
        got = ours(batch.inputs, batch.targets).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_adapters_learn_under_adafactor(tiny_run, tiny_experiment, tmp_path):
    """B begins at 0, and a step in proportion to its size would leave it there."""
    batch, losses = some_batch(), {}
    for floor in (1.0, 1e-3):
        optim = replace(tiny_experiment.optim, lr=0.01, schedule="constant", adapter_floor=floor)
        experiment = replace(tiny_experiment, optim=optim, lora=LoraConfig(rank=2))
        state = build_state(experiment, switchworks.load(tiny_run)[0])
        results = [train_step(state, batch).cross_entropy for _ in range(15)]
        losses[floor] = results[0] - results[-1]
    assert losses[1.0] > 0.05
    assert losses[1e-3] < 0.5 * losses[1.0]


def test_an_adapted_router_of_float32_scores_float64_inputs_in_float64():
    model = a_model()
    adapt(model, LoraConfig(rank=2, targets=("routers",)))
    router = next(iter(model.switch_layers.values())).router.eval()
    router.lora["weight"].b.data.normal_()
    x = torch.randn(1, 5, router.weight.shape[1], dtype=torch.float64)
    assert router(x).dtype == torch.float64
    torch.testing.assert_close(router(x).float(), router(x.float()))


def test_adapters_of_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"targets names nothing to adapt\.\n  Use some of att"):
        LoraConfig(targets=())
