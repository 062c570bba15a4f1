"""The noise: what draws depend on, and that they have the shares they should."""

from collections import Counter
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.training.corruption import STREAMS, Corruption, key_of, order
from mlx_dgemma.training.data import Example

L, V = 8, 20
EXAMPLE = Example(prompt=(2, 3), response=tuple(range(4, 9)), fill=1)
LONG = Example(prompt=(2, 3), response=tuple(range(100, 100 + 4 * L)), fill=1)
DRAWS = 2000


def samples(corruption: Corruption, example: Example, vocabulary=V, count=DRAWS):
    keys = (key_of(7, "train", step, 0) for step in range(count))
    return [corruption.sample(example, L, vocabulary, key) for key in keys]


def replaced(found) -> np.ndarray:
    """Where positions differ from the clean canvas, (samples, L)."""
    return np.array([s.noisy for s in found]) != np.array([s.canvas for s in found])


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(sorted(STREAMS)),
    st.integers(0, 10**9),
    st.integers(0, 10**4),
)
@settings(max_examples=50, deadline=None)
def test_a_key_says_everything_of_a_draw(seed, stream, step, place):
    key = key_of(seed, stream, step, place)
    one, again = (Corruption().sample(LONG, L, V, key) for _ in range(2))
    assert asdict(one) == asdict(again)


def test_another_seed_stream_step_or_place_draws_otherwise():
    """All keys of a small box are distinct, and so are their noises."""
    box = product((0, 1, 7), STREAMS, range(4), range(4))
    keys = [key_of(*where) for where in box]
    assert len(set(keys)) == len(keys)
    all_noise = Corruption(levels=(1, 1))
    noises = {tuple(all_noise.sample(LONG, L, 10**6, key).noisy) for key in keys}
    assert len(noises) == len(keys)


def test_the_draws_of_neighbouring_keys_are_independent():
    """Noise of 10 ids agrees in a tenth of the positions, whichever part moves."""
    all_noise = Corruption(levels=(1, 1))

    def noise(*where) -> np.ndarray:
        return np.array(all_noise.sample(EXAMPLE, 2000, 10, key_of(*where)).noisy)

    base = noise(3, "train", 5, 2)
    others = (4, "train", 5, 2), (3, "valid", 5, 2), (3, "train", 6, 2)
    for where in (*others, (3, "train", 5, 3), (3, "train", 2, 5)):
        assert 0.06 < (noise(*where) == base).mean() < 0.14


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_draw_what_one_draws(ranks):
    corruption, size = Corruption(), 8

    def draw(places):
        return {
            place: asdict(corruption.sample(LONG, L, V, key_of(1, "train", 9, place)))
            for place in places
        }

    shared = [draw(range(rank, size, ranks)) for rank in range(ranks)]
    assert {k: v for part in shared for k, v in part.items()} == draw(range(size))


@pytest.mark.parametrize(
    "levels", [(1e-3, 1.0), (0.0, 0.5), (0.4, 0.6), (0.3, 0.3), (1.0, 1.0)]
)
def test_levels_are_uniform_between_their_ends(levels):
    """The level of a sample is the share it replaces of a long canvas."""
    low, high = levels
    length, vocabulary, count = 2000, 10**6, 400
    example = Example((2,), (0,) * length, fill=1)
    corruption = Corruption(levels=levels)
    shares = []
    for step in range(count):
        key = key_of(0, "train", step, 0)
        noisy = corruption.sample(example, length, vocabulary, key).noisy
        shares.append(np.count_nonzero(noisy) / length)
    deviation = (high - low) / 12**0.5
    off = 5 * deviation / count**0.5 + 0.002
    assert np.mean(shares) == pytest.approx((low + high) / 2, abs=off)
    assert np.std(shares) == pytest.approx(deviation, abs=0.08 * deviation + 0.013)
    assert min(shares) > low - 0.06 and max(shares) < high + 0.06
    within = (np.sort(shares) - low) / max(high - low, 1e-9)
    if high - low >= 0.5:  # Kolmogorov-Smirnov against the uniform, p < 1e-4
        assert np.abs(within - np.linspace(0, 1, count)).max() < 2.3 / count**0.5


def test_a_replacement_may_be_the_token_itself():
    """So that of V ids 1 / V leave a position as it was."""
    small = Example(prompt=(2, 3), response=(0, 1, 2, 3, 3, 2, 1, 0), fill=1)
    changed = replaced(samples(Corruption(), small, vocabulary=4))
    expected = 0.5005 * (1 - 1 / 4)
    # positions of one sample share their level, so samples are what is independent
    assert changed.mean() == pytest.approx(expected, abs=5 * 0.29 / DRAWS**0.5)


