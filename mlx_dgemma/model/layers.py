"""The parts of a layer that are not attention: feed-forward, router, experts.

Every formula follows transformers' `models/diffusion_gemma`. Knows nothing of
prefixes, canvases or modes: shapes are (…, D).
"""

import mlx.core as mx
import mlx.nn as nn

from .. import backends
from ..checkpoint.config import ModelConfig


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu_tanh(gate) · up, elementwise."""
    return nn.gelu_approx(gate) * up


class FeedForward(nn.Module):
    """Dense gated MLP: down(gelu(gate(x)) · up(x)), (…, D) -> (…, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class SelfConditioning(FeedForward):
    """Mixes the previous step's soft embeddings into the canvas embeddings."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.eps = config.rms_norm_eps
        self.pre_norm = nn.RMSNorm(config.hidden_size, eps=self.eps)

    def __call__(self, x: mx.array, signal: mx.array | None = None) -> mx.array:
        """(B, L, D) embeddings and the (B, L, D) signal, or None before any step.

        The last norm has no weight and stands also where there is no signal; a
        signal of zeros passes the feed-forward as zeros, so None skips it.
        """
        if signal is not None:
            x = x + super().__call__(self.pre_norm(signal.astype(x.dtype)))
        return mx.fast.rms_norm(x, None, self.eps)


class Router(nn.Module):
    """Chooses k of E experts for each token and weighs them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.top_k_experts
        self.eps = config.rms_norm_eps
        self.root = config.hidden_size**-0.5
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))

    def __call__(self, residual: mx.array) -> tuple[mx.array, mx.array]:
        """(N, D) raw residual -> (N, k) expert indices, (N, k) float32 weights.

        The input is the residual itself, before any of the layer's norms.
        """
        x = mx.fast.rms_norm(residual, None, self.eps) * self.scale * self.root
        probabilities = mx.softmax(self.proj(x).astype(mx.float32), axis=-1)
        indices = mx.argpartition(-probabilities, kth=self.top_k - 1, axis=-1)
        indices = mx.stop_gradient(indices[..., : self.top_k])
        weights = mx.take_along_axis(probabilities, indices, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return indices, weights * self.per_expert_scale[indices]


class ExpertLinear(nn.Module):
    """E linear maps in one (E, out, in) weight."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = mx.zeros((experts, outputs, inputs))

    def gather(self, rows: mx.array, expert: mx.array) -> mx.array:
        """(R, 1, in) rows sorted by their (R,) expert -> (R, 1, out)."""
        weight = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(rows, weight, rhs_indices=expert, sorted_indices=True)

    def one(self, rows: mx.array, expert: int) -> mx.array:
        """(R, in) rows of a single expert -> (R, out)."""
        return rows @ self.weight[expert].T


class QuantizedExpertLinear(nn.Module):
    """E quantised linear maps; `weight` packed as mx.quantize leaves it."""

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        group_size: int,
        bits: int,
        mode: str,
    ):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        packed = (experts, outputs, inputs * bits // 32)
        self.weight = mx.zeros(packed, dtype=mx.uint32)
        self.scales = mx.zeros((experts, outputs, inputs // group_size))
        if mode == "affine":
            self.biases = mx.zeros_like(self.scales)
        self.freeze()

    def gather(self, rows: mx.array, expert: mx.array) -> mx.array:
        """(R, 1, in) rows sorted by their (R,) expert -> (R, 1, out)."""
        return mx.gather_qmm(
            rows,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=expert,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=True,
        )

    def one(self, rows: mx.array, expert: int) -> mx.array:
        """(R, in) rows of a single expert -> (R, out)."""
        biases = self.get("biases")
        weight = mx.dequantize(
            self.weight[expert],
            self.scales[expert],
            None if biases is None else biases[expert],
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=rows.dtype,
        )
        return rows @ weight.T


class Experts(nn.Module):
    """Top-k mixture of gated experts; gate and up stay fused as on disk."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, inner = config.num_experts, config.moe_intermediate_size
        self.gate_up_proj = ExpertLinear(experts, config.hidden_size, 2 * inner)
        self.down_proj = ExpertLinear(experts, inner, config.hidden_size)

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """(N, D) tokens, (N, k) experts, (N, k) weights -> (N, D).

        One contiguous row per (token, expert) pair, sorted by expert, which is
        what the sorted gather kernels want.
        """
        count, k = indices.shape
        order = mx.argsort(indices.flatten())
        rows = x[order // k]
        expert = indices.flatten()[order]
        run = _one_by_one if backends.loops_over_experts(x.dtype) else _gathered
        y = run(self, rows, expert)[mx.argsort(order)].reshape(count, k, -1)
        return (y * weights[..., None]).sum(axis=-2).astype(x.dtype)


def _gathered(experts: Experts, rows: mx.array, expert: mx.array) -> mx.array:
    hidden = experts.gate_up_proj.gather(rows[:, None], expert)
    gate, up = mx.split(hidden, 2, axis=-1)
    return experts.down_proj.gather(geglu(gate, up), expert)[:, 0]


def _one_by_one(experts: Experts, rows: mx.array, expert: mx.array) -> mx.array:
    """The same by one matrix product per expert; reads the indices on the host."""
    numbers: list[int] = expert.tolist()  # type: ignore[assignment]
    outputs, start = [], 0
    while start < len(numbers):
        number, end = numbers[start], start
        while end < len(numbers) and numbers[end] == number:
            end += 1
        hidden = experts.gate_up_proj.one(rows[start:end], number)
        gate, up = mx.split(hidden, 2, axis=-1)
        outputs.append(experts.down_proj.one(geglu(gate, up), number))
        start = end
    return mx.concatenate(outputs)
