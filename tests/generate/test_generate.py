"""Decoding: the cache, the ways to choose a token, and fill-ins as text."""

import pytest
import torch

from switchworks.batch import check_prompts
from switchworks.config import ConfigError
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.fast.seams import skip_losses
from switchworks.generate import Sampling, generate
from switchworks.generate.beam import BeamSearch
from switchworks.generate.texts import GenerationConfig, _to_fill, fill, parse_fills, write_texts
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.model.decoding import choose


@pytest.fixture(scope="module")
def model() -> SwitchTransformer:
    config = ModelConfig(
        vocab_size=64,
        d_model=16,
        d_ff=32,
        d_kv=4,
        num_heads=2,
        num_layers=2,
        routing=RoutingConfig(experts=4, every=1),
        init_scale=1.0,
    )
    return SwitchTransformer(config, seed=3)


def some_inputs() -> torch.Tensor:
    return torch.tensor([[9, 8, 7, 6, 1], [5, 4, 1, 0, 0]])


def greedy_by_full_forward(model: SwitchTransformer, inputs: torch.Tensor, steps: int):
    """One full teacher-forced pass per token: slow, and without any cache."""
    written = torch.zeros(inputs.shape[0], 0, dtype=torch.long)
    model.eval()
    with torch.no_grad():
        for _ in range(steps):
            # A last target is needed to ask for one more position; its value does not matter.
            targets = torch.cat([written, torch.full_like(inputs[:, :1], 5)], dim=1)
            logits = model(inputs, targets).logits[:, -1]
            written = torch.cat([written, logits.argmax(-1, keepdim=True)], dim=1)
    return written


def test_decoding_with_the_cache_writes_what_full_forward_passes_write(model):
    inputs = some_inputs()
    written = generate(model, inputs, max_length=8)
    expected = greedy_by_full_forward(model, inputs, written.shape[1])
    for row in range(2):
        ended = (expected[row] == 1).nonzero().flatten().tolist()
        length = ended[0] + 1 if ended else expected.shape[1]
        assert written[row, :length].tolist() == expected[row, :length].tolist()


def test_a_sequence_is_answered_the_same_alone_and_in_a_batch(model):
    together = generate(model, some_inputs(), max_length=6)
    alone = generate(model, torch.tensor([[5, 4, 1]]), max_length=6)
    assert together[1, : alone.shape[1]].tolist() == alone[0].tolist()


@pytest.mark.parametrize("beams", [None, BeamSearch(beams=2)], ids=["greedy", "beams"])
def test_switch_layers_count_nothing_while_decoding_and_everything_again_afterwards(model, beams):
    loads = []
    layer = model.switch_layers["decoder.0"]
    hook = layer.register_forward_hook(lambda _layer, _x, complete: loads.append(complete[1].load))
    generate(model, some_inputs(), max_length=3, beams=beams)
    hook.remove()
    assert torch.cat(loads).tolist() == [0.0] * 4 * len(loads)
    reported = model(some_inputs(), some_inputs()).routing
    assert [float(one.load.sum()) for one in reported] == pytest.approx([1.0] * 4)


def test_logits_only_leaves_out_losses_and_statistics_and_changes_no_logit_and_no_plan(model):
    torch.manual_seed(0)  # the router's jitter
    whole = model(some_inputs(), some_inputs())
    torch.manual_seed(0)
    with skip_losses(model):
        bare = model(some_inputs(), some_inputs())
    assert torch.equal(bare.logits, whole.logits)
    assert bare.losses.total == 0 < model(some_inputs(), some_inputs()).losses.total
    for ours, theirs in zip(bare.routing, whole.routing, strict=True):
        assert torch.equal(ours.routes.expert, theirs.routes.expert)
        assert ours.confidence == 0 < theirs.confidence


def test_of_two_that_want_logits_only_the_last_to_leave_leaves_the_model_whole(model):
    first, second = skip_losses(model), skip_losses(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    whole = model(some_inputs(), some_inputs())
    assert whole.losses.cross_entropy > 0
    assert all(one.load.sum() > 0 for one in whole.routing)


def test_generating_restores_the_training_mode(model):
    model.train()
    generate(model, some_inputs(), max_length=2)
    assert model.training


def test_after_its_end_a_row_holds_only_padding(model):
    written = generate(
        model, some_inputs().repeat(32, 1), max_length=24, sampling=Sampling(temperature=3.0)
    )
    ended = (written == 1).cumsum(dim=1) - (written == 1).long()
    assert (written == 1).any()
    assert (written[ended > 0] == 0).all()


def test_the_model_generates_by_itself(model):
    expected = generate(model, some_inputs(), max_length=4)
    assert torch.equal(model.generate(some_inputs(), max_length=4), expected)


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits, Sampling(temperature=1.0), generator)
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    assert torch.allclose(shares, torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.015)


