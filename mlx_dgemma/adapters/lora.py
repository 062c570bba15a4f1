"""Low-rank adapters: W + scale · (A · B)ᵀ beside frozen weights, dense or quantised.

One adapter serves the shared stack in both of its modes. Files are mlx-lm's:
`adapters.safetensors` holds lora_a and lora_b by the layer's path, and
`adapter_config.json` says where they go. arXiv 2106.09685, with `scale` for alpha / r.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import expected_shapes
from ..errors import AdapterError, SettingsError
from ..model.language import DiffusionGemma
from ..model.layers import ExpertLinear, QuantizedExpertLinear
from ..model.loading import find_layer

TARGETS = {
    "attention": tuple(f"self_attn.{part}_proj" for part in "qkvo"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "self_conditioning": tuple(
        f"self_conditioning.{part}_proj" for part in ("gate", "up", "down")
    ),
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
    "router": ("router.proj",),
}
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedExpertLinear)
USUAL = ("attention", "mlp", "self_conditioning")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which layers are adapted, and how.

    rank, scale   of each adapter; alpha of other libraries is scale · rank
    keys          paths of layers, within a decoder layer or from the model's root
    num_layers    adapt that many layers, counted from the last; -1 all
    """

    rank: int = 16
    scale: float = 2.0
    keys: tuple[str, ...] = tuple(key for name in USUAL for key in TARGETS[name])
    num_layers: int = -1

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            why = "it must be a whole number, at least 1"
            raise SettingsError(f"rank is {self.rank!r}; {why}")
        if not isinstance(self.scale, int | float) or not 0 < self.scale < math.inf:
            raise SettingsError(f"scale is {self.scale!r}; it must be above 0")
        known = [key for keys in TARGETS.values() for key in keys]
        if strange := [key for key in self.keys if key not in known]:
            known = ", ".join(sorted(known))
            raise SettingsError(f"lora keys hold {strange[0]!r}; known: {known}")
        if len(set(self.keys)) < len(self.keys):
            raise SettingsError("lora keys name a layer twice; name it once")
        if not self.keys:
            raise SettingsError("no layers to adapt; name some targets")

    def layers(self, config: ModelConfig) -> Iterator[str]:
        """Yield the paths of adapted layers. Raises SettingsError for too many."""
        roots = [key for key in self.keys if key in TARGETS["self_conditioning"]]
        for index in trained_layers(config, self.num_layers):
            for key in self.keys:
                lacks = key == "self_attn.v_proj" and not config.layers[index].sliding
                if key not in roots and not lacks:
                    yield f"layers.{index}.{key}"
        yield from roots


def trained_layers(config: ModelConfig, num_layers: int) -> range:
    """Return the indices of the last `num_layers` layers; of all for -1."""
    count = len(config.layers)
    if num_layers == -1:
        return range(count)
    if not isinstance(num_layers, int) or not 1 <= num_layers <= count:
        why = f"this model has {count} (-1 for all)"
        raise SettingsError(f"num-layers is {num_layers}; {why}")
    return range(count - num_layers, count)


class Adapted(nn.Module):
    """A frozen layer and the float32 adapter beside it."""

    def __init__(self, linear: Any, lora_a: mx.array, lora_b: mx.array, scale: float):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.lora_a, self.lora_b = lora_a, lora_b


