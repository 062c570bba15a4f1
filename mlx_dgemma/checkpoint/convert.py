"""Hugging Face safetensors to MLX weights, tensor by tensor.

The whole output is planned from headers alone, so a refusal comes before the first
byte. It is written beside the target under a hidden name, made durable, and renamed:
under the target's own name there is nothing or everything.
"""

import shutil
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import backends
from ..errors import ConversionError
from ..files import atomic
from ..files.opening import user_path
from ..files.safetensors import count_nonfinite, shorten, write_file
from ..text.tokenizer import Tokenizer
from . import hub
from .config import ModelConfig, read_config
from .generation_config import read_generation_config
from .plan import ConversionPlan, plan_conversion
from .quantize import RECIPES, Quantization, QuantizationMap
from .sums import write_sums
from .weights import INDEX, SINGLE, Layout, read_layout, shard_names

SHARD_BYTES = 5 * 10**9  # as mlx-lm
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
COPIED = (
    "generation_config.json tokenizer.json tokenizer.model tokenizer_config.json "
    "special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json "
    "processor_config.json preprocessor_config.json LICENSE NOTICE".split()
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
    quant_predicate     "uniform", or "mixed": experts as asked, the rest at 8 bits
    dtype               of what stays dense ("float32", "float16", "bfloat16");
                        the source's when None. The vision tower keeps its own.
    dequantize          turn quantised layers dense again
    revision            branch, tag or commit of a hub id
    upload_repo         hub repository to upload the result to
    overwrite           replace a model folder at `mlx_path`
    shard_bytes         most bytes of one file of weights
    progress            called after each tensor: its name, bytes done, bytes in all

    Raises DGemmaError, one line, before anything is written; a conversion that
    fails later leaves nothing behind.
    """
    target, base = user_path(mlx_path), None
    if quantize and dequantize:
        raise ConversionError("--quantize and --dequantize exclude one another")
    _check_known("dtype", dtype or "float32", DTYPES)
    _check_known("quant-predicate", quant_predicate, RECIPES)
    if quantize:
        base = Quantization.with_defaults(q_mode, q_bits, q_group_size)
    else:
        _refuse_flags_of_quantize(q_bits, q_group_size, q_mode, quant_predicate)
    layout = open_source(hf_path, revision, target, overwrite)
    if layout.quantized and not dequantize:
        why = "is quantised already; use it as it is, or add --dequantize"
        raise ConversionError(f"{layout.folder}: {why}")
    if dequantize and not layout.quantized:
        raise ConversionError(f"{layout.folder}: is not quantised")
    kept = None if dtype is None else DTYPES[dtype]
    return write_checkpoint(
        plan_conversion(layout, base=base, recipe=quant_predicate, dtype=kept),
        target,
        card=CARD.format(made="converted", command="convert"),
        upload_repo=upload_repo,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _check_known(flag: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ConversionError(f"{flag} is {value!r}; supported: {', '.join(known)}")


def _refuse_flags_of_quantize(
    bits: int | None, group_size: int | None, mode: str, recipe: str
) -> None:
    for flag, given in (
        ("q-bits", bits is not None),
        ("q-group-size", group_size is not None),
        ("q-mode", mode != "affine"),
        ("quant-predicate", recipe != "uniform"),
    ):
        if given:
            raise ConversionError(f"--{flag} is given without --quantize; add it")


def open_source(
    model: str | Path, revision: str | None, target: Path, overwrite: bool
) -> Layout:
    """Return what is read to write `target`: of a folder, hub id or built-in name.

    Raises DGemmaError if the source is incomplete, or the target may not be written.
    """
    backends.current()  # chosen before the first array is made
    atomic.check_target(target, overwrite)
    source = hub.resolve(model, revision)
    atomic.check_apart(source, target)
    config = read_config(source)
    # read here so that what `load` would refuse is refused before anything is written
    read_generation_config(config, source)
    Tokenizer.from_dir(source)
    return read_layout(source, config)


def write_checkpoint(
    plan: ConversionPlan,
    target: Path,
    *,
    card: str,
    upload_repo: str | None,
    overwrite: bool,
    shard_bytes: int,
    progress: Progress | None,
) -> Converted:
    """Write a planned folder, whole or not at all, and upload it if asked.

    `card` is the text of README.md. Raises ConversionError when the folder does not
    fit the disk or cannot be finished.
    """
    atomic.check_disk(target, plan.nbytes)
    source = plan.layout.folder
    config = released_config(plan.layout.config, plan.quantization, plan.dtype)
    shards = _split(plan.tensors, shard_bytes)
    converted = Converted(
        path=target,
        source_bytes=plan.layout.nbytes,
        bytes=plan.nbytes,
        shards=len(shards),
        bits_per_weight=plan.bits_per_weight,
        dense=tuple(plan.dense),
        regrouped=plan.regrouped,
    )
    plan.tensors.clear()  # so that each array is freed once it is written
    zeros = list[str]()

    def check(name: str, array: mx.array) -> None:
        sources = plan.sources.pop(name, [array])
        _check_numbers(name, sources, array, zeros)

    with atomic.staged(target, overwrite) as folder:
        (folder / "README.md").write_text(card, encoding="utf-8")
        sums = _write_weights(folder, shards, converted.bytes, progress, check)
        atomic.write_json(folder / "config.json", config)
        for name in COPIED:
            if (source / name).is_file() and _is_inside(source / name, source):
                shutil.copyfile(source / name, folder / name)
        write_sums(folder, sums)
    if zeros:
        message = f"{source}: all zeros, as after a torn download: {shorten(zeros)}"
        warnings.warn(message, stacklevel=2)
    if upload_repo is not None:
        hub.upload(target, upload_repo)
    return converted


def _is_inside(path: Path, source: Path) -> bool:
    """Whether a file lies in the source, or where the hub's cache keeps its files.

    What a link elsewhere leads to may be private, and the output may be published.
    """
    folder, real = source.resolve(), path.resolve()
    blobs = folder.parents[1] / "blobs" if len(folder.parents) > 1 else folder
    return real.is_relative_to(folder) or real.parent == blobs


def _split(tensors: dict[str, mx.array], limit: int) -> dict[str, dict[str, mx.array]]:
    """Return files of at most `limit` bytes, or of one tensor, by their names."""
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [SINGLE] if len(shards) == 1 else shard_names(len(shards))
    return dict(zip(names, shards, strict=True))


def _write_weights(
    folder: Path,
    shards: dict[str, dict[str, mx.array]],
    total: int,
    progress: Progress | None,
    check: Callable[[str, mx.array], None],
) -> dict[str, str]:
    """Write weight files, and their index if there are several; return their SHA-256.

    `check` sees each tensor before it is written.
    """
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    sums, done = dict[str, str](), 0
    cache_limit = mx.set_cache_limit(0)  # freed buffers would add up to a shard
    try:
        for file, tensors in shards.items():
            for name, size, digest in write_file(folder / file, tensors, check):
                done, sums[file] = done + size, digest.hex()
                if progress is not None:
                    progress(name, done, total)
    finally:
        mx.set_cache_limit(cache_limit)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic.write_json(folder / INDEX, index)
    return sums


def _check_numbers(
    name: str, sources: list[mx.array], written: mx.array, zeros: list[str]
) -> None:
    """Raise ConversionError for values that are none; note a weight of zeros alone."""
    if count := sum(map(count_nonfinite, sources)):
        why = "are NaN or infinite in the source; it is damaged: download it again"
        raise ConversionError(f"{name}: {count:,} values {why}")
    if count := count_nonfinite(written):
        kind = str(written.dtype).removeprefix("mlx.core.")
        raise ConversionError(
            f"{name}: {count:,} values are too large for {kind}; use --dtype bfloat16"
        )
    made = name.endswith((".scales", ".biases"))  # by the quantisation
    if written.ndim > 1 and not made and not mx.any(sources[0]).item():
        zeros.append(name)


def released_config(
    config: ModelConfig, quantization: QuantizationMap | None, dtype: mx.Dtype
) -> dict[str, Any]:
    """Return config.json in the release's layout, which every other reader knows."""
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
