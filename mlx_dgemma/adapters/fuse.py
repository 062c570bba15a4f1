"""Fusing an adapter into its model: streamed, tensor by tensor, like a conversion."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx

from ..checkpoint.config import ModelConfig
from ..checkpoint.convert import (
    CARD,
    SHARD_BYTES,
    Converted,
    Progress,
    open_source,
    write_checkpoint,
)
from ..checkpoint.plan import Blocks, Change, plan_conversion
from ..checkpoint.weights import expected_shapes
from ..errors import AdapterError
from ..files.atomic import check_apart
from ..files.opening import user_path
from ..files.safetensors import TensorInfo, load_tensors
from . import folder as adapters
from . import peft
from .lora import delta


def fuse(
    model: str | Path,
    adapter_path: str | Path = "adapters",
    save_path: str | Path = "fused_model",
    *,
    dequantize: bool = False,
    revision: str | None = None,
    upload_repo: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Converted:
    """Write the model with an adapter, or with fine-tuned weights, in its weights.

    model           checkpoint folder, hub id or built-in name
    adapter_path    folder written by `mlx_dgemma.lora`, or by PEFT where both modes
                    have the same adapter
    save_path       folder to write
    dequantize      make every layer dense; otherwise a quantised layer with an adapter
                    is quantised again in its own way, and all else stays bit for bit
    revision        branch, tag or commit of a hub id
    upload_repo     hub repository to upload the result to
    overwrite       replace a model folder at `save_path`
    shard_bytes     most bytes of one file of weights
    progress        called after each tensor: its name, bytes done, bytes in all

    Raises DGemmaError, one line, before anything is written; what fails later leaves
    nothing behind.
    """
    target, folder = user_path(save_path), user_path(adapter_path)
    layout = open_source(model, revision, target, overwrite)
    check_apart(folder, target, "the adapter")
    changes = read_changes(folder, layout.config)
    return write_checkpoint(
        plan_conversion(layout, keep_quantized=not dequantize, changes=changes),
        target,
        card=CARD.format(made="fused with an adapter", command="fuse"),
        upload_repo=upload_repo,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def read_changes(folder: Path, config: ModelConfig) -> dict[str, Change]:
    """Return what the adapter in a folder does to which parameter.

    Raises AdapterError when it does not fit, or one weight cannot hold it.
    """
    if peft.is_peft(folder):
        adapter = peft.read(folder, config)
        if not adapter.shared:
            raise AdapterError(
                f"{folder}: encoder and decoder have different adapters, and one "
                "weight cannot hold both; use it unfused, with --adapter-path"
            )
        return {
            f"{path}.weight": partial(_add, lambda low=low: (low.a, low.b), low.scale)
            for path, low in adapter.decoder.items()
        }
    lora, path = adapters.read_config(folder), folder / adapters.WEIGHTS
    infos = adapters.check_file(path, config, lora, expected_shapes(config))
    if lora is None:
        return {name: partial(_replace, info) for name, info in infos.items()}

    def pair(layer: str) -> tuple[mx.array, mx.array]:
        sides = {part: infos[f"{layer}.{part}"] for part in ("lora_a", "lora_b")}
        a, b = load_tensors(sides).values()
        return a.astype(mx.float32), b.astype(mx.float32)

    return {
        f"{layer}.weight": partial(_add, partial(pair, layer), lora.scale)
        for layer in lora.layers(config)
    }


def _add(
    load: Callable[[], tuple[mx.array, mx.array]], scale: float, blocks: Blocks
) -> Iterator[mx.array]:
    """Yield a weight with an adapter added; `load` reads lora_a and lora_b."""
    a, b = load()
    for experts, weight in blocks:
        some = (a[experts], b[experts]) if weight.ndim > 2 else (a, b)
        yield weight + delta(*some, scale)


def _replace(info: TensorInfo, blocks: Blocks) -> Iterator[mx.array]:
    """Yield a fine-tuned tensor; the weight it replaces is not read."""
    yield load_tensors({0: info})[0]
