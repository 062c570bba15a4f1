"""The prefix cache: appended in order, rewound exactly, never silently short."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.model.cache import (
    MAX_SNAPSHOTS,
    LayerCache,
    PrefixCache,
    Snapshot,
    bucket,
    least_useful,
)

TOKENS = np.random.default_rng(11).integers(0, 32, 4000).astype(np.int32)


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """By window; one of 40 or 300 tokens ends inside a bucket."""
    folder = tmp_path_factory.mktemp("wide")
    return {8: tiny_model[0]} | {
        window: load(write_tiny(folder / str(window), sliding_window=window))[0]
        for window in (40, 300)
    }


def columns(start: int, end: int) -> mx.array:
    """(1, 1, columns, 1) that hold their own column number."""
    return mx.arange(start, end).astype(mx.float32).reshape(1, 1, -1, 1)


def encode(model, cache, tokens) -> None:
    model.encode(mx.array(np.asarray(tokens)[None]), cache)
    cache.evaluate()


def hidden_of(model, cache, bucketed: bool) -> np.ndarray:
    canvases = mx.array(TOKENS[: 16 * len(cache.lengths)].reshape(-1, 16))
    view = model.view(cache, 16, bucketed=bucketed)
    return np.array(model.denoise_hidden(canvases, view))


def bits(model, cache) -> list[np.ndarray]:
    """All that a canvas behind the prefix sees, and what it makes of it."""
    seen = [part for layer in cache.layers for part in layer.read()]
    seen += [part for parts in cache.history for part in parts]
    hidden = [hidden_of(model, cache, bucketed) for bucketed in (False, True)]
    return [*map(np.array, seen), *hidden]


def assert_same(model, cache, chunks) -> None:
    """The cache is, bit for bit, a new one that encoded these chunks."""
    fresh = model.make_cache()
    for chunk in chunks:
        encode(model, fresh, chunk)
    assert cache.length == fresh.length
    for mine, theirs in zip(bits(model, cache), bits(model, fresh), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def growth(do) -> int:
    """Bytes by which memory rises while `do` runs."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    do()
    return max(0, mx.get_peak_memory() - before)


@pytest.mark.parametrize("window", [None, 2, 33])
def test_columns_come_back_in_order(window):
    for sizes in ([1] * 60, [60], [3, 50, 1, 1, 5], [257, 9]):
        layer, column = LayerCache(window, slack=4), 0
        for size in sizes:
            seen = layer.visible_from(column)
            new = columns(column, column + size)
            keys, values = layer.append(new, new + 0.5)
            column += size
            found = np.array(keys).ravel()
            np.testing.assert_array_equal(found, np.arange(seen, column))
            np.testing.assert_array_equal(np.array(values - keys), 0.5)
            first = 0 if window is None else max(0, column - (window - 1))
            found = np.array(layer.read()[0]).ravel()
            np.testing.assert_array_equal(found, np.arange(first, column))


def test_buckets_waste_little_and_are_few():
    found = [bucket(columns) for columns in range(40_000)]
    assert found == sorted(found) and found[:2] == [0, 256]
    for columns, size in enumerate(found):
        assert 0 <= size - columns < max(256, columns / 8) and size % 256 == 0
    assert len(set(found)) < 50  # eight per doubling, below 2048 every 256


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
    mx.eval(layer.append(columns(10, 14)))
    assert np.array(held[0]).ravel().tolist() == [*range(10), 0, 0, 0]


def test_reserved_room_is_made_once(tiny_model):
    model, _ = tiny_model
    cache = model.make_cache()
    cache.reserve(600)
    assert cache.nbytes == 0
    encode(model, cache, TOKENS[:5])
    # 768 columns in the full layer; sliding layers drop columns and need no more
    assert [layer.buffers[0].shape[2] for layer in cache.layers] == [256, 256, 768]
    # float32: keys and values of 2 sliding layers, 2 × 16; what a full layer keeps,
    # 1 × 32, and cos and sin of its 4 pairs that turn
    size = 4 * (256 * 2 * 2 * 2 * 16 + 768 * (32 + 2 * 4))
    assert cache.nbytes == size
    for _ in range(5):
        encode(model, cache, TOKENS[:120])
    assert cache.length == 605 and cache.nbytes <= size
    for _ in range(2):
        encode(model, cache, TOKENS[:120])
    assert cache.layers[2].buffers[0].shape[2] == bucket(845)


