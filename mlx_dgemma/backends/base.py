"""What a device says of itself, and the operations that it may have a faster form of.

The operations here are MLX's own; both forms compute the same.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn

ExpertPath = Literal["sorted", "blocks", "loop"]
Mask = mx.array | str | None


@dataclass(eq=False)
class Backend:
    """One device that MLX computes on, and its numbers.

    The defaults are those of a GPU, from MLX's source and not measured on one; a device
    says beside a number of its own why it differs.
    """

    name: ClassVar[str]
    kind: ClassVar[mx.DeviceType] = mx.DeviceType.gpu

    compiles: bool = True  # trace a step once, replay it: fewer kernels, less host time
    runs_ahead: bool = True  # start a step before the last one's stop flags are read
    dequantizes: bool = False  # make quantised weights dense before their product
    product_rows: int = 1  # join gate and up where that makes their rows a multiple
    score_bytes: int = 512 << 20  # attention scores alive at once
    vocabulary_chunk: int = 32_768  # rows of the embedding matrix in one product
    vocabulary_rows: int = 1024  # positions in one product with such a chunk

    def missing(self) -> str | None:
        """Return why it cannot be used here and how to fix that; None if it can."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Set what must be set before the first array is computed."""
        # or float32 products are rounded to 11 bits on a GPU
        os.environ.setdefault("MLX_ENABLE_TF32", "0")

    def info(self) -> Mapping[str, str | int]:
        """Return `mx.device_info` of this device; its keys differ between devices."""
        return mx.device_info(mx.Device(self.kind))

    def info_number(self, *keys: str) -> int | None:
        """Return the first of these keys of `info` that holds a number."""
        values = (self.info().get(key) for key in keys)
        return next((value for value in values if isinstance(value, int)), None)

    def description(self) -> str:
        """Return the device's name."""
        return str(self.info().get("device_name", self.name))

    def memory(self) -> int | None:
        """Return the bytes that one process may use, if the device says so."""
        raise NotImplementedError

    def product_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """Return the dtype in which to multiply matrices of `dtype`."""
        return dtype

    def experts(self, dtype: mx.Dtype, *, quantized: bool, pairs: int) -> ExpertPath:
        """Return how to run `pairs` rows of token and expert.

        sorted   one row per pair, gathered in order of experts
        blocks   rows in blocks of one expert each
        loop     one product per expert
        """
        return "sorted"

    exp = staticmethod(mx.exp)
    gelu = staticmethod(nn.gelu_approx)  # in its tanh form

    def softcap(self, x: mx.array, cap: float, scale: mx.array) -> mx.array:
        """tanh(x / cap) · scale, elementwise; scale broadcasts against x."""
        return mx.tanh(x / cap) * scale

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, mask: Mask
    ) -> mx.array:
        """softmax(q · kᵀ) · v: (B, H, T, W), two of (B, K, S, W) -> (B, H, T, W).

        mask (…, T, S) is True where a query may look; "causal" when the T queries are
        the last T keys; None when all may see all.
        """
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=1.0, mask=mask
        )


def differentiable(forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """Return `forward` with the gradient `backward` of inputs, cotangents, outputs."""
    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    return function
