"""What a conversion writes: MLX arrays whose shapes are known, not yet evaluated.

No weight is read before its turn to be written: arrays of MLX are computed on demand.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from ..files.safetensors import load_tensors
from .quantize import RECIPES, Quantization, QuantizationMap, quantizable
from .weights import VISION, Layout, disk_name, expected_shapes, layer_path

NORM = "norm.weight"  # never quantised: the model computes in its dtype

# Rows of a weight's first axis in float32: each expert apart, else all at once.
Blocks = Iterator[tuple[slice, mx.array]]
# Maps blocks to the blocks that replace them; a block it skips is never read.
Change = Callable[[Blocks], Iterator[mx.array]]


@dataclass
class ConversionPlan:
    """Every tensor to be written, and what the configuration will say of them."""

    layout: Layout
    tensors: dict[str, mx.array] = field(default_factory=dict)
    # what a tensor is made of, if that is not what is written
    sources: dict[str, list[mx.array]] = field(default_factory=dict)
    quantization: QuantizationMap | None = None
    dense: list[str] = field(default_factory=list)
    regrouped: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype the model will compute in."""
        return self.tensors[disk_name(NORM)].dtype

    @property
    def bits_per_weight(self) -> float:
        """Of the language model, scales included."""
        shapes = expected_shapes(self.layout.config).values()
        vision = sum(t.nbytes for n, t in self.tensors.items() if n.startswith(VISION))
        return 8 * (self.nbytes - vision) / sum(map(math.prod, shapes))

    def choose(
        self, parameter: str, shape: tuple[int, ...], recipe: str
    ) -> Quantization | None:
        """Return how a parameter is quantised; note where that is not as asked."""
        if self.quantization is None or not quantizable(parameter, shape):
            return None
        layer = layer_path(parameter.removesuffix(".weight"))
        base = self.quantization.default
        wanted = RECIPES[recipe](layer, base)
        fitting = wanted.fit_to_shape(shape)
        if fitting is None:
            self.dense.append(layer)
            return None
        if fitting.group_size != wanted.group_size:
            self.regrouped[layer] = fitting.group_size
        if fitting != base:
            self.quantization.overrides[layer] = fitting
        return fitting


def plan_conversion(
    layout: Layout,
    *,
    base: Quantization | None = None,
    recipe: str = "uniform",
    dtype: mx.Dtype | None = None,
    keep_quantized: bool = False,
    changes: Mapping[str, Change] | None = None,
) -> ConversionPlan:
    """Decide for each parameter what is written.

    base, recipe     how dense layers are quantised; None: they stay dense
    dtype            of what is dense; None: as it is
    keep_quantized   quantised layers stay so, each in its own way; otherwise they
                     become dense
    changes          parameter -> what is done to its weight; all others stay
    """
    plan, changes = ConversionPlan(layout), changes or {}
    if keep_quantized:
        plan.quantization = layout.quantization
    elif base is not None:
        plan.quantization = QuantizationMap(base)
    source = load_tensors(layout.parameters)
    for parameter, shape in expected_shapes(layout.config).items():
        layer, change = parameter.removesuffix(".weight"), changes.get(parameter)
        stored = layout.quantized.get(layer)
        chosen = stored if keep_quantized else plan.choose(parameter, shape, recipe)
        if stored is None:
            parts, own = {"weight": source[parameter]}, parameter
        else:
            names = stored.packed_shapes(shape)
            parts, own = {part: source[f"{layer}.{part}"] for part in names}, NORM
        name = disk_name(parameter) if chosen is None else f"{layer_path(layer)}.weight"
        plan.sources[name] = list(parts.values())
        if chosen is None or chosen != stored or change is not None:
            weight = _weight(parts, stored, change, dtype or source[own].dtype)
            parts = {"weight": weight} if chosen is None else chosen.quantize(weight)
        if chosen is None:
            plan.tensors[name] = parts["weight"]
        else:
            path = layer_path(layer)
            plan.tensors |= {f"{path}.{part}": array for part, array in parts.items()}
    vision = {n: info for n, info in layout.tensors.items() if n.startswith(VISION)}
    plan.tensors |= load_tensors(vision)
    return plan


def _weight(
    parts: dict[str, mx.array],
    stored: Quantization | None,
    change: Change | None,
    dtype: mx.Dtype,
) -> mx.array:
    """Return the dense weight of stored parts, changed if that is asked."""

    def dense(rows: slice, dtype: mx.Dtype) -> mx.array:
        some = {name: part[rows] for name, part in parts.items()}
        if stored is None:
            return some["weight"].astype(dtype)
        return stored.dequantize(some, dtype)

    if change is None:
        return dense(slice(None), dtype)
    count = len(parts["weight"]) if parts["weight"].ndim > 2 else 0
    experts = [slice(i, i + 1) for i in range(count)]
    blocks = ((rows, dense(rows, mx.float32)) for rows in experts or [slice(None)])
    changed = [block.astype(dtype) for block in change(blocks)]
    if len(changed) == 1:
        return changed[0]
    weight = mx.zeros((count, *changed[0].shape[1:]), dtype)
    for rows, block in zip(experts, changed, strict=True):
        weight[rows] = block  # in place: concatenating would hold all twice
    return weight
