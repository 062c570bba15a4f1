"""Fusing an adapter into its model: streamed, tensor by tensor, like a conversion."""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from ..checkpoint.config import ModelConfig
from ..checkpoint.convert import (
    CARD,
    SHARD_BYTES,
    Converted,
    Progress,
    carry_out,
    open_source,
)
from ..checkpoint.plan import Blocks, Change, Planner
from ..checkpoint.weights import Files, expected_shapes
from ..errors import AdapterError
from ..files import atomic as staging
from ..files.safetensors import read_header
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
    dequantize      make every layer dense; otherwise a quantised layer with an adapter
                    is quantised again in its own way, and all else stays bit for bit
    progress        called after each tensor

    Raises DGemmaError, one line, before anything is written; what fails later leaves
    nothing behind.
    """
    target, folder = Path(save_path).expanduser(), Path(adapter_path).expanduser()
    config, layout = open_source(model, revision, target, overwrite)
    staging.check_apart(folder, target, "the adapter")
    changes = changes_of(folder, config)
    planner = Planner(layout, config, keep=not dequantize, changes=changes)
    return carry_out(
        planner.plan(),
        layout,
        config,
        target,
        card=CARD.format(made="fused with an adapter", command="fuse"),
        upload_repo=upload_repo,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def changes_of(folder: Path, config: ModelConfig) -> dict[str, Change]:
    """What the adapter in a folder does to which parameter.

    Raises AdapterError when it does not fit, or one weight cannot hold it.
    """
    if peft.is_peft(folder):
        imported = peft.read(folder, config)
        if not imported.shared:
            raise AdapterError(
                f"{folder}: encoder and decoder have different adapters, and one "
                "weight cannot hold both; use it unfused, with --adapter-path"
            )
        return {
            f"{path}.weight": _adding(lambda low=low: (low.a, low.b), low.scale)
            for path, low in imported.decoder.items()
        }
    lora, path = adapters.read_config(folder), folder / adapters.WEIGHTS
    if lora is not None:
        wanted = adapters.needed(path, config, lora)
    else:
        wanted = expected_shapes(config)
    adapters.check_file(path, wanted, every=lora is not None)
    files = Files(folder, read_header(path))
    if lora is None:
        return {name: _replacing(files, name) for name in files.tensors}

    def pair(layer: str) -> tuple[mx.array, mx.array]:
        a, b = (files.load(f"{layer}.{part}") for part in ("lora_a", "lora_b"))
        return a.astype(mx.float32), b.astype(mx.float32)

    return {
        f"{layer}.weight": _adding(lambda layer=layer: pair(layer), lora.scale)
        for layer in lora.layers(config)
    }


def _adding(load: Callable[[], tuple[mx.array, mx.array]], scale: float) -> Change:
    """Adds what an adapter does to a weight; `load` reads lora_a and lora_b."""

    def change(blocks: Blocks) -> Iterator[mx.array]:
        a, b = load()
        for experts, weight in blocks:
            some = (a[experts], b[experts]) if weight.ndim > 2 else (a, b)
            yield weight + delta(*some, scale)

    return change


def _replacing(files: Files, name: str) -> Change:
    """Puts a fine-tuned tensor in a weight's place, which is not read."""

    def change(blocks: Blocks) -> Iterator[mx.array]:
        yield files.load(name)

    return change
