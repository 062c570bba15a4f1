"""What a denoising step and a commit cost in theory: operations and bytes.

Pure functions of the model's shape and of how its weights are stored. Every count is
a floor. Only matrix products are operations. Only weights and the encoded prefix are
bytes, each read once per pass: activations, new keys and values, and the (L, V)
logits are counted as if they never touched memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlx.utils import tree_flatten

from ..checkpoint.config import LayerConfig, ModelConfig
from ..checkpoint.quantize import RECIPES, Quantization, quantizable
from ..checkpoint.weights import expected_shapes, layer_path
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


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, two per multiply-add, and bytes read from memory.

    Bytes of experts are expected values, so both are floats.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Storage:
    """How weights lie in memory, tensor by tensor as a conversion leaves them.

    value_bytes     of a dense weight, a scale or bias, a key or value: 2 or 4
    quantization    of linear maps and embedding; None where all are dense
    recipe          name in RECIPES: which layers the quantization is for
    """

    value_bytes: int
    quantization: Quantization | None = None
    recipe: str = "uniform"

    def nbytes(self, parameter: str, shape: tuple[int, ...]) -> int:
        """Return the bytes of a parameter of this dense shape, scales included."""
        q = None
        if self.quantization is not None and quantizable(parameter, shape):
            layer = layer_path(parameter.removesuffix(".weight"))
            q = RECIPES[self.recipe](layer, self.quantization).fit_to_shape(shape)
        if q is None:
            return math.prod(shape) * self.value_bytes
        total = 0
        for part, packed in q.packed_shapes(shape).items():
            dtype = q.storage_dtype(part)
            width = self.value_bytes if dtype is None else dtype.size
            total += math.prod(packed) * width
        return total


@dataclass(frozen=True)
class Loaded(Storage):
    """How the weights of a model in memory lie there: bytes of each parameter."""

    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: DiffusionGemma) -> "Loaded":
        """Measure a model; scales and biases count with their weight."""
        sizes: dict[str, int] = {}
        parameters = tree_flatten(model.parameters())
        assert isinstance(parameters, list)
        for name, array in parameters:
            layer, _, part = name.rpartition(".")
            weight = f"{layer}.weight" if part in ("scales", "biases") else name
            names = [weight]
            if "gate_up_proj" in weight and ".experts." not in weight:
                # loading may have joined two layers
                names = [weight.replace("gate_up", half) for half in ("gate", "up")]
            for one in names:
                sizes[one] = sizes.get(one, 0) + array.nbytes // len(names)
        return cls(model.dtype.size, sizes=sizes)

    def nbytes(self, parameter: str, shape: tuple[int, ...]) -> int:
        return self.sizes[parameter]


def weight_bytes(config: ModelConfig, storage: Storage) -> int:
    """Return the bytes of all text weights; a vision tower is not counted."""
    shapes = expected_shapes(config)
    return sum(storage.nbytes(name, shape) for name, shape in shapes.items())


def prefix_bytes(config: ModelConfig, tokens: int, storage: Storage) -> int:
    """Return the bytes of the cache of `tokens` encoded tokens.

    Full layers store every token, sliding ones the last window - 1. The float32 cos
    and sin of every position are stored once for each kind of full layer.
    """
    stored = sum(
        _layer_prefix_bytes(config, layer, tokens, storage) for layer in config.layers
    )
    kinds = {layer for layer in config.layers if not layer.sliding}
    return stored + tokens * sum(2 * 4 * kind.rope.rotated for kind in kinds)


def step_cost(
    config: ModelConfig, storage: Storage, rows: int, prefix: int, canvas: int
) -> dict[str, Cost]:
    """Return the cost, by PARTS, of one denoising step of `rows` canvases.

    A canvas has `canvas` tokens behind a prefix of `prefix` tokens of its own. The
    step has a signal, unlike the first one. Head and soft embedding are an attention
    over the vocabulary, so one read of the tied matrix serves both.
    """
    tokens = rows * canvas
    costs = _weights_cost(config, storage, tokens, expected_shapes(config))
    flops = sum(
        _score_flops(config, layer, tokens * (_visible(config, layer, prefix) + canvas))
        for layer in config.layers
    )
    costs["scores"] = Cost(flops, rows * prefix_bytes(config, prefix, storage))
    costs["signal"] = Cost(costs["head"].flops, 0)
    return {part: costs[part] for part in PARTS}


def encode_cost(
    config: ModelConfig, storage: Storage, rows: int, prefix: int, tokens: int
) -> dict[str, Cost]:
    """Return the cost, by part, of encoding `tokens` more tokens on each of `rows`
    prefixes in one pass; a commit encodes a canvas.

    The last layer counts up to its keys and values. There is neither head nor signal,
    and embedding rows are looked up.
    """
    *layers, last = (f"layers.{index}." for index in range(len(config.layers)))
    shapes = {
        name: shape
        for name, shape in expected_shapes(config).items()
        if name.startswith(tuple(layers))
        or (name.startswith(last) and LAST_ENCODED & set(name.split(".")))
    }
    costs = _weights_cost(config, storage, rows * tokens, shapes)
    scores = Cost()
    for layer in config.layers[:-1]:
        window = config.sliding_window if layer.sliding else prefix + tokens
        pairs = _causal_pairs(prefix + tokens, window) - _causal_pairs(prefix, window)
        scores += Cost(
            rows * _score_flops(config, layer, pairs),
            rows * _layer_prefix_bytes(config, layer, prefix, storage),
        )
    return costs | {"scores": scores}


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


def _weights_cost(
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
        part, size = _part(name), storage.nbytes(name, shape)
        flops = 2 * tokens * math.prod(shape) if quantizable(name, shape) else 0
        cost = Cost(flops, size)
        if part == "experts":
            cost = Cost(flops * chosen, size * (1 - (1 - chosen) ** tokens))
        costs[part] = costs.get(part, Cost()) + cost
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


def _layer_prefix_bytes(
    config: ModelConfig, layer: LayerConfig, prefix: int, storage: Storage
) -> int:
    """Keys and values of what the next token sees, or (full) their projection."""
    arrays = 2 if layer.sliding else 1
    numbers = arrays * layer.kv_heads * layer.head_dim
    return _visible(config, layer, prefix) * numbers * storage.value_bytes
