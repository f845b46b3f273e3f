"""experiments/reads_inputs.py: what the inputs are worth to a model."""

import re
import shutil

import torch
from support.scripts import run_script

import switchworks


def test_inputs_are_worth_nothing_to_a_model_without_cross_attention(tiny_run, tmp_path):
    deaf = tmp_path / "deaf"
    shutil.copytree(tiny_run, deaf)
    shutil.rmtree(deaf / "model")
    model, tokenizer = switchworks.load(tiny_run)
    with torch.no_grad():
        for block in model.decoder:
            block.cross_attention.o.weight.zero_()
    switchworks.save(model, deaf / "model", tokenizer)
    with torch.no_grad():  # loud enough to be heard in three digits
        for block in model.decoder:
            torch.nn.init.normal_(block.cross_attention.o.weight)
    shutil.copytree(deaf, tmp_path / "loud")
    shutil.rmtree(tmp_path / "loud" / "model")
    switchworks.save(model, tmp_path / "loud" / "model", tokenizer)
    runs = [str(deaf), str(tmp_path / "loud")]
    said = run_script("reads_inputs.py", *runs, "--rows", "8")
    rows = re.findall(r"\| ([\d.]+) \| ([\d.]+) \| (-?[\d.]+) \|", said)
    (own, other, worth), (_, _, loud) = (tuple(map(float, row)) for row in rows)
    assert (own, worth) == (other, 0)
    assert loud != 0
