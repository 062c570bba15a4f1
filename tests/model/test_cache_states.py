"""Marks: going back further than sliding layers remember, and what that costs."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.model.cache import MARKS, PrefixCache, Snapshot, least_useful

TOKENS = np.random.default_rng(11).integers(0, 32, 4000).astype(np.int32)
CANVAS = mx.array(TOKENS[:16].reshape(1, 16))


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """By window: the tiny model, and one whose window ends inside a bucket."""
    folder = tmp_path_factory.mktemp("wide") / "m"
    return {8: tiny_model[0], 40: load(write_tiny(folder, sliding_window=40))[0]}


def encode(model, cache, tokens) -> None:
    model.encode(mx.array(np.asarray(tokens)[None]), cache)
    cache.evaluate()


def bits(model, cache) -> list[np.ndarray]:
    """All that a canvas behind the prefix sees, and what it makes of it."""
    seen = [part for layer in cache.layers for part in layer.read()]
    seen += [part for parts in cache.history for part in parts]
    views = [model.view(cache, 16, bucketed=bucketed) for bucketed in (False, True)]
    seen += [model.denoise_hidden(CANVAS, view) for view in views]
    return [np.array(part) for part in seen]


def assert_same(model, cache, chunks) -> None:
    """The cache is, bit for bit, a new one that encoded these chunks."""
    fresh = model.make_cache()
    for chunk in chunks:
        encode(model, fresh, chunk)
    assert cache.length == fresh.length
    for mine, theirs in zip(bits(model, cache), bits(model, fresh), strict=True):
        np.testing.assert_array_equal(mine, theirs)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("encode"), st.integers(1, 30), st.booleans()),
        st.tuples(st.just("back"), st.integers(0, 9), st.just(False)),
    ),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("window", [8, 40])
@given(actions=ACTIONS, slack=st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_coming_and_going_equals_a_new_cache(models, window, actions, slack):
    """Rewound to ends of chunks, as far as they can be reached, and encoded on."""
    model = models[window]
    cache, chunks, at = PrefixCache(model.config, slack=slack), [], 0
    for action, number, marked in actions:
        if action == "encode":
            chunks.append(TOKENS[at : at + number])
            at += number
            encode(model, cache, chunks[-1])
            if marked:
                cache.mark()
            continue
        ends = np.cumsum([0, *map(len, chunks)]).tolist()
        left = [i for i, end in enumerate(ends) if cache.reaches(end)]
        chunks = chunks[: left[number % len(left)]]
        cache.rewind(sum(map(len, chunks)))
        at += 7  # other tokens follow
    assert len(cache.marks) <= MARKS
    if chunks:
        assert_same(model, cache, chunks)


@pytest.mark.parametrize("window", [8, 40])
def test_a_mark_can_be_gone_back_to_again_and_again(models, window):
    model = models[window]
    cache = model.make_cache()
    encode(model, cache, TOKENS[:100])
    cache.mark()
    for round in range(3):
        for start in range(100, 1000, 300):
            encode(model, cache, TOKENS[start + round : start + round + 300])
        assert not any(layer.keep and layer.first == 0 for layer in cache.layers)
        cache.rewind(100)
        assert_same(model, cache, [TOKENS[:100]])
    encode(model, cache, TOKENS[500:509])
    assert_same(model, cache, [TOKENS[:100], TOKENS[500:509]])


def test_a_mark_nobody_can_have_come_from_is_gone(models):
    """What follows a rewind is another text: its marks are not the old ones."""
    model = models[8]
    cache = PrefixCache(model.config, slack=0)
    for start in (0, 100):
        encode(model, cache, TOKENS[start : start + 100])
        cache.mark()
    cache.rewind(100)
    assert [mark.column for mark in cache.marks] == [100]
    for start in (300, 400):
        encode(model, cache, TOKENS[start : start + 100])
    assert not cache.reaches(200)
    with pytest.raises(
        ValueError, match="to 200 tokens: possible from 300 to 300, 100"
    ):
        cache.rewind(200)
    assert cache.length == 300


def test_nothing_can_always_be_gone_back_to(models):
    model = models[8]
    cache = model.make_cache()
    encode(model, cache, TOKENS[:500])
    cache.rewind(0)
    assert cache.length == 0 and not cache.marks
    encode(model, cache, TOKENS[7:40])
    assert_same(model, cache, [TOKENS[7:40]])


def test_another_thread_may_go_on_from_a_mark(models):
    """Unevaluated, what was put back would belong to the thread that did it."""
    model = models[8]
    cache = model.make_cache()
    encode(model, cache, TOKENS[:100])
    cache.mark()
    encode(model, cache, TOKENS[100:400])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cache.rewind, 100).result()
    assert_same(model, cache, [TOKENS[:100]])


def test_the_same_place_is_marked_once(models):
    model = models[8]
    cache = model.make_cache()
    cache.mark()
    encode(model, cache, TOKENS[:50])
    cache.mark()
    cache.mark()
    assert [mark.column for mark in cache.marks] == [50]


def test_rows_of_unlike_length_go_back_together(models):
    model = models[8]
    caches = []
    for length in (60, 30):
        caches.append(model.make_cache())
        encode(model, caches[-1], TOKENS[:length])
    joined = PrefixCache.join(model.config, caches)
    joined.mark()
    before = np.array(model.denoise(mx.concatenate([CANVAS, CANVAS]), joined))
    model.encode(mx.array(TOKENS[:400].reshape(2, 200)), joined)
    joined.rewind(60)
    assert joined.lengths == (60, 30)
    after = np.array(model.denoise(mx.concatenate([CANVAS, CANVAS]), joined))
    np.testing.assert_array_equal(after, before)


def test_few_marks_are_kept_however_many_are_made(models):
    model = models[8]
    cache, sizes = model.make_cache(), []
    for start in range(0, 3000, 60):
        encode(model, cache, TOKENS[start : start + 60])
        cache.mark()
        sizes.append(sum(mark.nbytes for mark in cache.marks))
    columns = [mark.column for mark in cache.marks]
    assert len(columns) == MARKS and columns[-1] == 3000
    # keys and values, 2 heads of 16, in float32, of 7 columns of 2 sliding layers
    assert sizes[-1] == max(sizes) == MARKS * 2 * 2 * 2 * 16 * 4 * 7
    held = sum(b.nbytes for entry in cache._entries for b in entry.buffers)
    assert cache.nbytes == held + sizes[-1]


def marks_after(columns) -> list[int]:
    marks: list[Snapshot] = []
    for column in columns:
        marks.append(Snapshot(column, {}))
        if len(marks) > MARKS:
            marks.remove(least_useful(marks))
    return [mark.column for mark in marks]


def test_the_newest_marks_stay_and_old_ones_thin_out():
    for key_rope in range(6, 60):
        kept = marks_after(range(100, 100 * key_rope + 1, 100))
        assert kept == sorted(kept) and kept[-1] == 100 * key_rope
        assert kept[-2] >= 100 * (key_rope - 2)
    # a long beginning is worth more than the small steps behind it
    assert marks_after([5000, *range(5010, 5100, 10)])[0] == 5000


def growth(do) -> int:
    """Bytes by which memory rises while `do` runs."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    do()
    return max(0, mx.get_peak_memory() - before)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_mark_holds_no_buffer(tmp_path, heads):
    """An append behind it is in place: buffers, here 4 MB a part, are not copied."""
    folder = write_tiny(tmp_path / "m", num_key_value_heads=heads, sliding_window=8)
    model, _ = load(folder)
    cache = PrefixCache(model.config, slack=60_000 // heads)
    for layer in cache.layers:
        layer.reserved = 65_536 // heads
    encode(model, cache, TOKENS[:100])
    cache.mark()
    assert cache.nbytes > 20e6
    assert growth(lambda: encode(model, cache, TOKENS[100:120])) < 1e6
    assert growth(cache.mark) < 1e5
    assert growth(lambda: cache.rewind(100)) < 1e5
    assert growth(lambda: encode(model, cache, TOKENS[100:120])) < 1e6


def test_a_cache_resumes_where_another_was(models):
    for model in models.values():
        cache, chunks = model.make_cache(), []
        for start in range(0, 360, 60):
            chunks.append(TOKENS[start : start + 60])
            encode(model, cache, chunks[-1])
            cache.mark()
        other = model.make_cache()
        other.resume(cache.history, [*cache.marks[:-1], cache.here()])
        assert [m.column for m in other.marks] == [m.column for m in cache.marks]
        assert_same(model, other, chunks)
        for column in [mark.column for mark in other.marks][::-1]:
            other.rewind(column)
            assert_same(model, other, chunks[: column // 60])
