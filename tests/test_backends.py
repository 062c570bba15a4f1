"""Each way of a device to the same result, against float64 numpy."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import backends
from mlx_dgemma.backends import cpu

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
WIDE = np.concatenate(
    [
        np.linspace(-20, 20, 4001),
        np.linspace(-120, 120, 2401),
        np.logspace(-8, 4, 200),
        -np.logspace(-8, 4, 200),
        [-1e4, 0.0, -0.0, 1e4],
    ]
)


def inputs(dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """WIDE in `dtype`, and what that rounds it to in float64."""
    x = mx.array(WIDE.astype(np.float32)).astype(dtype)
    return x, doubles(x)


def doubles(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


@pytest.fixture(params=["cpu", "gpu"])
def way(request):
    """Both ways, whatever computes the operations."""
    if request.param == "gpu":
        request.getfixturevalue("as_gpu")
    return backends.current()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exp_is_right_to_its_last_digits(dtype):
    x, exact = inputs(dtype)
    with np.errstate(over="ignore"):
        wanted = np.exp(exact)
    most, least = mx.finfo(dtype).max, 2.0 ** (-14 if dtype == mx.float16 else -126)
    found = cpu.exp(x)
    assert found.dtype == dtype
    y = doubles(found)
    assert np.isinf(y[wanted > most * 1.1]).all()
    assert (y[wanted < least] <= least).all() and not np.isnan(y).any()
    normal = (wanted >= least) & (wanted < most * 0.9)
    off = np.abs(y[normal] / wanted[normal] - 1)
    # rounding the result, and an argument that float32 holds to 2**-24 of itself
    assert (off <= mx.finfo(dtype).eps + 2**-24 * np.abs(exact[normal])).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_is_right_to_its_last_digits(dtype, way):
    x, exact = inputs(dtype)
    inner = np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)
    wanted = exact / 2 * (1 + np.tanh(inner))
    found = way.gelu(x)
    assert found.dtype == dtype
    bound = 2 * mx.finfo(dtype).eps * (1 + np.abs(exact))
    assert (np.abs(doubles(found) - wanted) <= bound).all()


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcap_is_a_scaled_tanh(cap, way):
    x, exact = inputs(mx.float32)
    scale = np.array([[0.3], [cap], [75.0], [3000.0]], np.float32)
    found = np.array(way.softcap(x[None], cap, mx.array(scale)))
    wanted = np.tanh(exact / cap) * scale
    assert (np.abs(found - wanted) <= 4 * 2**-24 * scale).all()
    assert (np.abs(found) <= scale).all()


B, H, K, T, S, W = 2, 6, 2, 9, 20, 16
RNG = np.random.default_rng(3)
SEEN = RNG.random((B, 1, T, S)) < 0.6
SEEN[..., 3] = True  # no query without a key
MASKS = {
    "none": None,
    "(T, S)": SEEN[0, 0],
    "(B, 1, T, S)": SEEN,
    "(B, 1, 1, S)": SEEN[:, :, :1],
    "causal": "causal",
}


def attention(queries, keys, values, mask) -> np.ndarray:
    """Head by head in float64; H // K query heads share a key head."""
    y = np.zeros((B, H, T, W))
    if isinstance(mask, str):
        mask = np.tril(np.ones((T, S), bool), S - T)
    seen = np.broadcast_to(True if mask is None else mask, (B, H, T, S))
    for row, head in np.ndindex(B, H):
        shared = head // (H // K)
        scores = queries[row, head] @ keys[row, shared].T
        scores = np.where(seen[row, head], scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        y[row, head] = weights @ values[row, shared]
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharp", [0.3, 3.0])
@pytest.mark.parametrize("name", MASKS)
def test_attention_errs_no_more_than_mlx_does(name, sharp, dtype):
    rng = np.random.default_rng(4)
    q, k, v = (
        mx.array((rng.normal(size=shape) * size).astype(np.float32)).astype(dtype)
        for shape, size in (((B, H, T, W), sharp), ((B, K, S, W), 1), ((B, K, S, W), 1))
    )
    given = MASKS[name]
    mask = mx.array(given) if isinstance(given, np.ndarray) else given
    exact = attention(doubles(q), doubles(k), doubles(v), given)
    ours = cpu.attend(q, k, v, mask)
    mlx = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
    assert ours.dtype == dtype
    error, allowed = (np.abs(doubles(y) - exact).max() for y in (ours, mlx))
    assert error <= 4 * allowed
    assert allowed < 0.1


def test_attention_to_one_key_among_huge_scores_is_its_value():
    keys = mx.array(np.eye(4, dtype=np.float32))[None, None] * 3e4
    values = mx.arange(16).reshape(1, 1, 4, 4).astype(mx.float32)
    queries = mx.broadcast_to(keys / 10, (1, 2, 4, 4))
    y = np.array(cpu.attend(queries, keys, values, None))
    np.testing.assert_array_equal(y, np.broadcast_to(np.array(values), (1, 2, 4, 4)))


def test_a_model_computes_the_same_in_the_ways_of_a_gpu(tiny_model, request):
    model, _ = tiny_model
    prompt = mx.array(RNG.integers(0, 32, (1, 40)).astype(np.int32))
    canvas = prompt[:, :16]

    def logits() -> np.ndarray:
        cache = model.make_cache()
        model.encode(prompt, cache)
        return np.array(model.denoise(canvas, cache))

    here = logits()
    request.getfixturevalue("as_gpu")
    np.testing.assert_allclose(logits(), here, atol=2e-5)
