"""The CPU: the same mathematics in the operations that MLX is fast at there.

Its `power` takes 3.4 ns an element where `exp` takes 10 and `tanh` 16; its attention
is unfused, so nothing is lost by writing it out (`tests/bench/RESULTS.md`).
"""

import math
import os
import platform

import mlx.core as mx

from .gradients import differentiable
from .interface import Backend, Choices, ExpertPath, Limits, Mask

TWICE = 2 * math.sqrt(2 / math.pi)
BLOCK_PAIRS = 512  # from which on padding to blocks costs less than products by row
CHOICES = Choices(
    compiles=False,
    runs_ahead=False,
    product_dtype=mx.float32,
    dequantizes=True,
    product_rows=1,
    fused_attention=False,
    score_bytes=8 << 20,
    vocabulary_chunk=2048,
    vocabulary_rows=256,
)
WHY = {
    "compiles": "nothing to gain, and the first run would wait for a C++ compiler",
    "runs_ahead": "no idle time to fill: a step taken in vain costs all it takes",
    "product_dtype": "its BLAS knows float32 only",
    "dequantizes": "13 times faster than its quantised product",
    "product_rows": "made dense first, so the width does not matter",
    "fused_attention": "it has no fused kernel",
    "score_bytes": "a tile's scores fit its cache",
    "vocabulary_chunk": "a tile's logits fit its cache",
    "vocabulary_rows": "a tile's logits fit its cache",
    "experts": "it gathers dense float32 only, and row by row: blocks from "
    f"{BLOCK_PAIRS} rows on, a product per expert for other types",
}


class CPU(Backend):
    """Any CPU; the judge of the others."""

    name = "cpu"
    kind = mx.DeviceType.cpu
    why = WHY

    def __init__(self, choices: Choices = CHOICES):
        super().__init__(choices)

    def missing(self) -> str | None:
        return None

    def description(self) -> str:
        return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"

    def limits(self) -> Limits:
        return Limits(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def experts(self, dtype: mx.Dtype, *, quantized: bool, pairs: int) -> ExpertPath:
        if quantized or dtype != mx.float32:
            return "loop"
        return "blocks" if pairs >= BLOCK_PAIRS else "sorted"

    def exp(self, x: mx.array) -> mx.array:
        return exp(x)

    def softcap(self, x: mx.array, cap: float, scale: mx.array) -> mx.array:
        return softcap(x, cap, scale)

    def gelu(self, x: mx.array) -> mx.array:
        return gelu(x)

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, mask: Mask
    ) -> mx.array:
        return attend(queries, keys, values, mask)


def exp(x: mx.array) -> mx.array:
    """e^x as a power; e in float32 is 3e-8 off, less than x is rounded by."""
    return mx.power(math.e, x.astype(mx.float32)).astype(x.dtype)


def softcap(x: mx.array, cap: float, scale: mx.array) -> mx.array:
    """tanh(x / cap) · scale, by tanh z = 1 - 2 / (e^2z + 1); 1 where e^2z overflows."""
    return scale - 2 * scale / (exp(x * (2 / cap)) + 1)


def gelu(x: mx.array) -> mx.array:
    """x / (1 + e^-2u), u = √(2/π) · (x + 0.044715 x³): gelu in its tanh form."""
    return _gelu(x)


def _gated(x: mx.array) -> mx.array:
    return x / (1 + exp(x * (-TWICE * (1 + 0.044715 * x * x))))


def _slope(x: mx.array, given: mx.array, y: mx.array) -> mx.array:
    """s + x · s · (1 - s) · 2u' of s = 1 / (1 + e^-2u), finite where e^-2u is not."""
    square = x * x
    s = 1 / (1 + exp(x * (-TWICE * (1 + 0.044715 * square))))
    return given * s * (1 + x * (1 - s) * (TWICE * (1 + 0.134145 * square)))


_gelu = differentiable(_gated, _slope)


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
    """Attention as `Backend.attend` describes it, computed in float32.

    The heads that share a key head are stacked into one product.
    """
    B, H, T, W = queries.shape
    K, S = keys.shape[1:3]
    dtype = queries.dtype
    queries, keys, values = (a.astype(mx.float32) for a in (queries, keys, values))
    scores = queries.reshape(B, K, H // K * T, W) @ keys.swapaxes(-1, -2)
    if mask is not None:
        if isinstance(mask, str):
            mask = mx.arange(S) <= mx.arange(S - T, S)[:, None]
        scores = scores.reshape(B, H, T, S)
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
        scores = scores.reshape(B, K, H // K * T, S)
    highest = mx.stop_gradient(mx.max(scores, axis=-1, keepdims=True))  # it cancels
    weights = exp(scores - highest)
    y = (weights @ values) / mx.sum(weights, axis=-1, keepdims=True)
    return y.reshape(B, H, T, W).astype(dtype)
