"""The sampler's functions against their definitions, in float64 numpy."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.diffusion import sampler

RNG = np.random.default_rng(5)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_process_divides_each_row_by_its_temperature():
    logits = mx.array([[[2.0, 4.0]], [[2.0, 4.0]]])
    processed = sampler.process(logits, mx.array([0.5, 2.0]))
    np.testing.assert_array_equal(np.array(processed), [[[4, 8]], [[1, 2]]])


def test_entropy_is_in_nats():
    logits = RNG.normal(size=(2, 9, 33)).astype(np.float32) * 4
    p = softmax(logits.astype(np.float64))
    expected = -(p * np.log(p)).sum(axis=-1)
    found = np.array(sampler.entropy(mx.array(logits)))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    uniform = sampler.entropy(mx.zeros((1, 1, 1000)))
    assert uniform.item() == pytest.approx(np.log(1000), abs=2e-4)


def test_impossible_tokens_have_no_entropy_and_no_nan():
    logits = mx.array([[[0.0, -mx.inf, 0.0, -mx.inf]]])
    assert sampler.entropy(logits).item() == pytest.approx(np.log(2), abs=1e-6)


@given(
    entropies=st.lists(st.floats(0, 3, width=32), min_size=1, max_size=40),
    bound=st.floats(0.0625, 5, width=32),
)
@settings(max_examples=200, deadline=None)
def test_accept_takes_the_surest_within_the_bound(entropies, bound):
    found = np.array(sampler.accept(mx.array([entropies]), mx.array([bound])))[0]
    h = np.array(entropies, np.float32)
    order = np.argsort(h, kind="stable")
    before = np.cumsum(h[order].astype(np.float64)) - h[order]
    if np.abs(before - bound).min() < 1e-4:
        return  # a sum this close to the bound may round to either side
    count = (before <= bound).sum()
    assert found.sum() == count
    assert (h[found] <= h[order][count - 1]).all()


def test_accept_counts_what_was_accepted_before():
    """0.05 + 0.05 is within the bound, so a third is in; with it a fourth is not."""
    h = mx.array([[0.05, 0.05, 0.05, 0.05]])
    assert sampler.accept(h, mx.array([0.1001])).sum().item() == 3
    # the surest is accepted however unsure it is
    assert sampler.accept(mx.array([[3.0, 2.0]]), mx.array([0.1])).tolist() == [
        [False, True]
    ]


def test_accept_bounds_each_row_by_its_own():
    h = mx.full((2, 8), 0.2)
    assert sampler.accept(h, mx.array([0.1, 10.0])).sum(axis=-1).tolist() == [1, 8]


def test_propose_follows_the_distribution():
    """Chi-square over 100,000 draws of one distribution."""
    logits = RNG.normal(size=20).astype(np.float32) * 1.5
    draws = 100_000
    rows = mx.broadcast_to(mx.array(logits), (1, draws, 20))
    uniforms = mx.random.uniform(shape=(1, draws), key=mx.random.key(1))
    counts = np.bincount(np.array(sampler.propose(rows, uniforms))[0], minlength=20)
    expected = softmax(logits.astype(np.float64)) * draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001


def test_propose_is_the_inverse_cdf():
    p = np.array([0.1, 0.0, 0.4, 0.5])
    rows = mx.broadcast_to(mx.log(mx.array(p.astype(np.float32))), (1, 5, 4))
    uniforms = mx.array([[0.0, 0.09, 0.11, 0.51, 0.9999999]])
    assert sampler.propose(rows, uniforms).tolist() == [[0, 0, 2, 3, 3]]


def test_propose_never_leaves_the_vocabulary():
    flat = mx.zeros((1, 2, 50_000))
    ids = sampler.propose(flat, mx.array([[0.0, 1 - 2**-24]]))
    assert ids[0, 0].item() == 0
    assert 49_000 < ids[0, 1].item() <= 49_999


def test_drafts_in_a_row_are_counted_per_row():
    a, b = [1, 2, 3], [1, 2, 4]
    rows = [mx.array([first, second]) for first, second in ((a, b), (a, a), (a, a))]
    streak = mx.zeros((2,), dtype=mx.int32)
    before = mx.full((2, 3), -1)  # no canvas yet: the first never counts
    counted = []
    for argmax in [*rows, mx.array([b, a]), mx.array([b, b])]:
        streak = sampler.count_unchanged(argmax, before, streak)
        before = argmax
        counted.append(streak.tolist())
    assert counted == [[0, 0], [1, 0], [2, 1], [0, 2], [1, 0]]


def test_fold_depends_on_each_of_its_four_and_nothing_else():
    keys = {
        tuple(sampler.fold(seed, canvas, step, purpose).tolist())
        for seed in (0, 1, 2**40)
        for canvas in (0, 1, 11)
        for step in (0, 1, 11)
        for purpose in (sampler.CANVAS, sampler.PROPOSE, sampler.RENOISE)
    }
    assert len(keys) == 81
    mx.random.seed(3)
    first = sampler.fold(1, 2, 3, "x").tolist()
    mx.random.seed(4)
    assert sampler.fold(1, 2, 3, "x").tolist() == first


def test_random_tokens_cover_the_vocabulary_evenly():
    ids = np.array(sampler.random_tokens(sampler.fold(0, 0, 0, "x"), 64_000, 32))
    counts = np.bincount(ids, minlength=32)
    assert len(counts) == 32
    assert ((counts - 2000) ** 2 / 2000).sum() < 61.1  # 31 degrees, p = 0.001


def _refine(pinned=None, bounds=0.1):
    logits = mx.array(RNG.normal(size=(1, 6, 10)).astype(np.float32))
    return logits, sampler.refine(
        logits,
        temperatures=mx.array([1.0]),
        bounds=mx.array([bounds]),
        uniforms=mx.full((1, 6), 0.5),
        noise=mx.full((1, 6), 9, dtype=mx.int32),
        pinned=pinned,
    )


def test_refine_keeps_proposals_where_accepted_and_noise_elsewhere():
    logits, refined = _refine()
    accepted = np.array(refined.accepted)[0]
    assert accepted.sum() == 1
    proposals = np.array(sampler.propose(logits, mx.full((1, 6), 0.5)))[0]
    expected = np.where(accepted, proposals, 9)
    np.testing.assert_array_equal(np.array(refined.canvas)[0], expected)


def test_pinned_positions_are_certain():
    pinned = mx.array([[-1, 3, -1, 7, -1, -1]])
    logits, refined = _refine(pinned)
    assert refined.canvas[0, 1].item() == 3 and refined.canvas[0, 3].item() == 7
    assert refined.argmax[0, 1].item() == 3 and refined.argmax[0, 3].item() == 7
    assert refined.entropy[0, 1].item() == 0 and refined.accepted[0, 3].item()
    # they cost the others nothing: the surest free position is accepted too
    assert refined.accepted.sum().item() == 3
    free = [0, 2, 4, 5]
    np.testing.assert_array_equal(
        np.array(refined.processed)[0, free], np.array(logits)[0, free]
    )


def test_pinned_rows_are_cut_by_canvas():
    pinned = {0: 5, 7: 6, 8: 7}
    assert sampler.pinned_row(pinned, 0, 8).tolist() == [5, -1, -1, -1, -1, -1, -1, 6]
    assert sampler.pinned_row(pinned, 8, 8).tolist() == [7] + [-1] * 7