class LoRALinear(Adapted):
    """A linear layer and its adapter: lora_a (in, r), lora_b (r, out)."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        z = (x.astype(mx.float32) @ self.lora_a) @ self.lora_b
        return y + (self.scale * z).astype(y.dtype)


class LoRAExpertLinear(Adapted):
    """E linear maps and their adapters: lora_a (E, r, in), lora_b (E, out, r)."""

    @property
    def experts(self) -> int:
        return self.linear.experts

    @property
    def quantized(self) -> bool:
        return self.linear.quantized

    def gather(self, rows: mx.array, expert: mx.array) -> mx.array:
        """(G, M, in) groups of rows, each of one (G,) rising expert -> (G, M, out)."""
        y, z = self.linear.gather(rows, expert), rows.astype(mx.float32)
        for weight in (self.lora_a, self.lora_b):
            weight = weight.swapaxes(-1, -2)
            z = mx.gather_mm(z, weight, rhs_indices=expert, sorted_indices=True)
        return y + (self.scale * z).astype(y.dtype)

    def one(self, rows: mx.array, expert: int) -> mx.array:
        """(R, in) rows of a single expert -> (R, out)."""
        y = self.linear.one(rows, expert)
        z = rows.astype(mx.float32) @ self.lora_a[expert].T @ self.lora_b[expert].T
        return y + (self.scale * z).astype(y.dtype)


def delta(lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
    """Return what an adapter adds to a weight: (out, in), or (E, out, in)."""
    if lora_a.ndim > 2:
        return scale * (lora_b @ lora_a)
    return scale * (lora_a @ lora_b).T


def shapes(config: ModelConfig, lora: LoRA) -> dict[str, tuple[int, ...]]:
    """Return every tensor of an adapter file and its shape, without a model."""
    weights = expected_shapes(config)
    found: dict[str, tuple[int, ...]] = {}
    for path in lora.layers(config):
        *experts, outputs, inputs = weights[f"{path}.weight"]
        if experts:
            found[f"{path}.lora_a"] = (*experts, lora.rank, inputs)
            found[f"{path}.lora_b"] = (*experts, outputs, lora.rank)
        else:
            found[f"{path}.lora_a"] = (inputs, lora.rank)
            found[f"{path}.lora_b"] = (lora.rank, outputs)
    return found


def adapt(model: DiffusionGemma, lora: LoRA, seed: int = 0) -> None:
    """Freeze the model and put fresh adapters beside the layers `lora` names.

    They change nothing yet: lora_b is zero. lora_a is uniform within ±1 / √in, as
    mlx-lm and PEFT draw it, and depends on seed and path alone. Raises AdapterError if
    the model has adapters.
    """
    refuse_second(model)
    wanted = shapes(model.config, lora)
    if not wanted:
        raise SettingsError(f"no layer to adapt: none of the last has {lora.keys[0]}")
    model.freeze()
    for path in lora.layers(model.config):
        shape_a, shape_b = wanted[f"{path}.lora_a"], wanted[f"{path}.lora_b"]
        inputs = shape_a[0 if len(shape_a) == 2 else -1]
        key = mx.random.key((seed << 32) + zlib.crc32(path.encode()))
        bound: Any = 1 / math.sqrt(inputs)
        lora_a = mx.random.uniform(-bound, bound, shape_a, key=key)
        layer = add_adapter(model, path, lora_a, mx.zeros(shape_b), lora.scale)
        layer.unfreeze(recurse=False)
    model.eval()


def add_adapter(
    root: nn.Module, path: str, lora_a: mx.array, lora_b: mx.array, scale: float
) -> nn.Module:
    """Put an adapter beside the layer at `path` below `root`; return both together."""
    parent, name = find_layer(root, path)
    layer = parent[name]
    experts = isinstance(layer, ExpertLinear | QuantizedExpertLinear)
    kind = LoRAExpertLinear if experts else LoRALinear
    parent[name] = kind(layer, lora_a, lora_b, scale)
    return parent[name]


def refuse_second(model: DiffusionGemma) -> None:
    """Raise AdapterError if a model has adapters."""
    modules = [m for part in (model, *model.encoder_layers) for m in part.modules()]
    if any(isinstance(module, Adapted) for module in modules):
        raise AdapterError("the model has an adapter already; load it anew")


def unfreeze(model: DiffusionGemma, num_layers: int, *, router: bool) -> None:
    """Make all weights trainable, or those of the last layers alone.

    Routers only if asked; the scalars of layers never: they are no parameters in
    transformers either. Raises SettingsError for a quantised model.
    """
    if any(isinstance(module, QUANTIZED) for module in model.modules()):
        why = "use lora, or convert the model with --dequantize first"
        raise SettingsError(f"fine-tune-type full needs dense weights; {why}")
    model.freeze()
    if num_layers == -1:
        model.unfreeze()
    for index in trained_layers(model.config, num_layers):
        layer = model.layers[index]
        layer.unfreeze()
        layer.freeze(recurse=False, keys=["encoder_scalar", "decoder_scalar"])
        if not router:
            layer.router.freeze()
