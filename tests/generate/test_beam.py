"""Beam search: transformers' own on random weights, and exact search where that is possible."""

import itertools
import json

import pytest
import torch

from switchworks.checkpoint.hugging_face.weights import load_hf
from switchworks.cli.main import main
from switchworks.config import ConfigError
from switchworks.evaluate.answers import target_log_probabilities
from switchworks.generate import BeamSearch, Sampling, generate
from switchworks.generate.batches import GenerationConfig, generate_all
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer
from switchworks.parallel import MeshConfig
from switchworks.plan.simulate import fake_ranks

SIZE = {"vocab_size": 29, "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 2}
START = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
INPUTS = torch.tensor([[9, 8, 7, 6, 5, 1], [5, 4, 1, 0, 0, 0], [20, 21, 22, 1, 0, 0]])


@pytest.fixture(scope="module", params=["t5", "t5_1_1", "switch"])
def theirs(request):
    """A model of transformers whose answers end at various lengths."""
    import transformers

    torch.manual_seed(3)
    if request.param == "switch":
        config = transformers.SwitchTransformersConfig(
            **SIZE,
            **START,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=4,
            expert_capacity=1000,
            router_jitter_noise=0.0,
        )
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    else:
        new = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        config = transformers.T5Config(**SIZE, **START, **(new if "1" in request.param else {}))
        model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # The first values of transformers are so small that all tokens are as likely.
            spread = 2.0 if "shared" in name or "lm_head" in name else 0.5
            weight.copy_(torch.randn_like(weight) * spread)
    return model.eval()


def until_eos(rows: torch.Tensor) -> list[list[int]]:
    lists = [row.tolist() for row in rows]
    return [row[: row.index(1) + 1] if 1 in row else row for row in lists]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_the_tokens_are_those_of_transformers(theirs, penalty):
    expected = theirs.generate(
        INPUTS,
        attention_mask=(INPUTS != 0).long(),
        num_beams=4,
        max_new_tokens=10,
        length_penalty=penalty,
        do_sample=False,
    )[:, 1:]
    how = BeamSearch(beams=4, length_penalty=penalty)
    assert until_eos(generate(load_hf(theirs), INPUTS, max_length=10, beams=how)) == until_eos(
        expected
    )


def small_model(**settings) -> SwitchTransformer:
    config = ModelConfig(
        vocab_size=6,
        d_model=16,
        d_ff=32,
        d_kv=4,
        num_heads=2,
        num_layers=2,
        routing=RoutingConfig(experts=2, every=1),
        init_scale=3.0,
        **settings,
    )
    return SwitchTransformer(config, seed=5).eval()


@pytest.mark.parametrize("decoder_only", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_with_as_many_beams_as_there_are_texts_the_search_is_exact(decoder_only, penalty):
    model = small_model(decoder_only=decoder_only)
    texts = [
        text
        for length in (1, 2, 3)
        for text in itertools.product(range(6), repeat=length)
        if 1 not in text[:-1] and (text[-1] == 1 or length == 3) and 0 not in text
    ]
    for prompt in ([4, 3, 5], [2]):
        inputs = torch.tensor([prompt])
        targets = torch.tensor([[*text, 0, 0][:3] for text in texts])
        logits = model(inputs.expand(len(texts), -1), targets).logits.detach()
        nats = target_log_probabilities(logits, targets).tolist()
        pairs = zip(texts, nats, strict=True)
        scores = {text: value / len(text) ** penalty for text, value in pairs}
        how = BeamSearch(beams=160, length_penalty=penalty)
        found = generate(model, inputs, max_length=3, beams=how)[0].tolist()
        if 0 not in found:  # which is padding, and no forward pass scores it
            assert tuple(found) == max(scores, key=scores.__getitem__)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_a_sequence_is_answered_the_same_alone_and_in_a_batch(decoder_only):
    model = small_model(decoder_only=decoder_only)
    inputs = torch.tensor([[2, 3, 4, 5, 5, 2], [3, 5, 0, 0, 0, 0]])
    how = BeamSearch(beams=3)
    together = generate(model, inputs, max_length=7, beams=how)
    for row, alone in enumerate((inputs[:1], inputs[1:, :2])):
        found = generate(model, alone, max_length=7, beams=how)[0].tolist()
        assert together[row].tolist()[: len(found)] == found
        assert not any(together[row].tolist()[len(found) :])


def test_one_beam_is_greedy():
    model = small_model()
    inputs = torch.tensor([[2, 3, 4], [5, 5, 0]])
    found = generate(model, inputs, max_length=5, beams=BeamSearch(beams=1))
    assert torch.equal(found, generate(model, inputs, max_length=5))


def test_more_beams_find_a_text_at_least_as_likely():
    model = small_model()
    inputs = torch.tensor([[2, 3, 4]])

    def nats(beams: int) -> float:
        how = BeamSearch(beams=beams, length_penalty=0.0)
        text = generate(model, inputs, max_length=6, beams=how)
        logs = model(inputs, text).logits.detach().log_softmax(-1)
        return float(logs.gather(-1, text[..., None]).sum())

    assert nats(16) >= nats(1)


def test_penalties_are_those_of_transformers_and_of_mesh_tensorflow():
    assert BeamSearch(length_penalty=0.6).divisor(7) == 7**0.6
    assert BeamSearch(length_penalty=0.6, penalty="t5").divisor(7) == 2**0.6
    assert BeamSearch(length_penalty=0.0).divisor(7) == 1


def test_beams_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="beams = 0 must be at least 1"):
        BeamSearch(beams=0)
    with pytest.raises(ConfigError, match=r"temperature = 0\.5 samples, and beams = 2 look"):
        generate(
            small_model(),
            torch.tensor([[2]]),
            sampling=Sampling(temperature=0.5),
            beams=BeamSearch(beams=2),
        )


def test_generate_and_evaluate_take_beams(tiny_run, tmp_path, capsys):
    words = ["generate", str(tiny_run), "a <extra_id_0> b", "--max-length", "4"]
    assert main([*words, "--beams", "3", "--length-penalty", "0.6", "--penalty", "t5"]) == 0
    assert main([*words, "--beams", "0"]) == 2
    assert "beams = 0" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("q,a\n" + "".join(f"item {i},yes\n" for i in range(40)))
    task = ["evaluate", str(tiny_run), "--tasks", f"t={tmp_path / 't.csv'}", "--split", "train"]
    task += ["--examples", "3", "--max-length", "4", "--json", str(tmp_path / "e.json")]
    assert main([*task, "--beams", "2"]) == 0
    figures = json.loads((tmp_path / "e.json").read_text())
    assert (figures["beams"], figures["length_penalty"]) == (2, 1.0)
    assert main([*task, "--beams", "2", "--decode", "rank"]) == 2
    assert "decode = rank chooses" in capsys.readouterr().err


def test_beams_over_several_ranks_are_refused(byte_model):
    settings = GenerationConfig(max_length=4, beams=BeamSearch(beams=2))
    message = r"beams are for a model on one rank\. Leave them out"
    with fake_ranks(MeshConfig(expert=2)) as ranks, pytest.raises(ConfigError, match=message):
        generate_all(byte_model, [[5, 1]], settings, ranks)
