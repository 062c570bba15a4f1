"""Every MLX operation that the package calls, once each, at the 26B's shapes.

An operation that a device lacks raises here by name. Results are compared with the
same call on the CPU, or with numpy in float32 where the CPU would be slow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint.quantize import Quantization

HALF, FULL = mx.bfloat16, mx.float32
# Relative error allowed. Both sides start from the same arrays, so rounded inputs do
# not count. bfloat16 keeps 8 bits. A quantised kernel may round weights and even sums
# to bfloat16 (MLX's CPU kernel does, with an error of 2 %); a wrong scale, bias or row
# gives an error near 1.
EXACT, ROUNDED, QUANTIZED = 1e-5, 2**-7, 2**-5
MODES = [("affine", bits) for bits in (2, 3, 4, 5, 6, 8)]
MODES += [("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4)]


@dataclass(frozen=True)
class Shapes:
    """The shapes of a denoising step; single letters as in the package."""

    L: int = 256
    D: int = 2816
    inner: int = 2112  # width of the dense feed-forward
    expert: int = 704  # width of an expert
    E: int = 128
    top: int = 8  # experts per token
    H: int = 16
    K: int = 8
    head: int = 256
    full_K: int = 2
    full_head: int = 512
    T: int = 1023
    chunk: int = 32768  # rows of the embedding in one chunk of the vocabulary pass
    expert_dtype: mx.Dtype = HALF  # the CPU gathers dense experts in float32 only


TOY = Shapes(32, 256, 192, 64, 8, 2, 4, 2, 32, 1, 64, 50, 512, FULL)


class Probe(NamedTuple):
    """A call, the relative error allowed, and what it must return if not the CPU's."""

    name: str
    call: Callable[[], mx.array]
    allowed: float = EXACT
    expected: np.ndarray | None = None


Family = Callable[[Shapes], Iterator[Probe]]


def families() -> dict[str, Family]:
    """Return the groups of probes by name."""
    found: dict[str, Family] = {
        "elementwise": _elementwise,
        "rows": _rows,
        "random": _random,
        "products": _products,
        "attention": _attention,
        "machinery": _machinery,
    }
    for mode, bits in MODES:
        quantization = Quantization.with_defaults(mode, bits, None)
        found[f"{mode} {bits} bit"] = partial(_quantized, q=quantization)
    return found


def run(family: Family, s: Shapes) -> list[str]:
    """Run a group of probes; return what is wrong or missing."""
    failed = []
    for name, call, allowed, expected in family(s):
        try:
            found = numpy(call()).astype(np.float64)
        except (RuntimeError, ValueError) as error:
            failed.append(f"{name}: {str(error).strip().splitlines()[0]}")
            continue
        if expected is None:
            with mx.stream(mx.cpu):
                expected = numpy(call())
        error = np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1)
        if not error <= allowed:
            failed.append(f"{name}: off by {error:.1e}")
    return failed


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = FULL) -> mx.array:
    """Draw normal numbers."""
    return mx.random.normal(shape, dtype=dtype, key=mx.random.key(seed))


def numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(FULL))


def _elementwise(s: Shapes) -> Iterator[Probe]:
    x = normal(s.L, s.chunk)
    half = x.astype(HALF)
    for call in (mx.exp, mx.tanh, mx.abs, mx.square):
        yield Probe(call.__name__, partial(call, x))
    yield Probe("log", lambda: mx.log(mx.square(x) + 1))
    yield Probe("power", lambda: mx.power(2.0, x))
    yield Probe("maximum, minimum", lambda: mx.maximum(mx.minimum(x, 0.5), -0.5))
    yield Probe("clip", lambda: mx.clip(x, -0.5, 0.5))
    yield Probe("where", lambda: mx.where(x > 0, x, 0))
    yield Probe("bfloat16 add", lambda: half + mx.ones_like(half), ROUNDED)


