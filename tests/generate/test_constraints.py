"""What may be written: the tokens and scores of transformers' `generate` on 20 random models."""

from functools import cache
from typing import Any

import pytest
import torch
from support.models import byte_transformer
from torch import Tensor

from switchworks import ModelConfig, RoutingConfig, SwitchTransformer, load_hf
from switchworks.config import ConfigError
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
from switchworks.model import first_logits

transformers = pytest.importorskip("transformers")

LENGTH = 8
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1}
START = {**SPECIAL, "decoder_start_token_id": 0}
FAMILIES = ("encoder-decoder", "decoder-only")
each_family = pytest.mark.parametrize("family", FAMILIES)


class OurDecoder(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A decoder-only model of ours, of which transformers' `generate` asks for logits alone."""

    config_class = transformers.PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, ours: SwitchTransformer) -> None:
        size = {"vocab_size": ours.config.vocab_size, "num_hidden_layers": 1}
        super().__init__(transformers.PretrainedConfig(**SPECIAL, **size))
        self.ours, self.prompt = ours, 0

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, **_: Any
    ) -> dict[str, Tensor]:
        return {"input_ids": input_ids}

    @torch.no_grad()
    def forward(self, input_ids, attention_mask=None, **_: Any) -> Any:
        prompts, written = input_ids[:, : self.prompt], input_ids[:, self.prompt :]
        logits, cached = first_logits(self.ours, prompts, written.shape[1] + 1)
        if written.shape[1]:
            logits = self.ours.decode_step(written, cached)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits[:, -1:])


@cache
def models(family: str, vocab: int = 29) -> list[tuple[Any, SwitchTransformer]]:
    """20 pairs of a model as transformers and as we have it."""
    make = encoder_decoder if family == "encoder-decoder" else decoder_only
    return [make(seed, vocab) for seed in range(20)]


def encoder_decoder(seed: int, vocab: int) -> tuple[Any, SwitchTransformer]:
    size = {"vocab_size": vocab, "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24}
    size |= {"num_layers": 2, "num_decoder_layers": 2}
    torch.manual_seed(seed)
    if seed % 2:
        sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
        sparse |= {"num_experts": 4, "expert_capacity": 1000}
        config = transformers.SwitchTransformersConfig(**size, **START, **sparse)
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    else:
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**size, **START))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # The first values of transformers are so small that all tokens are as likely.
            spread = 2.0 if "shared" in name or "lm_head" in name else 0.5
            weight.copy_(torch.randn_like(weight) * spread)
    return model.eval(), load_hf(model)


def decoder_only(seed: int, vocab: int) -> tuple[Any, SwitchTransformer]:
    config = ModelConfig(
        vocab_size=vocab,
        d_model=16,
        d_ff=24,
        d_kv=4,
        num_heads=4,
        num_layers=2,
        decoder_only=True,
        routing=RoutingConfig(experts=4) if seed % 2 else None,
        init_scale=3.0,
    )
    model = SwitchTransformer(config, seed=seed).eval()
    return OurDecoder(model).eval(), model


INPUTS = torch.tensor([[9, 8, 9, 8, 7, 5], [5, 4, 6, 0, 0, 0], [20, 21, 22, 21, 0, 0]])


def their_output(family: str, model: Any, prefix: tuple[int, ...] = (), **settings: Any) -> Any:
    """What transformers' `generate` returns, and the width of its prompt."""
    inputs = INPUTS
    if family == "decoder-only":
        inputs = torch.stack([torch.cat([row[row == 0], row[row != 0]]) for row in INPUTS])
        model.prompt = inputs.shape[1]
        forced = torch.tensor([prefix] * 3, dtype=torch.long)
        inputs = torch.cat([inputs, forced], dim=1)
        settings["use_cache"] = False
    elif prefix:
        settings["decoder_input_ids"] = torch.tensor([(0, *prefix)] * 3)
    mask = (inputs != 0).long()
    settings = {"max_new_tokens": LENGTH - len(prefix), "do_sample": False, **settings}
    output = model.generate(
        inputs, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **settings
    )
    start = model.prompt if family == "decoder-only" else 1
    return output, output.sequences[:, start:]


def stripped(tokens: Tensor, ids: tuple[int, ...] = (0,)) -> list[list[int]]:
    """The rows without `ids` behind them. Beams of transformers are padded with EOS."""
    rows = tokens.tolist()
    for row in rows:
        while row and row[-1] in ids:
            row.pop()
    return rows