def test_noise_is_uniform_over_the_whole_vocabulary():
    """Padding, ends and all other special ids too: chi-square, 19 degrees, p 1e-4."""
    found = samples(Corruption(levels=(1, 1)), EXAMPLE)
    counts = np.bincount(np.array([s.noisy for s in found]).flatten(), minlength=V)
    assert len(counts) == V
    expected = DRAWS * L / V
    assert ((counts - expected) ** 2 / expected).sum() < 50.8


def test_positions_are_replaced_one_by_one():
    """At one level each, independently: pairs of neighbours as often as t²."""
    changed = replaced(samples(Corruption(levels=(0.5, 0.5)), EXAMPLE, 10**6))
    assert changed.mean(axis=0) == pytest.approx(0.5, abs=0.056)  # 5 sigma
    both = (changed[:, 1:] & changed[:, :-1]).mean()
    assert both == pytest.approx(0.25, abs=0.02)


def test_level_one_replaces_everything_and_level_zero_nothing():
    huge = 2**31 - 1  # no draw is the token itself
    assert replaced(samples(Corruption(levels=(1, 1)), EXAMPLE, huge, 50)).all()
    assert not replaced(samples(Corruption(levels=(0, 0)), EXAMPLE, huge, 50)).any()


def test_positions_that_are_not_replaced_are_the_answers():
    for sample in samples(Corruption(levels=(0.5, 0.5)), EXAMPLE, count=20):
        assert sample.canvas == (4, 5, 6, 7, 8, 1, 1, 1)
        assert len(sample.noisy) == L
        assert sum(a == b for a, b in zip(sample.noisy, sample.canvas, strict=True))


def test_the_canvas_is_chosen_uniformly_and_sees_those_before_it():
    found = samples(Corruption(), LONG, vocabulary=V)
    counts = Counter(s.canvas for s in found)
    assert len(counts) == 4
    for index in range(4):
        canvas = LONG.response[L * index : L * index + L]
        assert counts[canvas] / DRAWS == pytest.approx(0.25, abs=0.05)  # 5 sigma
    for sample in found:
        index = (sample.canvas[0] - 100) // L
        assert tuple(sample.prefix) == LONG.prompt + LONG.response[: L * index]
        assert sample.prompt == 2


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_share_of_the_samples_is_conditioned(share):
    found = samples(Corruption(self_conditioning=share), LONG)
    chosen = np.array([s.conditioned for s in found])
    assert chosen.mean() == pytest.approx(share, abs=5 * 0.5 / DRAWS**0.5)
    # whatever the canvas and the noise are
    noise = replaced(found).mean(axis=1)
    assert abs(np.corrcoef(chosen, noise)[0, 1]) < 0.12


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_are_conditioned_where_that_is_asked(share):
    found = samples(Corruption(self_conditioning=share), EXAMPLE, count=100)
    assert {s.conditioned for s in found} == {bool(share)}


# The order of examples


@pytest.mark.parametrize("count", [1, 2, 5, 13])
def test_every_epoch_is_a_permutation_of_its_own(count):
    indices = order(3, count, 0, 4 * count)
    epochs = [indices[i : i + count] for i in range(0, 4 * count, count)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    if count > 4:
        assert len(set(map(tuple, epochs))) == 4
        assert list(range(count)) not in epochs


@given(st.integers(1, 30), st.integers(0, 200), st.integers(0, 100), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_going_on_anywhere_gives_the_same_sequence(count, first, wanted, seed):
    whole = order(seed, count, 0, first + wanted)
    assert len(whole) == first + wanted
    assert order(seed, count, first, wanted) == whole[first:]


def test_batches_cross_the_end_of_an_epoch():
    whole = order(0, 10, 0, 40)
    batches = [order(0, 10, step * 4, 4) for step in range(10)]
    assert [index for batch in batches for index in batch] == whole
    assert sorted(whole[8:10] + whole[:8]) == list(range(10))
    assert set(batches[2]) <= set(range(10)) and len(batches[2]) == 4


def test_a_batch_larger_than_the_data_takes_epochs_together():
    indices = order(1, 3, 0, 8)
    assert [sorted(indices[i : i + 3]) for i in (0, 3)] == [[0, 1, 2]] * 2
    assert len(indices) == 8


def test_another_seed_is_another_order():
    orders = {tuple(order(seed, 20, 0, 20)) for seed in range(20)}
    assert len(orders) == 20
