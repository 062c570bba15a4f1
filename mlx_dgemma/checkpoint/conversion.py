"""Hugging Face safetensors to MLX weights, tensor by tensor.

The whole output is planned from headers alone, so a refusal comes before the first
byte; it is written beside the target under a hidden name, made durable, and renamed:
under the target's own name there is nothing or everything.
"""

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import ConversionError
from ..text.tokenizer import Tokenizer
from . import hub, staging
from .config import ModelConfig, read_config
from .quantize import RECIPES, Quantization, QuantizationMap, quantizable
from .safetensors import Pending, write_file
from .weights import (
    INDEX,
    SINGLE,
    VISION,
    Layout,
    disk_name,
    expected_shapes,
    layer_path,
    read_layout,
)

SHARD_BYTES = 5 * 10**9  # what mlx-lm writes
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "NOTICE",
)

# what the hub reads of an uploaded model, and how a person runs it
CARD = """\
---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- diffusion_gemma
---

DiffusionGemma weights for MLX, converted by `mlx_dgemma.convert`.

    mlx_dgemma.generate --model FOLDER --show --prompt "Why is the sky blue?"
"""

Progress = Callable[[str, int, int], None]  # tensor, bytes written, bytes in all


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion wrote."""

    path: Path
    source_bytes: int
    bytes: int
    shards: int
    bits_per_weight: float  # of the whole language model
    dense: tuple[str, ...]  # layers no group size fits, left unquantised
    regrouped: dict[str, int]  # layers that needed smaller groups -> group size


@dataclass
class _Plan:
    """Every tensor to be written, and what the configuration will say of them."""

    tensors: dict[str, Pending]
    quantization: QuantizationMap | None
    dense: list[str]
    regrouped: dict[str, int]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> mx.Dtype:
        """What the model will compute in."""
        return self.tensors[disk_name("norm.weight")].dtype


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str = "uniform",
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    upload_repo: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Converted:
    """Convert a checkpoint folder, hub id or built-in name into MLX weights.

    quantize            quantise linear layers, experts and the embedding
    q_bits, q_group_size, q_mode   as mlx.core.quantize; the mode's own defaults
    quant_predicate     recipe: "uniform", or "mixed" (experts as asked, the rest
                        at 8 bits)
    dtype               of what stays dense ("float32", "float16", "bfloat16");
                        the source's when None. The vision tower keeps its own.
    dequantize          turn quantised layers dense again
    progress            called after each tensor

    Raises DGemmaError, one line, before anything is written; a conversion that
    fails later leaves nothing behind.
    """
    target = Path(mlx_path).expanduser()
    if quantize and dequantize:
        raise ConversionError("--quantize and --dequantize exclude one another")
    _check_choice("dtype", dtype, (None, *DTYPES))
    _check_choice("quant-predicate", quant_predicate, RECIPES)
    if not quantize:
        _refuse_idle(q_bits, q_group_size, q_mode, quant_predicate)
    base = Quantization.of(q_mode, q_bits, q_group_size) if quantize else None
    staging.check_target(target, overwrite)
    source = hub.resolve(hf_path, revision)
    staging.check_apart(source, target)
    config = read_config(source)
    Tokenizer.from_dir(source)  # a model nobody can talk to is refused early
    layout = read_layout(source, config)
    plan = _Planner(layout, config, base, quant_predicate, dtype, dequantize).plan()
    staging.check_disk(target, plan.nbytes)
    with staging.staged(target, overwrite) as folder:
        shards = _write(folder, plan, config, source, shard_bytes, progress)
    if upload_repo is not None:
        hub.upload(target, upload_repo)
    return Converted(
        path=target,
        source_bytes=layout.files.nbytes,
        bytes=plan.nbytes,
        shards=shards,
        bits_per_weight=_bits_per_weight(plan, config),
        dense=tuple(plan.dense),
        regrouped=plan.regrouped,
    )


def _refuse_idle(
    q_bits: int | None, q_group_size: int | None, q_mode: str, quant_predicate: str
) -> None:
    """Refuse settings of a quantisation that was not asked for."""
    asked = {
        "q-bits": q_bits is not None,
        "q-group-size": q_group_size is not None,
        "q-mode": q_mode != "affine",
        "quant-predicate": quant_predicate != "uniform",
    }
    for name in asked:
        if asked[name]:
            raise ConversionError(f"--{name} is given without --quantize; add it")


def _check_choice(name: str, value: str | None, known: Iterable[str | None]) -> None:
    if value not in known:
        shown = ", ".join(one for one in known if one is not None)
        raise ConversionError(f"{name} is {value!r}; supported: {shown}")


class _Planner:
    """Decides for each parameter what is written, without reading a weight."""

    def __init__(
        self,
        layout: Layout,
        config: ModelConfig,
        base: Quantization | None,
        recipe: str,
        dtype: str | None,
        dequantize: bool,
    ):
        if layout.quantized and not dequantize:
            raise ConversionError(
                f"{layout.files.folder}: is quantised already; "
                "use it as it is, or make it dense with --dequantize"
            )
        if dequantize and not layout.quantized:
            raise ConversionError(f"{layout.files.folder}: is not quantised")
        self.layout, self.config = layout, config
        self.base, self.recipe = base, RECIPES[recipe]
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.out = _Plan({}, None, [], {})
        self.overrides: dict[str, Quantization] = {}

    def plan(self) -> _Plan:
        for parameter, shape in expected_shapes(self.config).items():
            layer = parameter.removesuffix(".weight")
            chosen = None
            if self.base is not None and quantizable(parameter, shape):
                chosen = self._choose(layer_path(layer), shape, self.base)
            if layer in self.layout.quantized and parameter.endswith(".weight"):
                self._dequantized(layer, shape)
            elif chosen is not None:
                self._quantized(layer, shape, chosen)
            else:
                self._dense(parameter)
        for name, info in self.layout.files.tensors.items():
            if name.startswith(VISION):
                self._keep(name, name, info.dtype)
        if self.base is not None:
            self.out.quantization = QuantizationMap(self.base, self.overrides)
        return self.out

    def _choose(
        self, layer: str, shape: tuple[int, ...], base: Quantization
    ) -> Quantization | None:
        wanted = self.recipe(layer, base)
        fitting = wanted.fits(shape)
        if fitting is None:
            self.out.dense.append(layer)
            return None
        if fitting.group_size != wanted.group_size:
            self.out.regrouped[layer] = fitting.group_size
        if fitting != base:
            self.overrides[layer] = fitting
        return fitting

    def _keep(self, name: str, source: str, dtype: mx.Dtype) -> None:
        files = self.layout.files
        self.out.tensors[name] = Pending(
            dtype, files.tensors[source].shape, lambda: files.load(source).astype(dtype)
        )

    def _dense(self, parameter: str) -> None:
        dtype = self.dtype or self.layout.info(parameter).dtype
        self._keep(disk_name(parameter), self.layout.names[parameter], dtype)

    def _quantized(
        self, layer: str, shape: tuple[int, ...], chosen: Quantization
    ) -> None:
        source = self.layout.names[f"{layer}.weight"]
        dtype = self.dtype or self.layout.info(f"{layer}.weight").dtype
        parts: dict[str, mx.array] = {}

        def make(part: str) -> mx.array:
            if not parts:  # all parts come from one reading of the weight
                weight = self.layout.files.load(source).astype(dtype)
                parts.update(chosen.apply(weight))
                mx.eval(parts)
            return parts.pop(part)

        for part, part_shape in chosen.packed(shape).items():
            kind = chosen.coded(part) or dtype
            self.out.tensors[f"{layer_path(layer)}.{part}"] = Pending(
                kind, part_shape, lambda part=part: make(part)
            )

    def _dequantized(self, layer: str, shape: tuple[int, ...]) -> None:
        quantization = self.layout.quantized[layer]
        norm = self.layout.info("norm.weight").dtype
        dtype = self.dtype or norm

        def make() -> mx.array:
            parts = {
                part: self.layout.files.load(self.layout.names[f"{layer}.{part}"])
                for part in quantization.packed(shape)
            }
            return quantization.undo(parts, dtype)

        name = disk_name(f"{layer}.weight")
        self.out.tensors[name] = Pending(dtype, shape, make)


def _write(
    folder: Path,
    plan: _Plan,
    config: ModelConfig,
    source: Path,
    shard_bytes: int,
    progress: Progress | None,
) -> int:
    """Everything a checkpoint folder holds; returns the number of shards."""
    shards = list(_split(plan.tensors, shard_bytes))
    names = [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    if len(shards) == 1:
        names = [SINGLE]
    done, total = 0, plan.nbytes
    cache_limit = mx.set_cache_limit(0)  # freed buffers would add up to a shard
    try:
        for file, tensors in zip(names, shards, strict=True):
            for tensor, size in write_file(folder / file, tensors):
                done += size
                if progress is not None:
                    progress(tensor, done, total)
    finally:
        mx.set_cache_limit(cache_limit)
    weight_map = {
        tensor: file
        for file, tensors in zip(names, shards, strict=True)
        for tensor in tensors
    }
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        staging.write_json(folder / INDEX, index)
    staging.write_json(
        folder / "config.json",
        released_config(config, plan.quantization, plan.dtype),
    )
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return len(shards)


def _split(tensors: dict[str, Pending], limit: int) -> Iterable[dict[str, Pending]]:
    shard: dict[str, Pending] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def released_config(
    config: ModelConfig, quantization: QuantizationMap | None, dtype: mx.Dtype
) -> dict[str, Any]:
    """config.json in the release's layout, which every other reader knows."""
    raw = {k: v for k, v in config.raw.items() if not k.startswith("quantization")}
    text = dict(raw["text_config"])
    full = {(one.head_dim, one.kv_heads) for one in config.layers if not one.sliding}
    sliding = {(one.head_dim, one.kv_heads) for one in config.layers if one.sliding}
    if len(full) == 1 and len(sliding) <= 1:
        text.pop("per_layer_config", None)
        ((dim, heads),) = full
        text |= {"global_head_dim": dim, "num_global_key_value_heads": heads}
        for dim, heads in sliding:
            text |= {"head_dim": dim, "num_key_value_heads": heads}
    raw["text_config"] = text
    name = next(name for name, known in DTYPES.items() if known == dtype)
    for part in (raw, text):
        part |= {key: name for key in ("dtype", "torch_dtype") if key in part}
    if quantization is not None:
        raw["quantization"] = raw["quantization_config"] = quantization.to_config()
    return raw


def _bits_per_weight(plan: _Plan, config: ModelConfig) -> float:
    weights = sum(math.prod(shape) for shape in expected_shapes(config).values())
    stored = sum(t.nbytes for n, t in plan.tensors.items() if not n.startswith(VISION))
    return 8 * stored / weights
