"""Which layer gets how many bits: recipes, and `config["quantization"]` as mlx-lm
writes it (a default, and overrides by the layer's path on disk).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx

from ..errors import ConversionError
from ..files.json import Keys


@dataclass(frozen=True)
class Format:
    """What a quantisation mode allows; the first of each is its default."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]


MODES = {
    "affine": Format((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": Format((4,), (32,)),
    "mxfp8": Format((8,), (32,)),
    "nvfp4": Format((4,), (16,)),
}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Bits per weight, weights per scale, and how they are coded."""

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConversionError(
                f"q-mode is {self.mode!r}; supported: {', '.join(MODES)}"
            )
        allowed = MODES[self.mode]
        for name, value, values in (
            ("q-bits", self.bits, allowed.bits),
            ("q-group-size", self.group_size, allowed.group_sizes),
        ):
            if value not in values:
                shown = ", ".join(map(str, sorted(values)))
                raise ConversionError(
                    f"{name} is {value}; {self.mode} supports {shown}"
                )

    @classmethod
    def of(cls, mode: str, bits: int | None, group_size: int | None) -> "Quantization":
        """A mode with its own defaults where nothing is given."""
        known = MODES.get(mode, MODES["affine"])
        return cls(
            mode=mode,
            bits=known.bits[0] if bits is None else bits,
            group_size=known.group_sizes[0] if group_size is None else group_size,
        )

    def fits(self, shape: tuple[int, ...]) -> "Quantization | None":
        """This for a (…, out, in) weight, in smaller groups if `in` needs them.

        None when no group size divides `in`: the weight then stays dense.
        """
        for size in sorted(MODES[self.mode].group_sizes, reverse=True):
            # kernels take `in` in blocks of 32, also where groups are of 16
            if size <= self.group_size and shape[-1] % max(size, 32) == 0:
                return Quantization(group_size=size, bits=self.bits, mode=self.mode)
        return None

    def packed(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of weight, scales (and biases) that a dense shape becomes."""
        *outer, inner = shape
        scales = (*outer, inner // self.group_size)
        parts = {"weight": (*outer, inner * self.bits // 32), "scales": scales}
        return parts | {"biases": scales} if self.mode == "affine" else parts

    def coded(self, part: str) -> mx.Dtype | None:
        """The integers that hold a part; None for a part of floats."""
        if part == "weight":
            return mx.uint32
        # one byte of shared exponent per group
        return mx.uint8 if part == "scales" and self.mode != "affine" else None

    def apply(self, weight: mx.array) -> dict[str, mx.array]:
        """Quantise a dense (…, out, in) weight into its named parts."""
        parts = mx.quantize(
            weight, group_size=self.group_size, bits=self.bits, mode=self.mode
        )
        return dict(zip(("weight", "scales", "biases"), parts, strict=False))

    def undo(self, parts: dict[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """The dense weight that `parts` stand for."""
        return mx.dequantize(
            parts["weight"],
            parts["scales"],
            parts.get("biases"),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=dtype,
        )


Recipe = Callable[[str, Quantization], Quantization]
EIGHT_BITS = Quantization(bits=8)


def uniform(layer: str, base: Quantization) -> Quantization:
    """Every layer alike."""
    return base


def mixed(layer: str, base: Quantization) -> Quantization:
    """Experts as asked for; attention, dense MLP, router, embeddings at 8 bits."""
    return base if ".experts." in layer else EIGHT_BITS


RECIPES: dict[str, Recipe] = {"uniform": uniform, "mixed": mixed}


def quantizable(parameter: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the weight of a linear map or the embedding."""
    return parameter.endswith(".weight") and len(shape) >= 2


@dataclass(frozen=True)
class QuantizationMap:
    """`config["quantization"]`: a default and overrides by path on disk."""

    default: Quantization
    overrides: dict[str, Quantization] = field(default_factory=dict)

    def of(self, layer: str) -> Quantization:
        return self.overrides.get(layer, self.default)

    def to_config(self) -> dict[str, Any]:
        layers = {name: asdict(q) for name, q in sorted(self.overrides.items())}
        return asdict(self.default) | layers


def read_quantization(raw: dict[str, Any], where: str) -> QuantizationMap | None:
    """The quantisation a config.json declares; None when the weights are dense."""
    key = "quantization" if raw.get("quantization") else "quantization_config"
    keys = Keys(raw, where).mapping(key)
    if keys is None:
        return None
    for name, entry in keys.items():
        if name == "quant_method":
            raise keys.refuse(
                name, f"is {entry!r}, not MLX's; convert from the bfloat16 release"
            )
    default = _read_one(keys)
    overrides = {}
    for name, entry in keys.items():
        if isinstance(entry, dict):
            layer = keys.mapping(name)
            assert layer is not None
            overrides[name] = _read_one(layer)
        elif name not in ("bits", "group_size", "mode") and entry is not False:
            raise keys.refuse(name, f"is {entry!r}; is this an MLX quantisation?")
    return QuantizationMap(default, overrides)


def _read_one(keys: Keys) -> Quantization:
    mode = keys.one_of("mode", "affine", tuple(MODES))
    allowed = MODES[mode]
    return Quantization(
        mode=mode,
        bits=keys.one_of("bits", allowed.bits[0], tuple(sorted(allowed.bits))),
        group_size=keys.one_of(
            "group_size", allowed.group_sizes[0], tuple(sorted(allowed.group_sizes))
        ),
    )
