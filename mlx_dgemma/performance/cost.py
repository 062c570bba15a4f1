"""What weights, prefixes, steps and commits cost in theory: bytes and operations.

Every count is a floor. Only matrix products are operations, two per multiply-add. Only
weights and the encoded prefix are bytes, each read once per pass.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mlx.utils import tree_flatten

from ..checkpoint.config import LayerConfig, ModelConfig
from ..checkpoint.quantize import RECIPES, Quantization, quantizable
from ..checkpoint.weights import expected_shapes, layer_path
from ..files.safetensors import TensorInfo
from ..model.language import DiffusionGemma

PARTS = (
    "attention",  # projections of queries, keys, values and output
    "scores",  # queries · keys and probabilities · values
    "feed_forward",  # dense; the layer's norms and scalars go with it
    "experts",
    "router",
    "self_conditioning",
    "head",
    "signal",  # soft embedding of a step's logits
)
# Parameters of the last layer that encoding needs; its output is not used.
LAST_ENCODED = {"input_layernorm", "k_proj", "v_proj", "k_norm"}


class Cost(NamedTuple):
    """Operations and bytes; those of experts are expected values."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Storage:
    """How the text weights of a model lie in memory.

    value_bytes   of a dense weight, a scale or bias, a key or value: 2 or 4
    sizes         bytes of each parameter of the dense model, scales included
    """

    value_bytes: int
    sizes: Mapping[str, int]

    @classmethod
    def planned(
        cls,
        config: ModelConfig,
        value_bytes: int,
        quantization: Quantization | None = None,
        recipe: str = "uniform",
    ) -> "Storage":
        """Return what a conversion makes; without quantization a dense model."""
        sizes: dict[str, int] = {}
        for name, shape in expected_shapes(config).items():
            q, parts = None, {"weight": shape}
            if quantization is not None and quantizable(name, shape):
                layer = layer_path(name.removesuffix(".weight"))
                q = RECIPES[recipe](layer, quantization).fit_to_shape(shape)
            if q is not None:
                parts = q.packed_shapes(shape)
            sizes[name] = 0
            for part, packed in parts.items():
                dtype = None if q is None else q.storage_dtype(part)
                width = value_bytes if dtype is None else dtype.size
                sizes[name] += math.prod(packed) * width
        return cls(value_bytes, sizes)

    @classmethod
    def of_arrays(cls, value_bytes: int, arrays: Iterable[tuple[str, int]]):
        """Return how named arrays of so many bytes are stored, by parameter."""
        sizes: dict[str, int] = {}
        for name, nbytes in arrays:
            layer, _, part = name.rpartition(".")
            weight = f"{layer}.weight" if part in ("scales", "biases") else name
            names = [weight]
            if "gate_up_proj" in weight and ".experts." not in weight:
                # loading may have joined two layers
                names = [weight.replace("gate_up", half) for half in ("gate", "up")]
            for one in names:
                sizes[one] = sizes.get(one, 0) + nbytes // len(names)
        return cls(value_bytes, sizes)

    @classmethod
    def of_files(cls, parameters: Mapping[str, TensorInfo]) -> "Storage":
        """Return how a checkpoint stores its parameters, known from headers."""
        arrays = ((name, info.nbytes) for name, info in parameters.items())
        return cls.of_arrays(parameters["norm.weight"].dtype.size, arrays)

    @classmethod
    def of_model(cls, model: DiffusionGemma) -> "Storage":
        """Return how the weights of a model in memory lie there."""
        parameters = dict(tree_flatten(model.parameters()))
        arrays = ((name, array.nbytes) for name, array in parameters.items())
        return cls.of_arrays(model.dtype.size, arrays)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all text weights; a vision tower is not counted."""
        return sum(self.sizes.values())


def prefix_bytes(config: ModelConfig, tokens: int, value_bytes: int) -> int:
    """Return the bytes of the cache of `tokens` encoded tokens.

    Full layers store every token, sliding ones the last window - 1. The float32 cos
    and sin of every position are stored once for each kind of full layer.
    """
    stored = sum(
        _layer_bytes(config, layer, tokens, value_bytes) for layer in config.layers
    )
    kinds = {layer for layer in config.layers if not layer.sliding}
    return stored + tokens * sum(2 * 4 * kind.rope.rotated for kind in kinds)


def step_cost(
    config: ModelConfig, storage: Storage, rows: int, prefix: int, canvas: int
) -> dict[str, Cost]:
    """Return the cost, by PARTS, of one denoising step of `rows` canvases.

    A canvas has `canvas` tokens behind a prefix of `prefix` tokens of its own, and a
    signal, unlike at the first step. One read of the tied matrix serves both the head
    and the soft embedding.
    """
    tokens = rows * canvas
    costs = _products(config, storage, tokens, expected_shapes(config))
    flops = sum(
        _score_flops(config, layer, tokens * (_visible(config, layer, prefix) + canvas))
        for layer in config.layers
    )
    read = rows * prefix_bytes(config, prefix, storage.value_bytes)
    costs |= {"scores": Cost(flops, read), "signal": Cost(costs["head"].flops)}
    return {part: costs[part] for part in PARTS}


def encode_cost(
    config: ModelConfig, storage: Storage, rows: int, prefix: int, tokens: int
) -> dict[str, Cost]:
    """Return the cost, by part, of encoding `tokens` tokens on each of `rows` prefixes.

    A commit encodes a canvas. The last layer counts up to its keys and values; there is
    neither head nor signal, and embedding rows are looked up.
    """
    *layers, last = (f"layers.{index}." for index in range(len(config.layers)))
    shapes = {
        name: shape
        for name, shape in expected_shapes(config).items()
        if name.startswith(tuple(layers))
        or (name.startswith(last) and LAST_ENCODED & set(name.split(".")))
    }
    flops, read = 0, 0
    for layer in config.layers[:-1]:
        window = config.sliding_window if layer.sliding else prefix + tokens
        pairs = _causal_pairs(prefix + tokens, window) - _causal_pairs(prefix, window)
        flops += rows * _score_flops(config, layer, pairs)
        read += rows * _layer_bytes(config, layer, prefix, storage.value_bytes)
    costs = _products(config, storage, rows * tokens, shapes)
    return costs | {"scores": Cost(flops, read)}


def floor_seconds(
    costs: Mapping[str, Cost], flops_per_second: float, bytes_per_second: float
) -> float:
    """Return Σ over parts of max(flops/F, bytes/B), the least seconds possible.

    Parts follow one another; within one, reading hides behind computing.
    """
    return sum(
        max(cost.flops / flops_per_second, cost.bytes / bytes_per_second)
        for cost in costs.values()
    )


def _products(
    config: ModelConfig,
    storage: Storage,
    tokens: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Cost]:
    """Return the cost of `tokens` tokens times every matrix, each read once.

    Of E experts, N tokens choosing k each are expected to hit E(1 - (1 - k/E)^N)
    different ones, which are the ones read.
    """
    chosen = config.top_k_experts / config.num_experts
    costs: dict[str, Cost] = {}
    for name, shape in shapes.items():
        part, size = _part(name), storage.sizes[name]
        flops = 2 * tokens * math.prod(shape) if quantizable(name, shape) else 0
        if part == "experts":
            flops, size = flops * chosen, size * (1 - (1 - chosen) ** tokens)
        before = costs.get(part, Cost())
        costs[part] = Cost(before.flops + flops, before.bytes + size)
    return costs


def _part(parameter: str) -> str:
    if not parameter.startswith("layers."):
        return "self_conditioning" if "self_conditioning" in parameter else "head"
    kind = parameter.split(".")[2]
    if kind == "self_attn":
        return "attention"
    return kind if kind in PARTS else "feed_forward"


def _causal_pairs(tokens: int, window: int) -> int:
    """Return Σ over positions p < tokens of min(p + 1, window)."""
    growing = min(tokens, window)
    return growing * (growing + 1) // 2 + (tokens - growing) * growing


def _score_flops(config: ModelConfig, layer: LayerConfig, pairs: int) -> int:
    """Two products of head_dim multiply-adds, per (query, key) pair and query head."""
    return 4 * pairs * config.num_attention_heads * layer.head_dim


def _visible(config: ModelConfig, layer: LayerConfig, prefix: int) -> int:
    """Return how many of `prefix` tokens the next token sees in a layer."""
    return min(prefix, config.sliding_window - 1) if layer.sliding else prefix


def _layer_bytes(
    config: ModelConfig, layer: LayerConfig, prefix: int, value_bytes: int
) -> int:
    """Keys and values of what the next token sees, or (full) their projection."""
    arrays = 2 if layer.sliding else 1
    numbers = arrays * layer.kv_heads * layer.head_dim
    return _visible(config, layer, prefix) * numbers * value_bytes
