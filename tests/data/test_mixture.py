"""Mixtures of corpora: how often each is drawn from, whose turn it is, and whole runs of them."""

import hashlib
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import (
    CAUSAL,
    CONFIG,
    DOCUMENTS,
    MANY,
    Ids,
    MemoryStore,
    _assert_equal,
    _offsets,
    _pipeline,
)

from switchworks.batch import Batch
from switchworks.cli.main import main
from switchworks.config import ConfigError, DataError, from_toml
from switchworks.data.config import DataConfig
from switchworks.data.open import open_dataset
from switchworks.data.rows.mixture import (
    BLOCK_ROWS,
    Mixture,
    MixtureSchedule,
    corpus_mixture,
    rates,
)
from switchworks.data.rows.pipeline import VALIDATION_SEED, Pipeline, RunRows, validation_batches
from switchworks.data.rows.span_corruption import raw_length
from switchworks.data.sources.files import Files
from switchworks.data.tokens.train import interleave
from switchworks.evaluate.perplexity import evaluate_run
from switchworks.training import Experiment
from switchworks.training.hooks.progress import losses_text


def test_107_languages_are_sampled_by_size_to_the_power_0_3() -> None:
    """mT5's rates, as statement 30 has them, where the sum has a closed form: sizes that grow by
    one factor from 1e3 to 1e9 give rates that grow by that factor ** 0.3, a geometric series."""
    sizes = 1e3 * 1e6 ** (np.arange(107) / 106)
    step = 1e6 ** (0.3 / 106)
    first = (step - 1) / (step**107 - 1)
    np.testing.assert_allclose(rates(sizes.tolist()), first * step ** np.arange(107), rtol=1e-12)


def test_exponent_1_is_by_size_and_0_equally_often() -> None:
    np.testing.assert_allclose(rates([1, 2, 5], 1.0), [1 / 8, 2 / 8, 5 / 8])
    np.testing.assert_allclose(rates([1, 2, 5], 0.0), [1 / 3] * 3)


def test_a_cap_makes_all_larger_corpora_equal() -> None:
    """T5's mixtures: rate = min(size, cap) ** (1 / temperature)."""
    np.testing.assert_allclose(rates([16, 81, 10_000], 0.5, cap=81), np.array([4, 9, 9]) / 22)
    np.testing.assert_allclose(rates([16, 81, 10_000], 0.0, cap=1), [1 / 3] * 3)


SHARES = np.array([0.41, 0.3, 0.2, 0.07, 0.02])


def test_every_block_keeps_the_rates_to_one_row_by_largest_remainder() -> None:
    turns = MixtureSchedule(np.array([0.41, 0.3, 0.29]), seed=0, block_rows=10)
    assert turns.counts.tolist() == [4, 3, 3]  # 4.1, 3.0 and 2.9
    for many in (2, 107, 1000):
        shares = rates((np.arange(many) + 1.0).tolist())
        counts = MixtureSchedule(shares, seed=0).counts
        assert counts.sum() == BLOCK_ROWS
        assert np.abs(counts - shares * BLOCK_ROWS).max() < 1


def test_the_smallest_corpus_has_a_row_in_every_block() -> None:
    turns = MixtureSchedule(np.array([1 - 2e-9, 1e-9, 1e-9]), seed=0, block_rows=50)
    assert turns.counts.tolist() == [48, 1, 1]


def test_whose_turn_it_is_agrees_with_counting_all_rows_before() -> None:
    turns = MixtureSchedule(SHARES, seed=3, block_rows=64)
    seen = np.zeros(5, dtype=np.int64)
    for row in range(5 * 64 + 17):
        np.testing.assert_array_equal(turns.counts_before(row), seen)
        corpus, number = turns.locate(row)
        assert number == seen[corpus]
        seen[corpus] += 1


def test_the_turn_of_a_row_far_on_is_known_without_those_before() -> None:
    turns = MixtureSchedule(SHARES, seed=3)
    far = 10**12 + 12_345
    block, place = divmod(far, BLOCK_ROWS)
    corpus, number = turns.locate(far)
    inside = MixtureSchedule(SHARES, seed=3)
    earlier = sum(inside.locate(block * BLOCK_ROWS + i)[0] == corpus for i in range(place))
    assert number == block * inside.counts[corpus] + earlier


@pytest.mark.parametrize("seed", range(3))
def test_after_any_number_of_rows_every_corpus_is_near_its_share(seed: int) -> None:
    """Not further than 1 + K times its rate; drawn one by one it would be some 16 rows here."""
    turns = MixtureSchedule(SHARES, seed=seed, block_rows=1000)
    exact = turns.counts / 1000
    for row in range(2500):
        off = np.abs(turns.counts_before(row) - row * exact)
        assert (off < 1 + len(exact) * exact).all(), row


