"""The noise: what draws depend on, and that they have the shares they should."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.training.corruption import STREAMS, corrupt, draw_key, shuffled_indices
from mlx_dgemma.training.data import Example
from mlx_dgemma.training.settings import TrainSettings

L, V = 8, 20
EXAMPLE = Example(prompt=(2, 3), response=tuple(range(4, 9)), fill=1)
LONG = Example(prompt=(2, 3), response=tuple(range(100, 100 + 4 * L)), fill=1)
DRAWS = 2000
ALL_NOISE = TrainSettings(levels=(1, 1))


def samples(example: Example, vocabulary=V, count=DRAWS, **changes):
    chosen = TrainSettings(**changes)
    keys = (draw_key(7, "train", step, 0) for step in range(count))
    return [corrupt(example, L, vocabulary, chosen, key) for key in keys]


def replaced(found) -> np.ndarray:
    """Where positions differ from the clean canvas, (samples, L)."""
    return np.array([s.noisy for s in found]) != np.array([s.canvas for s in found])


def test_a_key_determines_its_draws_and_every_part_of_it_matters():
    keys = [draw_key(*k) for k in product((0, 1, 7), STREAMS, range(4), range(4))]
    noises = [corrupt(LONG, L, 10**6, ALL_NOISE, key).noisy for key in keys]
    assert noises == [corrupt(LONG, L, 10**6, ALL_NOISE, key).noisy for key in keys]
    assert len(set(map(tuple, noises))) == len(keys)


@pytest.mark.parametrize("levels", [(1e-3, 1.0), (0.4, 0.6), (0.3, 0.3)])
def test_levels_are_uniform_between_their_ends(levels):
    """The level of a sample is the share it replaces of a long canvas."""
    (low, high), count, length = levels, 400, 2000
    example, chosen = Example((2,), (0,) * length, fill=1), TrainSettings(levels=levels)
    keys = (draw_key(0, "train", step, 0) for step in range(count))
    noisy = [corrupt(example, length, 10**6, chosen, key).noisy for key in keys]
    shares = np.array([np.count_nonzero(row) / length for row in noisy])
    deviation = (high - low) / 12**0.5
    off = 5 * deviation / count**0.5 + 0.002
    assert np.mean(shares) == pytest.approx((low + high) / 2, abs=off)
    assert np.std(shares) == pytest.approx(deviation, abs=0.08 * deviation + 0.013)
    assert min(shares) > low - 0.06 and max(shares) < high + 0.06
    if high - low >= 0.5:  # Kolmogorov-Smirnov against the uniform, p < 1e-4
        within = (np.sort(shares) - low) / (high - low)
        assert np.abs(within - np.linspace(0, 1, count)).max() < 2.3 / count**0.5


def test_noise_is_uniform_over_the_whole_vocabulary():
    """Special ids and the token itself too: chi-square, 19 degrees, p 1e-4."""
    found = samples(EXAMPLE, levels=(1, 1))
    counts = np.bincount(np.array([s.noisy for s in found]).flatten(), minlength=V)
    expected = DRAWS * L / V
    assert len(counts) == V and ((counts - expected) ** 2 / expected).sum() < 50.8


def test_positions_are_replaced_independently_and_others_stay():
    """At one level each: pairs of neighbours as often as t²."""
    found = samples(EXAMPLE, 10**6, levels=(0.5, 0.5))
    changed = replaced(found)
    assert changed.mean(axis=0) == pytest.approx(0.5, abs=0.056)  # 5 sigma
    both = (changed[:, 1:] & changed[:, :-1]).mean()
    assert both == pytest.approx(0.25, abs=0.02)
    assert {sample.canvas for sample in found} == {(4, 5, 6, 7, 8, 1, 1, 1)}
    assert not replaced(samples(EXAMPLE, count=50, levels=(0, 0))).any()


def test_the_canvas_is_chosen_uniformly_behind_those_before_it():
    found = samples(LONG)
    counts = Counter(s.canvas for s in found)
    assert len(counts) == 4
    assert list(counts.values()) == pytest.approx([DRAWS / 4] * 4, abs=0.05 * DRAWS)
    for sample in found:
        index = (sample.canvas[0] - 100) // L
        assert sample.canvas == LONG.response[L * index : L * index + L]
        assert tuple(sample.prefix) == LONG.prompt + LONG.response[: L * index]
        assert sample.prompt == 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_the_samples_is_conditioned(share):
    found = samples(LONG, self_conditioning=share)
    chosen = np.array([s.self_conditioned for s in found])
    allowed = 5 * (share * (1 - share) / DRAWS) ** 0.5
    assert chosen.mean() == pytest.approx(share, abs=allowed)
    if 0 < share < 1:  # whatever the noise is
        noise = replaced(found).mean(axis=1)
        assert abs(np.corrcoef(chosen, noise)[0, 1]) < 0.12


@given(st.integers(1, 30), st.integers(0, 200), st.integers(0, 100), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_the_order_is_of_shuffled_epochs_and_continues_from_anywhere(
    count, first, wanted, seed
):
    whole = shuffled_indices(seed, count, 0, first + wanted)
    assert len(whole) == first + wanted
    assert shuffled_indices(seed, count, first, wanted) == whole[first:]
    indices = shuffled_indices(seed, count, 0, 4 * count)
    epochs = [indices[i : i + count] for i in range(0, 4 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 12:  # no two are the same
        assert len(set(map(tuple, epochs))) == 4 and epochs[0] != sorted(epochs[0])
        assert shuffled_indices(seed + 1, count, 0, count) != epochs[0]
