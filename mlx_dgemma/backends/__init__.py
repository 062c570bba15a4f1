"""Which device runs the model, and what follows from it. Nobody else asks.

Each function is a choice between two ways to the same result; why one is taken is
said beside it.
"""

import os
import platform

import mlx.core as mx
import mlx.nn as nn

from . import cpu

MB = 1 << 20
GPU_SCORES = 512 * MB
GPU_CHUNK = 32768
GPU_ROWS = 1024


def name() -> str:
    """ "metal", "cuda" or "cpu": the device MLX computes on by default."""
    if _on_cpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def description() -> str:
    """The device in words, for those who read a figure measured on it."""
    if not _on_cpu():
        return str(mx.device_info()["device_name"])
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def peak_memory() -> int:
    """Most bytes MLX has held since the process began."""
    return mx.get_peak_memory()


def compiles() -> bool:
    """Whether a denoising step is traced once and replayed.

    On GPUs that fuses its small kernels and spares the host. On a CPU nothing is
    gained, and the first run would wait seconds for a C++ compiler.
    """
    return not _on_cpu()


def runs_ahead() -> bool:
    """Whether to start the next step before the host has read this one's flags.

    A CPU has no idle time to fill: a step taken in vain would cost all it takes.
    """
    return not _on_cpu()


def product_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """What to multiply matrices of `dtype` in: a CPU has a BLAS for float32 only."""
    return mx.float32 if _on_cpu() else dtype


def dequantizes() -> bool:
    """Whether to dequantise a weight before its product, which a CPU is 13 times
    faster with than with its quantised product."""
    return _on_cpu()


def score_bytes() -> int:
    """Most bytes of attention scores alive at once: what tiles of queries stay in.

    A CPU is faster when they fit its cache.
    """
    return 8 * MB if _on_cpu() else GPU_SCORES


def vocabulary_chunk() -> int:
    """Rows of the embedding matrix looked at together; a multiple of 128.

    A CPU is faster when the (positions, chunk) logits fit its cache.
    """
    return 2048 if _on_cpu() else GPU_CHUNK


def vocabulary_rows() -> int:
    """Positions that look at a chunk together, for the same reasons."""
    return 256 if _on_cpu() else GPU_ROWS


def loops_over_experts(dtype: mx.Dtype, *, quantized: bool) -> bool:
    """Whether experts take one product each: a CPU gathers dense float32 only, or else
    slowly."""
    return _on_cpu() and (quantized or dtype != mx.float32)


def groups_rows(pairs: int) -> bool:
    """Whether to gather that many rows in blocks: a CPU's product is row by row if
    not, which costs more than the padding of blocks once there are many."""
    return _on_cpu() and pairs >= 512


def exp(x: mx.array) -> mx.array:
    """e^x, elementwise."""
    return cpu.exp(x) if _on_cpu() else mx.exp(x)


def softcap(x: mx.array, cap: float, scale: mx.array) -> mx.array:
    """tanh(x / cap) · scale, elementwise; scale broadcasts against x."""
    return cpu.softcap(x, cap, scale) if _on_cpu() else mx.tanh(x / cap) * scale


def gelu(x: mx.array) -> mx.array:
    """gelu in its tanh form, elementwise."""
    return cpu.gelu(x) if _on_cpu() else nn.gelu_approx(x)


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None
) -> mx.array:
    """softmax(q · kᵀ) · v: (B, H, T, W), two of (B, K, S, W) -> (B, H, T, W).

    mask (…, T, S) is True where a query may look; "causal" when the T queries are
    the last T keys; None when all may see all.
    """
    if _on_cpu():
        return cpu.attend(queries, keys, values, mask)
    return mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=1.0, mask=mask
    )


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu
