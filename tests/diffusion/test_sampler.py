"""The sampler's functions against their definitions, in float64 numpy."""

import itertools

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.diffusion import sampler


@given(
    entropies=st.lists(st.floats(0, 3, width=32), min_size=1, max_size=40),
    bound=st.floats(0.0625, 5, width=32),
)
@settings(max_examples=60, deadline=None)
def test_accept_takes_the_lowest_entropies_within_the_bound(entropies, bound):
    bounds = bound, bound / 2
    rows = np.array(sampler.accept(mx.array([entropies] * 2), mx.array(bounds)))
    h = np.array(entropies, np.float32)
    order = np.argsort(h, kind="stable")
    before = np.cumsum(h[order].astype(np.float64)) - h[order]
    for found, bound in zip(rows, bounds, strict=True):
        if np.abs(before - bound).min() < 1e-4:
            continue  # a sum this close to the bound may round to either side
        count = (before <= bound).sum()  # at least one, however uncertain
        assert found.sum() == count
        assert (h[found] <= h[order][count - 1]).all()


def test_random_keys_depend_on_each_of_their_four_arguments_only():
    purposes = sampler.CANVAS, sampler.PROPOSE, sampler.RENOISE
    arguments = [*itertools.product((0, 1, 2**40), (0, 1, 11), (0, 1, 11), purposes)]
    keys = [tuple(sampler.random_key(*given).tolist()) for given in arguments * 2]
    assert len(set(keys)) == 81 and keys[:81] == keys[81:]
