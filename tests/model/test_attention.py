"""Masks and rope tables are functions of integers: checked against their words."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from mlx_dgemma import backends, load
from mlx_dgemma.checkpoint.config import Rope
from mlx_dgemma.model import attention, language
from mlx_dgemma.model.attention import (
    CausalView,
    canvas_mask,
    causal_tiles,
    rope_tables,
    rotate,
    tile_size,
)
from mlx_dgemma.model.cache import LayerCache, PrefixCache, Span


@pytest.mark.parametrize(("width", "rotated"), [(8, 4), (16, 2)])
def test_rope_rotates_the_first_pairs_of_halves(width, rotated):
    """As complex numbers; the other pairs are left alone."""
    places, half = [0, 1, 7], width // 2
    tables = rope_tables(Rope(theta=1e4, rotated=rotated), width, np.array([places]))
    x = mx.random.normal((1, 2, 3, width), key=mx.random.key(0))
    found, x = (np.array(a, np.float64) for a in (rotate(x, tables), x))
    angles = np.outer(places, 1e4 ** (-2 * np.arange(half) / width))
    angles[:, rotated:] = 0
    wanted = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    np.testing.assert_allclose(found[..., :half], wanted.real, atol=1e-6)
    np.testing.assert_allclose(found[..., half:], wanted.imag, atol=1e-6)


def test_far_positions_keep_their_precision():
    tables = rope_tables(Rope(theta=1e4, rotated=1), 2, np.array([[200_000]]))
    assert abs(tables[0].item() - np.cos(200_000.0)) < 1e-6
    rope = Rope(theta=1e4, rotated=1, factor=4.0)
    assert rope_tables(rope, 2, np.array([[800_000]]))[0].item() == tables[0].item()


def allowed(mask: mx.array | str | None, shape: tuple[int, ...]) -> np.ndarray:
    """A mask spelled out for (rows, queries, keys)."""
    if mask is None:
        return np.ones(shape, bool)
    if isinstance(mask, str):
        lower = np.tril(np.ones(shape[1:], bool), shape[2] - shape[1])
        return np.broadcast_to(lower, shape)
    return np.broadcast_to(np.array(mask)[:, 0], shape)


@given(
    window=st.sampled_from([None, 1, 2, 8]),
    size=st.integers(1, 20),
    before=st.integers(0, 30),
    runs=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    images=st.sampled_from([None, 0, 1]),
    starts=st.lists(st.integers(0, 35), min_size=1, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_tiles_see_what_their_queries_should(
    window, size, before, runs, images, starts
):
    """Every query is in one tile and sees what is in front of it within its window,
    no padding, and all of the image it belongs to: every second run of a single row."""
    ends = (before + np.cumsum(runs)).tolist()
    last, blocks = ends[-1], []
    if images is not None:
        starts = [0]
        blocks = list(zip([before, *ends], ends, strict=False))[images::2]
    starts, new = [min(start, before) for start in starts], last - before
    first = 0 if window is None else max(0, before - (window - 1))
    span, queries = Span(first, last, tuple(starts)), []
    seen = np.zeros((len(starts), new, last), bool)
    for tile in causal_tiles(new, span, window, size, tuple(blocks)):
        begin, end = tile.queries.start, tile.queries.stop
        keys = slice(first + tile.keys.start, first + tile.keys.stop)
        assert 0 < end - begin <= size
        if not blocks:  # no keys that none of its queries needs
            reach = first if window is None else max(first, before + begin - window + 1)
            assert (keys.start, keys.stop) == (reach, before + end)
        if max(starts) <= keys.start and (window is None or window > last - first):
            assert not isinstance(tile.mask, mx.array)  # slicing the keys does it
        queries += range(begin, end)
        shape = len(starts), end - begin, keys.stop - keys.start
        seen[:, begin:end, keys] = allowed(tile.mask, shape)
    assert queries == list(range(new))
    image_of = {c: i for i, (f, e) in enumerate(blocks) for c in range(f, e)}
    for row, query, key in np.ndindex(*seen.shape):
        at = before + query
        near = key <= at and (window is None or at - key < window)
        same = key == at or (at in image_of and image_of.get(key) == image_of[at])
        assert seen[row, query, key] == ((near and key >= starts[row]) or same)


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
    monkeypatch.setattr(language, "tile_size", lambda *a: 1 << 40)
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
        tiles = causal_tiles(
            tokens, Span(0, tokens, (0,)), None, tile_size(1, 4, tokens)
        )
        view = CausalView(rope, rope, tiles)
        y = layer.encode(x, LayerCache(None, 0), view)
    mx.eval(y)
    scores = 4 * tokens * tokens * 4  # of 4 heads, in float32
    # a few tiles of 1/64 are in flight, each as scores, exponents and weights
    assert mx.get_peak_memory() - before < scores / 4