ROWS = [(8, (0,)), (8, (6,)), (8, (7,)), (300, (257,)), (300, (299,)), (300, (513,))]


@pytest.mark.parametrize(
    ("window", "lengths"), [*ROWS, (8, (3, 40)), (300, (290, 30, 257))]
)
def test_empty_columns_change_nothing(models, window, lengths):
    model, caches = models[window], []
    for length in lengths:
        caches.append(model.make_cache())
        for start in range(0, length, 100):
            encode(model, caches[-1], TOKENS[start : min(start + 100, length)])
    cache = caches[0] if len(lengths) == 1 else PrefixCache.join(model.config, caches)
    exact = hidden_of(model, cache, False)
    np.testing.assert_allclose(hidden_of(model, cache, True), exact, atol=1e-5)
    # a joined cache can be written to, and read with room again
    more = np.stack([TOKENS[i : i + 9] for i in range(len(lengths))])
    model.encode(mx.array(more), cache)
    exact = hidden_of(model, cache, False)
    np.testing.assert_allclose(hidden_of(model, cache, True), exact, atol=1e-5)


def test_shapes_change_once_per_bucket(models):
    """Of what a compiled step sees: prefixes and masks."""
    model, shapes, changes = models[300], "", []
    cache = model.make_cache()
    for start in range(0, 700, 20):
        encode(model, cache, TOKENS[start : start + 20])
        view = model.view(cache, 16, bucketed=True)
        sizes = tree_map(lambda a: None if a is None else a.shape, view)
        before, shapes = shapes, str(sizes)
        if shapes != before:
            changes.append(cache.length)
        # sliding layers have no room beyond a window
        assert view.prefixes[0][0].shape[2] <= 299
    # a new bucket, the window full, a new bucket
    assert changes == [20, 260, 300, 520]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("encode"), st.integers(1, 30), st.booleans()),
        st.tuples(st.just("back"), st.integers(0, 9), st.just(False)),
    ),
    min_size=1,
    max_size=14,
)


@given(actions=ACTIONS, window=st.sampled_from([8, 40]), slack=st.integers(0, 20))
@settings(max_examples=12, deadline=None)
def test_rewinding_equals_a_new_cache(models, window, actions, slack):
    """Rewound to ends of chunks, as far as they can be reached, and encoded on."""
    model = models[window]
    cache, chunks, at = PrefixCache(model.config, slack=slack), [], 0
    for action, number, save in actions:
        if action == "encode":
            chunks.append(TOKENS[at : at + number])
            at += number
            encode(model, cache, chunks[-1])
            if save:
                cache.save_snapshot()
            continue
        ends = np.cumsum([0, *map(len, chunks)]).tolist()
        left = [i for i, end in enumerate(ends) if cache.can_rewind_to(end)]
        chunks = chunks[: left[number % len(left)]]
        cache.rewind(sum(map(len, chunks)))
        at += 7  # other tokens follow
    assert len(cache.snapshots) <= MAX_SNAPSHOTS
    if chunks:
        assert_same(model, cache, chunks)


def test_another_thread_may_go_on_from_a_snapshot(models):
    """Unevaluated, what was put back would belong to the thread that did it."""
    model = models[8]
    cache = model.make_cache()
    encode(model, cache, TOKENS[:100])
    cache.save_snapshot()
    encode(model, cache, TOKENS[100:400])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cache.rewind, 100).result()
    assert_same(model, cache, [TOKENS[:100]])


def test_rows_of_unlike_length_go_back_together(models):
    model, caches = models[8], []
    for length in (60, 30):
        caches.append(model.make_cache())
        encode(model, caches[-1], TOKENS[:length])
    joined = PrefixCache.join(model.config, caches)
    joined.save_snapshot()
    before = hidden_of(model, joined, False)
    model.encode(mx.array(TOKENS[:400].reshape(2, 200)), joined)
    joined.rewind(60)
    assert joined.lengths == (60, 30)
    np.testing.assert_array_equal(hidden_of(model, joined, False), before)


