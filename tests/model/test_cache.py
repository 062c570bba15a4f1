"""The prefix cache: appended in order, rewound exactly, never silently short."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.model.cache import LayerCache, PrefixCache, bucket

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
    assert layer.buffers[0].shape[2] < 600


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
    # float32 in buffers of 256 columns: keys and values of 2 sliding layers, 2 × 16;
    # what a full layer keeps, 1 × 32, and cos and sin of its 4 pairs that turn
    assert cache.nbytes == 256 * 4 * (2 * 2 * 2 * 16 + 32 + 2 * 4)


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


def test_buckets_waste_little_and_are_few():
    found = [bucket(columns) for columns in range(40_000)]
    assert found[0] == 0 and found[1] == 256
    assert found == sorted(found)
    for columns, whole in enumerate(found):
        assert whole >= columns and whole % 256 == 0
        assert whole - columns < max(256, columns / 8)
        assert whole == bucket(whole)
    assert len(set(found)) < 50  # eight per doubling, below 2048 every 256
    assert [bucket(2**n + 1) - 2**n for n in (11, 12, 15)] == [256, 512, 4096]


def growth(do) -> int:
    """Bytes by which memory rises while `do` runs."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    do()
    return max(0, mx.get_peak_memory() - before)


def test_an_append_writes_in_place():
    layer = LayerCache(None, slack=4)
    layer.reserved = 8000
    keys, values = (mx.random.normal((1, 2, 10, 64)) for _ in range(2))
    mx.eval(keys, values)

    def append() -> None:
        layer.append(keys, values)
        mx.eval(layer.buffers)

    append()
    for _ in range(3):
        assert growth(append) < layer.buffers[0].nbytes / 8
    for buffer, part in zip(layer.buffers, (keys, values), strict=True):
        assert buffer.shape == (1, 2, 8192, 64)
        written = np.tile(np.array(part), (1, 1, 4, 1))
        np.testing.assert_array_equal(np.array(buffer)[:, :, :40], written)


def test_what_was_read_stays_as_it_was():
    """While a view lives, an append copies instead of writing under it."""
    layer = LayerCache(None, slack=4)
    layer.append(columns(0, 10))
    held = layer.read(room=3)
    layer.append(columns(10, 14))
    mx.eval(layer.buffers)
    assert np.array(held[0]).ravel().tolist() == [*range(10), 0, 0, 0]


def test_reserved_room_is_made_once(tiny_model):
    model, _ = tiny_model
    cache = model.make_cache()
    cache.reserve(600)
    assert cache.nbytes == 0
    _encode(model, cache, TOKENS[:5])
    # 768 columns in the full layer; sliding layers drop columns and need no more
    widths = [layer.buffers[0].shape[2] for layer in cache.layers]
    assert widths == [256, 256, 768]
    held = cache.nbytes
    for _ in range(5):
        _encode(model, cache, TOKENS)
    assert cache.length == 605
    assert cache.layers[2].buffers[0].shape[2] == 768 and cache.nbytes <= held
    for _ in range(2):
        _encode(model, cache, TOKENS)
    assert cache.layers[2].buffers[0].shape[2] == bucket(845)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """With a window that ends inside a bucket: 300 tokens."""
    return load(write_tiny(tmp_path_factory.mktemp("wide") / "m", sliding_window=300))


LONG = np.random.default_rng(4).integers(0, 32, 700).astype(np.int32)


def hidden_of(model, cache, bucketed: bool) -> np.ndarray:
    canvases = mx.array(LONG[: 16 * len(cache.lengths)].reshape(-1, 16))
    view = model.view(cache, 16, bucketed=bucketed)
    return np.array(model.denoise_hidden(canvases, view))


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 255, 256, 257, 298, 299, 300, 513])
@pytest.mark.parametrize("window", [8, 300])
def test_empty_columns_change_nothing(request, window, length):
    model, _ = request.getfixturevalue("tiny_model" if window == 8 else "wide_model")
    cache = model.make_cache()
    for start in range(0, length, 100):
        _encode(model, cache, LONG[start : min(start + 100, length)])
    exact = hidden_of(model, cache, False)
    np.testing.assert_allclose(hidden_of(model, cache, True), exact, atol=1e-5)


@pytest.mark.parametrize("lengths", [(3, 40), (256, 100), (5, 2), (290, 30, 257)])
@pytest.mark.parametrize("window", [8, 300])
def test_empty_columns_behind_ragged_rows_change_nothing(request, window, lengths):
    model, _ = request.getfixturevalue("tiny_model" if window == 8 else "wide_model")
    caches = [model.make_cache() for _ in lengths]
    for length, cache in zip(lengths, caches, strict=True):
        _encode(model, cache, LONG[-length:])
    joined = PrefixCache.join(model.config, caches)
    exact = hidden_of(model, joined, False)
    np.testing.assert_allclose(hidden_of(model, joined, True), exact, atol=1e-5)
    # a joined cache can be written to, and read with room again
    more = np.stack([LONG[i : i + 9] for i in range(len(lengths))])
    model.encode(mx.array(more), joined)
    exact = hidden_of(model, joined, False)
    np.testing.assert_allclose(hidden_of(model, joined, True), exact, atol=1e-5)


@pytest.mark.parametrize("window", [8, 300])
@pytest.mark.parametrize("bucketed", [False, True])
def test_a_rewound_prefix_hides_what_came_after(request, window, bucketed):
    """The columns behind it hold old keys: a canvas sees none of them."""
    model, _ = request.getfixturevalue("tiny_model" if window == 8 else "wide_model")
    cache = PrefixCache(model.config, slack=1000)
    _encode(model, cache, LONG[:600])
    for length in (310, 100, 6, 3):
        cache.rewind(length)
        fresh = model.make_cache()
        _encode(model, fresh, LONG[:length])
        np.testing.assert_allclose(
            hidden_of(model, cache, bucketed), hidden_of(model, fresh, False), atol=2e-5
        )


def test_shapes_change_once_per_bucket(wide_model):
    """Of what a compiled step sees: prefixes and masks."""
    model, _ = wide_model
    cache, shapes = model.make_cache(), []
    for start in range(0, 700, 20):
        _encode(model, cache, LONG[start : start + 20])
        view = model.view(cache, 16, bucketed=True)
        sizes = tree_map(
            lambda array: None if array is None else array.shape, view.arrays
        )
        shapes.append((cache.length, str(sizes)))
        (widest, *_), *_ = view.prefixes
        assert widest.shape[2] <= 299  # sliding layers have no room beyond a window
    changes = [
        length
        for (_, before), (length, after) in itertools.pairwise(shapes)
        if before != after
    ]
    # a new bucket, the window full, a new bucket
    assert changes == [260, 300, 520]


def test_shapes_of_joined_rows_have_room_too(tiny_model):
    model, _ = tiny_model
    caches = []
    for length in (40, 4):
        caches.append(model.make_cache())
        _encode(model, caches[-1], TOKENS[:length])
    view = model.view(PrefixCache.join(model.config, caches), 16, bucketed=True)
    assert [parts[0].shape[2] for parts in view.prefixes] == [7, 7, 256]
