"""Encoded prefixes in files: a long beginning is encoded once, by one process.

One safetensors file: `keys` and `ends` of the prefix, part j of what keeps all columns
as `full.i.j`, of what sliding layer i showed at column c as `sliding.i.j.c`; and in its
metadata, which layout this is and which model encoded it.
"""

import json
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import __version__
from ..errors import CheckpointError
from ..files.atomic import write_atomically
from ..files.safetensors import TensorInfo, read_header
from ..model.cache import LayerKV, PrefixCache, Snapshot
from ..model.language import DiffusionGemma
from .prefix import Prefix

KIND, LAYOUT = "mlx-dgemma prompt cache", "1"
SAMPLES = 256  # numbers of each array that its fingerprint is of
WORD = 2**60  # a key is written as two numbers: how many of these, and the rest


def save_prefix(path: str | Path, prefix: Prefix) -> None:
    """Write what is encoded to a file that appears under its name when it is whole.

    Raises CheckpointError when there is nothing to write, or it cannot be written.
    """
    path = Path(path).expanduser()
    prefix.check_free()
    if not prefix.trim():
        raise CheckpointError(f"{path}: nothing is encoded yet; ask something first")
    arrays = {
        "keys": mx.array(np.array([divmod(k, WORD) for k in prefix.keys], np.int64)),
        "ends": mx.array(np.array(prefix.ends, np.int64)),
        **_arrays(prefix.cache),
    }
    metadata = {
        "kind": KIND,
        "layout": LAYOUT,
        "model": fingerprint(prefix.model),
        "version": __version__,
    }

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # a file, or its name would get a suffix
            mx.save_safetensors(file, arrays, metadata)

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from None


