"""Cases of public issue trackers of other libraries, tried here. docs/interop.md lists them."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from switchworks.batch import Batch
from switchworks.checkpoint import load_hf
from switchworks.model import RoutingConfig, SwitchFFN, SwitchTransformer
from switchworks.recipes.tiny import tiny
from switchworks.training import build_state, train_step

SMALL = {
    **{"vocab_size": 40, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2},
    **{"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
}
IDS = torch.tensor([[5, 9, 3, 1], [7, 7, 2, 1]])


def t5(**settings):
    torch.manual_seed(0)
    config = transformers.T5Config(**SMALL, **settings)
    return transformers.T5ForConditionalGeneration(config).eval()


def test_an_embedding_under_the_decoder_s_name_beside_a_head_is_no_head(tmp_path):
    """transformers 48154: madlad400-3b-mt has decoder.embed_tokens and lm_head, but no
    shared.weight, and transformers 5 put the head in the encoder's place."""
    theirs = t5(feed_forward_proj="gated-gelu")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    stored["decoder.embed_tokens.weight"] = stored.pop("shared.weight")
    stored.pop("encoder.embed_tokens.weight", None)
    stored["lm_head.weight"] = torch.randn(40, 16)
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scale_decoder_outputs"]  # as transformers 4 wrote it
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    ours = load_hf(tmp_path)
    assert torch.equal(ours.embedding.weight, theirs.shared.weight)
    assert torch.equal(ours.head.weight, stored["lm_head.weight"])


def test_a_bias_of_cross_attention_that_no_model_reads_is_passed_over(tmp_path):
    """transformers 2334 and 9231: T5's released files hold it in the first block."""
    theirs = t5()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(load_file(file) | {name: torch.randn(32, 2)}, file, metadata={"format": "pt"})
    with torch.no_grad():
        expected = theirs(input_ids=IDS, labels=IDS).logits
        torch.testing.assert_close(load_hf(tmp_path)(IDS, IDS).logits, expected)


def test_micro_batches_of_unequal_length_weigh_every_token_the_same():
    """transformers 24725, trl 2175, torchtune 1875, mlx-lm 1413: means of means weigh short rows
    more. Two rows of 12 targets and two of 2."""
    experiment = tiny()
    routing = replace(experiment.model.routing, group_sequences=1, jitter=0.0, capacity_factor=None)
    model = replace(experiment.model, routing=routing, dropout=0.0)
    targets = torch.randint(2, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    targets[2:, 2:] = 0
    batch = Batch(inputs=torch.full((4, 8), 7), targets=targets)
    losses, norms = [], []
    for parts in (1, 2, 4):
        state = build_state(replace(experiment, model=model, batch_size=4, micro_batches=parts))
        result = train_step(state, batch)
        losses.append(result.cross_entropy)
        norms.append(result.update.grad_norm)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_the_balance_loss_of_top2_takes_the_whole_softmax():
    """aprender 2162: P of the chosen experts alone is another loss."""
    torch.manual_seed(0)
    layer = SwitchFFN(8, 16, RoutingConfig(experts=4, strategy="top2", jitter=0.0))
    x = torch.randn(1, 30, 8)
    probs = layer.router(x).softmax(-1)[0]
    share = torch.bincount(probs.argmax(-1), minlength=4) / 30
    expected = 4 * (share * probs.mean(dim=0)).sum()
    torch.testing.assert_close(layer(x)[1].balance, expected)


def test_rows_are_routed_by_themselves_whatever_stands_beside_them():
    """transformers 33463: a transposed mask gave right results for one row alone."""
    torch.manual_seed(0)
    layer = SwitchFFN(8, 16, RoutingConfig(experts=4)).eval()
    x = torch.randn(3, 7, 8)
    together = layer(x)[0]
    torch.testing.assert_close(together, torch.cat([layer(row[None])[0] for row in x]))


def test_weights_of_another_run_come_without_its_optimizer(tmp_path):
    """t5x 1478 asks whether fine-tuning restarts the optimizer: here it does."""
    experiment = tiny()
    state = build_state(experiment)
    batch = Batch(inputs=torch.full((8, 32), 7), targets=torch.full((8, 16), 9))
    train_step(state, batch)
    trained = SwitchTransformer(experiment.model)
    trained.load_state_dict(state.updater.masters.float_state())
    again = build_state(experiment, trained)
    assert again.step == 0
    fresh = build_state(experiment)
    assert again.updater.state_dict().keys() == fresh.updater.state_dict().keys()
