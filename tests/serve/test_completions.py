"""/v1/completions, asked by OpenAI's client and as lm-eval asks."""

import math

import httpx
import openai
import pytest
import torch

from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.generate import GenerationConfig, Sampling, generate_candidates, write_texts

PROMPT = "The list of"


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, prompt=PROMPT, **settings):
    settings = {"model": "causal", "temperature": 0, "max_tokens": 12} | settings
    return client.completions.create(prompt=prompt, **settings)


def test_a_text_is_continued_as_offline(client, causal):
    answer = ask(client)
    (whole,) = write_texts(causal, ByteTokenizer(), [PROMPT], GenerationConfig(max_length=12))
    (choice,) = answer.choices
    assert PROMPT + choice.text == whole
    assert choice.finish_reason in ("stop", "length")
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.total_tokens == len(PROMPT) + answer.usage.completion_tokens


def test_an_encoder_decoder_gets_the_prompt_as_its_input(client, filler):
    answer = ask(client, "The <extra_id_0> of", model="filler", logprobs=0)
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("The <extra_id_0> of"), tokenizer.eos_id]
    ((text,),) = generate_candidates(filler, [ids], GenerationConfig(max_length=12), 1)
    assert answer.choices[0].text == tokenizer.decode(text.tokens)
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(text.log_probs, abs=1e-4)


def test_several_prompts_are_answered_in_their_order(client):
    prompts = ["The list", "A", "The cat of the dog"]
    together = ask(client, prompts)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [c.text for c in together.choices] == [ask(client, p).choices[0].text for p in prompts]


def test_tokens_are_prompts_too(client):
    ids = ByteTokenizer().encode(PROMPT)
    text = ask(client).choices[0].text
    assert ask(client, ids).choices[0].text == text
    assert [choice.text for choice in ask(client, [ids, ids]).choices] == [text, text]


def test_a_seed_gives_the_same_samples_again(client, causal):
    answer = ask(client, temperature=1.0, n=3, seed=5)
    config = GenerationConfig(max_length=12, sampling=Sampling(temperature=1.0, seed=5))
    tokenizer = ByteTokenizer()
    (texts,) = generate_candidates(causal, [tokenizer.encode(PROMPT)], config, 3)
    assert [choice.text for choice in answer.choices] == [
        tokenizer.decode(text.tokens) for text in texts
    ]
    assert ask(client, temperature=1.0, n=3, seed=6).choices != answer.choices


def test_samples_without_a_seed_differ(client):
    texts = {ask(client, temperature=1.5).choices[0].text for _ in range(3)}
    assert len(texts) > 1


def test_a_stop_text_is_left_out(client):
    text = ask(client, max_tokens=40).choices[0].text
    stop = text[6:8]
    end = text.index(stop)
    stopped = ask(client, max_tokens=40, stop=[stop, "never there"])
    assert stopped.choices[0].text == text[:end]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = list(ask(client, max_tokens=40, stop=stop, stream=True))
    assert "".join(event.choices[0].text for event in streamed) == text[:end]


def test_log_probs_are_those_of_the_model(client, causal):
    logprobs = ask(client, logprobs=3).choices[0].logprobs
    ids = ByteTokenizer().encode(PROMPT)
    for place, value in enumerate(logprobs.token_logprobs[:3]):
        with torch.no_grad():
            output = causal(torch.tensor([ids]), torch.tensor([[0]]), padding=False)
        scores = output.logits[0, -1].log_softmax(-1)
        ids.append(int(scores.argmax()))
        assert value == pytest.approx(float(scores.max()), abs=1e-5)
        top = list(logprobs.top_logprobs[place].values())
        assert top == pytest.approx(scores.topk(3).values.tolist()[: len(top)], abs=1e-5)
        assert top[0] == value
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]


def test_a_stream_is_the_plain_answer_in_pieces(client):
    plain = ask(client, max_tokens=30, logprobs=2)
    stream = ask(
        client, max_tokens=30, logprobs=2, stream=True, stream_options={"include_usage": True}
    )
    *events, usage = stream
    assert "".join(event.choices[0].text for event in events) == plain.choices[0].text
    told = [each for event in events for each in event.choices[0].logprobs.tokens]
    assert told == plain.choices[0].logprobs.tokens
    assert [e.choices[0].finish_reason for e in events][-1] == plain.choices[0].finish_reason
    assert usage.choices == []
    assert usage.usage == plain.usage