WORDS = [*([id_] for id_ in range(2, 10)), [20, 20], [21, 20], [16, 17, 18]]
ALLOWED = [0, 1, 4, 8, 9, *range(12, 27)]
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "min_length": ({"min_length": 6}, {"min_new_tokens": 6}),
    "repetition_penalty": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    "no_repeat_ngram": ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    "no_repeat_token": ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
    "prefix": ({"prefix": (7, 3)}, {"prefix": (7, 3)}),
    "forbid": ({"forbid": tuple(map(tuple, WORDS))}, {"bad_words_ids": WORDS}),
    "allow": ({"allow": tuple(ALLOWED)}, {"prefix_allowed_tokens_fn": lambda *_: ALLOWED}),
}
MIXED = ("repetition_penalty", "no_repeat_ngram", "forbid", "allow", "min_length")
OPTIONS["all"] = (
    {key: value for name in MIXED for key, value in OPTIONS[name][0].items()},
    {key: value for name in MIXED for key, value in OPTIONS[name][1].items()},
)
each_option = pytest.mark.parametrize("option", OPTIONS)
few_or_all = pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])


def both(family: str, option: str) -> tuple[Constraints, dict[str, Any]]:
    """The option here and there. A decoder may not write id 0: transformers takes the padding
    before a prompt for tokens that are repeated, and we do not."""
    ours, theirs = OPTIONS[option]
    if family == "decoder-only":
        ours = {**ours, "forbid": (*ours.get("forbid", ()), (0,))}
        theirs = {**theirs, "bad_words_ids": [*theirs.get("bad_words_ids", ()), [0]]}
    return Constraints(**ours), theirs


@few_or_all
@each_family
@each_option
def test_greedy_tokens_are_those_of_transformers(family, option, count):
    constraints, theirs = both(family, option)
    changed = 0
    for their_model, model in models(family)[:count]:
        written = generate(model, INPUTS, max_length=LENGTH, constraints=constraints)
        assert stripped(written) == stripped(their_output(family, their_model, **theirs)[1])
        changed += stripped(written) != stripped(generate(model, INPUTS, max_length=LENGTH))
    assert changed or count < 20


@few_or_all
@each_family
@each_option
def test_sampled_tokens_are_those_of_transformers_from_the_same_seed(family, option, count):
    constraints, theirs = both(family, option)
    draw = {"do_sample": True, "temperature": 1.3, "top_k": 12, "num_return_sequences": 2}
    for seed, (their_model, model) in enumerate(models(family)[:count]):
        written = generate(
            model,
            INPUTS,
            max_length=LENGTH,
            sampling=Sampling(temperature=1.3, top_k=12, seed=seed),
            constraints=constraints,
            candidates=2,
        )
        if option == "prefix":  # for its tokens ours draws, too, so that others follow
            assert all(row[:2] == [7, 3] for row in written.tolist())
            continue
        torch.manual_seed(seed)
        assert stripped(written) == stripped(their_output(family, their_model, **theirs, **draw)[1])


@few_or_all
@each_family
@each_option
def test_beams_have_tokens_and_scores_of_transformers(family, option, count):
    constraints, theirs = both(family, option)
    search = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.6}
    for their_model, model in models(family)[:count]:
        written = generate_scored(
            model,
            INPUTS,
            max_length=LENGTH,
            beams=BeamSearch(beams=4, length_penalty=0.6),
            constraints=constraints,
            candidates=3,
        )
        output, tokens = their_output(family, their_model, **theirs, **search)
        assert stripped(written.tokens, (0, 1)) == stripped(tokens, (0, 1))
        torch.testing.assert_close(written.scores, output.sequences_scores, atol=1e-4, rtol=1e-4)


class Ends(transformers.StoppingCriteria):
    """Rows whose last two tokens are equal, for transformers."""

    def __call__(self, input_ids, scores, **_: Any) -> Tensor:
        return input_ids[:, -1] == input_ids[:, -2]


@each_family
@pytest.mark.parametrize("beams", [1, 4])
def test_a_text_may_end_as_the_stopping_criteria_of_transformers_say(family, beams):
    constraints = Constraints(prefix=(7, 9), ends=lambda ids: ids[-1] == ids[-2])
    search = {"num_beams": beams, "stopping_criteria": [Ends()], "prefix": (7, 9)}
    shorter = 0
    for their_model, model in models(family):
        written = generate(
            model, INPUTS, max_length=LENGTH, beams=BeamSearch(beams=beams), constraints=constraints
        )
        tokens = their_output(family, their_model, **search)[1]
        assert stripped(written, (0, 1)) == stripped(tokens, (0, 1))
        shorter += sum(len(row) < LENGTH for row in stripped(written, (0, 1)))
    assert shorter > 10


