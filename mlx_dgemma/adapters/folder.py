"""Adapter folders: mlx-lm's two files, written whole or not at all, read strictly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.config import ModelConfig
from ..errors import AdapterError, ConfigError, SettingsError
from ..files.atomic import save_arrays, write_atomically, write_json
from ..files.json import Keys, read_json
from ..files.opening import user_path
from ..files.safetensors import (
    Expected,
    TensorInfo,
    check_tensors,
    load_tensors,
    read_header,
)
from ..model.language import DiffusionGemma
from . import peft
from .lora import LoRA, adapt, shapes

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def trained(model: DiffusionGemma) -> dict[str, mx.array]:
    """Return every trainable parameter by its path."""
    return dict(tree_flatten(model.trainable_parameters()))  # type: ignore[arg-type]


def count(weights: Mapping[str, mx.array]) -> int:
    """Return how many numbers there are."""
    return sum(array.size for array in weights.values())


def save(folder: Path, weights: Mapping[str, mx.array], config: dict[str, Any]) -> None:
    """Write both files into `folder`, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, lambda path: write_json(path, config))
    save_arrays(folder / WEIGHTS, weights)


def config_of(lora: LoRA | None, num_layers: int) -> dict[str, Any]:
    """Return adapter_config.json for an adapter, or for fine-tuned weights if None."""
    if lora is None:
        return {"fine_tune_type": "full", "num_layers": num_layers}
    parameters = {"rank": lora.rank, "scale": lora.scale, "dropout": 0.0}
    return {
        "fine_tune_type": "lora",
        "num_layers": lora.num_layers,
        "lora_parameters": parameters | {"keys": list(lora.keys)},
    }


def read_config(folder: Path) -> LoRA | None:
    """Return the adapter a folder holds; None for fine-tuned weights themselves.

    Raises AdapterError naming the file and key.
    """
    path = folder / CONFIG
    if folder.is_file():
        raise AdapterError(f"{folder}: is a file; give the adapter's folder")
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    try:
        keys = Keys(read_json(path), str(path))
        if keys.one_of("fine_tune_type", "lora", ("lora", "full")) == "full":
            return None
        parameters = keys.mapping("lora_parameters")
        if parameters is None:
            raise keys.refuse("lora_parameters", "is missing; is this mlx-lm's format?")
        targets = parameters.array("keys")
        return LoRA(
            rank=parameters.integer("rank", None, 1, 2**16),
            scale=parameters.number("scale", None),
            num_layers=keys.integer("num_layers", -1, -1, 2**16),
            keys=LoRA.keys if targets is None else tuple(targets),
        )
    except ConfigError as error:
        raise AdapterError(str(error)) from None
    except SettingsError as error:
        raise AdapterError(f"{path}: {error}") from None


def load(model: DiffusionGemma, folder: str | Path) -> None:
    """Put the adapter, or the fine-tuned weights, of a folder into a model.

    The folder may be one that PEFT saved. Raises AdapterError when a tensor is missing,
    unexpected or of the wrong shape.
    """
    folder = user_path(folder)
    if peft.is_peft(folder):
        return peft.attach(model, peft.read(folder, model.config))
    lora = read_config(folder)
    infos = check_weights(model, lora, folder / WEIGHTS)
    if lora is not None:
        adapt(model, lora)
    model.load_weights(list(load_tensors(infos).items()), strict=False)
    mx.eval(model.parameters())
    model.freeze()


def check(model: DiffusionGemma, folder: str | Path) -> None:
    """Raise AdapterError when `load` would, as far as headers show."""
    folder = user_path(folder)
    if peft.is_peft(folder):
        peft.read(folder, model.config)
    else:
        check_weights(model, read_config(folder), folder / WEIGHTS)


def check_weights(
    model: DiffusionGemma, lora: LoRA | None, path: Path
) -> dict[str, TensorInfo]:
    """Return a file's tensors. Raises AdapterError if one does not fit the model."""
    every: Any = tree_flatten(model.parameters())
    return check_file(path, model.config, lora, {n: a.shape for n, a in every})


def check_file(
    path: Path,
    config: ModelConfig,
    lora: LoRA | None,
    parameters: Mapping[str, tuple[int, ...]],
) -> dict[str, TensorInfo]:
    """Return the tensors in the file of an adapter, or of fine-tuned weights.

    `parameters` are those of the model, of which fine-tuned weights may be any. Raises
    AdapterError when a tensor is missing, unexpected, of the wrong shape or no floats.
    """
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    if lora is not None:
        try:
            parameters = shapes(config, lora)
        except SettingsError as error:
            raise AdapterError(f"{path.parent / CONFIG}: {error}") from None
    expected = {n: Expected(s, source="this model") for n, s in parameters.items()}
    infos, partial = read_header(path), lora is None
    check_tensors(path, infos, expected, partial=partial, error=peft.mismatch)
    return infos
