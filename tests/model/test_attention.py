"""Masks and rotary tables are functions of integers: checked against their words."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.config import Rope
from mlx_dgemma.model.attention import canvas_mask, causal_mask, rope_tables, rotate
from mlx_dgemma.model.cache import Span


def _sees(query: int, key: int, start: int, window: int | None) -> bool:
    """One sentence of the architecture: causal, in the window, no padding."""
    near = window is None or query - key < window
    return key <= query and near and (key >= start or key == query)


@pytest.mark.parametrize("window", [None, 2, 3, 8])
@pytest.mark.parametrize("new", [1, 2, 5, 9])
@pytest.mark.parametrize("last", [9, 12, 30])
@pytest.mark.parametrize("starts", [(0,), (0, 3), (7, 0, 2)])
def test_causal_mask_says_who_sees_whom(window, new, last, starts):
    first = 0 if window is None else max(0, last - new - (window - 1))
    mask = causal_mask(new, Span(first, last, starts), window)
    queries, keys = range(last - new, last), range(first, last)
    wanted = np.array(
        [[[_sees(q, k, s, window) for k in keys] for q in queries] for s in starts]
    )
    if mask is None:
        found = np.ones_like(wanted)
    elif isinstance(mask, str):
        lower = np.tril(np.ones((new, len(keys)), bool), len(keys) - new)
        found = np.broadcast_to(lower, wanted.shape)
    else:
        found = np.broadcast_to(np.array(mask)[:, 0], wanted.shape)
    np.testing.assert_array_equal(found, wanted)
    assert found.any(axis=-1).all()  # an all-False row has no softmax


def test_no_mask_where_slicing_does_it():
    """Masks are what makes long prefills ask for memory: none without need."""
    assert causal_mask(5, Span(0, 5, (0,)), None) == "causal"
    assert causal_mask(5, Span(0, 8, (0, 0)), 8) == "causal"
    assert causal_mask(1, Span(22, 30, (0,)), 8) is None
    assert canvas_mask(16, Span(22, 30, (0, 9))) is None  # paddings out of sight


def test_canvas_sees_prefix_and_itself_but_no_padding():
    mask = canvas_mask(3, Span(2, 6, (0, 4)))
    assert mask is not None
    np.testing.assert_array_equal(
        np.array(mask)[:, 0, 0],
        [[True] * 7, [False, False, True, True, True, True, True]],
    )


def test_rope_turns_pairs_of_halves():
    rope = Rope(theta=10_000.0, rotated=4)
    tables = rope_tables(rope, 8, np.array([[0, 1, 7]]))
    x = mx.random.normal((1, 2, 3, 8), key=mx.random.key(0))
    turned = np.array(rotate(x, tables), np.float64)
    x = np.array(x, np.float64)
    for place, position in enumerate([0, 1, 7]):
        for pair in range(4):
            angle = position * 10_000 ** (-2 * pair / 8)
            left, right = x[0, :, place, pair], x[0, :, place, pair + 4]
            np.testing.assert_allclose(
                turned[0, :, place, pair],
                left * np.cos(angle) - right * np.sin(angle),
                atol=1e-6,
            )
            np.testing.assert_allclose(
                turned[0, :, place, pair + 4],
                right * np.cos(angle) + left * np.sin(angle),
                atol=1e-6,
            )


def test_proportional_rope_leaves_the_other_pairs_alone():
    tables = rope_tables(Rope(theta=1e6, rotated=2), 16, np.array([[5]]))
    x = mx.random.normal((1, 1, 1, 16), key=mx.random.key(1))
    turned = np.array(rotate(x, tables))
    still = [2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15]
    np.testing.assert_array_equal(turned[..., still], np.array(x)[..., still])
    assert (turned[..., [0, 1, 8, 9]] != np.array(x)[..., [0, 1, 8, 9]]).all()


def test_rope_factor_stretches_positions():
    near = rope_tables(Rope(theta=1e4, rotated=4), 8, np.array([[3]]))
    far = rope_tables(Rope(theta=1e4, rotated=4, factor=4.0), 8, np.array([[12]]))
    np.testing.assert_allclose(np.array(near[0]), np.array(far[0]), atol=1e-6)


def test_far_positions_keep_their_precision():
    """cos of an angle of 200,000 is right to float32, whatever the device."""
    tables = rope_tables(Rope(theta=1e4, rotated=1), 2, np.array([[200_000]]))
    assert abs(tables[0].item() - np.cos(200_000.0)) < 1e-6
