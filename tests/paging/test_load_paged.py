"""Experts on disk: the same bits as from memory whatever the budget, and never more of it."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch
from support.cases import mostly_slow, slow
from support.compiling import compiling
from support.models import CAUSAL, DENSE, TINY
from torch import Tensor

from switchworks.checkpoint import load, save
from switchworks.config import CheckpointError, ConfigError
from switchworks.fast import CompiledDecoder, for_decoding
from switchworks.generate import BeamSearch, generate
from switchworks.model import RoutingConfig, SwitchTransformer
from switchworks.paging import PagedExperts, expert_cache, load_paged
from switchworks.quantise import QuantiseConfig, QuantisedModule, quantise

KINDS = {
    "sparse": TINY,
    "gated": replace(TINY, gated=True, activation="gelu"),
    "top2": replace(TINY, routing=RoutingConfig(experts=4, strategy="top2")),
    "alone": CAUSAL,
    "attention": replace(TINY, routing=RoutingConfig(experts=4, layers="both")),
    "padded": replace(TINY, routing=RoutingConfig(experts=4, eval_capacity_factor=1.0)),
    "split": replace(TINY, d_model=128, d_ff=512, routing=RoutingConfig(experts=4, every=1)),
}
"""Of "split" decoding multiplies in shares: its matrices are large enough."""
WEIGHTS = ["float32", "bfloat16", "cast", "int8", "int8-dynamic", "int4"]
"""How they are stored; "cast" are float32, and computed in bfloat16."""
SOME = [
    ("split", "float32"),
    ("split", "int4"),
    ("sparse", "cast"),
    ("gated", "int8"),
    ("top2", "bfloat16"),
    ("alone", "int4"),
    ("attention", "int8-dynamic"),
    ("padded", "float32"),
]
BUDGETS = [0.0, 0.25, 1.0]
"""Shares of the least budget beyond it: two experts of each layer, some more, and all four."""
IDS = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))


def write(folder: Path, kind: str, scheme: str = "float32") -> Path:
    """The folder of a model of random weights."""
    model = SwitchTransformer(KINDS[kind], seed=1).eval()
    if scheme == "bfloat16":
        model = model.bfloat16()
    elif scheme.startswith("int"):
        model = quantise(model, QuantiseConfig.from_scheme(scheme))  # type: ignore[arg-type]
    save(model, folder / "model")
    return folder / "model"


def least_budget(folder: Path, dtype: torch.dtype | None = None) -> int:
    """What the message about a budget of one byte says."""
    with pytest.raises(ConfigError, match="1 bytes of memory for experts are too few") as error:
        load_paged(folder, 1, dtype)
    number = re.search(r"this model needs ([\d,]+), for 2 of each layer", str(error.value))
    assert number is not None
    return int(number[1].replace(",", ""))


def banks_of(model: SwitchTransformer) -> dict[str, PagedExperts]:
    banks = {name: layer.experts for name, layer in model.switch_layers.items()}
    assert all(isinstance(bank, PagedExperts) for bank in banks.values())
    return banks  # type: ignore[return-value]


@torch.no_grad()
def logits(model: SwitchTransformer) -> Tensor:
    return model(IDS[:, :0] if model.config.decoder_only else IDS, IDS).logits


@pytest.mark.parametrize(("kind", "scheme"), mostly_slow(itertools.product(KINDS, WEIGHTS), SOME))
def test_placement_changes_no_bit_and_no_token(tmp_path, kind, scheme):
    folder = write(tmp_path, kind, scheme)
    dtype = torch.bfloat16 if scheme == "cast" else None
    plain, _ = load(folder, dtype=dtype)
    least = least_budget(folder, dtype)
    searches = [None, BeamSearch(beams=3)]
    whole = logits(plain)
    texts = [generate(plain, IDS, max_length=6, beams=beams) for beams in searches]
    for share in BUDGETS:
        paged, _ = load_paged(folder, int(least * (1 + share)), dtype)
        assert torch.equal(logits(paged), whole)
        for beams, text in zip(searches, texts, strict=True):
            assert torch.equal(generate(paged, IDS, max_length=6, beams=beams), text)
        figures = expert_cache(paged)
        assert figures is not None
        layers = len(paged.switch_layers)
        assert figures.slots >= {0.0: 2 * layers, 0.25: 2 * layers, 1.0: 4 * layers}[share]
        assert share > 0 or figures.slots == 2 * layers


def test_decoding_multiplies_in_shares_as_it_does_in_memory(tmp_path):
    paged, _ = load_paged(write(tmp_path, "split"), 1 << 30)
    units = [unit for bank in banks_of(paged).values() for unit in bank.units]
    with for_decoding(paged):
        assert all("matmul" in vars(unit) for unit in units)
    assert not any("matmul" in vars(unit) for unit in units)


@pytest.mark.parametrize("scheme", ["float32", slow("int4")])
def test_a_compiled_step_calls_experts_from_disk(tmp_path, scheme):
    folder = write(tmp_path, "sparse", scheme)
    plain, _ = load(folder)
    paged, _ = load_paged(folder, least_budget(folder))
    with compiling():
        texts = [
            generate(model, IDS[:1], max_length=6, compiled=CompiledDecoder(model))
            for model in (plain, paged)
        ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("scheme", ["float32", "cast", "int8", "int4"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.7])
def test_all_that_is_kept_of_experts_fits_the_budget(tmp_path, scheme, share):
    """Also the copies in the order of the kernel for 4 bits."""
    dtype = torch.bfloat16 if scheme == "cast" else None
    folder = write(tmp_path, "split", scheme)
    budget = int(least_budget(folder, dtype) * (1 + share))
    paged, _ = load_paged(folder, budget, dtype)
    logits(paged)
    generate(paged, IDS, max_length=8)
    size = 0
    for unit in [unit for bank in banks_of(paged).values() for unit in bank.units]:
        tensors = [*unit.parameters(), *unit.buffers()]
        if isinstance(unit, QuantisedModule):
            tensors += [tensor for pair in unit.ordered.values() for tensor in pair]
        size += sum(tensor.nbytes for tensor in tensors)
    assert 0 < size <= budget


def test_a_budget_of_two_experts_a_layer_is_the_least(tmp_path):
    """TINY: an expert is 2 * 16 * 24 weights of 4 bytes, and there are two layers."""
    folder = write(tmp_path, "sparse")
    assert least_budget(folder) == 2 * 2 * (2 * 16 * 24 * 4)
    load_paged(folder, 12_288)
    with pytest.raises(ConfigError, match="12,287 bytes"):
        load_paged(folder, 12_287)


@pytest.mark.parametrize(
    ("experts", "encoder", "decoder"), [(4, 2, 2), (5, 2, 3), (6, 2, 4), (7, 3, 4), (8, 4, 4)]
)
def test_what_the_least_leaves_goes_to_the_decoder_first(tmp_path, experts, encoder, decoder):
    paged, _ = load_paged(write(tmp_path, "sparse"), experts * 3072)
    slots = {name: len(bank.units) for name, bank in banks_of(paged).items()}
    assert slots == {"encoder.1": encoder, "decoder.1": decoder}


def test_threads_that_decode_with_one_model_write_what_each_would_alone(tmp_path):
    folder = write(tmp_path, "sparse")
    plain, _ = load(folder)
    paged, _ = load_paged(folder, least_budget(folder))
    texts = [torch.randint(2, 40, (2, 7)) for _ in range(4)]
    written: dict[int, Tensor] = {}

    def decode(number: int) -> None:
        written[number] = generate(paged, texts[number], max_length=8)

    threads = [Thread(target=decode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, text in enumerate(texts):
        assert torch.equal(written[number], generate(plain, text, max_length=8))


# What it is not for


def test_experts_on_disk_are_not_trained(tmp_path):
    paged, _ = load_paged(write(tmp_path, "sparse"), 1 << 30)
    assert not any(parameter.requires_grad for parameter in paged.parameters())
    assert not paged(IDS, IDS).losses.total.requires_grad
    paged.requires_grad_(True)
    with pytest.raises(ConfigError, match="cannot be trained"):
        paged(IDS, IDS)


def test_experts_on_disk_are_not_saved_nor_quantised(tmp_path):
    folder = write(tmp_path, "sparse")
    paged, _ = load_paged(folder, 1 << 30)
    with pytest.raises(CheckpointError, match=f"are in {folder}, and not in memory"):
        save(paged, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(ConfigError, match="convert PATH NEW --quantise int8"):
        quantise(paged)


def test_experts_on_disk_keep_the_dtype_they_were_loaded_with(tmp_path):
    folder = write(tmp_path, "sparse")
    paged, _ = load_paged(folder, 1 << 30)
    before = logits(paged)
    with pytest.raises(ConfigError, match=r"stay in torch\.float32 on cpu"):
        paged.bfloat16()
    assert torch.equal(logits(load_paged(folder, 1 << 30)[0].to("cpu").float()), before)


def test_a_dense_model_has_no_experts_to_leave_on_disk(tmp_path):
    save(SwitchTransformer(DENSE), tmp_path / "model")
    with pytest.raises(ConfigError, match="is a dense model"):
        load_paged(tmp_path / "model", 1 << 30)


def test_a_checkpoint_is_refused_and_its_finished_run_is_read(tiny_run):
    with pytest.raises(CheckpointError, match="switchworks finish"):
        load_paged(max((tiny_run / "checkpoints").iterdir()), 1 << 30)
    paged, tokenizer = load_paged(tiny_run, 1 << 30)
    assert tokenizer is not None
    assert not paged.training
    assert expert_cache(load(tiny_run)[0]) is None


def test_files_that_have_changed_are_refused(tmp_path):
    folder = write(tmp_path, "sparse")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        load_paged(folder, 1 << 30)
