"""Looking into checkpoint folders, and making changed copies of them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.weights import parameter_name
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.model.language import DiffusionGemma

PROMPT = mx.array([[2, 3, 9, 10, 11, 12, 13, 14, 15, 16, 4]])
CANVAS = mx.array([list(range(7, 23))])


def tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder by their parameter, vision by its name on disk."""
    found: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        found |= {parameter_name(name) or name: a for name, a in arrays.items()}
    return found


def bits(array: mx.array) -> bytes:
    return np.array(mx.view(array.reshape(-1), mx.uint8)).tobytes()


def same(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape)
        assert bits(array) == bits(theirs[name]), name


def logits(model: DiffusionGemma) -> np.ndarray:
    cache = model.make_cache()
    model.encode(PROMPT, cache)
    signal = model.self_condition(model.denoise(CANVAS, cache))
    return np.array(model.denoise(CANVAS, cache, signal))


def copied(
    source: Path,
    target: Path,
    *,
    dtype: mx.Dtype | None = None,
    more: Mapping[str, mx.array | None] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A changed copy of a checkpoint folder; None takes a tensor or a key out.

    dtype    of every tensor
    more     tensors by their names on disk
    config   keys of config.json
    """
    shutil.copytree(source, target)
    arrays: dict[str, Any] = dict(mx.load(str(source / "model.safetensors")))
    if dtype is not None:
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    arrays |= more or {}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    mx.save_safetensors(str(target / "model.safetensors"), arrays)
    keys = read_json(target) | dict(config or {})
    keys = {key: value for key, value in keys.items() if value is not None}
    (target / "config.json").write_text(json.dumps(keys))
    return target


def read_json(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(DGemmaError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def whole(folder: Path, source: Path) -> None:
    """The folder holds the source's model, complete."""
    same(tensors(folder), tensors(source))
    own = {"README.md", "SHA256SUMS"}  # a source may have none
    assert {*listing(folder)} - own == {*listing(source)} - own
