"""Packing: what goes into which row, under which segment id, and what is left out."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from switchworks.data.rows.packing import SHORTEST_PIECE, cut_into_pieces, pack
from switchworks.data.rows.span_corruption import SpanCorruption

T5 = SpanCorruption(
    noise_density=0.15, mean_span=3.0, sentinels=tuple(range(1099, 999, -1)), eos_id=1
)


def _piece(inputs: int, targets: int, value: int = 7) -> tuple[np.ndarray, np.ndarray]:
    return np.full(inputs, value), np.full(targets, value)


def test_two_pieces_share_a_row_under_segments_1_and_2() -> None:
    packed = pack([[_piece(3, 2, 7), _piece(2, 1, 8)], [_piece(1, 1, 9)]], 6, 4)
    assert packed.inputs.tolist() == [[7, 7, 7, 8, 8, 0], [9, 0, 0, 0, 0, 0]]
    assert packed.targets.tolist() == [[7, 7, 8, 0], [9, 0, 0, 0]]
    assert packed.input_segments is not None
    assert packed.target_segments is not None
    assert packed.input_segments.tolist() == [[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]]
    assert packed.target_segments.tolist() == [[1, 1, 2, 0], [1, 0, 0, 0]]


def test_rows_of_one_piece_need_no_segments() -> None:
    padded = pack([[_piece(3, 2)], [_piece(1, 1)]], 3, 2, segments=False)
    assert padded.inputs.tolist() == [[7, 7, 7], [7, 0, 0]]
    assert padded.input_segments is None


def test_pieces_of_a_window_end_where_documents_end() -> None:
    assert cut_into_pieces([100, 120, 150], T5, 64, 32) == [(100, 120), (120, 150)]


def test_pieces_under_four_tokens_are_left_out() -> None:
    assert SHORTEST_PIECE == 4
    assert cut_into_pieces([0, 3, 20, 24], T5, 64, 32) == [(3, 20), (20, 24)]


def test_the_first_piece_without_room_is_cut_and_the_rest_is_left_out() -> None:
    # 20 tokens become 19 inputs (3 hidden, 1 sentinel, EOS), which leaves 11: 11 tokens' worth.
    assert T5.lengths(20)[0] == 19
    assert T5.lengths(11)[0] == 11
    assert T5.lengths(12)[0] == 12
    assert cut_into_pieces([0, 20, 60, 65], T5, 30, 32) == [(0, 20), (20, 31)]


def test_a_window_of_scraps_only_is_kept_as_one_piece() -> None:
    assert cut_into_pieces([0, 3, 5, 8], T5, 64, 32) == [(0, 8)]


@given(
    st.lists(st.integers(1, 40), min_size=4, max_size=30), st.integers(8, 128), st.integers(6, 64)
)
def test_the_pieces_of_a_window_always_fit_one_row(
    sizes: list[int], input_length: int, target_length: int
) -> None:
    bounds = [0, *np.cumsum(sizes).tolist()]
    pieces = cut_into_pieces(bounds, T5, input_length, target_length)
    rng = np.random.default_rng(0)
    pairs = [
        _piece(*T5.lengths(stop - start), value=int(rng.integers(9))) for start, stop in pieces
    ]
    assert pack([pairs], input_length, target_length).inputs.shape == (1, input_length)
