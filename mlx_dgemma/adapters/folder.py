"""Adapter folders: mlx-lm's two files, written whole or not at all, read strictly."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import FLOATS
from ..errors import AdapterError, ConfigError, SettingsError
from ..files.atomic import save_arrays, write_atomically
from ..files.json import Keys, read_json
from ..files.safetensors import read_header
from ..model.language import DiffusionGemma
from . import peft
from .lora import LoRA, adapt, shapes

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def trained(model: DiffusionGemma) -> dict[str, mx.array]:
    """Every trainable parameter by its path."""
    return dict(tree_flatten(model.trainable_parameters()))  # type: ignore[arg-type]


def save(folder: Path, weights: Mapping[str, mx.array], config: dict[str, Any]) -> None:
    """Write both files into `folder`, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=4, sort_keys=True) + "\n"
    write_atomically(
        folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8")
    )
    save_arrays(folder / WEIGHTS, weights)


def drop_partials(folder: Path) -> None:
    """Remove what a run that was killed had half written."""
    for partial in folder.glob(".partial-*"):
        partial.unlink(missing_ok=True)


def config_of(lora: LoRA | None, num_layers: int) -> dict[str, Any]:
    """What adapter_config.json says of the layers; None for all weights."""
    if lora is None:
        return {"fine_tune_type": "full", "num_layers": num_layers}
    parameters = {"rank": lora.rank, "scale": lora.scale, "dropout": 0.0}
    parameters["keys"] = list(lora.keys)
    return {
        "fine_tune_type": "lora",
        "num_layers": lora.num_layers,
        "lora_parameters": parameters,
    }


def read_config(folder: Path) -> LoRA | None:
    """The adapter a folder holds; None for fine-tuned weights themselves.

    Raises AdapterError naming the file and key.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    try:
        keys = Keys(read_json(path), str(path))
        kind = keys.one_of("fine_tune_type", "lora", ("lora", "full"))
        if kind == "full":
            return None
        parameters = keys.mapping("lora_parameters")
        if parameters is None:
            raise keys.refuse("lora_parameters", "is missing; is this mlx-lm's format?")
        chosen = parameters.array("keys")
        return LoRA(
            rank=parameters.integer("rank", None, 1, 2**16),
            scale=parameters.number("scale", None),
            num_layers=keys.integer("num_layers", -1, -1, 2**16),
            **({} if chosen is None else {"keys": tuple(chosen)}),
        )
    except (ConfigError, SettingsError) as error:
        text = str(error)
        raise AdapterError(text if str(path) in text else f"{path}: {text}") from None


def load(model: DiffusionGemma, folder: str | Path) -> None:
    """Put the adapter, or the fine-tuned weights, of a folder into a model.

    The folder may be one that PEFT saved. Raises AdapterError when a tensor is missing,
    unexpected or of the wrong shape.
    """
    folder = Path(folder).expanduser()
    if peft.is_peft(folder):
        return peft.put(model, peft.read(folder, model.config))
    lora, path = read_config(folder), folder / WEIGHTS
    check_weights(model, lora, path)
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    if lora is not None:
        adapt(model, lora)
    model.load_weights(list(arrays.items()), strict=False)
    mx.eval(model.parameters())
    model.freeze()


def check(model: DiffusionGemma, folder: str | Path) -> None:
    """Raise AdapterError when `load` would, as far as headers tell."""
    folder = Path(folder).expanduser()
    if peft.is_peft(folder):
        peft.read(folder, model.config)
    else:
        check_weights(model, read_config(folder), folder / WEIGHTS)


def check_weights(model: DiffusionGemma, lora: LoRA | None, path: Path) -> None:
    """Raise AdapterError when the file does not hold what the model would take."""
    if lora is not None:
        wanted = needed(path, model.config, lora)
    else:
        every: Any = tree_flatten(model.parameters())
        wanted = {name: array.shape for name, array in every}
    check_file(path, wanted, every=lora is not None)


def needed(path: Path, config: ModelConfig, lora: LoRA) -> dict[str, tuple[int, ...]]:
    """Every tensor the file of an adapter must hold, and its shape.

    Raises AdapterError when the model has fewer layers.
    """
    try:
        return shapes(config, lora)
    except SettingsError as error:
        raise AdapterError(f"{path.parent / CONFIG}: {error}") from None


def check_file(
    path: Path, wanted: Mapping[str, tuple[int, ...]], *, every: bool
) -> None:
    """Raise AdapterError when a file holds another tensor than those wanted.

    every: all of them must be there
    """
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    held = read_header(path)
    if every and (missing := sorted(set(wanted) - set(held))):
        raise AdapterError(f"{path}: lacks {missing[0]}")
    for name, info in held.items():
        if name not in wanted:
            raise AdapterError(f"{path}: {name} is no parameter of this model")
        if info.shape != tuple(wanted[name]):
            raise AdapterError(
                f"{path}: {name} has shape {list(info.shape)}, but this model needs "
                f"{list(wanted[name])}; was it trained on another model?"
            )
        if info.dtype not in FLOATS:
            raise AdapterError(f"{path}: {name} holds {info.dtype}, not floats")


def count(weights: Mapping[str, mx.array]) -> int:
    """How many numbers."""
    return sum(math.prod(array.shape) for array in weights.values())
