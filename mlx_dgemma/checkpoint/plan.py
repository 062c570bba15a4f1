"""What a conversion writes, decided from headers: no weight is read yet."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx

from ..files.safetensors import LazyTensor, TensorInfo, load_tensors
from .quantize import RECIPES, Quantization, QuantizationMap, quantizable
from .weights import VISION, Layout, disk_name, expected_shapes, layer_path

NORM = "norm.weight"  # never quantised: the model computes in its dtype

# Rows of a dense weight's first axis in float32: each expert apart, else all at once.
Blocks = Iterator[tuple[slice, mx.array]]
# From those to the rows that replace them. A change that ignores them reads nothing.
Change = Callable[[Blocks], Iterator[mx.array]]


@dataclass
class ConversionPlan:
    """Every tensor to be written, and what the configuration will say of them."""

    layout: Layout
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
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
    plan = ConversionPlan(layout)
    if keep_quantized:
        plan.quantization = layout.quantization
    elif base is not None:
        plan.quantization = QuantizationMap(base)
    for parameter, shape in expected_shapes(layout.config).items():
        source = Source(layout, parameter, shape, (changes or {}).get(parameter))
        if keep_quantized:
            chosen = source.quantization
        else:
            chosen = plan.choose(parameter, shape, recipe)
        plan.tensors |= source.converted(chosen, dtype)
    for name, info in layout.tensors.items():
        if name.startswith(VISION):
            plan.tensors[name] = _copy(info)
    return plan


@dataclass(frozen=True)
class Source:
    """A parameter of the source, dense or quantised, and the change to be made."""

    layout: Layout
    parameter: str
    shape: tuple[int, ...]
    change: Change | None

    @property
    def layer(self) -> str:
        return self.parameter.removesuffix(".weight")

    @property
    def quantization(self) -> Quantization | None:
        return self.layout.quantized.get(self.layer)

    @property
    def parts(self) -> dict[str, TensorInfo]:
        """What the source stores of it: weight, or weight, scales (and biases)."""
        parameters = self.layout.parameters
        if self.quantization is None:
            return {"weight": parameters[self.parameter]}
        parts = self.quantization.packed_shapes(self.shape)
        return {part: parameters[f"{self.layer}.{part}"] for part in parts}

    def converted(
        self, chosen: Quantization | None, dtype: mx.Dtype | None
    ) -> dict[str, LazyTensor]:
        """Return the tensors to be written by their names on disk."""
        path = layer_path(self.layer)
        if chosen is not None and chosen == self.quantization and self.change is None:
            return {f"{path}.{part}": _copy(info) for part, info in self.parts.items()}
        if dtype is None:  # what was quantised has no dtype of its own
            own = self.parameter if self.quantization is None else NORM
            dtype = self.layout.parameters[own].dtype
        if chosen is None:
            read = partial(self.read, dtype)
            return {disk_name(self.parameter): LazyTensor(dtype, self.shape, read)}
        parts: dict[str, mx.array] = {}

        def compute(part: str) -> mx.array:
            if not parts:  # all parts come from one reading of the weight
                parts.update(chosen.quantize(self.read(dtype)))
                mx.eval(parts)
            return parts.pop(part)

        return {
            f"{path}.{part}": LazyTensor(
                chosen.storage_dtype(part) or dtype, shape, partial(compute, part)
            )
            for part, shape in chosen.packed_shapes(self.shape).items()
        }

    def read(self, dtype: mx.Dtype) -> mx.array:
        """Return the dense weight, changed if that is asked."""
        if self.change is None:
            return self._dense(load_tensors(self.parts), dtype)
        rows = []
        for block in self.change(self._blocks()):
            rows.append(block.astype(dtype))
            mx.eval(rows[-1])  # one block in float32 at a time
        return mx.concatenate(rows)

    def _blocks(self) -> Blocks:
        parts = load_tensors(self.parts)
        mx.eval(parts)
        experts = [slice(i, i + 1) for i in range(self.shape[0])]
        for rows in experts if len(self.shape) > 2 else [slice(None)]:
            some = {name: part[rows] for name, part in parts.items()}
            yield rows, self._dense(some, mx.float32)

    def _dense(self, parts: dict[str, mx.array], dtype: mx.Dtype) -> mx.array:
        if self.quantization is None:
            return parts["weight"].astype(dtype)
        return self.quantization.dequantize(parts, dtype)


def _copy(info: TensorInfo) -> LazyTensor:
    return LazyTensor(info.dtype, info.shape, lambda: load_tensors({0: info})[0])
