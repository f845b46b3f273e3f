"""The routing report: what it counts, against counts made by hand, and the page it becomes."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pydoc_data.topics import topics

import pytest
import torch

import switchworks
from switchworks.batch import Batch
from switchworks.cli.main import main
from switchworks.config import CheckpointError
from switchworks.data.tokens.tokenizer import ByteTokenizer
from switchworks.data.tokens.train import train_sentencepiece
from switchworks.evaluate.routing import (
    TYPES,
    TokenTypes,
    jensen_shannon,
    mutual_information,
    routing_report,
)
from switchworks.model import RoutingConfig, SwitchTransformer
from switchworks.recipes.tiny import tiny
from switchworks.report.routing import open_comparable


def types_of(tokenizer, ids: list[int]) -> list[str]:
    rows = max(tokenizer.vocab_size, max(ids) + 1)
    return [TYPES[t] for t in TokenTypes(tokenizer, rows)(torch.tensor([ids]))[0].tolist()]


def test_the_types_of_bytes_depend_on_what_stands_before():
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("ab, 1<extra_id_3>é"), 1, 0]
    assert types_of(tokenizer, ids) == [
        "word start",
        "continuation",
        "punctuation",
        "space",
        "digits",
        "sentinel",
        "continuation",
        "continuation",
        "special",
        "special",
    ]


@pytest.fixture(scope="module")
def pieces():
    return train_sentencepiece(list(topics.values())[:12], 512)


def test_the_types_of_pieces(pieces):
    ids = pieces.encode("hello worlds 2 !<extra_id_0>")
    found = list(zip([pieces.piece(i) for i in ids], types_of(pieces, ids), strict=True))
    for piece, kind in found:
        expected = (
            "sentinel" if piece == "" else
            "space" if not piece.strip() else
            "digits" if piece.strip().isdigit() else
            "punctuation" if piece.strip() == "!" else
            None
        )  # fmt: skip
        if expected is not None:
            assert kind == expected, piece
        elif piece.startswith(" "):
            assert kind == "word start"
    assert {kind for _, kind in found} >= {"word start", "digits", "punctuation", "sentinel"}
    assert "".join(piece for piece, _ in found) == " hello worlds 2 !"


def test_ids_beyond_the_tokenizer_are_special():
    assert types_of(ByteTokenizer(), [400]) == ["special"]


def test_divergence_and_information_agree_with_scipy_and_scikit_learn():
    from scipy.spatial.distance import jensenshannon
    from sklearn.metrics import mutual_info_score

    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    p, q = p / p.sum(), q / q.sum()
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q) ** 2)
    assert jensen_shannon(p, p) == pytest.approx(0, abs=1e-12)
    apart = torch.eye(2, dtype=torch.float64)
    assert jensen_shannon(apart[0], apart[1]) == pytest.approx(math.log(2))
    counts = torch.randint(0, 9, (3, 5), generator=generator).double()
    assert mutual_information(counts) == pytest.approx(
        mutual_info_score(None, None, contingency=counts.numpy())
    )


def a_model(seed: int = 0, **routing) -> SwitchTransformer:
    config = RoutingConfig(experts=4, group_sequences=2, **routing)
    return SwitchTransformer(replace(tiny().model, routing=config), seed=seed)


def a_batch(text: str, rows: int = 2) -> Batch:
    ids = torch.tensor([ByteTokenizer().encode(text)[:24]] * rows)
    targets = torch.cat([ids[:, :9], torch.zeros(rows, 3, dtype=torch.long)], dim=1)
    return Batch(inputs=ids, targets=targets)


TEXTS = {"en": "some English, 12 words here", "digits": "0123456789 0123456789 0123"}


@pytest.mark.parametrize("strategy", ["switch", "top2"])
def test_choices_are_counted_as_a_loop_over_tokens_counts_them(strategy):
    model = a_model(strategy=strategy, second_threshold=0.0)
    batches = {name: [a_batch(text)] for name, text in TEXTS.items()}
    report = routing_report(model, ByteTokenizer(), batches)
    layers = model.eval().switch_layers
    for name, text in TEXTS.items():
        batch = a_batch(text)
        seen: dict[str, torch.Tensor] = {}
        handles = [
            layer.router.register_forward_hook(
                lambda m, i, o, at=at, seen=seen: seen.__setitem__(at, o)
            )
            for at, layer in layers.items()
        ]
        with torch.no_grad():
            model(batch.inputs, batch.targets)
        for handle in handles:
            handle.remove()
        for at, real in (("encoder.1", batch.inputs != 0), ("decoder.1", batch.targets != 0)):
            counts = torch.zeros(4)
            for logits, is_real in zip(seen[at].flatten(0, 1), real.flatten(), strict=True):
                if is_real:
                    best = logits.topk(1 if strategy == "switch" else 2).indices
                    counts[best] += 1
            row = report["layers"][at]["by_label"][name]
            assert row["routed"] == int(counts.sum())
            assert row["load"] == pytest.approx((counts / counts.sum()).tolist(), abs=1e-5)
    assert report["layers"]["encoder.1"]["tokens"] == 2 * 2 * 24
    assert report["layers"]["decoder.1"]["tokens"] == 2 * 2 * 9  # padding does not count


def test_a_decoder_layer_is_told_by_the_token_it_reads():
    batch = Batch(
        inputs=torch.tensor([ByteTokenizer().encode("abc")]),
        targets=torch.tensor([ByteTokenizer().encode("<extra_id_0>12")]),
    )
    report = routing_report(a_model(), ByteTokenizer(), {"": [batch]})
    kinds = report["layers"]["decoder.1"]["by_type"]
    assert {kind: row["routed"] for kind, row in kinds.items()} == {
        "special": 1,  # the beginning
        "sentinel": 1,
        "digits": 1,
    }


def test_a_router_that_knows_one_expert_is_dead_elsewhere_and_tells_nothing():
    model = a_model()
    with torch.no_grad():
        for layer in model.switch_layers.values():
            layer.router.weight.zero_()
    layer = routing_report(model, ByteTokenizer(), {"en": [a_batch("words and words")]})["layers"]
    layer = layer["encoder.1"]
    assert layer["load"] == [1, 0, 0, 0]
    assert layer["dead"] == [1, 2, 3]
    assert layer["load_entropy"] == 0
    assert layer["token_entropy"] == pytest.approx(math.log(4))
    assert layer["confidence"] == pytest.approx(0.25)
    assert layer["information"]["type"] == pytest.approx(0, abs=1e-9)


def test_drift_is_nothing_against_itself_and_all_against_a_permuted_router():
    model, other = a_model(), a_model()
    batches = {"en": [a_batch("drifting words")]}
    none = routing_report(model, ByteTokenizer(), batches, against=other)["layers"]
    assert all(layer["drift"]["changed"] == 0 for layer in none.values())
    assert all(layer["drift"]["jensen_shannon"] == pytest.approx(0) for layer in none.values())
    with torch.no_grad():  # the first switch layer sees the same tokens and names experts anew
        router = other.switch_layers["encoder.1"].router
        router.weight.copy_(router.weight.roll(1, 0))
    drift = routing_report(model, ByteTokenizer(), batches, against=other)["layers"]["encoder.1"]
    assert drift["drift"]["changed"] == 1
    assert drift["drift"]["other_load"] == pytest.approx(
        torch.tensor(drift["load"]).roll(1).tolist(), abs=1e-6
    )


def test_dense_models_and_models_of_another_shape_are_refused():
    dense = SwitchTransformer(replace(tiny().model, routing=None))
    batches = {"en": [a_batch("words")]}
    with pytest.raises(CheckpointError, match="dense"):
        routing_report(dense, ByteTokenizer(), batches)
    with pytest.raises(CheckpointError, match="cannot be compared"):
        routing_report(a_model(), ByteTokenizer(), batches, against=dense)


class Balanced(HTMLParser):
    """Notes tags that are opened and not closed, and what is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "path", "br"):
            self.open.append(tag)
        self.loaded += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_command_writes_numbers_and_a_page_that_needs_nothing_else(
    tiny_run, corpus, tmp_path, capsys
):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for number, file in enumerate(sorted(corpus.iterdir())):
        folder = tmp_path / "ab"[number % 2]
        (folder / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    model, tokenizer = switchworks.load(tiny_run)
    switchworks.save(SwitchTransformer(model.config, seed=9), tmp_path / "other", tokenizer)
    words = ["routing", str(tiny_run), "--data.path", "none", "--against", str(tmp_path / "other")]
    words += ["--data.mixture", f"A<i>={tmp_path / 'a'}".replace("<i>", "1"), f"B={tmp_path / 'b'}"]
    words += ["--batches", "2", "--output", str(tmp_path / "out" / "page.html")]
    words += ["--data.validation-share", "0.3"]
    assert main(words) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "page.json").read_text())
    assert report["labels"] == ["A1", "B"]
    assert set(report["layers"]) == {"encoder.1", "decoder.1"}
    assert report["layers"]["encoder.1"]["drift"]["changed"] > 0
    page = (tmp_path / "out" / "page.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.loaded == []
    for words in ("By token type", "By label", "Drift", "word start", "Jensen-Shannon"):
        assert words in page


def test_without_a_model_the_command_says_what_it_needs(capsys):
    assert main(["routing", "--batches", "2"]) == 2
    assert "needs a model first" in capsys.readouterr().err


def test_models_of_two_kinds_are_not_compared(byte_model, byte_decoder, tmp_path):
    for name, model in (("both", byte_model), ("decoder", byte_decoder)):
        switchworks.save(model, tmp_path / name, ByteTokenizer())
    with pytest.raises(
        CheckpointError, match=r"decoder-only and the other is not.*\n  Compare mod"
    ):
        open_comparable([tmp_path / "both", tmp_path / "decoder"])