def load_prefix(path: str | Path, model: DiffusionGemma) -> Prefix:
    """The prefix in a file that `save_prefix` wrote with the same model.

    Raises CheckpointError for a file of another model or another layout, and for one
    that is torn or says what cannot be.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        header = read_header(path)
        arrays, metadata = _load(path)
    except (CheckpointError, RuntimeError, ValueError):
        raise CheckpointError(
            f"{path}: torn, or no safetensors file; delete it and save it again"
        ) from None
    _check_metadata(path, metadata, model)
    keys, ends = _read_lists(path, header, arrays)
    if max(keys) >= model.config.vocab_size:
        raise _broken(path, f"holds id {max(keys)}, which the model has no row for")
    one = model.make_cache()
    model.encode(mx.array([[0]]), one)
    wanted, columns = _wanted(_arrays(one), header, ends, model.config.sliding_window)
    found = {
        name: (info.shape, info.dtype)
        for name, info in header.items()
        if name not in _LISTS
    }
    if wanted != found:
        raise _broken(path, _difference(wanted, found))
    prefix = Prefix(model)
    prefix.cache.resume(*_parts(prefix.cache, arrays, columns))
    prefix.keys, prefix.ends = keys, ends
    return prefix


def fingerprint(model: DiffusionGemma) -> str:
    """Tells models apart that encode differently: a hash of what they are.

    Of the configuration, and of every layer that encodes: its settings, and a sample
    of its weights.
    """
    digest = sha256(json.dumps(model.config.raw, sort_keys=True).encode())
    samples = []
    for part in (model.embed_tokens, *model.encoder_layers):
        for name, module in sorted(part.named_modules()):
            own = vars(module).items()
            numbers = [(k, v) for k, v in own if isinstance(v, int | float)]
            # an adapter's scale is one; whether a module is being trained is none
            said = [name, *sorted(pair for pair in numbers if pair[0][0] != "_")]
            digest.update(repr(said).encode())
        arrays: Any = tree_flatten(part.parameters())
        for name, array in sorted(arrays):
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            flat = array.reshape(-1)[:: max(1, array.size // SAMPLES)]
            samples.append(mx.view(mx.contiguous(flat), mx.uint8))
    mx.eval(samples)
    for sample in samples:
        digest.update(np.array(sample).tobytes())
    return digest.hexdigest()


_LISTS = ("keys", "ends")


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    return loaded


def _check_metadata(path: Path, said: dict[str, str], model: DiffusionGemma) -> None:
    if said.get("kind") != KIND:
        raise CheckpointError(f"{path}: is no prompt cache; give another file")
    if said.get("layout") != LAYOUT:
        raise CheckpointError(
            f"{path}: of layout {said.get('layout')!r}, but this version reads "
            f"{LAYOUT!r}; delete it and save it again"
        )
    if said.get("model") != fingerprint(model):
        raise CheckpointError(
            f"{path}: encoded by another model, or with another adapter; load that "
            "one, or delete the file"
        )


def _read_lists(
    path: Path, header: dict[str, TensorInfo], arrays: dict[str, mx.array]
) -> tuple[list[int], list[int]]:
    """Keys and ends of a prefix, neither empty."""
    found = {n: (i.dtype, len(i.shape), *i.shape[1:]) for n, i in header.items()}
    if found.get("keys") != (mx.int64, 2, 2) or found.get("ends") != (mx.int64, 1):
        raise _broken(path, "keys or ends are not the numbers they should be")
    keys = [high * WORD + low for high, low in np.array(arrays["keys"]).tolist()]
    ends = np.array(arrays["ends"]).tolist()
    rising = all(a < b for a, b in pairwise([0, *ends]))
    if not ends or not rising or ends[-1] != len(keys):
        raise _broken(path, "ends are not those of chunks of the keys")
    return keys, ends


def _arrays(cache: PrefixCache) -> dict[str, mx.array]:
    """All that a cache is made of, by its name in a file."""
    marks = {mark.column: mark for mark in [*cache.marks, cache.here()]}
    full = {
        f"full.{i}.{j}": part
        for i, parts in enumerate(cache.history)
        for j, part in enumerate(parts)
    }
    sliding = {
        f"sliding.{i}.{j}.{column}": part
        for column, mark in marks.items()
        for i, parts in mark.windows.items()
        for j, part in enumerate(parts)
    }
    return full | sliding


Kind = tuple[tuple[int, ...], mx.Dtype]


def _wanted(
    one: dict[str, mx.array],
    header: dict[str, TensorInfo],
    ends: list[int],
    window: int,
) -> tuple[dict[str, Kind], list[int]]:
    """Shapes and dtypes of what a file must hold, and at which columns it has marks.

    one: the arrays of a cache of one token
    """
    named = {name.rpartition(".")[2] for name in header if name.startswith("sliding.")}
    columns = [end for end in ends[:-1] if str(end) in named] + ends[-1:]
    wanted: dict[str, Kind] = {}
    for name, array in one.items():
        rows, heads, _, width = array.shape
        if name.startswith("full."):
            wanted[name] = (rows, heads, ends[-1], width), array.dtype
            continue
        stem = name.removesuffix("1")  # the column
        for column in columns:
            seen = min(column, window - 1)
            wanted[f"{stem}{column}"] = (rows, heads, seen, width), array.dtype
    return wanted, columns


def _parts(
    cache: PrefixCache, arrays: dict[str, mx.array], columns: list[int]
) -> tuple[list[LayerKV], list[Snapshot]]:
    """What `PrefixCache.resume` takes."""

    def parts(name: str) -> LayerKV:
        found, j = [], 0
        while (array := arrays.get(name.format(j))) is not None:
            found.append(array)
            j += 1
        return tuple(found)

    history = [parts(f"full.{i}.{{}}") for i in range(len(cache.history))]
    sliding = [i for i, layer in enumerate(cache.layers) if layer.keep is not None]
    marks = [
        Snapshot(column, {i: parts(f"sliding.{i}.{{}}.{column}") for i in sliding})
        for column in columns
    ]
    mx.eval([mark.windows for mark in marks])  # read now, whatever becomes of the file
    return history, marks


def _difference(wanted: dict[str, Kind], found: dict[str, Kind]) -> str:
    """One name in which two sets of tensors differ, and how."""
    name = next(n for n in sorted(wanted | found) if wanted.get(n) != found.get(n))
    if name not in found:
        return f"lacks {name}"
    if name not in wanted:
        return f"{name!r} is no part of this model's"
    shape, dtype = found[name]
    return f"{name} holds {dtype} {list(shape)}"


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: {why}; delete it and save it again")
