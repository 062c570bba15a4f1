"""Kernels written by hand beside what they would replace: equal, and faster?"""

from collections.abc import Callable

import kernels
import mlx.core as mx
from parts import Setting, seconds_of

SEEDS = range(3)
LAUNCHES = 20  # timed together: one alone is mostly its launch
DTYPE = mx.bfloat16


def race(setting: Setting, name: str) -> dict:
    """Equality on fresh inputs at the 26B's size and an odd one; seconds of each way.

    The twin is compiled, as a step is.
    """
    candidate = next(one for one in kernels.CANDIDATES if one.name == name)
    worst, equal = 0.0, True
    for seed in SEEDS:
        for size in (candidate.real, candidate.odd):
            given = candidate.inputs(size, seed, DTYPE)
            found, wanted = candidate.kernel(*given), candidate.twin(*given)
            worst = max(worst, candidate.worst(given, found, wanted))
            equal = equal and candidate.equal(given, found, wanted)
    sets = [candidate.inputs(candidate.real, seed, DTYPE) for seed in range(LAUNCHES)]
    kernel = _seconds(candidate.kernel, sets)
    plain = _seconds(mx.compile(candidate.twin), sets)
    moved = candidate.traffic(candidate.real, DTYPE.size)
    return {
        "replaces": candidate.replaces,
        "worst": worst,
        "kernel_seconds": kernel,
        "plain_seconds": plain,
        "kernel_bytes_per_second": moved / kernel,
        "passed": equal,
    }


def _seconds(way: Callable[..., kernels.Arrays], sets: list[kernels.Arrays]) -> float:
    """Of one launch, in a row over inputs that no cache holds together."""
    mx.eval(sets)
    return seconds_of(lambda: [way(*given) for given in sets]) / len(sets)
