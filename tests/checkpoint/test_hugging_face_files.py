"""Directories of weights: every name accounted for, read piece by piece, gated experts too."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from switchworks import load_hf, save_hf
from switchworks.checkpoint.hugging_face import weights as hugging_face
from switchworks.checkpoint.hugging_face.weights import to_hf_state
from switchworks.checkpoint.tensors import Tensors, open_tensors, require_match, write_tensors
from switchworks.config import CheckpointError
from switchworks.model import ModelConfig, RoutingConfig, SwitchTransformer

GATED = ModelConfig(
    vocab_size=23,
    d_model=10,
    d_ff=14,
    d_kv=3,
    num_heads=3,
    num_layers=4,
    activation="gelu",
    gated=True,
    tied_head=False,
    routing=RoutingConfig(experts=3, balance_weight=0.001, z_weight=0.001),
)
"""Switch-XXL in small: GEGLU in every FFN and expert, every other FFN sparse, a head of its own."""


def config_of(config: ModelConfig, **more: Any) -> dict[str, Any]:
    """config.json of a Switch model, as transformers spells it."""
    assert config.routing is not None
    return {
        "model_type": "switch_transformers",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "num_sparse_encoder_layers": config.num_layers // config.routing.every,
        "num_sparse_decoder_layers": config.num_layers // config.routing.every,
        "num_experts": config.routing.experts,
        "dropout_rate": config.dropout,
        "tie_word_embeddings": config.tied_head,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    } | more


def write_gated(model: SwitchTransformer, directory: Path, **settings: Any) -> dict[str, Tensor]:
    """`model` as a checkpoint like switch-xxl-128, in shards. transformers has no such model, so
    the names follow its rule for T5 1.1, wi_0 and wi_1, below mlp.experts.expert_N (#25347)."""
    state = to_hf_state(model, ffn="mlp")
    directory.mkdir()
    write_tensors(state, directory, shard_bytes=4000)
    (directory / "config.json").write_text(json.dumps(config_of(model.config, **settings)))
    return state


@pytest.mark.parametrize(
    "settings",
    [
        {"dense_act_fn": "gelu_new"},
        {"dense_act_fn": "gated-gelu"},
        {"dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu", "is_gated_act": True},
    ],
)
def test_gated_experts_load_however_the_configuration_spells_them(tmp_path, settings):
    model = SwitchTransformer(GATED, seed=3)
    state = write_gated(model, tmp_path / "hf", **settings)
    expert = "encoder.block.1.layer.1.mlp.experts.expert_2"
    assert state[f"{expert}.wi_0.weight"].shape == state[f"{expert}.wi_1.weight"].shape == (14, 10)
    assert state[f"{expert}.wo.weight"].shape == (10, 14)
    assert f"{expert}.wi.weight" not in state
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3

    loaded = load_hf(tmp_path / "hf")
    assert loaded.config == GATED
    for ours, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, other)


def test_wi_0_is_the_gate_as_in_t5(tmp_path):
    """Answer of one expert = wo (gelu(wi_0 x) * wi_1 x), from the tensors in the file."""
    model = SwitchTransformer(GATED, seed=3)
    state = write_gated(model, tmp_path / "hf", dense_act_fn="gelu_new")
    x = torch.randn(5, 10)
    expert = "decoder.block.3.layer.2.mlp.experts.expert_1"
    wi_0, wi_1, wo = (state[f"{expert}.{name}.weight"] for name in ("wi_0", "wi_1", "wo"))
    hidden = torch.nn.functional.gelu(x @ wi_0.T, approximate="tanh") * (x @ wi_1.T)
    got = load_hf(tmp_path / "hf").decoder.blocks[3].ffn.experts.run_one(1, x)
    torch.testing.assert_close(got, hidden @ wo.T, rtol=1e-5, atol=1e-6)


