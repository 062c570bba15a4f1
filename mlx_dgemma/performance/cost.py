"""What a step, a prefill and a commit cost in theory: operations and bytes.

Pure functions of the model's shape and of how its weights are stored; nothing is
measured and no device is asked. Every count is a floor. Only matrix products are
operations. Only weights and the encoded prefix are bytes, each read once per pass:
activations, keys and values just made, and the (L, V) logits are counted as never
touching memory. Head and soft embedding are an attention over the vocabulary, so
one read of the tied matrix can serve both.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.config import LayerConfig, ModelConfig
from ..checkpoint.quantize import RECIPES, Quantization, quantizable
from ..checkpoint.weights import expected_shapes, layer_path
from ..errors import SettingsError
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
# What encoding still needs of the last layer, whose output nobody reads.
LAST_ENCODED = ("input_layernorm", "k_proj", "v_proj", "k_norm")


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
    """How weights lie in memory, tensor by tensor as a conversion would leave them.

    value_bytes    of a dense weight, a scale or bias, a key or value: 2 or 4
    quantization   code of linear maps and embedding; None where all are dense
    recipe         name in RECIPES: which layers that code is for

    Raises SettingsError naming what cannot be.
    """

    value_bytes: int
    quantization: Quantization | None = None
    recipe: str = "uniform"

    def __post_init__(self) -> None:
        if self.value_bytes not in (2, 4):
            raise SettingsError(f"value_bytes is {self.value_bytes}; it must be 2 or 4")
        if self.recipe not in RECIPES:
            raise SettingsError(
                f"recipe is {self.recipe!r}; supported: {', '.join(RECIPES)}"
            )

    @classmethod
    def dense(cls, dtype: mx.Dtype) -> "Storage":
        """Every weight in `dtype`, a float of 2 or 4 bytes."""
        return cls(dtype.size)

    @classmethod
    def quantized(
        cls,
        quantization: Quantization,
        recipe: str = "uniform",
        dtype: mx.Dtype = mx.bfloat16,
    ) -> "Storage":
        """Quantised by a recipe; norms, scales and activations in `dtype`."""
        return cls(dtype.size, quantization, recipe)

    def nbytes(self, parameter: str, shape: tuple[int, ...]) -> int:
        """Bytes of one parameter whose dense shape this is, scales included."""
        q = self._code(parameter, shape)
        if q is None:
            return math.prod(shape) * self.value_bytes
        total = 0
        for part, packed in q.packed_shapes(shape).items():
            coded = q.storage_dtype(part)
            width = self.value_bytes if coded is None else coded.size
            total += math.prod(packed) * width
        return total

    def _code(self, parameter: str, shape: tuple[int, ...]) -> Quantization | None:
        if self.quantization is None or not quantizable(parameter, shape):
            return None
        layer = layer_path(parameter.removesuffix(".weight"))
        return RECIPES[self.recipe](layer, self.quantization).fit_to_shape(shape)


@dataclass(frozen=True)
class Loaded(Storage):
    """How the weights of a model in memory lie there."""

    sizes: Mapping[str, int] = field(default_factory=dict)  # of each parameter

    @classmethod
    def of(cls, model: DiffusionGemma) -> "Loaded":
        """Weighed part by part: a quantised weight with its scales and biases."""
        parameters = tree_flatten(model.parameters())
        assert isinstance(parameters, list)
        sizes: dict[str, int] = {}
        for name, array in parameters:
            layer, _, part = name.rpartition(".")
            whole = f"{layer}.weight" if part in ("scales", "biases") else name
            names = _as_stored(whole)
            for stored in names:
                sizes[stored] = sizes.get(stored, 0) + array.nbytes // len(names)
        return cls(model.dtype.size, sizes=sizes)

    def nbytes(self, parameter: str, shape: tuple[int, ...]) -> int:
        return self.sizes[parameter]


def weight_bytes(config: ModelConfig, storage: Storage) -> int:
    """Bytes of all text weights in memory; a vision tower is not counted."""
    shapes = expected_shapes(config)
    return sum(storage.nbytes(name, shape) for name, shape in shapes.items())


def bits_per_weight(config: ModelConfig, storage: Storage) -> dict[str, float]:
    """Mean bits per weight, scales included, of experts, embedding and the rest."""
    bits = dict.fromkeys(("experts", "embedding", "rest"), 0)
    weights = dict(bits)
    for name, shape in expected_shapes(config).items():
        group = "experts" if _part(name) == "experts" else "rest"
        group = "embedding" if name.startswith("embed_tokens.") else group
        bits[group] += 8 * storage.nbytes(name, shape)
        weights[group] += math.prod(shape)
    return {group: bits[group] / weights[group] for group in bits}


def prefix_bytes(config: ModelConfig, tokens: int, storage: Storage) -> int:
    """Bytes that `tokens` encoded tokens leave behind.

    Full layers hold every token; sliding ones the window - 1 that a later token
    can still see beside itself. The float32 cos and sin of every position are held
    once for each kind of full layer.
    """
    kept = sum(
        _seen(config, layer, tokens) * _column_bytes(layer, storage)
        for layer in config.layers
    )
    kinds = {layer for layer in config.layers if not layer.sliding}
    return kept + tokens * sum(2 * 4 * kind.rope.rotated for kind in kinds)


def step_cost(
    config: ModelConfig, storage: Storage, rows: int, prefix: int, canvas: int
) -> dict[str, Cost]:
    """One denoising step of `rows` canvases of `canvas` tokens, by PARTS.

    Each row has its own prefix of `prefix` tokens. It is a step with a signal, not
    the first one. Experts: of E, N tokens choosing k each are expected to hit
    E(1 - (1 - k/E)^N) different ones, which are the ones read.
    """
    tokens = rows * canvas
    costs = _weights_cost(config, storage, tokens, expected_shapes(config))
    scores = sum(
        _score_flops(config, layer, tokens * (_seen(config, layer, prefix) + canvas))
        for layer in config.layers
    )
    read = rows * prefix_bytes(config, prefix, storage)
    costs["scores"] = Cost(scores, read)
    costs["signal"] = Cost(costs["head"].flops, 0)  # its matrix came with the head
    return {part: costs[part] for part in PARTS}


def encode_cost(
    config: ModelConfig, storage: Storage, rows: int, prefix: int, tokens: int
) -> dict[str, Cost]:
    """Encoding `tokens` more tokens on each of `rows` prefixes in one pass, by part.

    A commit is this with the canvas's length. The last layer counts only up to its
    keys and values. Embedding rows are looked up: neither head nor signal is there.
    """
    costs = _encoder_weights(config, storage, rows * tokens)
    costs["scores"] = _causal_scores(config, storage, rows, prefix, tokens)
    return costs


def prefill_cost(
    config: ModelConfig, storage: Storage, tokens: int, chunk: int
) -> dict[str, Cost]:
    """Encoding a prompt of `tokens` from nothing, `chunk` tokens a pass, by part.

    Every pass reads the weights and the prefix so far. Raises SettingsError for a
    chunk below 1.
    """
    if chunk < 1:
        raise SettingsError(f"chunk is {chunk}; it must be at least 1")
    sizes = [chunk] * (tokens // chunk) + [tokens % chunk] * (tokens % chunk > 0)
    weights = {size: _encoder_weights(config, storage, size) for size in set(sizes)}
    scores = [
        {"scores": _causal_scores(config, storage, 1, index * chunk, size)}
        for index, size in enumerate(sizes)
    ]
    return _added([*(weights[size] for size in sizes), *scores])


def floor_seconds(
    costs: Mapping[str, Cost], flops_per_second: float, bytes_per_second: float
) -> float:
    """Seconds below which no program gets: Σ over parts of max(flops/F, bytes/B).

    Parts follow one another; within one, reading hides behind computing.
    """
    return sum(
        max(cost.flops / flops_per_second, cost.bytes / bytes_per_second)
        for cost in costs.values()
    )


def total(costs: Mapping[str, Cost]) -> Cost:
    """All parts together."""
    return sum(costs.values(), Cost())


def _part(parameter: str) -> str:
    """The part of a pass that reads a parameter."""
    match parameter.split("."):
        case ["layers", _, "self_attn", *_]:
            return "attention"
        case ["layers", _, "experts" | "router" as name, *_]:
            return name
        case ["layers", *_]:
            return "feed_forward"
        case ["self_conditioning", *_]:
            return "self_conditioning"
    return "head"


def _as_stored(parameter: str) -> list[str]:
    """The names on disk of what may have been joined when it was loaded."""
    if ".experts." in parameter or "gate_up_proj" not in parameter:
        return [parameter]
    halves = ("gate_proj", "up_proj")
    return [parameter.replace("gate_up_proj", half) for half in halves]


def _weights_cost(
    config: ModelConfig,
    storage: Storage,
    tokens: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Cost]:
    """Products of `tokens` tokens with every matrix of `shapes`, each read once."""
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


def _encoder_weights(
    config: ModelConfig, storage: Storage, tokens: int
) -> dict[str, Cost]:
    last = f"layers.{len(config.layers) - 1}."
    shapes = {
        name: shape
        for name, shape in expected_shapes(config).items()
        if name.startswith("layers.")
        and (not name.startswith(last) or set(name.split(".")) & {*LAST_ENCODED})
    }
    return _weights_cost(config, storage, tokens, shapes)


def _causal_scores(
    config: ModelConfig, storage: Storage, rows: int, prefix: int, tokens: int
) -> Cost:
    """Attention of new tokens to the prefix, themselves and one another.

    (query, key) pairs of the token at position p: p + 1, in sliding layers at most
    the window.
    """
    flops, read = 0, 0
    for layer in config.layers[:-1]:
        window = config.sliding_window if layer.sliding else None
        pairs = _pairs(prefix + tokens, window) - _pairs(prefix, window)
        flops += rows * _score_flops(config, layer, pairs)
        read += rows * _seen(config, layer, prefix) * _column_bytes(layer, storage)
    return Cost(flops, read)


def _pairs(tokens: int, window: int | None) -> int:
    """Σ over positions p < tokens of min(p + 1, window)."""
    growing = tokens if window is None else min(tokens, window)
    return growing * (growing + 1) // 2 + (tokens - growing) * growing


def _score_flops(config: ModelConfig, layer: LayerConfig, pairs: int) -> int:
    """Two products of head_dim multiply-adds, per pair and query head."""
    return 4 * pairs * config.num_attention_heads * layer.head_dim


def _seen(config: ModelConfig, layer: LayerConfig, prefix: int) -> int:
    """How many of `prefix` tokens the next one sees in a layer."""
    return min(prefix, config.sliding_window - 1) if layer.sliding else prefix


def _column_bytes(layer: LayerConfig, storage: Storage) -> int:
    """What one layer keeps of a token: key and value, or (full) what both come from."""
    kept = 2 if layer.sliding else 1
    return kept * layer.kv_heads * layer.head_dim * storage.value_bytes


def _added(costs: Iterable[Mapping[str, Cost]]) -> dict[str, Cost]:
    added: dict[str, Cost] = {}
    for one in costs:
        for part, cost in one.items():
            added[part] = added.get(part, Cost()) + cost
    return added
