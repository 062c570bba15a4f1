"""The prefix cache: appended in order, rewound exactly, never silently short."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.model.cache import LayerCache, PrefixCache

RNG = np.random.default_rng(3)
TOKENS = RNG.integers(0, 32, 120).astype(np.int32)
CANVAS = mx.array(RNG.integers(0, 32, (1, 16)).astype(np.int32))


def columns(start: int, end: int) -> mx.array:
    """(1, 1, columns, 1) that hold their own column number."""
    return mx.arange(start, end).astype(mx.float32).reshape(1, 1, -1, 1)


@pytest.mark.parametrize("sizes", [[1] * 60, [7] * 9, [60], [3, 50, 1, 1, 5], [257, 9]])
@pytest.mark.parametrize("window", [None, 2, 8, 33])
def test_columns_come_back_in_order(sizes, window):
    layer = LayerCache(window, slack=4)
    column = 0
    for size in sizes:
        seen = layer.visible_from(column)
        keys, values = layer.append(
            columns(column, column + size), columns(column, column + size) + 0.5
        )
        column += size
        np.testing.assert_array_equal(np.array(keys).ravel(), np.arange(seen, column))
        np.testing.assert_array_equal(np.array(values - keys), 0.5)
        read = layer.read()
        assert read is not None
        first = 0 if window is None else max(0, column - (window - 1))
        np.testing.assert_array_equal(
            np.array(read[0]).ravel(), np.arange(first, column)
        )


def test_a_sliding_layer_stays_small():
    layer = LayerCache(8, slack=4)
    for column in range(3000):
        layer.append(columns(column, column + 1), columns(column, column + 1))
    assert layer.keys.shape[2] < 600


def _encode(model, cache, tokens):
    model.encode(mx.array(tokens[None]), cache)


@pytest.mark.parametrize("length", [100, 95, 84])
def test_rewinding_is_as_if_nothing_had_come_after(tiny_model, length):
    model, _ = tiny_model
    cache = model.make_cache()
    for start in range(0, 100, 20):
        _encode(model, cache, TOKENS[start : start + 20])
    cache.rewind(length)
    assert cache.length == length
    _encode(model, cache, TOKENS[100:])
    fresh = model.make_cache()
    _encode(model, fresh, np.concatenate([TOKENS[:length], TOKENS[100:]]))
    np.testing.assert_allclose(
        np.array(model.denoise(CANVAS, cache)),
        np.array(model.denoise(CANVAS, fresh)),
        atol=2e-5,
    )


def test_a_canvas_can_always_be_rewound(tiny_model):
    model, _ = tiny_model
    cache = model.make_cache()
    for token in TOKENS:
        _encode(model, cache, token[None])
        if cache.length > 16:
            earliest = max(layer.earliest for layer in cache.layers)
            assert earliest <= cache.length - 16


def test_rewinding_too_far_is_refused(tiny_model):
    model, _ = tiny_model
    cache = model.make_cache()
    _encode(model, cache, TOKENS)
    with pytest.raises(ValueError, match="cannot rewind to 5 tokens"):
        cache.rewind(5)
    with pytest.raises(ValueError, match="cannot rewind to 121 tokens"):
        cache.rewind(121)
    assert cache.length == 120


def test_rewinding_to_nothing_starts_anew(tiny_model):
    model, _ = tiny_model
    cache = model.make_cache()
    _encode(model, cache, TOKENS[:5])
    cache.rewind(0)
    model.encode(mx.array(np.stack([TOKENS[:9], TOKENS[9:18]])), cache)
    assert cache.lengths == (9, 9)


def test_rows_must_match(tiny_model):
    model, _ = tiny_model
    cache = model.make_cache()
    _encode(model, cache, TOKENS[:5])
    with pytest.raises(ValueError, match="2 rows of tokens for 1 prefixes"):
        model.encode(mx.array(np.stack([TOKENS[:9], TOKENS[9:18]])), cache)


def test_bytes_are_counted(tiny_model):
    model, _ = tiny_model
    cache = model.make_cache()
    assert cache.nbytes == 0
    _encode(model, cache, TOKENS[:10])
    # 2 sliding layers of 2 × 16 and one full layer of 1 × 32, keys and values, float32
    # in buffers of 256 columns
    assert cache.nbytes == 256 * 4 * 2 * (2 * 2 * 16 + 32)


def test_joining_changes_nothing(tiny_model):
    model, _ = tiny_model
    caches = []
    for length in (30, 4):
        caches.append(model.make_cache())
        _encode(model, caches[-1], TOKENS[:length])
    before = np.array(model.denoise(CANVAS, caches[1]))
    joined = PrefixCache.join(model.config, caches)
    assert joined.lengths == (30, 4)
    model.encode(mx.array(np.stack([TOKENS[:3], TOKENS[3:6]])), joined)
    assert joined.lengths == (33, 7)
    assert caches[0].length == 30
    np.testing.assert_array_equal(np.array(model.denoise(CANVAS, caches[1])), before)
