"""What every device answers: is it here, what are its limits, what is it fast at.

The ways written here are MLX's own, which GPUs are fast at. A device overrides what it
has a better way for; both ways lead to the same result.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn

ExpertPath = Literal["sorted", "blocks", "loop"]
Mask = mx.array | str | None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Which of two ways to the same result a device takes.

    compiles           a denoising step is traced once and replayed
    runs_ahead         the next step is started before the host read this one's flags
    product_dtype      what matrices are multiplied in; None: in what they are
    dequantizes        a quantised weight is made dense before its product
    product_rows       quantised products are fast where their outputs are a multiple of
                       this: gate and up are joined where that makes them one; 1: never
    fused_attention    attention keeps its scores to itself where the kernel allows it
    score_bytes        most bytes of attention scores alive at once, in tiles of queries
    vocabulary_chunk   rows of the embedding matrix looked at together, in 128s
    vocabulary_rows    positions that look at a chunk together
    """

    compiles: bool
    runs_ahead: bool
    product_dtype: mx.Dtype | None
    dequantizes: bool
    product_rows: int
    fused_attention: bool
    score_bytes: int
    vocabulary_chunk: int
    vocabulary_rows: int


@dataclass(frozen=True)
class Limits:
    """Bytes of memory; None where the device does not say.

    memory   what one process may use without swapping
    free     what nobody uses just now
    wired    what may be kept from being paged out
    """

    memory: int | None = None
    free: int | None = None
    wired: int | None = None


class Backend:
    """One device that MLX computes on."""

    name: ClassVar[str]
    kind: ClassVar[mx.DeviceType]
    # why each choice, in a few words, and why experts run as they do
    why: ClassVar[Mapping[str, str]]

    def __init__(self, choices: Choices):
        self.choices = choices

    def missing(self) -> str | None:
        """Why it cannot be used here, in one line with the mend; None if it can."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What must be set before the first array is computed."""

    def info(self) -> Mapping[str, str | int]:
        """`mx.device_info` of this device; which keys there are differs."""
        return mx.device_info(mx.Device(self.kind))

    def description(self) -> str:
        """The device in words, for those who read a figure measured on it."""
        return str(self.info().get("device_name", self.name))

    def limits(self) -> Limits:
        """What memory there is."""
        raise NotImplementedError

    def product_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """What to multiply matrices of `dtype` in."""
        return self.choices.product_dtype or dtype

    def experts(self, dtype: mx.Dtype, *, quantized: bool, pairs: int) -> ExpertPath:
        """How to run `pairs` rows of token and expert.

        sorted   one row per pair, gathered in order of experts
        blocks   rows in blocks of one expert each
        loop     one product per expert
        """
        return "sorted"

    def exp(self, x: mx.array) -> mx.array:
        """e^x, elementwise."""
        return mx.exp(x)

    def softcap(self, x: mx.array, cap: float, scale: mx.array) -> mx.array:
        """tanh(x / cap) · scale, elementwise; scale broadcasts against x."""
        return mx.tanh(x / cap) * scale

    def gelu(self, x: mx.array) -> mx.array:
        """gelu in its tanh form, elementwise."""
        return nn.gelu_approx(x)

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


def keep_float32() -> None:
    """Multiply float32 in float32: MLX rounds it to 11 bits on GPUs unless told not to.

    The released weights are 16 bits, so only those pay for it who chose float32.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


def whole(info: Mapping[str, str | int], key: str) -> int | None:
    """A number that a device may or may not say of itself."""
    value = info.get(key)
    return value if isinstance(value, int) else None
