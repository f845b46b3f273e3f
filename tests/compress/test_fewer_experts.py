"""Models that lose experts: dropped by use, or merged with those they resemble."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import TINY

import switchworks
from switchworks.batch import Batch
from switchworks.cli.main import main
from switchworks.compress.directories import fewer_table, text_to_count
from switchworks.compress.fewer import dense_equivalent, measure_usage, reduce_experts, route_batch
from switchworks.config import ConfigError, DataError
from switchworks.data.config import DataConfig
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer

CONFIG = replace(TINY, init_scale=1.0)
GATED = replace(CONFIG, gated=True, activation="gelu")
prune_experts = partial(reduce_experts, method="prune")
merge_experts = partial(reduce_experts, method="merge")
WAYS = pytest.mark.parametrize("reduce", [prune_experts, merge_experts])


def batch_of(rows: int = 6, seed: int = 0) -> Batch:
    """Random tokens; the last row is padding but for one token on each side."""
    torch.manual_seed(seed)
    inputs, targets = torch.randint(2, 40, (rows, 9)), torch.randint(2, 40, (rows, 7))
    inputs[-1, 1:] = 0
    targets[-1, 1:] = 0
    return Batch(inputs=inputs, targets=targets)


@torch.no_grad()
def logits_of(model: SwitchTransformer, batch: Batch) -> torch.Tensor:
    return model.eval()(batch.inputs, batch.targets).logits[batch.targets != 0]


def with_twins(config: ModelConfig, shuffled: bool) -> SwitchTransformer:
    """A model whose experts 2 and 3 are copies of 0 and 1: the same rows of the router but for a
    hair less, hidden units in another order if `shuffled`."""
    model = SwitchTransformer(config, seed=3)
    order = torch.randperm(config.d_ff) if shuffled else torch.arange(config.d_ff)
    with torch.no_grad():
        for layer in model.switch_layers.values():
            layer.router.weight[2:] = layer.router.weight[:2]
            for name, weight in layer.experts.named_parameters():
                weight[2:] = weight[:2, order] if name == "w_out" else weight[:2][..., order]
    return model


def test_usage_counts_real_tokens_by_the_expert_they_want_most():
    """Against the model's own report: load times tokens, and confidence times tokens."""
    model, batch = SwitchTransformer(CONFIG, seed=1).eval(), batch_of()
    usage = measure_usage(model, [batch, batch])
    with torch.no_grad():
        reports = model(batch.inputs, batch.targets).routing
    for name, report, tokens in zip(usage, reports, (46, 36), strict=True):
        torch.testing.assert_close(usage[name].tokens, 2 * tokens * report.load)
        torch.testing.assert_close(usage[name].gates.sum(), 2 * tokens * report.confidence)


def test_of_top2_both_experts_of_a_token_are_counted():
    model = SwitchTransformer(replace(CONFIG, routing=RoutingConfig(experts=4, strategy="top2")))
    usage = measure_usage(model, [batch_of()])
    assert [float(one.tokens.sum()) for one in usage.values()] == [2 * 46, 2 * 36]


def test_how_logits_go_together_is_their_covariance():
    model, batch = SwitchTransformer(CONFIG, seed=1), batch_of()
    first = next(iter(model.switch_layers.values()))
    with torch.no_grad():
        first.router.weight[2] += 1.0  # its logits have a mean that is not the others'
    routed = next(iter(route_batch(model, batch).values()))
    usage = next(iter(measure_usage(model, [batch]).values()))
    logits = routed.logits[routed.real].double()
    wanted = np.cov((logits - logits.mean(dim=1, keepdim=True)).T.numpy(), bias=True)
    torch.testing.assert_close(usage.logits, torch.from_numpy(wanted).float())