@pytest.mark.parametrize(
    ("text", "ends"), [("a stop", True), ("a stop!", False), ("\n\n", True), ("x\n", False)]
)
def test_a_stop_text_ends_a_text_with_the_token_that_completes_it(text, ends):
    ids, stops = ByteTokenizer().encode(text), ("stop", "\n\n")
    assert StopTexts(ByteTokenizer(), stops)(ids) is ends
    theirs = transformers.StopStringCriteria(transformers.ByT5Tokenizer(), list(stops))
    assert bool(theirs(torch.tensor([ids]), None)) is ends


def test_a_stop_text_is_seen_in_characters_of_several_tokens():
    ids = ByteTokenizer().encode("un \u00e9t")
    ends = StopTexts(ByteTokenizer(), ("\u00e9",))
    assert [ends(ids[:length]) for length in range(1, len(ids) + 1)] == [False] * 4 + [True, False]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_log_probabilities_are_those_of_transformers(beams):
    for their_model, model in models("encoder-decoder"):
        written = generate_scored(
            model, INPUTS, max_length=LENGTH, beams=BeamSearch(beams=beams), candidates=beams
        )
        search = {"num_beams": beams, "num_return_sequences": beams, "output_logits": True}
        output, _ = their_output("encoder-decoder", their_model, **search)
        indices = getattr(output, "beam_indices", None)
        expected = their_model.compute_transition_scores(
            output.sequences, output.logits, indices, normalize_logits=True
        )
        for row, ours in enumerate(written.log_probs):
            length = len(stripped(written.tokens)[row])
            torch.testing.assert_close(ours[:length], expected[row, :length], atol=1e-4, rtol=1e-4)
            assert not ours[length:].any()
        if beams == 1:
            torch.testing.assert_close(written.scores, written.log_probs.sum(dim=1))


@each_family
def test_a_stream_is_what_generate_writes_token_by_token(family):
    _, model = models(family)[0]
    settings: dict[str, Any] = {"max_length": LENGTH, "constraints": Constraints(no_repeat_ngram=1)}
    steps = stream(model, INPUTS, **settings)
    first = next(steps)
    written = generate(model, INPUTS, **settings)
    assert torch.equal(torch.stack([first, *steps], dim=1), written)


def test_a_stream_that_is_closed_leaves_the_model_as_it_was():
    model = byte_transformer(decoder_only=False).train()
    steps = stream(model, INPUTS)
    next(steps)
    assert not model.training
    steps.close()
    assert model.training
    assert model(INPUTS, INPUTS).losses.total > 0


@each_family
def test_a_row_is_constrained_the_same_alone_and_in_a_batch(family):
    _, model = models(family)[1]
    constraints = Constraints(repetition_penalty=1.5, no_repeat_ngram=2, forbid=((9, 8), (5,)))
    for beams in (None, BeamSearch(beams=3)):
        settings: dict[str, Any] = {"max_length": 6, "constraints": constraints, "beams": beams}
        together = generate(model, INPUTS, **settings)
        alone = generate(model, INPUTS[1:2, :3], **settings)
        assert stripped(together)[1] == stripped(alone)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_length": -1}, "min_length = -1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty = 0\.0"),
        ({"no_repeat_ngram": -2}, "no_repeat_ngram = -2"),
        ({"forbid": ((1,),)}, "other than EOS"),
        ({"forbid": ((),)}, "forbid = "),
        ({"prefix": (5, 1)}, r"prefix = \(5, 1\) holds EOS"),
        ({"allow": (3, 29)}, "Token 29 .*\n  Use ids from 0 to 28"),
        ({"forbid": ((-4, 2),)}, "Token -4"),
        ({"prefix": (2,) * 8}, "max_length = 8 leaves no room"),
        ({"min_length": 8}, "min_length = 8"),
    ],
)
def test_constraints_that_cannot_be_are_refused(settings, message):
    _, model = models("encoder-decoder")[0]
    with pytest.raises(ConfigError, match=message):
        generate(model, INPUTS, max_length=8, constraints=Constraints(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 2}, "candidates = 2 must be 1 for greedy"),
        ({"candidates": 0}, "candidates = 0"),
        ({"candidates": 3, "beams": BeamSearch(beams=2)}, "between 1 and beams = 2"),
    ],
)
def test_candidates_need_beams_or_a_temperature(settings, message):
    _, model = models("encoder-decoder")[0]
    with pytest.raises(ConfigError, match=message):
        generate(model, INPUTS, **settings)
