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

from .. import backends
from ..errors import ConversionError
from ..files import atomic as staging
from ..files.safetensors import Pending, write_file
from ..text.tokenizer import Tokenizer
from . import hub
from .config import ModelConfig, read_config
from .plan import DTYPES, ConversionPlan, Planner
from .quantize import RECIPES, Quantization, QuantizationMap
from .weights import INDEX, SINGLE, VISION, Layout, expected_shapes, read_layout

SHARD_BYTES = 5 * 10**9  # what mlx-lm writes
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

DiffusionGemma weights for MLX, {made} by `mlx_dgemma.{command}`.

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
    config, layout = open_source(hf_path, revision, target, overwrite)
    if layout.quantized and not dequantize:
        raise ConversionError(
            f"{layout.files.folder}: is quantised already; "
            "use it as it is, or make it dense with --dequantize"
        )
    if dequantize and not layout.quantized:
        raise ConversionError(f"{layout.files.folder}: is not quantised")
    planner = Planner(layout, config, base=base, recipe=quant_predicate, dtype=dtype)
    return carry_out(
        planner.plan(),
        layout,
        config,
        target,
        card=CARD.format(made="converted", command="convert"),
        upload_repo=upload_repo,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def open_source(
    model: str | Path, revision: str | None, target: Path, overwrite: bool
) -> tuple[ModelConfig, Layout]:
    """What is read to write `target`: a folder, hub id or built-in name.

    Raises DGemmaError when the source is not whole, or the target may not be written.
    """
    backends.current()  # chosen before the first array is made
    staging.check_target(target, overwrite)
    source = hub.resolve(model, revision)
    staging.check_apart(source, target)
    config = read_config(source)
    Tokenizer.from_dir(source)  # a model nobody can talk to is refused early
    return config, read_layout(source, config)


def carry_out(
    plan: ConversionPlan,
    layout: Layout,
    config: ModelConfig,
    target: Path,
    *,
    card: str,
    upload_repo: str | None,
    overwrite: bool,
    shard_bytes: int,
    progress: Progress | None,
) -> Converted:
    """Write what was planned of a source, whole or not at all, and upload it if asked.

    card    the text of README.md

    Raises ConversionError when it does not fit or cannot be finished.
    """
    staging.check_disk(target, plan.nbytes)
    with staging.staged(target, overwrite) as folder:
        (folder / "README.md").write_text(card, encoding="utf-8")
        source = layout.files.folder
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


def _write(
    folder: Path,
    plan: ConversionPlan,
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


def _bits_per_weight(plan: ConversionPlan, config: ModelConfig) -> float:
    weights = sum(math.prod(shape) for shape in expected_shapes(config).values())
    stored = sum(t.nbytes for n, t in plan.tensors.items() if not n.startswith(VISION))
    return 8 * stored / weights
