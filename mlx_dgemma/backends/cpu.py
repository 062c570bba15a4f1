"""The CPU: the same mathematics in the operations that MLX is fast at there.

Its `power` takes 3.4 ns an element where `exp` takes 10 and `tanh` 16; its attention
is unfused, so nothing is lost by writing it out (`tests/bench/RESULTS.md`).
"""

import math
import os
import platform
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import SlowBlasWarning
from .base import Backend, ExpertPath, Mask, differentiable

BLOCK_PAIRS = 512  # from here on padding to blocks costs less than products by row
FAST_BLAS = re.compile(r"/lib(openblas|mkl|blis)")  # not NumPy's own libscipy_openblas
MAPPED_FILES = Path("/proc/self/maps")
TWO_ROOT = 2 * math.sqrt(2 / math.pi)


def exp(x: mx.array) -> mx.array:
    """e^x as a power; e in float32 is 3e-8 off, less than x is rounded by."""
    return mx.power(math.e, x.astype(mx.float32)).astype(x.dtype)


def _gelu(x: mx.array) -> mx.array:
    """x / (1 + e^-2u), u = √(2/π) · (x + 0.044715 x³)."""
    return x / (1 + exp(x * (-TWO_ROOT * (1 + 0.044715 * x * x))))


def _gelu_gradient(x: mx.array, given: mx.array, y: mx.array) -> mx.array:
    """s + x · s · (1 - s) · 2u' of s = 1 / (1 + e^-2u), finite where e^-2u is not."""
    square = x * x
    s = 1 / (1 + exp(x * (-TWO_ROOT * (1 + 0.044715 * square))))
    return given * s * (1 + x * (1 - s) * (TWO_ROOT * (1 + 0.134145 * square)))


gelu = differentiable(_gelu, _gelu_gradient)


@dataclass(eq=False)
class CPU(Backend):
    """Any CPU; the reference for the other devices."""

    name = "cpu"
    kind = mx.DeviceType.cpu
    compiles: bool = False  # the first run would wait for a C++ compiler
    runs_ahead: bool = False  # there is no idle time to fill
    dequantizes: bool = True  # 13 times faster than its quantised product
    score_bytes: int = 8 << 20  # a tile's scores fit the cache
    vocabulary_chunk: int = 2048  # a tile's logits fit the cache
    vocabulary_rows: int = 256

    def missing(self) -> str | None:
        return None

    def prepare(self) -> None:
        if (slow := slow_blas()) is not None:
            warnings.warn(slow, SlowBlasWarning, stacklevel=3)

    def description(self) -> str:
        return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"

    def memory(self) -> int | None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def product_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        return mx.float32  # the only one its BLAS has

    def experts(self, dtype: mx.Dtype, *, quantized: bool, pairs: int) -> ExpertPath:
        if quantized or dtype != mx.float32:  # its gather takes dense float32 only
            return "loop"
        return "blocks" if pairs >= BLOCK_PAIRS else "sorted"

    exp = staticmethod(exp)
    gelu = staticmethod(gelu)

    def softcap(self, x: mx.array, cap: float, scale: mx.array) -> mx.array:
        # tanh z = 1 - 2 / (e^2z + 1); 1 where e^2z overflows
        return scale - 2 * scale / (exp(x * (2 / cap)) + 1)

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, mask: Mask
    ) -> mx.array:
        """In float32; the heads that share a key head are stacked into one product."""
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
        # the maximum cancels, so it needs no gradient
        highest = mx.stop_gradient(mx.max(scores, axis=-1, keepdims=True))
        weights = exp(scores - highest)
        y = (weights @ values) / mx.sum(weights, axis=-1, keepdims=True)
        return y.reshape(B, H, T, W).astype(dtype)


def slow_blas() -> str | None:
    """Return what to do about the mlx-cpu wheel's BLAS; None if a fast one is here."""
    if sys.platform != "linux" or FAST_BLAS.search(MAPPED_FILES.read_text()):
        return None
    system = f"{platform.machine()}-linux-gnu"
    library = Path("/usr/lib") / system / "openblas-pthread" / "libblas.so.3"
    install = "" if library.exists() else "install libopenblas0-pthread and "
    return (
        f"MLX multiplies with a slow BLAS; {install}run with LD_PRELOAD={library}: "
        "8 to 10 times faster in float32"
    )
