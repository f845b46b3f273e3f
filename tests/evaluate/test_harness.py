"""lm-eval's questions: likelihoods against a float64 pass by hand, texts against `generate`."""

import importlib.util
import json
import sys

import pytest
import torch

from switchworks.checkpoint.model_files import save
from switchworks.config import CheckpointError, ConfigError
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.evaluate.harness import Pair, Scorer, harness_model, until
from switchworks.generate import BeamSearch, generate
from switchworks.generate.texts import continuation
from switchworks.model import SwitchTransformer

TOKENIZER = ByteTokenizer()
there = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not there, reason="lm-eval is not installed")


@pytest.fixture(params=["byte_model", "byte_decoder"])
def model(request) -> SwitchTransformer:
    return request.getfixturevalue(request.param)


def by_hand(model: SwitchTransformer, context: str, text: str) -> tuple[float, bool]:
    """One pair alone in float64."""
    exact = SwitchTransformer(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    before, after = TOKENIZER.encode(context), TOKENIZER.encode(text)
    if not model.config.decoder_only:
        before = [*before, 1]
    inputs = torch.tensor([before], dtype=torch.long)
    logs = exact(inputs, torch.tensor([after])).logits.detach().log_softmax(-1)[0]
    nats = sum(float(logs[place, token]) for place, token in enumerate(after))
    return nats, logs.argmax(-1).tolist() == after


def test_likelihoods_are_those_of_each_pair_alone_in_float64(model):
    pairs = [("The sky is", " blue"), ("", "grey"), ("a much longer context", " x"), ("q", " long")]
    scorer = Scorer(model, TOKENIZER, batch_size=2)
    found = scorer.score([scorer.pair(*pair) for pair in pairs])
    for (nats, greedy), pair in zip(found, pairs, strict=True):
        expected, likeliest = by_hand(model, *pair)
        assert nats == pytest.approx(expected, rel=1e-4)
        assert greedy == likeliest


def test_what_the_model_writes_itself_is_greedy(model):
    scorer = Scorer(model, TOKENIZER)
    context = TOKENIZER.encode("some")
    prompt = context if model.config.decoder_only else [*context, 1]
    written = generate(model, torch.tensor([prompt]), max_length=4)[0].tolist()
    other = [*written[:-1], (written[-1] + 1) % 300 + 3]
    (_, first), (_, second) = scorer.score([Pair(context, written), Pair(context, other)])
    assert (first, second) == (True, False)


def test_spaces_at_the_end_of_a_context_go_to_the_continuation(model):
    scorer = Scorer(model, TOKENIZER)
    assert scorer.pair("a ", "b") == scorer.pair("a", " b")


class Merging(ByteTokenizer):
    """Bytes, and one token more for "ab"."""

    def encode(self, text: str) -> list[int]:
        pieces = text.split("ab")
        ids = [ByteTokenizer.encode(self, piece) for piece in pieces]
        return [token for place, own in enumerate(ids) for token in ([299] * (place > 0) + own)]


@pytest.mark.parametrize(("context", "text"), [("a", "b"), ("xa", "bc")])
def test_a_continuation_that_grows_together_with_its_context_is_still_scored(
    context, text, byte_decoder
):
    tokenizer = Merging()
    assert tokenizer.encode(context + text)[: len(context)] != tokenizer.encode(context)
    scorer = Scorer(byte_decoder, tokenizer)
    assert scorer.pair(context, text) == Pair(tokenizer.encode(context), tokenizer.encode(text))
    assert scorer.pair("x", "ab") == Pair(tokenizer.encode("x"), [299])


def test_a_context_that_is_too_long_loses_its_beginning(model):
    short, long = (Scorer(model, TOKENIZER, max_length=size) for size in (12, 64))
    # Of 12 positions an encoder needs one for EOS; a decoder-only model three for "abc".
    kept = "123456789" if model.config.decoder_only else "x0123456789"
    (cut,) = short.score([short.pair("xxxx0123456789", "abc")])
    (whole,) = long.score([long.pair(kept, "abc")])
    assert cut[0] == pytest.approx(whole[0], rel=1e-4)


def test_texts_end_at_the_first_stop(model):
    scorer = Scorer(model, TOKENIZER, batch_size=2, max_gen_toks=6)
    contexts = ["abc", "a longer one", "x"]
    whole = scorer.write([(text, {"until": []}) for text in contexts])
    for text, written in zip(contexts, whole, strict=True):
        ids = TOKENIZER.encode(text)
        prompt = ids if model.config.decoder_only else [*ids, 1]
        alone = generate(model, torch.tensor([prompt]), max_length=6)[0].tolist()
        if model.config.decoder_only:
            assert written == continuation(TOKENIZER, ids, alone)
        else:
            assert written == TOKENIZER.decode(alone)
    assert until("one\ntwo\nthree", ["three", "\n"]) == "one"


def test_settings_of_generation_are_understood_or_refused(model):
    scorer = Scorer(model, TOKENIZER)
    settings = {"until": "x", "do_sample": False, "temperature": 0.7, "num_beams": 2}
    found = scorer.write([("abc", settings | {"max_gen_toks": 4, "until": []})])
    ids = TOKENIZER.encode("abc")
    prompt = torch.tensor([ids if model.config.decoder_only else [*ids, 1]])
    beams = generate(model, prompt, max_length=4, beams=BeamSearch(beams=2))[0].tolist()
    by_beams = TOKENIZER.decode(beams)
    if model.config.decoder_only:
        by_beams = continuation(TOKENIZER, ids, beams)
    assert found == [by_beams]
    with pytest.raises(ConfigError, match="asks for 'min_p', which is not known here"):
        scorer.write([("abc", {"min_p": 0.1})])


def test_a_prompt_needs_room(byte_decoder):
    scorer = Scorer(byte_decoder, TOKENIZER, max_length=16)
    with pytest.raises(ConfigError, match="max_gen_toks = 128 leave no room for a prompt"):
        scorer.write([("abc", {})])


def test_without_lm_eval_the_error_says_how_to_get_it(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        harness_model(tiny_run)


@needs_lm_eval
def test_the_adapter_is_a_model_of_the_harness(model, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    save(model, tmp_path / "model", tokenizer=TOKENIZER)
    adapter = harness_model(tmp_path / "model", batch_size=2, max_length=24)
    assert isinstance(adapter, LM)

    def asked(kind: str, *arguments: tuple) -> list[Instance]:
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    ((nats, _),) = adapter.loglikelihood(asked("loglikelihood", ("The sky", " is")))
    assert nats == pytest.approx(by_hand(model, "The sky", " is")[0], rel=1e-4)
    (text,) = adapter.generate_until(asked("generate_until", ("abc", {"max_gen_toks": 4})))
    assert isinstance(text, str)
    (short,) = adapter.loglikelihood_rolling(asked("loglikelihood_rolling", ("abcde",)))
    assert short == pytest.approx(by_hand(model, "", "abcde")[0], rel=1e-4)


@needs_lm_eval
def test_a_long_text_is_scored_in_windows_that_predict_each_token_once(byte_decoder):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    seen: list[int] = []

    def windows(ids, prefix, size):
        pairs = [make_disjoint_window(p) for p in get_rolling_token_windows(ids, prefix, size, 1)]
        seen.extend(token for _, predicted in pairs for token in predicted)
        return pairs

    scorer = Scorer(byte_decoder, TOKENIZER, max_length=9)
    nats = scorer.rolling("0123456789abcdefghij", windows)
    assert seen == TOKENIZER.encode("0123456789abcdefghij")
    # Windows of 8: the first from nothing, the second after one token, the last after five.
    parts = [("", "01234567"), ("7", "89abcdef"), ("bcdef", "ghij")]
    assert nats == pytest.approx(sum(by_hand(byte_decoder, *part)[0] for part in parts), rel=1e-4)


@needs_lm_eval
@pytest.mark.slow
def test_the_harness_runs_a_task_of_its_own_with_our_model(model, tmp_path):
    """A task of multiple choice and one of written answers, from a table on this machine."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    save(model, tmp_path / "model", tokenizer=TOKENIZER)
    rows = [{"q": f"{i} is", "choices": ["odd", "even"], "gold": i % 2, "a": "x"} for i in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "d.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    chosen = common | {
        "task": "parity",
        "output_type": "multiple_choice",
        "doc_to_target": "gold",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    written = common | {
        "task": "copied",
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = lm_eval.simple_evaluate(
        harness_model(tmp_path / "model"),
        tasks=[chosen, written],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert set(found["results"]) == {"parity", "copied"}
    assert 0 <= found["results"]["parity"]["acc,none"] <= 1


@needs_lm_eval
def test_a_model_without_a_tokenizer_cannot_be_asked(byte_decoder, tmp_path):
    save(byte_decoder, tmp_path / "model")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        harness_model(tmp_path / "model")


def test_sizes_that_hold_nothing_are_refused(model):
    with pytest.raises(ConfigError, match="batch_size = 0 must be at least 1"):
        Scorer(model, TOKENIZER, batch_size=0)
