"""The sampler's functions against their definitions, in float64 numpy."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.diffusion import sampler

RNG = np.random.default_rng(5)


@given(
    entropies=st.lists(st.floats(0, 3, width=32), min_size=1, max_size=40),
    bound=st.floats(0.0625, 5, width=32),
)
@settings(max_examples=60, deadline=None)
def test_accept_takes_the_lowest_entropies_within_the_bound(entropies, bound):
    found = np.array(sampler.accept(mx.array([entropies]), mx.array([bound])))[0]
    h = np.array(entropies, np.float32)
    order = np.argsort(h, kind="stable")
    before = np.cumsum(h[order].astype(np.float64)) - h[order]
    if np.abs(before - bound).min() < 1e-4:
        return  # a sum this close to the bound may round to either side
    count = (before <= bound).sum()
    assert found.sum() == count
    assert (h[found] <= h[order][count - 1]).all()


def test_accept_sums_what_was_accepted_before_with_a_bound_per_row():
    # 0.05 + 0.05 is within the bound, so a third is accepted; a fourth is not
    h = mx.full((1, 4), 0.05)
    assert sampler.accept(h, mx.array([0.1001])).sum().item() == 3
    rows = sampler.accept(mx.full((2, 8), 0.2), mx.array([0.1, 10.0]))
    assert rows.sum(axis=-1).tolist() == [1, 8]  # at least one, however uncertain


def test_equal_drafts_in_a_row_are_counted_per_row():
    a, b = [1, 2, 3], [1, 2, 4]
    unchanged = mx.zeros((2,), dtype=mx.int32)
    before = mx.full((2, 3), -1)  # no canvas yet: the first never counts
    counted = []
    for first, second in ((a, b), (a, a), (a, a), (b, a), (b, b)):
        argmax = mx.array([first, second])
        unchanged = sampler.count_unchanged(argmax, before, unchanged)
        before = argmax
        counted.append(unchanged.tolist())
    assert counted == [[0, 0], [1, 0], [2, 1], [0, 2], [1, 0]]


def test_reveal_takes_likely_positions_and_at_least_one():
    argmax = mx.array([[5, 6, 7], [5, 6, 7]])
    peak = mx.array([[0.95, 0.2, 0.91], [0.3, 0.2, 0.1]])
    revealed, minimum = mx.full((2, 3), -1), mx.array([0.9, 0.9])
    revealed = sampler.reveal(argmax, peak, revealed, minimum)
    assert revealed.tolist() == [[5, -1, 7], [5, -1, -1]]
    peak = mx.array([[0.95, 0.2, 0.95]] * 2)
    revealed = sampler.reveal(argmax + 1, peak, revealed, minimum)
    assert revealed.tolist() == [[5, 7, 7], [5, -1, 8]]


def test_fold_depends_on_each_of_its_four_arguments_only():
    keys = [
        tuple(sampler.random_key(seed, canvas, step, purpose).tolist())
        for _ in range(2)
        for seed in (0, 1, 2**40)
        for canvas in (0, 1, 11)
        for step in (0, 1, 11)
        for purpose in (sampler.CANVAS, sampler.PROPOSE, sampler.RENOISE)
    ]
    assert len(set(keys)) == 81 and keys[:81] == keys[81:]


def test_random_tokens_cover_the_vocabulary_evenly():
    ids = np.array(sampler.random_tokens(sampler.random_key(0, 0, 0, "x"), 64_000, 32))
    counts = np.bincount(ids, minlength=32)
    assert len(counts) == 32
    assert ((counts - 2000) ** 2 / 2000).sum() < 61.1  # 31 degrees, p = 0.001