def test_a_fixed_capacity_grows_as_experts_go():
    routing = RoutingConfig(experts=4, expert_capacity=5)
    model = SwitchTransformer(replace(CONFIG, routing=routing))
    small = prune_experts(model, [batch_of()], 3).model
    assert small.config.routing == replace(routing, experts=3, expert_capacity=7)


@WAYS
@pytest.mark.parametrize("config", [CONFIG, GATED])
def test_keeping_all_experts_changes_nothing(reduce, config):
    model, batch = SwitchTransformer(config, seed=1), batch_of()
    kept = reduce(model, [batch], 4)
    before = model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in kept.model.state_dict().items())


@WAYS
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("config", [CONFIG, GATED])
def test_experts_that_have_twins_can_go_without_loss(reduce, shuffled, config):
    """Every gate doubles as half of the rows go, which the output matrices make up for."""
    model, batch = with_twins(config, shuffled), batch_of()
    fewer = reduce(model, [batch], 2)
    assert fewer.model.config.routing.experts == 2
    assert all(torch.allclose(scale, torch.tensor(0.5)) for scale in fewer.scales.values())
    torch.testing.assert_close(logits_of(fewer.model, batch), logits_of(model, batch))


def test_pruning_keeps_the_experts_that_the_text_wants_most():
    model, batch = SwitchTransformer(CONFIG, seed=1), batch_of(rows=12)
    usage, fewer = measure_usage(model, [batch]), prune_experts(model, [batch], 2)
    for name, groups in fewer.groups.items():
        best = usage[name].tokens.topk(2)
        assert sorted(group.members[0] for group in groups) == sorted(best.indices.tolist())
        share = sum(group.share for group in groups)
        assert share == pytest.approx(float(best.values.sum() / usage[name].tokens.sum()))
        row = groups[0].members[0]
        kept, before = fewer.model.switch_layers[name], model.switch_layers[name]
        assert torch.equal(kept.router.weight[0], before.router.weight[row])
        assert torch.equal(kept.experts.w_in[0], before.experts.w_in[row])


def test_gates_and_counts_may_keep_different_experts():
    """One expert is wanted by more tokens, another with more confidence."""
    routing = RoutingConfig(experts=3)
    model = SwitchTransformer(replace(CONFIG, routing=routing), seed=5)
    batch = batch_of(rows=12)
    kept = {
        by: [g.members[0] for g in prune_experts(model, [batch], 1, by=by).groups["encoder.1"]]
        for by in ("usage", "gates")
    }
    usage = measure_usage(model, [batch])["encoder.1"]
    assert kept["usage"] == [int(usage.tokens.argmax())]
    assert kept["gates"] == [int(usage.gates.argmax())]


def test_merging_loses_no_expert_and_averages_by_usage():
    model, batch = SwitchTransformer(CONFIG, seed=1), batch_of(rows=12)
    usage, fewer = measure_usage(model, [batch]), merge_experts(model, [batch], 1)
    for name, (group,) in fewer.groups.items():
        tokens = usage[name].tokens
        assert sorted(group.members) == [0, 1, 2, 3]
        assert group.members[0] == int(tokens.argmax())
        assert group.share == pytest.approx(1)
        merged, before = fewer.model.switch_layers[name].experts, model.switch_layers[name].experts
        # A sum over hidden units does not mind their order.
        expected = (before.w_in.sum(-1) * (tokens / tokens.sum())[:, None]).sum(0)
        torch.testing.assert_close(merged.w_in[0].sum(-1), expected)


def test_the_first_model_is_left_as_it_was():
    model, batch = SwitchTransformer(CONFIG, seed=1).train(), batch_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fewer = merge_experts(model, [batch], 2)
    assert model.training
    assert fewer.model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ours = {value.data_ptr() for value in fewer.model.parameters()}
    assert not ours & {value.data_ptr() for value in model.parameters()}