def test_the_order_of_turns_changes_with_block_and_seed() -> None:
    def order(turns: MixtureSchedule, block: int) -> tuple[int, ...]:
        return tuple(turns.locate(block * 64 + i)[0] for i in range(64))

    turns, other = (
        MixtureSchedule(SHARES, seed=0, block_rows=64),
        MixtureSchedule(SHARES, seed=1, block_rows=64),
    )
    assert len({order(turns, 0), order(turns, 1), order(other, 0), order(other, 1)}) == 4


class Shifted(MemoryStore):
    """Tokens from `base` on, so that a row's corpus shows."""

    def __init__(self, num_tokens: int, base: int, documents: list[int] | None = None) -> None:
        super().__init__(num_tokens, documents)
        self.base = base

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return super().tokens(start, stop) + np.int32(self.base)


STORES = {
    "en": Shifted(3000, 0, MANY),
    "de": Shifted(340, 10_000, [100, 140, 100]),
    "gd": Shifted(70, 20_000),
}
NAMES = list(STORES)
RUN = RunRows(batch_size=8, seed=0)
RATES = np.array([0.5, 0.3, 0.2])
ALL = pytest.mark.parametrize(
    "config", [CONFIG, DOCUMENTS, CAUSAL], ids=["stream", "documents", "causal"]
)


def _mixture(
    config: DataConfig = CONFIG, *, seed: int = 0, rank: int = 0, world: int = 1
) -> Mixture:
    run = RunRows(batch_size=8, seed=seed, rank=rank, world=world)
    return corpus_mixture(config, STORES, Ids(), RATES, run)


@ALL
def test_a_batch_of_a_mixture_depends_on_the_step_alone(config: DataConfig) -> None:
    through = _mixture(config)
    passed = [through.batch(step) for step in range(30)]
    for step in (29, 3, 17):
        _assert_equal(_mixture(config).batch(step), passed[step])


@ALL
def test_resuming_a_mixture_goes_on_as_if_never_stopped(config: DataConfig) -> None:
    through = list(islice(_mixture(config).batches(), 12))
    resumed = list(islice(_mixture(config).batches(7), 5))
    for left, right in zip(resumed, through[7:], strict=True):
        _assert_equal(left, right)


@pytest.mark.parametrize("world", [2, 4])
@ALL
def test_more_ranks_cut_the_same_batch_of_a_mixture(config: DataConfig, world: int) -> None:
    for step in (0, 5):
        whole = _mixture(config).batch(step).split(world)
        for rank in range(world):
            part = _mixture(config, rank=rank, world=world).batch(step)
            for name in ("inputs", "targets", "input_segments", "target_segments"):
                left, right = getattr(part, name), getattr(whole[rank], name)
                assert left is right is None or torch.equal(left, right), name


def test_every_row_is_the_one_of_its_corpus_whose_turn_it_is() -> None:
    mixture = _mixture()
    for step in range(5):
        batch = mixture.batch(step)
        for place in range(8):
            corpus, number = mixture.schedule.locate(step * 8 + place)
            start, stop = mixture.parts[NAMES[corpus]].window_of(number)
            found = sorted(_offsets(batch.inputs[place]) + _offsets(batch.targets[place]))
            assert found == list(range(corpus * 10_000 + start, corpus * 10_000 + stop))


def test_each_corpus_is_read_in_epochs_of_its_own() -> None:
    mixture = _mixture()
    windows: dict[str, list[int]] = {name: [] for name in NAMES}
    for row in range(400):
        corpus, number = mixture.schedule.locate(row)
        name = NAMES[corpus]
        windows[name].append(mixture.parts[name].window_of(number)[0])
    read = mixture.epochs(50)
    for name, starts in windows.items():
        size = mixture.parts[name].windows
        assert read[name] == len(starts) / size
        for begin in range(0, len(starts) - size + 1, size):
            assert len(set(starts[begin : begin + size])) == size
    assert read["gd"] > read["de"] > 5 > 2.5 > read["en"] > 2


