"""The engine writes what transformers' `generate` writes, greedily and with four beams."""

from dataclasses import replace

import pytest
import torch
import transformers
from support.models import TINY

from switchworks.checkpoint import save_hf
from switchworks.engine import Engine, EngineConfig, Request
from switchworks.generate import BeamSearch, GenerationConfig
from switchworks.model import RoutingConfig, SwitchTransformer

SHAPE = replace(TINY, vocab_size=64, init_scale=1.0)
CONFIGS = {
    "switch": SHAPE,
    "switch in every block": replace(SHAPE, routing=RoutingConfig(experts=8, every=1)),
    "three layers of two": replace(SHAPE, num_layers=3, routing=RoutingConfig(experts=2)),
    "T5": replace(SHAPE, routing=None),
    "T5 1.1": replace(SHAPE, routing=None, activation="gelu", gated=True, tied_head=False),
}
TEXTS = [[7, 9, 30, 1], [5, 1], [*range(2, 33), 1], [40, 41, 42, 43, 44, 1]]
LENGTH = 12


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_tokens_are_those_of_transformers(kind, beams, tmp_path):
    """In float64, all texts at once on our side, one by one on theirs."""
    model = SwitchTransformer(CONFIGS[kind], seed=5).eval().double()
    save_hf(model, tmp_path / "theirs")
    peer = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "theirs", dtype=torch.float64
    )
    engine = Engine(model, config=EngineConfig(max_rows=16))
    config = GenerationConfig(max_length=LENGTH, beams=BeamSearch(beams=beams))
    answers = engine.answer(Request(ids=ids, config=config) for ids in TEXTS)
    engine.close()
    for ids, answer in zip(TEXTS, answers, strict=True):
        written = peer.generate(
            torch.tensor([ids]), max_new_tokens=LENGTH, num_beams=beams, do_sample=False
        )[0, 1:]
        expected = [token for token in written.tolist() if token]
        assert [token.id for token in answer.texts[0].tokens] == expected
