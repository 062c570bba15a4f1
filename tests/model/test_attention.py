"""Masks and rope tables are functions of integers: checked against their words."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from mlx_dgemma import backends, load
from mlx_dgemma.checkpoint.config import Rope
from mlx_dgemma.model import attention
from mlx_dgemma.model.attention import (
    CausalView,
    Tile,
    canvas_mask,
    causal_mask,
    causal_tiles,
    rope_tables,
    rotate,
)
from mlx_dgemma.model.cache import LayerCache, PrefixCache, Span


def _sees(query: int, key: int, start: int, window: int | None) -> bool:
    """One sentence of the architecture: causal, in the window, no padding."""
    near = window is None or query - key < window
    return key <= query and near and (key >= start or key == query)


def _allowed(mask: mx.array | str | None, shape: tuple[int, ...]) -> np.ndarray:
    """What `causal_mask` rerotated, spelled out for (rows, queries, keys)."""
    if mask is None:
        return np.ones(shape, bool)
    if isinstance(mask, str):
        lower = np.tril(np.ones(shape[1:], bool), shape[2] - shape[1])
        return np.broadcast_to(lower, shape)
    return np.broadcast_to(np.array(mask)[:, 0], shape)


@given(
    window=st.sampled_from([None, 2, 3, 8]),
    new=st.integers(1, 9),
    last=st.integers(9, 30),
    starts=st.sampled_from([(0,), (0, 3), (7, 0, 2)]),
)
@settings(max_examples=60, deadline=None)
def test_causal_mask_says_who_sees_whom(window, new, last, starts):
    first = 0 if window is None else max(0, last - new - (window - 1))
    mask = causal_mask(new, Span(first, last, starts), window)
    queries, keys = range(last - new, last), range(first, last)
    wanted = np.array(
        [[[_sees(q, k, s, window) for k in keys] for q in queries] for s in starts]
    )
    found = _allowed(mask, wanted.shape)
    np.testing.assert_array_equal(found, wanted)
    assert found.any(axis=-1).all()  # an all-False row has no softmax
    if starts == (0,) and (window is None or last - first <= window):
        assert not isinstance(mask, mx.array)  # slicing the keys does it


def test_rope_rotates_pairs_of_halves():
    rope = Rope(theta=10_000.0, rotated=4)
    tables = rope_tables(rope, 8, np.array([[0, 1, 7]]))
    x = mx.random.normal((1, 2, 3, 8), key=mx.random.key(0))
    rotated = np.array(rotate(x, tables), np.float64)
    x = np.array(x, np.float64)
    for place, position in enumerate([0, 1, 7]):
        for pair in range(4):
            angle = position * 10_000 ** (-2 * pair / 8)
            left, right = x[0, :, place, pair], x[0, :, place, pair + 4]
            wanted = left * np.cos(angle) - right * np.sin(angle)
            np.testing.assert_allclose(rotated[0, :, place, pair], wanted, atol=1e-6)
            wanted = right * np.cos(angle) + left * np.sin(angle)
            found = rotated[0, :, place, pair + 4]
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_proportional_rope_leaves_the_other_pairs_alone():
    tables = rope_tables(Rope(theta=1e6, rotated=2), 16, np.array([[5]]))
    x = mx.random.normal((1, 1, 1, 16), key=mx.random.key(1))
    rotated = np.array(rotate(x, tables))
    still = [2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15]
    np.testing.assert_array_equal(rotated[..., still], np.array(x)[..., still])
    assert (rotated[..., [0, 1, 8, 9]] != np.array(x)[..., [0, 1, 8, 9]]).all()


def test_far_positions_keep_their_precision():
    tables = rope_tables(Rope(theta=1e4, rotated=1), 2, np.array([[200_000]]))
    assert abs(tables[0].item() - np.cos(200_000.0)) < 1e-6
    stretched = rope_tables(
        Rope(theta=1e4, rotated=1, factor=4.0), 2, np.array([[800_000]])
    )
    assert stretched[0].item() == tables[0].item()


@given(
    window=st.sampled_from([None, 1, 2, 8]),
    most=st.integers(1, 20),
    new=st.integers(1, 40),
    before=st.integers(0, 30),
    starts=st.lists(st.integers(0, 35), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_tiles_see_together_what_all_queries_see(window, most, new, before, starts):
    """Every query is in one tile, with its keys and none that no query there needs."""
    last = before + new
    first = 0 if window is None else max(0, before - (window - 1))
    span = Span(first, last, tuple(min(start, before) for start in starts))
    seen = np.zeros((len(starts), new, last), bool)
    queries = []
    for begin, end, tile, _ in causal_tiles(new, span, window, most):
        assert 0 < end - begin <= most
        assert tile.row_starts == span.row_starts
        assert first <= tile.begin and tile.end == before + end
        # the tile's first key is the first that its first query may see
        assert tile.begin == (
            first if window is None else max(first, before + begin - window + 1)
        )
        queries += range(begin, end)
        seen[:, begin:end, tile.begin : tile.end] = _allowed(
            causal_mask(end - begin, tile, window),
            (len(starts), end - begin, tile.end - tile.begin),
        )
    assert queries == list(range(new))
    wanted = [
        [[_sees(before + q, k, start, window) for k in range(last)] for q in range(new)]
        for start in span.row_starts
    ]
    np.testing.assert_array_equal(seen, wanted)


@pytest.mark.parametrize(
    ("room", "starts"), [(0, (0,)), (0, (2, 2)), (0, (0, 4)), (1, (0,)), (5, (3, 0, 6))]
)
def test_a_canvas_sees_no_room_behind_the_prefix(room, starts):
    """Keys lie in the order: padding, prefix, empty columns, canvas."""
    mask = canvas_mask(3, Span(2, 6, starts), room)
    wanted = [
        [max(start - 2, 0) <= key < 4 or 4 + room <= key for key in range(4 + room + 3)]
        for start in starts
    ]
    if mask is None:
        assert np.all(wanted)
        return
    assert mask.shape == (len(starts), 1, 1, 4 + room + 3)
    assert not np.all(wanted)
    np.testing.assert_array_equal(np.array(mask)[:, 0, 0], wanted)


@pytest.mark.parametrize(("window", "lengths"), [(8, [5, 70, 33]), (40, [70, 3])])
def test_the_smallest_tiles_change_nothing(
    tmp_path, monkeypatch, tuned, window, lengths
):
    """Prefixes beyond the window, ragged rows, several tiles in both modes."""
    model, _ = load(write_tiny(tmp_path / "m", sliding_window=window))
    rng = np.random.default_rng(9)
    prompts = [rng.integers(0, 32, (1, n)).astype(np.int32) for n in lengths]
    more, canvas = (
        mx.array(rng.integers(0, 32, (len(lengths), 50)).astype(np.int32))
        for _ in range(2)
    )

    def results() -> list[np.ndarray]:
        caches = [model.make_cache() for _ in lengths]
        for prompt, cache in zip(prompts, caches, strict=True):
            model.encode(mx.array(prompt), cache)
        joined = PrefixCache.join(model.config, caches)
        hidden = model.encode_hidden(more, joined)  # 50 queries, padding in front
        return [np.array(hidden), np.array(model.denoise(canvas, joined))]

    counts = []
    device = backends.current()
    attend = device.attend
    monkeypatch.setattr(
        device, "attend", lambda q, *a: counts.append(q.shape[2]) or attend(q, *a)
    )
    tuned(score_bytes=1)
    tiled = results()
    assert max(counts) == attention.MIN_TILE
    counts.clear()
    tuned(score_bytes=1 << 40)
    monkeypatch.setattr(
        attention,
        "causal_tiles",
        lambda new, span, window, most, blocks: [Tile(0, new, span)],
    )
    whole = results()
    assert set(counts) == {50, *lengths}
    for ours, wanted in zip(tiled, whole, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5)


@pytest.mark.parametrize("mode", ["encode", "denoise"])
def test_tiles_do_not_live_side_by_side(tiny_model, tuned, mode):
    model, _ = tiny_model
    layer, tokens = model.layers[-1].self_attn, 2048
    tuned(score_bytes=1 << 20)
    x = mx.random.normal((1, tokens, 64), key=mx.random.key(2))
    rope = rope_tables(Rope(theta=1e6, rotated=4), 32, np.arange(tokens)[None])
    mx.eval(x, rope)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    if mode == "denoise":
        y = layer.denoise(x, (), rope, rope, None)
    else:
        mask_of = partial(causal_mask, window=None)
        view = CausalView(rope, rope, Span(0, tokens, (0,)), mask_of)
        y = layer.encode(x, LayerCache(None, 0), view)
    mx.eval(y)
    scores = 4 * tokens * tokens * 4  # of 4 heads, in float32
    # a few tiles of 1/64 are in flight, each as scores, exponents and weights
    assert mx.get_peak_memory() - before < scores / 4
