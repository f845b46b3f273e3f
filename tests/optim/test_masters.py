"""Float32 masters behind 16-bit weights."""

import pytest
import torch
from torch import Tensor, nn

from switchworks.optim import MasterWeights


def narrow(*values: float, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def move(masters: MasterWeights, by: float) -> None:
    with torch.no_grad():
        for master in masters.named.values():
            master += by
    masters.copy_to_model()


def test_steps_too_small_for_bfloat16_add_up_in_the_master():
    weight, alone = narrow(1.0), narrow(1.0)
    masters = MasterWeights([("w", weight)])
    for _ in range(16):
        move(masters, 2**-10)
        alone.data += 2**-10
    assert alone.item() == 1.0
    assert weight.item() == 1.0 + 2**-6


def test_a_float32_parameter_is_its_own_master():
    wide, slim = nn.Parameter(torch.ones(2)), narrow(1.0, 2.0)
    masters = MasterWeights([("wide", wide), ("slim", slim)]).named
    assert masters["wide"] is wide
    assert masters["slim"] is not slim
    assert masters["slim"].dtype == torch.float32


def test_half_precision_gets_masters_too_and_float64_does_not():
    half, double = narrow(1.0, dtype=torch.float16), narrow(1.0, dtype=torch.float64)
    masters = MasterWeights([("half", half), ("double", double)]).named
    assert masters["half"].dtype == torch.float32
    assert masters["double"] is double


def test_masters_keep_the_digits_of_the_float32_model_that_was_cast():
    layer = nn.Linear(3, 2)
    exact = {name: p.detach().clone() for name, p in layer.named_parameters()}
    before = {name: p.detach() for name, p in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    state = MasterWeights(layer.named_parameters(), before).float_state()
    assert all(torch.equal(state[name], exact[name]) for name in exact)
    assert state["weight"].data_ptr() == before["weight"].data_ptr()


def test_given_weights_reach_the_model_whatever_its_dtype():
    wide, slim = nn.Parameter(torch.zeros(1)), narrow(0.0)
    given = {"wide": torch.tensor([0.1]), "slim": torch.tensor([0.1])}
    MasterWeights([("wide", wide), ("slim", slim)], given)
    assert torch.equal(wide, torch.tensor([0.1]))
    assert torch.equal(slim, torch.tensor([0.1]).bfloat16())


def test_gradients_of_micro_batches_are_added_in_float32():
    weight = narrow(0.0)
    masters = MasterWeights([("w", weight)])
    for grad in (1.0, 2**-9, 2**-9):
        weight.grad = torch.tensor([grad]).bfloat16()
        masters.accumulate()
        assert weight.grad is None
    assert masters.gradients()["w"].item() == 1.0 + 2**-8


def test_a_float32_parameter_gathers_its_gradient_in_place():
    weight = nn.Parameter(torch.zeros(1))
    masters = MasterWeights([("w", weight)])
    for _ in range(2):
        (3 * weight).sum().backward()
        masters.accumulate()
    assert masters.gradients()["w"] is weight.grad
    assert weight.grad is not None
    assert weight.grad.item() == 6.0


def test_a_tied_parameter_has_one_master_that_takes_both_gradients():
    embedding, head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head}).bfloat16()
    masters = MasterWeights(model.named_parameters())
    assert list(masters.named) == ["embedding.weight"]
    head(embedding(torch.tensor([1]))).sum().backward()
    expected: Tensor | None = embedding.weight.grad
    assert expected is not None
    masters.accumulate()
    assert torch.equal(masters.gradients()["embedding.weight"], expected.float())


@pytest.mark.parametrize("gathered", [True, False])
def test_zero_forgets_gradients_before_and_after_they_are_gathered(gathered):
    weight = narrow(0.0)
    masters = MasterWeights([("w", weight)])
    weight.grad = torch.ones_like(weight)
    if gathered:
        masters.accumulate()
    masters.zero()
    masters.accumulate()
    assert masters.gradients() == {}


def test_a_frozen_parameter_stays_frozen_in_its_master():
    frozen = nn.Parameter(torch.ones(1, dtype=torch.bfloat16), requires_grad=False)
    assert not MasterWeights([("w", frozen)]).named["w"].requires_grad


def test_a_single_gradient_waits_in_16_bits_until_its_bucket_is_updated():
    parameters = {name: narrow(*[1.0] * 70_000) for name in ("a", "b")}
    masters = MasterWeights(parameters.items())
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    assert {g.dtype for g in masters.gradients().values()} == {torch.bfloat16}
    masters.prepare_grads(["a"], 0.5)
    found = masters.gradients()
    assert parameters["a"].grad is None
    assert torch.equal(found["a"], torch.full((70_000,), 0.25))
    assert found["b"].dtype == torch.bfloat16
    masters.zero(["a"])
    assert list(masters.gradients()) == ["b"]


def test_every_name_is_in_one_bucket_and_large_ones_are_few_at_a_time(monkeypatch):
    monkeypatch.setattr("switchworks.optim.masters._BUCKET", 150_000)
    sizes = {"vector": 10, "wide": 70_000, "large": 70_000, "larger": 140_000, "last": 70_000}
    parameters = {name: narrow(*[0.0] * size) for name, size in sizes.items()}
    parameters["wide"] = nn.Parameter(torch.zeros(70_000))
    buckets = MasterWeights(parameters.items()).buckets()
    assert buckets == [["vector", "wide"], ["large", "larger"], ["last"]]