def test_a_corpus_has_its_own_order_and_masks_whatever_stands_beside_it() -> None:
    store = MemoryStore(3000)

    def part(name: str, *before: str) -> Pipeline:
        stores = dict.fromkeys([*before, name], store)
        shares = np.full(len(stores), 1 / len(stores))
        return corpus_mixture(CONFIG, stores, Ids(), shares, RUN).parts[name]

    _assert_equal(part("de").rows([0, 1]), part("de", "en", "fr").rows([0, 1]))
    assert not torch.equal(part("de").rows([0]).inputs, part("en").rows([0]).inputs)
    one_window = MemoryStore(34)
    twins = corpus_mixture(CONFIG, {"a": one_window, "b": one_window}, Ids(), np.full(2, 0.5), RUN)
    masks = [part.rows(range(6)).targets for part in twins.parts.values()]
    assert not torch.equal(*masks)


@pytest.mark.parametrize(
    ("config", "store", "digest"),
    [
        (CONFIG, MemoryStore(3000), "7ffb308bce5396e2"),
        (DOCUMENTS, MemoryStore(3000, MANY), "6be1ff34e61ae711"),
        (CAUSAL, MemoryStore(3000, MANY), "f814c5a31b3b3da8"),
    ],
    ids=["stream", "documents", "causal"],
)
def test_a_corpus_alone_gives_the_batches_it_gave_before_there_were_mixtures(
    config: DataConfig, store: MemoryStore, digest: str
) -> None:
    """The hashes were taken from the version before. A seed means the same run for good."""
    found = hashlib.blake2b(digest_size=8)
    for step in range(40):
        batch = _pipeline(config, store).batch(step)
        for name in ("inputs", "targets", "input_segments", "target_segments"):
            if (tensor := getattr(batch, name)) is not None:
                found.update(tensor.numpy().tobytes())
    assert found.hexdigest() == digest


def test_joined_batches_have_all_rows_and_take_orders_them() -> None:
    ids = torch.arange(12).reshape(3, 4)
    whole = Batch.join(
        [Batch(inputs=ids, targets=ids), Batch(inputs=ids + 12, targets=ids, padding=False)]
    )
    assert whole.padding
    assert whole.input_segments is None
    assert whole.take(torch.tensor([4, 0])).inputs.tolist() == [[16, 17, 18, 19], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mixture": ("en=a", "de=b", "en=c")}, "names 'en' 2 times"),
        ({"mixture": ("texts/en",)}, "'texts/en', which is neither NAME=PATH"),
        ({"mixture": ("en=hub:",)}, "'en=hub:', which is neither"),
        ({"mixture": ("en=hub::de",)}, "'en=hub::de', which is neither"),
        ({"mixture": ("a/b=c",)}, "'a/b=c', which is neither NAME=PATH"),
        ({"mixture": ("en=a",), "path": "b"}, r"data\.path = 'b' both say"),
        ({"mixture": ("en=a",), "source": "hub", "dataset": "c4"}, r"data\.dataset = 'c4' both"),
        ({"mixture_exponent": 2.0}, r"mixture_exponent = 2\.0"),
        ({"mixture_cap": -1}, "mixture_cap = -1"),
    ],
)
def test_mixtures_that_cannot_work_are_refused_with_the_rule(settings, said) -> None:
    with pytest.raises(ConfigError, match=said):
        DataConfig(**settings)


def test_a_corpus_under_one_row_is_refused_by_its_name() -> None:
    stores = {"en": MemoryStore(3000), "gd": MemoryStore(33)}
    with pytest.raises(DataError, match="Corpus 'gd': The corpus has 33 tokens; one row"):
        corpus_mixture(CONFIG, stores, Ids(), np.full(2, 0.5), RUN)


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory) -> Path:
    """The small corpus as two: en, 20 files, and qq, 3 files in capitals."""
    folder = tmp_path_factory.mktemp("folders")
    files = sorted(corpus.iterdir())
    for name, some in (("en", files[:20]), ("qq", files[20:23])):
        (folder / name).mkdir()
        for file in some:
            text = file.read_text(encoding="utf-8")
            (folder / name / file.name).write_text(text.upper() if name == "qq" else text)
    return folder


@pytest.fixture(scope="module")
def config(folders) -> DataConfig:
    return DataConfig(
        mixture=(f"en={folders / 'en'}", f"qq={folders / 'qq'}"),
        tokenizer="bytes",
        validation_share=0.1,
        workers=1,
        input_length=64,
        target_length=14,
        cache=str(folders / "cache"),
    )


