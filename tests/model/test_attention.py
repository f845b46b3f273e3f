"""Attention, its masks and its relative bias, against T5's and against a plain loop."""

import pytest
import torch

from switchworks.model import ModelConfig
from switchworks.model.attention import (
    Attention,
    RelativeBias,
    attend,
    causal,
    mask_to_bias,
    relative_bucket,
    segment_mask,
)
from switchworks.model.layers import SharedDropout

CONFIG = ModelConfig(d_model=16, d_kv=4, num_heads=2)
NO_DROPOUT = SharedDropout(0.0)


def bucket(distance: int, *, bidirectional: bool) -> int:
    """Of key position - query position, with T5's 32 buckets and distance 128."""
    distances = torch.tensor([[distance]])
    return int(
        relative_bucket(distances, bidirectional=bidirectional, buckets=32, max_distance=128)
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_distance_has_the_bucket_t5_gives_it(bidirectional):
    """Mesh-TF `_relative_position_bucket`, by way of transformers."""
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)[None]
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
    ours = relative_bucket(distance, bidirectional=bidirectional, buckets=32, max_distance=128)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("distance", "expected"), [(0, 0), (-15, 15), (-16, 16), (-127, 31), (-128, 31), (-900, 31)]
)
def test_the_decoder_tells_sixteen_distances_apart_and_the_far_ones_roughly(distance, expected):
    """Mesh-TF `_relative_position_bucket`, causal."""
    assert bucket(distance, bidirectional=False) == expected


def test_the_decoder_puts_every_later_key_into_the_first_bucket():
    assert {bucket(distance, bidirectional=False) for distance in range(1, 200)} == {0}


@pytest.mark.parametrize("distance", [1, 7, 8, 50, 400])
def test_the_encoder_has_the_upper_half_of_the_buckets_for_keys_after_the_query(distance):
    """Mesh-TF `_relative_position_bucket`, bidirectional."""
    after, before = (bucket(d, bidirectional=True) for d in (distance, -distance))
    assert after == before + 16


def new_bias(*, bidirectional: bool) -> RelativeBias:
    bias = RelativeBias(CONFIG, bidirectional=bidirectional)
    torch.nn.init.normal_(bias.weight)
    return bias


def test_the_bias_of_a_head_depends_on_the_distance_alone():
    bias = new_bias(bidirectional=True)(9, 9)[0]
    assert torch.equal(bias[:, 1:, 1:], bias[:, :-1, :-1])
    assert not torch.equal(bias[0], bias[1])


def test_the_bias_of_later_queries_is_a_part_of_the_whole():
    """What decoding token by token asks for."""
    bias = new_bias(bidirectional=False)
    assert torch.equal(bias(2, 7, first=5), bias(7, 7)[:, :, 5:])


def test_positions_see_their_own_segment_only():
    rows = torch.tensor([[1, 1, 2, 0]])
    assert segment_mask(rows, rows)[0, 0].int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_no_query_sees_a_later_key():
    assert causal(3, 3, torch.device("cpu"))[0, 0].int().tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
    ]


def test_the_last_query_stands_at_the_last_key():
    assert causal(2, 4, torch.device("cpu"))[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_hidden_keys_get_no_weight_and_visible_ones_no_change():
    assert mask_to_bias(torch.tensor([True, False]), torch.float32).softmax(-1).tolist() == [
        1.0,
        0.0,
    ]


def some_heads(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q [2, 3, 4, 16], k and v [2, 3, 5, 16] and a bias for them."""
    shapes = [(2, 3, 4, 16), (2, 3, 5, 16), (2, 3, 5, 16), (1, 3, 4, 5)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def test_scores_are_plain_products_without_a_root_of_the_width():
    """T5: the factor is in the query's first values. Here it would be 4."""
    q, k, v, bias = some_heads()
    expected = torch.einsum("bhlk,bhmk->bhlm", q, k).add(bias).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, bias, NO_DROPOUT), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_kernel_used_without_gradients_computes_the_same(with_bias):
    q, k, v, some_bias = some_heads(torch.float32)
    bias = some_bias if with_bias else None
    plain = attend(q, k, v, bias, NO_DROPOUT)
    with torch.no_grad():
        fused = attend(q, k, v, bias, NO_DROPOUT)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_query_that_sees_no_key_gets_a_finite_answer(gradients):
    q, k, v, _ = some_heads(torch.float32)
    nothing = mask_to_bias(torch.zeros(1, 1, 4, 5, dtype=torch.bool), torch.float32)
    with torch.set_grad_enabled(gradients):
        assert attend(q, k, v, nothing, NO_DROPOUT).isfinite().all()


def test_the_softmax_of_bfloat16_scores_is_taken_in_float32():
    """1000 equal weights sum to 1; bfloat16 would stop counting long before."""
    q, k = torch.zeros(1, 1, 1, 2).bfloat16(), torch.zeros(1, 1, 1000, 2).bfloat16()
    v = torch.ones(1, 1, 1000, 2).bfloat16()
    read = attend(q, k, v, None, NO_DROPOUT)
    assert read.dtype == torch.bfloat16
    torch.testing.assert_close(read, torch.ones_like(read), rtol=0.01, atol=0)


@pytest.mark.parametrize("weight", ["q", "k", "v", "o"])
def test_no_projection_has_a_bias(weight):
    """T5."""
    assert getattr(Attention(CONFIG), weight).bias is None


def test_attention_is_that_of_t5():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    settings = T5Config(d_model=16, d_kv=4, num_heads=2, dropout_rate=0.0)
    settings._attn_implementation = "eager"
    theirs = T5Attention(settings, has_relative_attention_bias=True, layer_idx=0)
    ours, bias = Attention(CONFIG), RelativeBias(CONFIG, bidirectional=True)
    for name in "qkvo":
        getattr(theirs, name).weight = getattr(ours, name).weight
    assert theirs.relative_attention_bias.weight.shape == bias.weight.shape
    bias.weight = theirs.relative_attention_bias.weight
    x = torch.randn(2, 9, 16)
    expected = theirs(x)[0]
    torch.testing.assert_close(ours(x, ours.project(x), bias(9, 9)), expected, rtol=1e-5, atol=1e-6)


def test_attention_dropout_shares_its_mask_over_the_queries():
    """Mesh-TF: the noise shape leaves out the query length."""
    q, k = torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 50, 2)
    read = attend(q, k, torch.randn(1, 1, 50, 2), None, SharedDropout(0.5))
    assert torch.equal(read, read[:, :, :1].expand_as(read))
