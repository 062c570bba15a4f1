"""What a conversion is going to write, decided from headers: no weight is read yet."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from ..files.safetensors import Pending
from .config import ModelConfig
from .quantize import (
    RECIPES,
    Quantization,
    QuantizationMap,
    quantizable,
    read_quantization,
)
from .weights import VISION, Layout, disk_name, expected_shapes, layer_path

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
NORM = "norm.weight"  # never quantised: the model computes in its dtype

# Rows of a dense weight's first axis in float32, expert after expert and else all at
# once, to what takes their place; who does not ask for them does not have them read.
Blocks = Iterator[tuple[slice, mx.array]]
Change = Callable[[Blocks], Iterator[mx.array]]


@dataclass
class ConversionPlan:
    """Every tensor to be written, and what the configuration will say of them."""

    tensors: dict[str, Pending] = field(default_factory=dict)
    quantization: QuantizationMap | None = None
    dense: list[str] = field(default_factory=list)
    regrouped: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> mx.Dtype:
        """What the model will compute in."""
        return self.tensors[disk_name(NORM)].dtype


class Planner:
    """Decides for each parameter what is written.

    base, recipe    how layers are quantised that are dense; None: they stay dense
    dtype           of what is dense, a key of DTYPES; None: as it is
    keep            layers that are quantised stay so, each in its own way; otherwise
                    they become dense
    changes         parameter -> what is done to its weight; all others stay
    """

    def __init__(
        self,
        layout: Layout,
        config: ModelConfig,
        *,
        base: Quantization | None = None,
        recipe: str = "uniform",
        dtype: str | None = None,
        keep: bool = False,
        changes: Mapping[str, Change] | None = None,
    ):
        self.layout, self.config = layout, config
        self.base, self.recipe = base, RECIPES[recipe]
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.keep, self.changes = keep, changes or {}
        self.out = ConversionPlan()
        self.overrides: dict[str, Quantization] = {}

    def plan(self) -> ConversionPlan:
        for parameter, shape in expected_shapes(self.config).items():
            stored, chosen = self._stored(parameter), self._chosen(parameter, shape)
            if chosen is None:
                self._dense(parameter, shape)
            elif chosen == stored and parameter not in self.changes:
                self._copied(parameter, shape, chosen)
            else:
                self._quantized(parameter, shape, chosen)
        for name, info in self.layout.files.tensors.items():
            if name.startswith(VISION):
                self._keep(name, name, info.dtype)
        if self.base is not None:
            self.out.quantization = QuantizationMap(self.base, self.overrides)
        elif self.keep and self.layout.quantized:
            path = str(self.layout.files.folder / "config.json")
            self.out.quantization = read_quantization(self.config.raw, path)
        return self.out

    def _stored(self, parameter: str) -> Quantization | None:
        """How a parameter is quantised in the source."""
        if not parameter.endswith(".weight"):
            return None
        return self.layout.quantized.get(parameter.removesuffix(".weight"))

    def _chosen(self, parameter: str, shape: tuple[int, ...]) -> Quantization | None:
        """How a parameter will be quantised; notes where that is not as asked."""
        if self.keep:
            return self._stored(parameter)
        if self.base is None or not quantizable(parameter, shape):
            return None
        layer = layer_path(parameter.removesuffix(".weight"))
        wanted = self.recipe(layer, self.base)
        fitting = wanted.fits(shape)
        if fitting is None:
            self.out.dense.append(layer)
            return None
        if fitting.group_size != wanted.group_size:
            self.out.regrouped[layer] = fitting.group_size
        if fitting != self.base:
            self.overrides[layer] = fitting
        return fitting

    def _keep(self, name: str, source: str, dtype: mx.Dtype) -> None:
        files = self.layout.files
        self.out.tensors[name] = Pending(
            dtype, files.tensors[source].shape, lambda: files.load(source).astype(dtype)
        )

    def _copied(self, parameter: str, shape: tuple[int, ...], q: Quantization) -> None:
        layer = parameter.removesuffix(".weight")
        for part in q.packed(shape):
            source = self.layout.names[f"{layer}.{part}"]
            dtype = self.layout.files.tensors[source].dtype
            self._keep(f"{layer_path(layer)}.{part}", source, dtype)

    def _dense(self, parameter: str, shape: tuple[int, ...]) -> None:
        dtype = self._dtype(parameter)
        self.out.tensors[disk_name(parameter)] = Pending(
            dtype, shape, lambda: self._weight(parameter, shape, dtype)
        )

    def _quantized(
        self, parameter: str, shape: tuple[int, ...], chosen: Quantization
    ) -> None:
        dtype = self._dtype(parameter)
        parts: dict[str, mx.array] = {}

        def make(part: str) -> mx.array:
            if not parts:  # all parts come from one reading of the weight
                parts.update(chosen.apply(self._weight(parameter, shape, dtype)))
                mx.eval(parts)
            return parts.pop(part)

        layer = layer_path(parameter.removesuffix(".weight"))
        for part, part_shape in chosen.packed(shape).items():
            kind = chosen.coded(part) or dtype
            self.out.tensors[f"{layer}.{part}"] = Pending(
                kind, part_shape, lambda part=part: make(part)
            )

    def _dtype(self, parameter: str) -> mx.Dtype:
        """Of a parameter where it is dense, and of its scales where it is not."""
        stays = self._stored(parameter) is None
        return self.dtype or self.layout.info(parameter if stays else NORM).dtype

    def _weight(
        self, parameter: str, shape: tuple[int, ...], dtype: mx.Dtype
    ) -> mx.array:
        """A weight to be written, dense, and changed if that is asked."""
        change = self.changes.get(parameter)
        if change is None:
            return self._undo(parameter, self._parts(parameter, shape), dtype)
        made = []
        for block in change(self._blocks(parameter, shape)):
            made.append(block.astype(dtype))
            mx.eval(made[-1])  # one block in float32 at a time
        return mx.concatenate(made)

    def _blocks(self, parameter: str, shape: tuple[int, ...]) -> Blocks:
        parts = self._parts(parameter, shape)
        mx.eval(parts)
        experts = [slice(i, i + 1) for i in range(shape[0])]
        for rows in experts if len(shape) > 2 else [slice(None)]:
            some = {name: part[rows] for name, part in parts.items()}
            yield rows, self._undo(parameter, some, mx.float32)

    def _parts(self, parameter: str, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """What the source holds of a parameter, unevaluated."""
        files, names = self.layout.files, self.layout.names
        stored = self._stored(parameter)
        if stored is None:
            return {"weight": files.load(names[parameter])}
        layer = parameter.removesuffix(".weight")
        parts = stored.packed(shape)
        return {part: files.load(names[f"{layer}.{part}"]) for part in parts}

    def _undo(
        self, parameter: str, parts: dict[str, mx.array], dtype: mx.Dtype
    ) -> mx.array:
        """The dense weight that parts stand for."""
        stored = self._stored(parameter)
        if stored is None:
            return parts["weight"].astype(dtype)
        return stored.undo(parts, dtype)