def test_each_corpus_has_a_store_and_held_out_text_of_its_own(config) -> None:
    corpora = open_dataset(config, vocab_size=512)
    for name, alone in config.corpora.items():
        path = alone.path
        part = open_dataset(alone, vocab_size=512).parts[""]
        assert corpora.parts[name].folder == part.folder  # the very one the text has alone
        text = "".join(file.read_text().strip() for file in Path(path).iterdir())
        assert part.train.num_tokens + part.validation.num_tokens == len(text.encode())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_may_have_data_sets_beside_folders(folders, tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        rows = "".join(json.dumps({"text": f"{name} {n} " * 20}) + "\n" for n in range(40))
        (tmp_path / name / "train.jsonl").write_text(rows)
    config = DataConfig(
        mixture=(f"a=hub:{tmp_path}/one", f"b=hub:{tmp_path}/two:default", f"c={folders}/en"),
        tokenizer="bytes",
        streaming=streaming,
    )
    assert [own.dataset_config for own in config.corpora.values()] == [None, "default", None]
    corpora = open_dataset(config, vocab_size=384)
    assert list(corpora.parts) == ["a", "b", "c"]
    for name, said in (("a", "one "), ("b", "two ")):
        store = corpora.parts[name].train
        assert corpora.tokenizer.decode(store.tokens(0, 4).tolist()) == said
        assert store.num_documents > 30


@pytest.mark.parametrize("by", ["tokens", "documents"])
def test_rates_are_by_the_tokens_or_the_documents_to_train_on(config, by) -> None:
    settings = replace(config, mixture_by=by, mixture_exponent=1.0)
    corpora = open_dataset(settings, vocab_size=512)
    stores = [part.train for part in corpora.parts.values()]
    sizes = [s.num_tokens if by == "tokens" else s.num_documents for s in stores]
    expected = {"en": sizes[0] / sum(sizes), "qq": sizes[1] / sum(sizes)}
    assert corpora.rates == pytest.approx(expected)
    capped = replace(settings, mixture_cap=min(sizes))
    assert open_dataset(capped, vocab_size=512).rates == pytest.approx({"en": 0.5, "qq": 0.5})


def test_one_tokenizer_learns_from_all_corpora(config, folders) -> None:
    settings = replace(config, tokenizer="train")
    corpora = open_dataset(settings, vocab_size=600)
    assert {part.tokenizer.fingerprint for part in corpora.parts.values()} == {
        corpora.tokenizer.fingerprint
    }
    english = replace(settings, mixture=(), path=str(folders / "en"))
    alone = open_dataset(english, vocab_size=600).tokenizer
    capitals = (folders / "qq").iterdir()
    text = next(capitals).read_text()
    assert len(corpora.tokenizer.encode(text)) < 0.8 * len(alone.encode(text))


def test_text_for_the_tokenizer_is_drawn_by_the_rates_until_all_was_read(tmp_path) -> None:
    sources = []
    for name, documents in (("a", 40), ("b", 400)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(f'{{"text": "{name * 10}{i:03}"}}\n' for i in range(documents)))
        sources.append(Files((file,), "text"))
    drawn = list(interleave(sources, np.array([0.25, 0.75])))
    for end in (8, 80, 400):
        assert sum(text[0] == "a" for text in drawn[:end]) == end // 4
    assert len({text for text in drawn if text[0] == "a"}) == 40
    assert sum(text[0] == "b" for text in drawn) == 400
    assert sum(text[0] == "a" for text in drawn) == pytest.approx(400 / 3, abs=1)


def test_a_corpus_that_is_not_there_is_named_before_any_is_tokenised(config, tmp_path) -> None:
    broken = (config.mixture[0], f"gd={tmp_path / 'nowhere'}")
    settings = replace(config, mixture=broken, cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"Corpus 'gd': .*nowhere does not exist"):
        open_dataset(settings, vocab_size=512)
    assert not (tmp_path / "cache").exists()


def test_held_out_batches_are_shared_out_over_the_corpora(config) -> None:
    corpora = open_dataset(config, vocab_size=512)
    for asked, each in ((1, 1), (4, 2), (5, 3)):
        held_out = corpora.held_out(batch_size=2, batches=asked)
        assert [len(batches) for batches in held_out.batches.values()] == [each, each]
    run = RunRows(batch_size=2, seed=VALIDATION_SEED)
    text = corpora.parts["qq"].validation
    alone = validation_batches(Pipeline(config, text, corpora.tokenizer, run), 3)
    for left, right in zip(held_out.batches["qq"], alone, strict=True):
        _assert_equal(left, right)


def test_held_out_text_under_one_row_is_refused_by_the_corpus_name(config, tmp_path) -> None:
    (tmp_path / "gd.txt").write_text("Tha mi gu math. " * 20)
    settings = replace(config, mixture=(config.mixture[0], f"gd={tmp_path / 'gd.txt'}"))
    corpora = open_dataset(settings, vocab_size=512)
    corpora.training(batch_size=2, seed=0)
    with pytest.raises(DataError, match=r"Corpus 'gd': Validation text: .*(.|\n)*validation_share"):
        corpora.held_out(batch_size=2, batches=1)


def _words(config: DataConfig, run_dir: Path, steps: int) -> list[str]:
    words = ["train", "tiny", "--run-dir", str(run_dir), "--steps", str(steps), "--threads", "1"]
    words += ["--data.mixture", *config.mixture, "--data.tokenizer", "bytes"]
    words += ["--data.validation-share", "0.1", "--data.cache", str(config.cache)]
    return [*words, "--validate-every", "2", "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def run_of_two(config, tmp_path_factory) -> Path:
    """Six steps over both corpora, by the command line. Tests only read it."""
    run_dir = tmp_path_factory.mktemp("mixed") / "run"
    assert main(_words(config, run_dir, 6)) == 0
    return run_dir


def _validations(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val/loss" in line]


def test_a_run_notes_the_loss_of_each_corpus_and_their_mean_by_rates(run_of_two, config) -> None:
    shares = open_dataset(config, vocab_size=512).rates
    lines = _validations(run_of_two)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        mean = sum(shares[name] * line[f"val/loss/{name}"] for name in shares)
        assert line["val/loss"] == pytest.approx(mean, rel=1e-12)
        assert line["val/loss/en"] != line["val/loss/qq"]


def test_a_run_notes_how_often_each_corpus_was_read(run_of_two, config) -> None:
    experiment = from_toml(Experiment, run_of_two / "experiment.toml")
    corpora = open_dataset(config, vocab_size=512)
    last = _validations(run_of_two)[-1]
    row = raw_length(64, 0.15, 3.0)
    rows = sum(
        last[f"epoch/{name}"] * (part.train.num_tokens // row - 1)
        for name, part in corpora.parts.items()
    )
    assert rows == pytest.approx(6 * experiment.batch_size)


def test_a_run_of_a_mixture_stopped_and_resumed_ends_bitwise_the_same(
    run_of_two, config, tmp_path
) -> None:
    import switchworks

    run_dir = tmp_path / "run"
    assert main(_words(config, run_dir, 4)) == 0
    assert main([*_words(config, run_dir, 6), "--resume"]) == 0
    whole, resumed = (switchworks.load(path)[0].state_dict() for path in (run_of_two, run_dir))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_line_of_a_validation_names_all_corpora_or_of_many_the_extremes() -> None:
    assert losses_text({}) == ""
    assert losses_text({"en": 1.0, "de": 0.5}) == "  en 1.000  de 0.500"
    many = {f"c{i}": (i * 37 % 107) / 10 for i in range(107)}
    assert losses_text(many) == "  lowest c0 0.000  highest c26 10.600 of 107"


def test_the_report_lists_the_corpora_with_loss_share_and_epochs(run_of_two) -> None:
    page = (run_of_two / "report.html").read_text()
    last = _validations(run_of_two)[-1]
    assert "Validation loss by corpus" in page
    assert f"{last['val/loss/qq']:.3f}" in page
    assert f"read {last['epoch/qq']:.3g} times" in page
    assert page.count("% of the rows") == 2


def test_evaluate_gives_the_loss_of_each_corpus(run_of_two) -> None:
    figures = evaluate_run(run_of_two, batches=2)
    assert {"loss", "loss/en", "loss/qq"} <= figures.keys()
    assert min(figures["loss/en"], figures["loss/qq"]) < figures["loss"]
    assert figures["loss"] < max(figures["loss/en"], figures["loss/qq"])


def test_prepare_shows_share_and_epochs_of_each_corpus(config, capsys) -> None:
    words = ["prepare", "tiny", "--data.mixture", *config.mixture, "--steps", "1000"]
    words += ["--data.validation-share", "0.1", "--data.cache", str(config.cache)]
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["corpus", "en", "qq", "Epochs:"]
    epochs = [float(line.split()[-1]) for line in table[1:3]]
    assert epochs[1] > epochs[0] > 0  # the smaller is read more often


def test_shards_of_a_mixture_can_be_built_by_several_jobs(config, tmp_path, capsys) -> None:
    words = ["prepare", "tiny", "--data.mixture", *config.mixture]
    words += ["--data.validation-share", "0.1", "--data.cache", str(tmp_path)]
    assert main([*words, "--shard", "1/2"]) == 0
    assert capsys.readouterr().out.count("shards still missing: 0") == 2
    assert main([*words, "--shard", "0/2"]) == 0
    assert "Epochs:" in capsys.readouterr().out