def _rows(s: Shapes) -> Iterator[Probe]:
    x = normal(s.L, s.chunk // 8)
    for call in (mx.max, mx.argmax, mx.softmax, mx.logsumexp):
        yield Probe(call.__name__, partial(call, x, axis=-1))
    for call in (mx.sum, mx.mean, mx.cumsum):
        yield Probe(call.__name__, partial(call, mx.square(x), axis=-1))
    yield Probe("any", lambda: mx.any(x > 3.5, axis=-1))
    yield Probe("all", lambda: mx.all(x < 3.5, axis=-1))
    yield Probe("scatter", lambda: _scatter(x))
    scores = normal(s.L, s.E)
    ids = mx.array(np.random.default_rng(1).integers(0, s.E, (s.L, s.top)))
    flat = ids.flatten()
    yield Probe("argpartition", lambda: _sum_of_largest(scores, s.top))
    yield Probe("argsort", lambda: flat[mx.argsort(flat)])
    yield Probe("take_along_axis", lambda: mx.take_along_axis(scores, ids, axis=-1))
    yield Probe("rms_norm", lambda: mx.fast.rms_norm(scores, None, 1e-6))
    half, weight = normal(s.L, s.D, dtype=HALF), mx.full((s.D,), 0.5, dtype=HALF)
    bfloat16 = partial(mx.fast.rms_norm, half, weight, 1e-6)
    yield Probe("bfloat16 rms_norm", bfloat16, ROUNDED)


def _random(s: Shapes) -> Iterator[Probe]:
    """Draws equal those on the CPU: a seed means the same on every device."""
    key, other = mx.random.split(mx.random.key(7), 2)
    yield Probe("uniform", lambda: mx.random.uniform(shape=(s.L,), key=key))
    yield Probe("randint", lambda: mx.random.randint(0, 262144, (s.L,), key=other))


def _products(s: Shapes) -> Iterator[Probe]:
    for dtype, name, allowed in ((FULL, "float32", EXACT), (HALF, "bfloat16", ROUNDED)):
        x = normal(s.L, s.D, dtype=dtype)
        w = normal(s.chunk // 8, s.D, seed=1, dtype=dtype)
        product = numpy(x) @ numpy(w).T
        yield Probe(f"matmul {name}", partial(mx.matmul, x, w.T), allowed, product)
    stored = normal(s.E, 2 * s.expert, s.D, seed=3, dtype=s.expert_dtype) * s.D**-0.5

    def gather(x: mx.array, expert: mx.array) -> mx.array:
        weight = stored.swapaxes(-1, -2)
        return mx.gather_mm(x, weight, rhs_indices=expert, sorted_indices=True)

    yield from _gathered("gather_mm sorted", gather, s, stored, ROUNDED)


def _quantized(s: Shapes, q: Quantization) -> Iterator[Probe]:
    """Products from quantised weights, in every shape that a step has."""
    spec = {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}

    def quantize(*shape: int) -> tuple[tuple[mx.array, ...], mx.array]:
        dense = normal(*shape, seed=4, dtype=HALF) * shape[-1] ** -0.5
        parts = tuple(mx.quantize(dense, **spec))
        # the CPU is the judge, but all experts at once would take it a minute
        judge = mx.cpu if len(shape) == 2 else mx.default_device()
        return parts, mx.dequantize(*parts, **spec, dtype=FULL, stream=judge)

    x = normal(s.L, s.D, dtype=HALF)
    for name, outputs, inputs in (
        ("gate and up", 2 * s.inner, s.D),
        ("gate", s.inner, s.D),
        ("square", s.D, s.D),
        ("down", s.D, s.inner),
    ):
        parts, dense = quantize(outputs, inputs)
        given = x[:, :inputs]
        call = partial(mx.quantized_matmul, given, *parts, transpose=True, **spec)
        product = numpy(given) @ numpy(dense).T
        yield Probe(f"quantized_matmul {name}", call, QUANTIZED, product)
    call = partial(mx.dequantize, *parts, **spec, dtype=HALF)
    yield Probe("dequantize", call, QUANTIZED, numpy(dense))
    for name, outputs, inputs in (
        ("gate and up", 2 * s.expert, s.D),
        ("down", s.D, s.expert),
    ):
        parts, dense = quantize(s.E, outputs, inputs)
        gather = partial(_gather_qmm, parts=parts, spec=spec)
        yield from _gathered(f"gather_qmm {name}", gather, s, dense, QUANTIZED)


def _gather_qmm(x: mx.array, expert: mx.array, parts: tuple, spec: dict) -> mx.array:
    order = {"rhs_indices": expert, "sorted_indices": True}
    return mx.gather_qmm(x, *parts, transpose=True, **order, **spec)


def _gathered(
    name: str, gather: Callable, s: Shapes, weight: mx.array, allowed: float
) -> Iterator[Probe]:
    """`gather` of sorted rows through (E, out, in) weights, and its gradient."""
    expert = np.sort(np.random.default_rng(5).integers(0, s.E, s.L * s.top))
    dtype = HALF if allowed == QUANTIZED else s.expert_dtype
    rows = normal(len(expert), 1, weight.shape[-1], seed=6, dtype=HALF).astype(dtype)
    call = partial(gather, expert=mx.array(expert.astype(np.uint32)))
    x, dense = numpy(rows)[:, 0], numpy(weight)
    products = [x[expert == e] @ dense[e].T for e in range(s.E)]
    expected = np.concatenate(products)[:, None]
    yield Probe(name, partial(call, rows), allowed, expected)
    slope = dense.sum(axis=1)[expert][:, None]
    yield Probe(f"{name}, gradient", _gradient(call, rows), allowed, slope)


def _attention(s: Shapes) -> Iterator[Probe]:
    length = s.T + s.L
    causal = np.tril(np.ones((s.L, length), bool), length - s.L)
    late = np.arange(length) >= 5
    masks = {
        "no mask": (None, np.True_),
        "causal": ("causal", causal),
        "boolean mask": (mx.array(late)[None, None, None], late),
    }
    for kv_heads, width in ((s.K, s.head), (s.full_K, s.full_head)):
        q, k, v = (
            normal(1, heads, t, width, seed=heads, dtype=HALF) * width**-0.25
            for heads, t in ((s.H, s.L), (kv_heads, length), (kv_heads, length))
        )
        for name, (mask, seen) in masks.items():
            call = partial(
                mx.fast.scaled_dot_product_attention, q, k, v, scale=1.0, mask=mask
            )
            expected = _plain_attention(q, k, v, seen)
            yield Probe(f"attention {width}, {name}", call, ROUNDED, expected)


def _machinery(s: Shapes) -> Iterator[Probe]:
    """Shapes, slices, order of evaluation, traces and gradients."""
    x = normal(s.L, s.D)

    def write_slice() -> mx.array:
        y = mx.zeros((s.L + 8, s.D))
        y[4 : s.L + 4] = x
        return mx.concatenate([y[4 : s.L + 4], mx.full((1, s.D), 2.0)])

    def pad_and_stack() -> mx.array:
        return mx.stack(mx.split(mx.pad(x, [(0, 0), (2, 2)]), 2, axis=-1))

    def view_bits() -> mx.array:
        return mx.broadcast_to(mx.view(x, mx.uint32)[:, :1] & 255, (s.L, 3))

    double = mx.custom_function(lambda a: a * 2)
    double.vjp(lambda a, given, out: given * 3)
    cube = mx.checkpoint(lambda a: mx.sum(mx.square(a) * mx.stop_gradient(a)))
    traced = mx.compile(lambda a: mx.tanh(a) * mx.arange(s.D) + 1)
    # not by the CPU: it would wait for a C++ compiler
    expected = np.tanh(numpy(x)) * np.arange(s.D) + 1
    yield Probe("compile", lambda: traced(x), expected=expected)
    yield Probe("slice update, concatenate", write_slice)
    yield Probe("pad, stack, split", pad_and_stack)
    yield Probe("view, broadcast", view_bits)
    yield Probe("depends", lambda: mx.depends([x], [mx.zeros_like(x)])[0])
    yield Probe("contiguous", lambda: mx.contiguous(x.T))
    yield Probe("custom gradient", _gradient(double, x))
    yield Probe("value_and_grad", lambda: mx.value_and_grad(cube)(x)[1])


def _gradient(function: Callable, x: mx.array) -> Callable[[], mx.array]:
    """Return a call that gives the gradient of the sum of `function(x)`."""
    return lambda: mx.grad(lambda a: mx.sum(function(a)))(x)


def _plain_attention(q: mx.array, k: mx.array, v: mx.array, seen) -> np.ndarray:
    queries, keys, values = (numpy(x)[0] for x in (q, k, v))
    groups = len(queries) // len(keys)
    keys, values = (np.repeat(x, groups, axis=0) for x in (keys, values))
    scores = np.where(seen, queries @ keys.swapaxes(1, 2), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ values)[None]


def _sum_of_largest(scores: mx.array, count: int) -> mx.array:
    order = mx.argpartition(-scores, kth=count - 1)[:, :count]
    return mx.sum(mx.take_along_axis(scores, order, axis=-1), axis=-1)


def _scatter(x: mx.array) -> mx.array:
    y = mx.zeros_like(x)
    y[mx.arange(len(x))[::-1]] = x
    return y