def test_few_snapshots_are_kept_however_many_are_made(models):
    model = models[8]
    cache = model.make_cache()
    for start in range(0, 1800, 60):
        encode(model, cache, TOKENS[start : start + 60])
        cache.save_snapshot()
    columns = [s.column for s in cache.snapshots]
    assert len(columns) == MAX_SNAPSHOTS and columns[-1] == 1800
    # keys and values, 2 heads of 16, in float32, of 7 columns of 2 sliding layers
    size = MAX_SNAPSHOTS * 2 * 2 * 2 * 16 * 4 * 7
    assert sum(s.nbytes for s in cache.snapshots) == size
    cache.snapshots, before = [], cache.nbytes
    assert before - cache.nbytes == size


def test_a_snapshot_holds_no_buffer(tmp_path):
    """An append behind it is in place: buffers, here 4 MB a part, are not copied."""
    model, _ = load(write_tiny(tmp_path / "m", sliding_window=8))
    cache = PrefixCache(model.config, slack=30_000)
    for layer in cache.layers:
        layer.reserved = 32_768
    encode(model, cache, TOKENS[:100])
    cache.save_snapshot()
    assert cache.nbytes > 20e6
    assert growth(lambda: encode(model, cache, TOKENS[100:120])) < 1e6
    assert growth(cache.save_snapshot) < 1e5
    assert growth(lambda: cache.rewind(100)) < 1e5
    assert growth(lambda: encode(model, cache, TOKENS[100:120])) < 1e6


@pytest.mark.parametrize("window", [8, 40])
def test_a_cache_resumes_where_another_was(models, window):
    model, chunks = models[window], []
    cache, other = model.make_cache(), model.make_cache()
    for start in range(0, 360, 60):
        chunks.append(TOKENS[start : start + 60])
        encode(model, cache, chunks[-1])
        cache.save_snapshot()
    other.resume(cache.history, [*cache.snapshots[:-1], cache.snapshot()])
    ends = [snapshot.column for snapshot in other.snapshots]
    assert ends == [snapshot.column for snapshot in cache.snapshots]
    assert_same(model, other, chunks)
    for column in reversed(ends):
        other.rewind(column)
        assert_same(model, other, chunks[: column // 60])


def test_rewinding_out_of_reach_is_refused(models):
    model = models[8]
    cache = PrefixCache(model.config, slack=0)
    for start in (0, 100):
        encode(model, cache, TOKENS[start : start + 100])
        cache.save_snapshot()
        cache.save_snapshot()
    cache.rewind(100)  # what follows is another text: the later snapshot is gone
    assert [s.column for s in cache.snapshots] == [100]
    for start in (300, 400):
        encode(model, cache, TOKENS[start : start + 100])
    for length in (200, 301):
        message = f"to {length} tokens: possible from 300 to 300, 100"
        with pytest.raises(ValueError, match=message):
            cache.rewind(length)
    assert cache.length == 300
    cache.rewind(0)
    assert cache.length == 0 and not cache.snapshots
    model.encode(mx.array(TOKENS[:18].reshape(2, 9)), cache)
    assert cache.lengths == (9, 9)


def test_the_least_useful_snapshot_is_dropped():
    def left(columns) -> list[int]:
        snapshots: list[Snapshot] = []
        for column in columns:
            snapshots.append(Snapshot(column, {}))
            if len(snapshots) > MAX_SNAPSHOTS:
                snapshots.remove(least_useful(snapshots))
        return [snapshot.column for snapshot in snapshots]

    for count in range(6, 60):  # the last two stay
        columns = left(range(100, 100 * count + 1, 100))
        assert columns[-1] == 100 * count and columns[-2] >= 100 * (count - 2)
    # a long beginning is worth more than the small steps behind it
    assert left([5000, *range(5010, 5100, 10)])[0] == 5000
