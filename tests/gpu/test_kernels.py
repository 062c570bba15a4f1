"""The kernels on a CUDA device, against the operations they would replace."""

import mlx.core as mx
import numpy as np
import pytest
from kernels import CANDIDATES

pytestmark = pytest.mark.gpu
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
by_name = pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def cuda(gpu):
    if gpu != "cuda":
        pytest.skip("the kernels are written in CUDA, which Metal does not take")


@by_name
@by_dtype
@pytest.mark.parametrize("size", ["real", "odd", "one row", "several turns"])
def test_a_kernel_computes_what_its_twin_does(candidate, dtype, size):
    sizes = {
        "real": candidate.real,
        "odd": candidate.odd,
        "one row": (1, candidate.odd[1]),
        # more columns than a thread block holds at once, the last vector not full
        "several turns": (3, 9001),
    }
    given = candidate.inputs(sizes[size], 1, dtype)
    found, wanted = candidate.kernel(*given), candidate.twin(*given)
    # the bounds add up the roundings that the two ways may do differently
    assert candidate.worst(given, found, wanted) <= 1
    assert candidate.equal(given, found, wanted)


@by_name
@by_dtype
def test_a_kernel_is_the_same_compiled_and_each_time(candidate, dtype):
    given = candidate.inputs(candidate.odd, 2, dtype)
    compiled = mx.compile(candidate.kernel)
    first = candidate.kernel(*given)
    for again in (candidate.kernel(*given), compiled(*given), compiled(*given)):
        for a, b in zip(first, again, strict=True):
            assert mx.array_equal(a, b).item()


@by_name
@by_dtype
def test_arrays_may_begin_anywhere_in_memory(candidate, dtype):
    given = candidate.inputs((2, 256), 3, dtype)
    moved = []
    for array in given:
        longer = mx.concatenate([array.flatten()[:1], array.flatten()])
        mx.eval(longer)
        moved.append(longer[1:].reshape(array.shape))
    for a, b in zip(candidate.kernel(*given), candidate.kernel(*moved), strict=True):
        assert mx.array_equal(a, b).item()


@by_name
def test_inputs_need_not_be_contiguous(candidate):
    given = candidate.inputs(candidate.odd, 4, mx.float32)
    turned = [mx.array(np.array(a).T).T for a in given]
    for a, b in zip(candidate.kernel(*given), candidate.kernel(*turned), strict=True):
        assert mx.array_equal(a, b).item()