def test_several_prompts_stream_side_by_side(client):
    prompts, texts = ["The list", "A cat"], ["", ""]
    for event in ask(client, prompts, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [choice.text for choice in ask(client, prompts).choices]


def test_echo_puts_the_prompt_before_the_text(client):
    echoed = ask(client, echo=True).choices[0].text
    assert echoed == PROMPT + ask(client).choices[0].text
    streamed = ask(client, echo=True, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == echoed


@pytest.mark.parametrize("is_streamed", [False, True])
def test_echo_alone_scores_a_prompt_and_writes_nothing(is_streamed, client, causal):
    answer = ask(client, echo=True, max_tokens=0, logprobs=1, stream=is_streamed)
    (choice,) = next(iter(answer)).choices if is_streamed else answer.choices
    assert choice.text == PROMPT
    assert choice.logprobs.tokens == list(PROMPT)
    assert choice.logprobs.token_logprobs[0] is None


def test_lm_eval_reads_the_log_likelihood_of_a_continuation(address, causal):
    """The request and the reading of its `local-completions`: api_models.py, parse_logprobs."""
    context, continuation = ByteTokenizer().encode("The cat"), ByteTokenizer().encode(" sat.")
    other = ByteTokenizer().encode("A dog ran off.")
    requests = [(context, continuation), (other[:3], other[3:])]
    payload = {
        **{"model": "causal", "prompt": [a + b for a, b in requests], "temperature": 0},
        **{"max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True},
    }
    choices = httpx.post(address + "/v1/completions", json=payload).json()["choices"]
    for choice, (before, after) in zip(choices, requests, strict=True):
        logprobs, start = choice["logprobs"], len(before)
        told = logprobs["token_logprobs"][start:-1]
        tops = logprobs["top_logprobs"][start:-1]
        is_greedy = all(v == max(top.values()) for v, top in zip(told, tops, strict=True))
        scores = full_pass(causal, before + after)[len(before) :]
        expected = scores.gather(1, torch.tensor(after)[:, None]).sum()
        assert sum(told) == pytest.approx(float(expected), abs=1e-4)
        assert is_greedy == (scores.argmax(-1).tolist() == after)


def test_lm_eval_sees_that_a_greedy_continuation_is_greedy(address, causal):
    ids = ByteTokenizer().encode("The cat")
    for _ in range(4):
        ids.append(int(full_pass(causal, [*ids, 5])[-1].argmax()))
    payload = {"model": "causal", "prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True}
    (choice,) = httpx.post(address + "/v1/completions", json=payload).json()["choices"]
    logprobs = choice["logprobs"]
    pairs = zip(logprobs["token_logprobs"][7:-1], logprobs["top_logprobs"][7:-1], strict=True)
    assert [value == max(top.values()) for value, top in pairs] == [True] * 4


def full_pass(model, ids):
    """ln p of every token in each place of `ids`."""
    with torch.no_grad():
        output = model(torch.empty(1, 0, dtype=torch.long), torch.tensor([ids]), padding=False)
    return output.logits[0].log_softmax(-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best_of": 3}, "best_of is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"n": 2}, "n = 2 needs temperature > 0"),
        ({"max_tokens": 0}, "asks for nothing"),
        ({"max_tokens": 101}, "--max-length"),
        ({"prompt": ["a"] * 129}, "1 to 128"),
        ({"prompt": []}, "1 to 128"),
        ({"prompt": "a" * 201}, "--max-input"),
        ({"prompt": [384]}, "Token 384 is not in the vocabulary"),
        ({"prompt": [5, 0, 6]}, "Token 0 pads"),
        ({"model": "filler", "echo": True}, "echo needs a decoder-only model"),
        ({"n": 9, "temperature": 1}, "--max-rows"),
    ],
)
def test_what_the_server_does_not_do_is_refused(settings, message, client):
    with pytest.raises(openai.UnprocessableEntityError, match="422") as error:
        ask(client, **settings)
    assert message in error.value.body["message"]


def test_settings_that_change_nothing_are_taken(client):
    neutral = {"best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "user": "me"}
    assert ask(client, logit_bias={}, suffix="", **neutral).choices == ask(client).choices


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        ask(client, model="gpt")


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["filler", "causal"]


def test_an_empty_prompt_starts_a_text(client):
    answer = ask(client, "", logprobs=1)
    assert answer.usage.prompt_tokens == 0
    assert all(math.isfinite(value) for value in answer.choices[0].logprobs.token_logprobs)
