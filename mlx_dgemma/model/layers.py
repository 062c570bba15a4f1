"""The parts of a layer that are not attention: feed-forward, router, experts.

Every formula follows transformers' `models/diffusion_gemma`. Knows nothing of
prefixes, canvases or modes: shapes are (…, D).
"""

import itertools
from collections.abc import Callable
from copy import copy

import mlx.core as mx
import mlx.nn as nn

from .. import backends
from ..checkpoint.config import ModelConfig


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu_tanh(gate) · up, elementwise."""
    return backends.current().gelu(gate) * up


class Linear(nn.Linear):
    """x · Wᵀ + b, multiplied in the dtype the device is fast at."""

    def __call__(self, x: mx.array) -> mx.array:
        fast = backends.current().product_dtype(x.dtype)
        if fast == x.dtype:
            return super().__call__(x)
        y = x.astype(fast) @ self.weight.astype(fast).T
        return (y + self.bias if "bias" in self else y).astype(x.dtype)


class QuantizedLinear(nn.QuantizedLinear):
    """The same from quantised weights."""

    def __call__(self, x: mx.array) -> mx.array:
        device = backends.current()
        if not device.dequantizes:
            return super().__call__(x)
        weight = dequantize(self, device.product_dtype(x.dtype))
        y = x.astype(weight.dtype) @ weight.T
        return (y + self.bias if "bias" in self else y).astype(x.dtype)


def dequantize(
    layer: "nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedExpertLinear",
    dtype: mx.Dtype,
    rows: slice | int = slice(None),
) -> mx.array:
    """The dense weight of a quantised layer, or some of its first axis."""
    biases = layer.get("biases")
    return mx.dequantize(
        layer.weight[rows],
        layer.scales[rows],
        None if biases is None else biases[rows],
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=dtype,
    )


class FeedForward(nn.Module):
    """Dense gated MLP: down(gelu(gate(x)) · up(x)), (…, D) -> (…, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(geglu(gate, up))

    def join(self) -> None:
        """Make one quantised product of gate and up, with the same results.

        Does nothing if one is dense or adapted, or if their quantisations differ.
        """
        gate, up = self.get("gate_proj"), self.get("up_proj")
        if not (isinstance(gate, QuantizedLinear) and isinstance(up, QuantizedLinear)):
            return
        codes = {(q.group_size, q.bits, q.mode) for q in (gate, up)}
        if len(codes) > 1:
            return
        joined = copy(gate)
        for part in ("weight", "scales", "biases"):
            if gate.get(part) is not None:
                joined[part] = mx.concatenate([gate[part], up[part]])
        mx.eval(joined.parameters())
        del self.gate_proj, self.up_proj
        self.gate_up_proj = joined


class SelfConditioning(FeedForward):
    """Mixes the previous step's soft embeddings into the canvas embeddings."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.eps = config.rms_norm_eps
        self.pre_norm = nn.RMSNorm(config.hidden_size, eps=self.eps)

    def __call__(self, x: mx.array, signal: mx.array | None = None) -> mx.array:
        """(B, L, D) embeddings and the (B, L, D) signal, or None before any step.

        The last norm has no weight and applies without a signal too. A signal of
        zeros leaves the feed-forward as zeros, so None skips it.
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
        self.proj = Linear(config.hidden_size, config.num_experts, bias=False)
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

    quantized = False

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.experts, self.inputs, self.outputs = experts, inputs, outputs
        self.weight = mx.zeros((experts, outputs, inputs))

    def gather(self, rows: mx.array, expert: mx.array) -> mx.array:
        """(G, M, in) groups of rows, each of one (G,) rising expert -> (G, M, out)."""
        weight = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(rows, weight, rhs_indices=expert, sorted_indices=True)

    def one(self, rows: mx.array, expert: int) -> mx.array:
        """(R, in) rows of a single expert -> (R, out)."""
        return rows @ self.weight[expert].astype(rows.dtype).T


class QuantizedExpertLinear(nn.Module):
    """E quantised linear maps; `weight` packed as mx.quantize leaves it."""

    quantized = True

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
        self.experts, self.inputs, self.outputs = experts, inputs, outputs
        self.group_size, self.bits, self.mode = group_size, bits, mode
        packed = (experts, outputs, inputs * bits // 32)
        self.weight = mx.zeros(packed, dtype=mx.uint32)
        self.scales = mx.zeros((experts, outputs, inputs // group_size))
        if mode == "affine":
            self.biases = mx.zeros_like(self.scales)
        self.freeze()

    def gather(self, rows: mx.array, expert: mx.array) -> mx.array:
        """(G, M, in) groups of rows, each of one (G,) rising expert -> (G, M, out)."""
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
        return rows @ dequantize(self, rows.dtype, expert).T


class Experts(nn.Module):
    """Top-k mixture of gated experts; gate and up stay fused as on disk."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, inner = config.num_experts, config.moe_intermediate_size
        self.gate_up_proj = ExpertLinear(experts, config.hidden_size, 2 * inner)
        self.down_proj = ExpertLinear(experts, inner, config.hidden_size)

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """(N, D) tokens, (N, k) experts, (N, k) weights -> (N, D)."""
        pairs = indices.flatten()
        path = backends.current().experts(
            x.dtype, quantized=self.gate_up_proj.quantized, pairs=pairs.size
        )
        order = mx.argsort(pairs)
        tokens, numbers = order // indices.shape[1], pairs[order]
        y = PATHS[path](self, x, tokens, numbers)[mx.argsort(order)]
        y = y.reshape(*indices.shape, -1)
        return (y * weights[..., None]).sum(axis=-2).astype(x.dtype)

    def run(self, rows: mx.array, expert: mx.array) -> mx.array:
        """(G, M, D) groups of rows, each of one (G,) rising expert -> (G, M, D)."""
        gate, up = mx.split(self.gate_up_proj.gather(rows, expert), 2, axis=-1)
        return self.down_proj.gather(geglu(gate, up), expert)


# Three ways to run the R = N · k pairs of token and expert, in order of experts: each
# takes (N, D) tokens and the (R,) token and expert of each pair, and returns (R, D).


def _sorted(
    experts: Experts, x: mx.array, tokens: mx.array, numbers: mx.array
) -> mx.array:
    """One contiguous row per pair: what the GPUs' gather kernels want."""
    return experts.run(x[tokens][:, None], numbers)[:, 0]


def _in_blocks(
    experts: Experts, x: mx.array, tokens: mx.array, numbers: mx.array
) -> mx.array:
    """Rows in blocks of one expert each, the last block of an expert half empty.

    However the tokens choose, R // size + E blocks are enough, so no shape depends
    on the choice.
    """
    count, pairs, size = experts.gate_up_proj.experts, numbers.size, 4
    while size < 64 and 8 * size * count <= pairs:
        size *= 2  # larger blocks where their padding weighs little
    sizes = mx.sum(numbers[:, None] == mx.arange(count), axis=0)
    blocks = (sizes + size - 1) // size
    ends = mx.cumsum(blocks)
    # where the first pair of an expert goes, less its place in the sorted order
    shift = (ends - blocks) * size - (mx.cumsum(sizes) - sizes)
    place = shift[numbers] + mx.arange(pairs)  # of each pair
    total = pairs // size + count
    source = mx.zeros((total * size,), dtype=mx.uint32)
    source[place] = tokens.astype(mx.uint32)
    owner = mx.sum(mx.arange(total)[:, None] >= ends, axis=-1)
    rows = x[source].reshape(total, size, -1)
    y = experts.run(rows, mx.minimum(owner, count - 1))
    return y.reshape(total * size, -1)[place]


def _one_by_one(
    experts: Experts, x: mx.array, tokens: mx.array, numbers: mx.array
) -> mx.array:
    """One product per expert; reads the choice on the host.

    For what MLX's CPU gather cannot do, or does slowly: other types than float32,
    and quantised weights.
    """
    rows = x[tokens].astype(backends.current().product_dtype(x.dtype))
    choices: list[int] = numbers.tolist()  # type: ignore[assignment]
    outputs, start = [], 0
    for number, group in itertools.groupby(choices):
        end = start + len(list(group))
        hidden = experts.gate_up_proj.one(rows[start:end], number)
        gate, up = mx.split(hidden, 2, axis=-1)
        outputs.append(experts.down_proj.one(geglu(gate, up), number))
        start = end
    return mx.concatenate(outputs).astype(x.dtype)


PATHS: dict[backends.ExpertPath, Callable[..., mx.array]] = {
    "sorted": _sorted,
    "blocks": _in_blocks,
    "loop": _one_by_one,
}