def test_top_k_never_draws_a_token_outside_the_best_k():
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.5]]).expand(500, 4)
    drawn = choose(logits, Sampling(temperature=5.0, top_k=2), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {2, 3}


def test_top_p_keeps_the_smallest_set_that_holds_the_probability():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(500, 4)
    drawn = choose(logits, Sampling(temperature=1.0, top_p=0.6), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("probs", "top_p", "kept"),
    [
        ([0.5, 0.25, 0.125, 0.125], 0.75, 2),
        ([0.4, 0.3, 0.2, 0.1], 0.7, 2),
        ([0.4, 0.3, 0.2, 0.1], 0.9, 3),
        ([0.3, 0.3, 0.2, 0.2], 0.6, 2),
        ([0.1] * 10, 0.3, 3),
        ([0.9, 0.1], 0.5, 1),
        ([0.4, 0.3, 0.2, 0.1], 1e-9, 1),
    ],
)
def test_a_sum_of_exactly_top_p_is_enough(probs, top_p, kept):
    logits = torch.tensor([probs]).log().expand(800, len(probs))
    drawn = choose(logits, Sampling(temperature=1.0, top_p=top_p), torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == kept


def test_the_same_seed_draws_the_same_text(model):
    sampling = Sampling(temperature=1.0, seed=5)
    first = generate(model, some_inputs(), max_length=6, sampling=sampling)
    assert torch.equal(first, generate(model, some_inputs(), max_length=6, sampling=sampling))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": 1e-40}, "temperature = 1e-40 must be 0 or at least"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(4, dtype=torch.long), r"inputs of shape \[4\] are not"),
        (torch.ones(0, 4, dtype=torch.long), r"inputs of shape \[0, 4\] are not"),
        (torch.ones(2, 0, dtype=torch.long), "Give it EOS at least"),
    ],
)
def test_inputs_that_are_no_texts_are_refused(inputs, message):
    with pytest.raises(ConfigError, match=message):
        check_prompts(inputs, 4, decoder_only=False)


@pytest.mark.parametrize("power", [float("nan"), 1e6, -11.0])
def test_a_length_penalty_beyond_reason_is_refused(power):
    with pytest.raises(ConfigError, match="length_penalty = "):
        BeamSearch(length_penalty=power)


def test_texts_of_several_batches_are_drawn_with_other_numbers(byte_decoder):
    """A causal model's text shows every token, so that all four differ and not only two."""
    config = GenerationConfig(
        max_length=8, sampling=Sampling(temperature=1.0, seed=3), batch_size=1
    )
    texts = write_texts(byte_decoder, ByteTokenizer(), ["The list"] * 4, config)
    assert len(set(texts)) == 4
    assert texts == write_texts(byte_decoder, ByteTokenizer(), ["The list"] * 4, config)


def test_no_room_to_write_is_refused(model):
    with pytest.raises(ConfigError, match="max_length = 0"):
        generate(model, some_inputs(), max_length=0)


def test_fills_are_read_by_their_number():
    complete = "lost <extra_id_1> of the <extra_id_0> big <extra_id_1> again"
    assert parse_fills(complete) == {1: "of the", 0: "big"}


def test_holes_are_counted_from_zero_for_the_model_whatever_their_numbers():
    tokenizer = ByteTokenizer()
    texts = ["a <extra_id_0> b <extra_id_1>", "a <extra_id_7> b <extra_id_3>"]
    usual, other = _to_fill(tokenizer, texts)
    assert other.ids == usual.ids
    written = tokenizer.encode("<extra_id_0> old <extra_id_1> new")
    assert other.show(written) == usual.show(written) == "a [old] b [new]"
    assert other.show(tokenizer.encode("<extra_id_1> new")) == "a <extra_id_7> b [new]"


def test_more_holes_than_sentinels_are_refused(byte_model):
    text = " ".join(f"<extra_id_{number}>" for number in range(ByteTokenizer.num_sentinels + 1))
    with pytest.raises(ConfigError, match=r"has \d+ holes, and the tokenizer has names for \d+"):
        write_texts(byte_model, ByteTokenizer(), [text], GenerationConfig())


def test_a_hole_without_a_fill_stays():
    text = "The <extra_id_0> dog <extra_id_1>."
    assert fill(text, {0: "old"}) == "The [old] dog <extra_id_1>."