@pytest.mark.parametrize("config", [CONFIG, GATED])
def test_one_expert_left_is_a_dense_model_with_the_same_answers(config):
    model, batch = SwitchTransformer(config, seed=1), batch_of()
    one = merge_experts(model, [batch], 1).model
    dense = dense_equivalent(one)
    assert dense.config == replace(config, routing=None)
    torch.testing.assert_close(logits_of(dense, batch), logits_of(one, batch))


def test_several_experts_or_one_in_attention_make_no_dense_model():
    with pytest.raises(ConfigError, match="4 experts a layer"):
        dense_equivalent(SwitchTransformer(CONFIG))
    routing = RoutingConfig(experts=1, layers="both")
    with pytest.raises(ConfigError, match=r"routing\.layers = both"):
        dense_equivalent(SwitchTransformer(replace(CONFIG, routing=routing)))


@WAYS
@pytest.mark.parametrize(
    ("keep", "message"),
    [(0, "0 experts would be left"), (5, "5 experts cannot be kept: the model has 4")],
)
def test_impossible_numbers_are_refused(reduce, keep, message):
    with pytest.raises(ConfigError, match=message):
        reduce(SwitchTransformer(CONFIG), [batch_of()], keep)


def test_dense_models_and_experts_that_choose_are_refused():
    dense = SwitchTransformer(replace(CONFIG, routing=None))
    with pytest.raises(ConfigError, match="dense"):
        prune_experts(dense, [batch_of()], 1)
    routing = RoutingConfig(experts=4, strategy="expert_choice", decoder_strategy="switch")
    choosy = SwitchTransformer(replace(CONFIG, routing=routing))
    with pytest.raises(ConfigError, match="experts pick"):
        prune_experts(choosy, [batch_of()], 2)


def test_a_text_of_padding_alone_is_refused():
    padding = Batch(inputs=torch.zeros(2, 3, dtype=torch.long), targets=torch.zeros(2, 3).long())
    with pytest.raises(DataError, match="No token of the text reaches"):
        prune_experts(SwitchTransformer(CONFIG), [padding], 2)


@pytest.mark.parametrize("how", ["prune", "merge"])
def test_the_command_writes_a_model_that_trains_on(how, tiny_run, corpus, tmp_path, capsys):
    smaller = tmp_path / "smaller"
    assert main(["convert", str(tiny_run), str(smaller), f"--{how}", "2", "--batches", "2"]) == 0
    printed = capsys.readouterr().out
    assert "of the tokens" in printed
    assert "--model.routing.experts 2" in printed
    model, tokenizer = switchworks.load(smaller)
    assert model.config.routing.experts == 2
    assert tokenizer is not None
    more = ["--model.routing.experts", "2", "--steps", "2", "--run-dir", str(tmp_path / "run")]
    more += ["--data.path", str(corpus), "--data.tokenizer", str(tiny_run)]
    assert main(["train", "tiny", "--init", str(smaller), *more]) == 0