def test_transformers_itself_leaves_such_experts_at_random(tmp_path):
    """Why we read them and do not write them: it warns, and goes on with weights of its own."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    write_gated(SwitchTransformer(GATED), tmp_path / "hf", dense_act_fn="gelu_new")
    kind = transformers.SwitchTransformersForConditionalGeneration
    _, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    expert = "encoder.block.1.layer.1.mlp.experts.expert_2"
    assert f"{expert}.wi.weight" in info["missing_keys"]
    assert f"{expert}.wi_0.weight" in info["unexpected_keys"]


@pytest.mark.parametrize("decoder", [(), (0, 1)])
def test_stacks_with_different_sparse_blocks_survive_the_round_trip(decoder, tmp_path):
    """transformers has a number of sparse blocks for each stack, and so has routing."""
    routing = RoutingConfig(experts=3, encoder_blocks=(1, 3), decoder_blocks=decoder)
    sizes = {"vocab_size": 23, "d_model": 10, "num_layers": 4, "num_decoder_layers": 2}
    model = SwitchTransformer(ModelConfig(**sizes, routing=routing)).eval()
    save_hf(model, tmp_path / "hf")
    back = load_hf(tmp_path / "hf")
    assert tuple(back.config.sparse_blocks(False)) == (1, 3)
    assert tuple(back.config.sparse_blocks(True)) == decoder
    batch = torch.randint(2, 23, (2, 5)), torch.randint(2, 23, (2, 4))
    torch.testing.assert_close(back(*batch).logits, model(*batch).logits, rtol=0, atol=0)
    transformers = pytest.importorskip("transformers")
    kind = transformers.SwitchTransformersForConditionalGeneration
    _, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_experts_said_to_be_gated_that_are_not_are_refused(tmp_path):
    config = ModelConfig(
        vocab_size=23, d_model=10, num_layers=2, routing=RoutingConfig(experts=3), activation="gelu"
    )
    write_gated(SwitchTransformer(config), tmp_path / "hf", dense_act_fn="gated-gelu")
    with pytest.raises(CheckpointError) as error:
        load_hf(tmp_path / "hf")
    message = str(error.value)
    assert "encoder.block.1.layer.1.mlp.experts.expert_{0-2}.wi_{0,1}.weight (6 tensors)" in message
    assert "unknown: encoder.block.0.layer.1.mlp.wi.weight, " in message


def test_complaints_name_every_tensor_and_stay_short():
    """Names that differ in numbers share an entry; 4 of them fit where 96 would not."""
    sparse = [
        f"{stack}.block.{block}.layer.{layer}.mlp.experts.expert_{expert}.{name}.weight"
        for stack, layer in (("encoder", 1), ("decoder", 2))
        for name in ("wi", "wo")
        for block in (1, 3, 5)
        for expert in range(8)
    ]
    wanted: dict[str, object] = dict.fromkeys(sparse, (3, 4)) | {"a.0.b": (1,), "a.1.b": (1,)}
    actual: dict[str, object] = {"a.0.b": (2,), "a.1.b": (2,), "c.7": (), "d": ()}
    with pytest.raises(CheckpointError) as error:
        require_match("X.", wanted=wanted, actual=actual, fix="Y.")
    experts = "mlp.experts.expert_{0-7}"
    assert str(error.value).split("\n  ") == [
        "X.",
        "missing: "
        f"encoder.block.{{1,3,5}}.layer.1.{experts}.wi.weight (24 tensors), "
        f"encoder.block.{{1,3,5}}.layer.1.{experts}.wo.weight (24 tensors), "
        f"decoder.block.{{1,3,5}}.layer.2.{experts}.wi.weight (24 tensors), "
        f"decoder.block.{{1,3,5}}.layer.2.{experts}.wo.weight (24 tensors)",
        "unknown: c.7, d",
        "of another shape: a.{0,1}.b (2 tensors) is [2] and should be [1]",
        "Y.",
    ]


def test_of_many_different_names_ten_are_shown_and_the_rest_counted():
    with pytest.raises(CheckpointError, match=r"unknown: a, b, c, d, e, f, g, h, i, j and 3 more"):
        require_match("X.", wanted={}, actual=dict.fromkeys("abcdefghijklm", ()), fix="Y.")


def live(values: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """What load_hf looks at in a live model, without the model."""
    return SimpleNamespace(config=SimpleNamespace(to_dict=lambda: values), state_dict=lambda: state)


def test_stacks_with_embeddings_of_their_own_are_refused():
    """transformers unties them in a Switch model whose head is untied, and trains three."""
    model = SwitchTransformer(GATED)
    state = to_hf_state(model, ffn="mlp") | {"encoder.embed_tokens.weight": torch.ones(23, 10)}
    with pytest.raises(CheckpointError, match="the two stacks read different embeddings"):
        load_hf(live(config_of(GATED, dense_act_fn="gelu_new"), state))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"eos_token_id": 2}, "eos_token_id = 2 cannot be read"),
        ({"relative_attention_num_buckets": 6}, "config.json describes no model.*multiple of 4"),
    ],
)
def test_settings_that_would_change_the_outputs_are_refused(change, complaint):
    state = to_hf_state(SwitchTransformer(GATED), ffn="mlp")
    with pytest.raises(CheckpointError, match=r"(?s)" + complaint):
        load_hf(live(config_of(GATED, dense_act_fn="gelu_new", **change), state))


STREAMED = ModelConfig(
    vocab_size=500, d_model=64, d_ff=1024, num_layers=4, routing=RoutingConfig(experts=16)
)
"""10.5 million parameters, 42 MB; the largest tensor in a file, of one expert, has 0.26 MB."""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """`STREAMED` in about 20 shards of 2 MB, as safetensors in `st` and as pickles in `bin`."""
    folder = tmp_path_factory.mktemp("large")
    save_hf(SwitchTransformer(STREAMED), folder / "st", shard_bytes=2_000_000)
    index = json.loads((folder / "st" / "model.safetensors.index.json").read_text())
    (folder / "bin").mkdir()
    stored, places = open_tensors(folder / "st"), {}
    for shard in set(index["weight_map"].values()):
        names = [name for name, file in index["weight_map"].items() if file == shard]
        file = shard.replace("model", "pytorch_model").replace("safetensors", "bin")
        torch.save({name: stored.read(name).clone() for name in names}, folder / "bin" / file)
        places |= dict.fromkeys(names, file)
    text = json.dumps({"weight_map": places})
    (folder / "bin" / "pytorch_model.bin.index.json").write_text(text)
    (folder / "bin" / "config.json").write_bytes((folder / "st" / "config.json").read_bytes())
    return folder


def test_no_more_than_one_tensor_of_the_files_is_held_at_a_time(large, monkeypatch):
    """Counted: what was read and is still referred to."""
    alive, peak = 0, 0

    def count(change: int) -> None:
        nonlocal alive, peak
        alive += change
        peak = max(peak, alive)

    def watched(directory: Path) -> Tensors:
        stored = open_tensors(directory)

        def read(name: str) -> Tensor:
            tensor = stored.read(name)
            count(tensor.nbytes)
            weakref.finalize(tensor, count, -tensor.nbytes)
            return tensor

        return Tensors(stored.shapes, read)

    monkeypatch.setattr(hugging_face.tensors, "open_tensors", watched)
    model = load_hf(large / "st")
    assert sum(parameter.nbytes for parameter in model.parameters()) > 40e6
    assert (alive, peak) == (0, 64 * 1024 * 4)


MEASURE = """
import sys
from pathlib import Path
from switchworks import load_hf
from switchworks.checkpoint.hugging_face import weights as hugging_face
from switchworks.checkpoint.tensors import Tensors, open_tensors

