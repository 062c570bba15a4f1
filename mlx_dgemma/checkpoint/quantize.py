"""Which layer gets how many bits: recipes, and `config["quantization"]` as mlx-lm
writes it (a default, and overrides by the layer's path on disk).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import ConversionError
from ..files.json import Keys


class Format(NamedTuple):
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
    """Bits per weight, weights per scale, and MLX's mode."""

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            known = ", ".join(MODES)
            raise ConversionError(f"q-mode is {self.mode!r}; supported: {known}")
        bits, sizes = MODES[self.mode]
        for flag, value, allowed in (
            ("q-bits", self.bits, bits),
            ("q-group-size", self.group_size, sizes),
        ):
            if value not in allowed:
                known = ", ".join(map(str, sorted(allowed)))
                raise ConversionError(
                    f"{flag} is {value}; {self.mode} supports {known}"
                )

    @classmethod
    def with_defaults(
        cls, mode: str, bits: int | None = None, group_size: int | None = None
    ) -> "Quantization":
        """Return a mode with its own defaults for what is None."""
        known = MODES.get(mode, MODES["affine"])
        return cls(
            mode=mode,
            bits=known.bits[0] if bits is None else bits,
            group_size=known.group_sizes[0] if group_size is None else group_size,
        )

    def fit_to_shape(self, shape: tuple[int, ...]) -> "Quantization | None":
        """Return this for a (…, out, in) weight, in smaller groups if `in` needs them.

        None when no group size divides `in`, and for a weight of another size than a
        multiple of 64, which mlx-vlm takes for dense: it then stays dense.
        """
        if math.prod(shape) % 64:
            return None
        for size in sorted(MODES[self.mode].group_sizes, reverse=True):
            # kernels take `in` in blocks of 32, also where groups are of 16
            if size <= self.group_size and shape[-1] % max(size, 32) == 0:
                return replace(self, group_size=size)
        return None

    def packed_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of weight, scales (and biases) for a dense shape."""
        *outer, inner = shape
        scales = (*outer, inner // self.group_size)
        parts = {"weight": (*outer, inner * self.bits // 32), "scales": scales}
        return parts | {"biases": scales} if self.mode == "affine" else parts

    def storage_dtype(self, part: str) -> mx.Dtype | None:
        """Return the integer type that stores a part; None for a part of floats."""
        if part == "weight":
            return mx.uint32
        # one byte of shared exponent per group
        return mx.uint8 if part == "scales" and self.mode != "affine" else None

    def quantize(self, weight: mx.array) -> dict[str, mx.array]:
        """Return the named parts of a dense (…, out, in) weight."""
        parts = mx.quantize(weight, **asdict(self))
        return dict(zip(("weight", "scales", "biases"), parts, strict=False))

    def dequantize(self, parts: dict[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """Return the dense weight of named parts."""
        arrays = parts["weight"], parts["scales"], parts.get("biases")
        return mx.dequantize(*arrays, **asdict(self), dtype=dtype)


EIGHT_BITS = Quantization(bits=8)
# from the path of a layer on disk and what is asked for to what the layer gets
RECIPES: dict[str, Callable[[str, Quantization], Quantization]] = {
    # every layer as asked for
    "uniform": lambda layer, base: base,
    # experts as asked for; attention, dense MLP, router, embedding at 8 bits
    "mixed": lambda layer, base: base if ".experts." in layer else EIGHT_BITS,
}


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
    """Return the quantisation a config.json declares; None if it declares none.

    Raises ConfigError naming the key, also for the formats of other tools.
    """
    key = "quantization" if raw.get("quantization") else "quantization_config"
    keys = Keys(raw, where).mapping(key)
    if keys is None:
        return None
    if "quant_method" in keys:
        method = dict(keys.items())["quant_method"]
        why = f"is {method!r}, not MLX's; convert from the bfloat16 release"
        raise keys.refuse("quant_method", why)
    default, overrides = _read_one(keys), {}
    for name, entry in keys.items():
        if isinstance(entry, dict):
            overrides[name] = _read_one(Keys(entry, f"{keys.where}: {name}"))
        elif name not in ("bits", "group_size", "mode") and entry is not False:
            raise keys.refuse(name, f"is {entry!r}; is this an MLX quantisation?")
    return QuantizationMap(default, overrides)


def _read_one(keys: Keys) -> Quantization:
    mode = keys.one_of("mode", "affine", tuple(MODES))
    bits, sizes = MODES[mode]
    return Quantization(
        mode=mode,
        bits=keys.one_of("bits", bits[0], tuple(sorted(bits))),
        group_size=keys.one_of("group_size", sizes[0], tuple(sorted(sizes))),
    )