def test_the_command_makes_a_dense_model_of_one_expert(tiny_run, tmp_path):
    words = ["convert", str(tiny_run), str(tmp_path / "dense"), "--merge", "1", "--batches", "1"]
    assert main(words) == 0
    model, _ = switchworks.load(tmp_path / "dense")
    assert model.config.routing is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune", "2", "--merge", "2"], "--prune and --merge are different changes"),
        (["--by", "gates"], "--by needs --prune or --merge"),
        (["--prune", "2", "--noise", "0.1"], "--noise needs --upcycle"),
        (["--prune", "2", "--batches", "0"], "--batches 0 would read no text"),
        (["--only", "de"], "--only needs --prune or --merge"),
        (["--prune", "2", "--capacity", "hf"], "Convert first, then --prune"),
        (["--prune", "9"], "9 experts cannot be kept"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, tiny_run, tmp_path, capsys):
    assert main(["convert", str(tiny_run), str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--prune", "9"], ["--merge", "0"]])
def test_a_wrong_number_is_refused_before_any_text_is_read(flags, tiny_run, tmp_path, capsys):
    words = ["convert", str(tiny_run), str(tmp_path / "to"), "--text", "absent", *flags]
    assert main(words) == 2
    assert re.search("9 experts cannot be kept|0 experts would be left", capsys.readouterr().err)


def test_a_model_alone_needs_a_text(tiny_run, tmp_path, capsys):
    words = ["convert", str(tiny_run / "model"), str(tmp_path / "out"), "--prune", "2"]
    assert main(words) == 2
    assert "--text FILE" in capsys.readouterr().err


def test_kept_experts_that_the_text_never_wants_are_named():
    model, batch = SwitchTransformer(CONFIG, seed=1), batch_of(rows=1)
    with torch.no_grad():
        for layer in model.switch_layers.values():
            layer.router.weight[1:] = layer.router.weight[:1]  # all tie, and the first one wins
    said = fewer_table(prune_experts(model, [batch], 3), [batch], DataConfig(path="mine.txt"))
    assert "tokens of mine.txt" in said
    assert said.count("no token wants 2 of these (1 2): keep fewer") == len(model.switch_layers)


def test_routers_stay_in_float32_beside_bfloat16_weights():
    model = SwitchTransformer(CONFIG, seed=1).bfloat16()
    for layer in model.switch_layers.values():
        layer.router.float()
    small = prune_experts(model, [batch_of(rows=2)], 2).model
    assert {layer.router.weight.dtype for layer in small.switch_layers.values()} == {torch.float32}
    assert small.embedding.weight.dtype == torch.bfloat16


def read_by(run_dir: Path, tmp_path: Path, data: str, **asked) -> DataConfig:
    """What is read to count the experts of a run with these settings of data."""
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "experiment.toml").write_text(f"[data]\n{data}\n")
    return text_to_count(run, CONFIG, asked.get("text"), asked.get("only", ()))


def test_a_text_named_is_counted_on_whatever_the_run_read(tiny_run, tmp_path):
    for data in ('tasks = ["glue_rte"]', 'source = "catalogs"\nlanguages = ["de", "ru"]'):
        read = read_by(tiny_run, tmp_path, data, text="german.txt")
        assert (read.path, read.tasks, read.languages) == ("german.txt", (), ())
    causal = 'objective = "causal"\ninput_length = 48\ntarget_length = 16\ntasks = ["glue_rte"]'
    read = read_by(tiny_run, tmp_path, causal, text="german.txt")
    assert (read.input_length, read.target_length) == (0, 64)


def test_experts_are_counted_on_one_language_corpus_or_task_alone(tiny_run, tmp_path):
    def only(data: str, *names: str) -> DataConfig:
        return read_by(tiny_run, tmp_path, data, only=names)

    assert only('source = "catalogs"', "de").languages == ("de",)
    assert only('mixture = ["a=x", "b=y"]', "b").mixture == ("b=y",)
    assert only('tasks = ["glue_rte", "glue_cola"]', "glue_cola").tasks == ("glue_cola",)
    assert only('path = "plain"', "docstring_summary").tasks == ("docstring_summary",)
    causal = 'path = "plain"\nobjective = "causal"\ninput_length = 0\ntarget_length = 64'
    assert only(causal, "docstring_summary").input_length == 64
    with pytest.raises(ConfigError, match=r"--only c: the run read nothing of that name.\n.*a, b"):
        only('mixture = ["a=x", "b=y"]', "c")
    with pytest.raises(ConfigError, match="There is no task 'german'"):
        only('path = "plain"', "german")
    with pytest.raises(ConfigError, match=r"are both to count on\.\n  Give one of them"):
        read_by(tiny_run, tmp_path, "", text="a.txt", only=("de",))


def test_an_empty_text_is_explained(tiny_run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    words = ["convert", str(tiny_run), str(tmp_path / "out"), "--prune", "2"]
    assert main([*words, "--text", str(tmp_path / "empty.txt")]) == 2
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
