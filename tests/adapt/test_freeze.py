"""Freezing: what a name means, and that frozen parameters cost nothing and stay as they are."""

from dataclasses import replace

import pytest
import torch

import switchworks
from switchworks.adapt import freeze_parameters
from switchworks.adapt.freeze import KINDS, kinds_of, select
from switchworks.config import ConfigError
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.plan.explain import as_text, explain_experiment
from switchworks.recipes.tiny import tiny
from switchworks.training import Interrupted, train
from switchworks.training.state import build_state
from switchworks.training.step import train_step


def a_model(**more) -> SwitchTransformer:
    return SwitchTransformer(replace(tiny().model, **more))


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def some_batch(rows: int = 4):
    from switchworks.batch import Batch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (rows, 30), generator=generator)
    return Batch(inputs=ids[:, :16], targets=ids[:, 16:])


def test_every_parameter_has_one_kind():
    routing = RoutingConfig(experts=4, group_sequences=2, layers="both", bias_rate=0.1)
    model = a_model(routing=routing, tied_head=False)
    kinds = kinds_of(model)
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    assert set(kinds.values()) == set(KINDS)
    assert kinds["head.weight"] == kinds["embedding.weight"] == "embeddings"
    assert kinds["encoder.blocks.1.self_attention.o.weight"] == "attention"
    assert kinds["encoder.blocks.1.self_attention.switch.experts.w_in"] == "experts"
    assert kinds["encoder.blocks.1.ffn.router.selection_bias"] == "routers"


def test_experts_only_is_all_but_experts():
    model = a_model()
    freeze_parameters(model, ("all-but-experts",))
    assert trainable(model) == {
        f"{stack}.blocks.1.ffn.experts.{name}"
        for stack in ("encoder", "decoder")
        for name in ("w_in", "w_out")
    }


def test_everything_but_experts_is_freezing_the_experts():
    model = a_model()
    freeze_parameters(model, ("experts",))
    assert {n for n, _ in model.named_parameters()} - trainable(model) == {
        name for name in kinds_of(model) if ".experts." in name
    }


def test_router_only_is_all_but_routers():
    model = a_model()
    freeze_parameters(model, ("all-but-routers",))
    assert trainable(model) == {f"{s}.blocks.1.ffn.router.weight" for s in ("encoder", "decoder")}


def test_patterns_go_over_whole_names_and_add_up():
    model = a_model()
    actual = select(
        model, ("decoder.*", "encoder.blocks.0.ffn.w_??.weight", "embeddings"), "freeze"
    )
    assert "decoder.blocks.1.ffn.experts.w_in" in actual
    assert {name for name in actual if not name.startswith("decoder.")} == {
        "encoder.blocks.0.ffn.w_in.weight",
        "embedding.weight",
    }


def test_what_several_all_buts_spare_adds_up_and_plain_names_are_taken_out_of_it():
    model = a_model()
    entries = ("all-but-experts", "all-but-norms", "decoder.*")
    freeze_parameters(model, entries)
    assert trainable(model) == {
        name
        for name, kind in kinds_of(model).items()
        if kind in ("experts", "norms") and not name.startswith("decoder.")
    }


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names():
    with pytest.raises(ConfigError) as error:
        freeze_parameters(a_model(), ("*.expert.w_in",))
    assert "'*.expert.w_in', which matches no parameter" in str(error.value)
    assert "encoder.blocks.1.ffn.experts.w_in" in str(error.value)


def test_a_kind_that_the_model_has_not_is_an_error():
    with pytest.raises(ConfigError, match=r"names experts, and this model has none. It has attent"):
        freeze_parameters(a_model(routing=None), ("experts",))


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        freeze_parameters(a_model(), ("*",))


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_frozen_parameters_have_no_gradient_no_state_and_do_not_move(optimizer, precision):
    recipe = tiny()
    optim = replace(recipe.optim, name=optimizer, betas=(0.9, 0.99), lr=0.01, weight_decay=0.1)
    state = build_state(replace(recipe, freeze=("experts",), precision=precision, optim=optim))
    before = {name: t.clone() for name, t in state.updater.masters.float_state().items()}
    kept: dict[str, bool] = {}

    step = state.updater.step

    def look(*args):  # between backward and update, when gradients are there
        kept.update({n: g is not None for n, g in state.updater.masters.gradients().items()})
        return step(*args)

    state.updater.step = look
    train_step(state, some_batch())
    frozen = {name for name in before if ".experts." in name}
    assert len(frozen) == 4
    assert kept.keys() == before.keys() - frozen
    assert state.state_dict()["optimizer"].keys() == before.keys() - frozen
    after = state.updater.masters.float_state()
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen


def test_a_frozen_router_s_selection_bias_stays_too():
    recipe = tiny()
    routing = replace(recipe.model.routing, bias_rate=0.1)
    moved = {}
    for entries in ((), ("routers",)):
        model = replace(recipe.model, routing=routing)
        state = build_state(replace(recipe, model=model, freeze=entries))
        train_step(state, some_batch())
        bias = state.model.switch_layers["encoder.1"].router.selection_bias
        moved[entries] = bool(bias.any())
    assert moved == {(): True, ("routers",): False}


def test_explain_counts_what_is_trained_and_the_bytes_that_are_saved():
    recipe = replace(tiny(), optim=replace(tiny().optim, name="adamw"), freeze=("all-but-experts",))
    figures, whole = explain_experiment(recipe), explain_experiment(replace(recipe, freeze=()))
    experts = 2 * 2 * 4 * 32 * 64
    assert figures["trainable_parameters"] == experts
    assert figures["parameters"] == whole["parameters"] == whole["trainable_parameters"]
    state = build_state(recipe)
    train_step(state, some_batch())
    slots = state.state_dict()["optimizer"].values()
    held = sum(t.nbytes for s in slots for name, t in s.items() if name != "step")
    assert figures["bytes_per_rank"]["optimizer"] == held == 2 * 4 * experts
    assert figures["bytes_per_rank"]["gradients"] == 4 * experts
    assert "trained            32.8k" in as_text(figures)


def test_a_run_refuses_a_pattern_that_matches_nothing_before_it_reads_text(tmp_path):
    data = replace(tiny().data, path=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="matches no parameter"):
        train(replace(tiny(), data=data, freeze=("encodr.*",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_frozen_run_resumes_exactly_and_keeps_what_is_frozen_bit_for_bit(
    tiny_run, tiny_experiment, tmp_path, monkeypatch
):
    experiment = replace(
        tiny_experiment,
        steps=8,
        checkpoint_every=4,
        freeze=("all-but-experts", "decoder.*"),
        optim=replace(tiny_experiment.optim, betas=(0.9, 0.999)),
    )
    whole = train(experiment, tmp_path / "whole", init=tiny_run)
    interrupted_after(5, monkeypatch)
    with pytest.raises(Interrupted):
        train(experiment, tmp_path / "parts", init=tiny_run)
    monkeypatch.undo()
    parts = train(experiment, tmp_path / "parts", resume=True)
    ends = [switchworks.load(run)[0].state_dict() for run in (whole, parts, tiny_run)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    moved = {name for name in ends[0] if not torch.equal(ends[0][name], ends[2][name])}
    assert moved == {"encoder.blocks.1.ffn.experts.w_in", "encoder.blocks.1.ffn.experts.w_out"}


def interrupted_after(steps: int, monkeypatch) -> None:
    """Training gets a signal in its step number `steps`."""
    import os
    import signal

    from switchworks.training import loop

    real = loop.train_step

    def step(state, batch):
        if state.step == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, batch)

    monkeypatch.setattr(loop, "train_step", step)


def test_a_frozen_model_of_another_size_is_counted_without_memory():
    model = ModelConfig(routing=RoutingConfig(experts=2048), d_model=4096, d_ff=16384)
    data = replace(tiny().data, input_length=4096, target_length=2048)
    figures = explain_experiment(
        replace(tiny(), batch_size=2, data=data, model=model, freeze=("experts",))
    )
    assert figures["trainable_parameters"] < figures["parameters"] // 100