def anonymous():  # memory that no file backs, which the system cannot take back
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def watched(directory):
    stored = open_tensors(directory)
    def read(name):
        seen.append(anonymous())
        return stored.read(name)
    return Tensors(stored.shapes, read)

load_hf(Path(sys.argv[1]) / "st")  # what torch loads at its first use does not count
hugging_face.tensors.open_tensors = watched
for kind in ("st", "bin"):
    seen = []
    before = anonymous()
    model = load_hf(Path(sys.argv[1]) / kind)
    print(kind, sum(p.nbytes for p in model.parameters()), max(*seen, anonymous()) - before)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux reports")
def test_loading_takes_the_memory_of_the_model_and_not_of_the_files_beside_it(large):
    """Safetensors and pickles alike, in a process of its own. Blocks are returned when freed."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(large)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for line in done.stdout.splitlines():
        kind, size, grown = line.split()
        assert len(list((large / kind).glob("*model-*"))) > 15
        assert 0.9 * int(size) < int(grown) < 1.2 * int(size), line
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": "10"}, r"d_model = '10' should be of type int\.\n  Write 3.*\n  Or fetch"),
        ({"tie_word_embeddings": "no"}, r"= 'no' is neither true nor false\.\n  Mend it, or fetch"),
        ({"router_bias": True}, r"router_bias = true: no router .*\n  Use another model"),
        ({"num_layers": 5000}, r"json: 5,000 layers exceed 4,096\.\n  Fetch it again"),
        ({"num_layers": 4000}, r"says 4,000 layers and 3 experts, .* 126 tensors\.\n  They do not"),
    ],
)
def test_settings_that_no_model_has_are_refused_with_their_values(settings, message, tmp_path):
    write_gated(SwitchTransformer(GATED), tmp_path / "hf", **settings)
    with pytest.raises(CheckpointError, match=message):
        load_hf(tmp_path / "hf")


def test_an_index_without_a_map_of_weights_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match=r"json has no weight_map, .*\n  Fetch it again"):
        open_tensors(tmp_path)
