"""Encoded prefixes in files: a long beginning is encoded once, by one process.

One safetensors file: `keys` and `ends` of the prefix, part j of what keeps all columns
as `full.i.j`, the window of sliding layer i at column c as `sliding.i.j.c`; and in its
metadata, which layout this is, which model encoded it, and a sum of all arrays. It is
readable for its owner alone: it holds what was said.
"""

import json
from collections import defaultdict
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import __version__
from ..errors import CheckpointError
from ..files.atomic import save_arrays
from ..files.safetensors import (
    Expected,
    TensorInfo,
    check_tensors,
    checksum,
    read_header,
)
from ..model.cache import LayerKV, PrefixCache, Snapshot
from ..model.language import DiffusionGemma
from .prefix import Prefix

KIND, LAYOUT = "mlx-dgemma prompt cache", "2"
WORD = 2**60  # a key of any size is written as two int64: key // WORD, key % WORD


def save_prefix(path: str | Path, prefix: Prefix) -> None:
    """Write an encoded prefix to a file, which is replaced whole or not at all.

    Raises CheckpointError when nothing is encoded, or the file cannot be written.
    """
    path = Path(path).expanduser()
    prefix.claim()
    try:
        _save(path, prefix)
    finally:
        prefix.release()


def _save(path: Path, prefix: Prefix) -> None:
    if not prefix.trim():
        raise CheckpointError(f"{path}: nothing is encoded yet; ask something first")
    arrays = {
        "keys": mx.array(np.array([divmod(k, WORD) for k in prefix.keys], np.int64)),
        "ends": mx.array(np.array(prefix.ends, np.int64)),
        **_arrays(prefix.cache),
    }
    metadata = {"kind": KIND, "layout": LAYOUT, "version": __version__}
    metadata |= {"model": fingerprint(prefix.model), "arrays": checksum(arrays)}
    try:
        save_arrays(path, arrays, metadata, private=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from None


def load_prefix(path: str | Path, model: DiffusionGemma) -> Prefix:
    """Return the prefix in a file that `save_prefix` wrote with the same model.

    Raises CheckpointError for a file of another model or layout, and for one that is
    damaged or inconsistent.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        header = read_header(path)
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except (CheckpointError, RuntimeError, ValueError):
        raise CheckpointError(
            f"{path}: damaged, or not a safetensors file; delete it and save it again"
        ) from None
    arrays, metadata = loaded
    if metadata.get("kind") != KIND:
        raise CheckpointError(f"{path}: not a prompt cache; give another file")
    if metadata.get("layout") != LAYOUT:
        raise CheckpointError(
            f"{path}: of layout {metadata.get('layout')!r}, but this version reads "
            f"{LAYOUT!r}; delete it and save it again"
        )
    if metadata.get("arrays") != checksum(arrays):
        raise CheckpointError(f"{path}: damaged; delete it and save it again")
    if metadata.get("model") != fingerprint(model):
        raise CheckpointError(
            f"{path}: encoded by another model, or with another adapter; load that "
            "one, or delete the file"
        )
    prefix = Prefix(model)
    try:
        columns = _check(path, header, arrays, prefix)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete it and save it again") from None
    parts: dict[str, LayerKV] = defaultdict(tuple)  # by "full.i" and "sliding.i.c"
    for name in sorted(arrays.keys() - {"keys", "ends"}):
        kind, layer, _, *column = name.split(".")
        parts[".".join([kind, layer, *column])] += (arrays[name],)
    history = [parts[f"full.{i}"] for i in range(len(prefix.cache.history))]
    layers = enumerate(prefix.cache.layers)
    sliding = [i for i, layer in layers if layer.lookback is not None]
    snapshots = [
        Snapshot(c, {i: parts[f"sliding.{i}.{c}"] for i in sliding}) for c in columns
    ]
    # read now, whatever happens to the file later
    mx.eval(history, [snapshot.windows for snapshot in snapshots])
    prefix.cache.resume(history, snapshots)
    return prefix


def fingerprint(model: DiffusionGemma) -> str:
    """Return a hash that differs between models that encode differently.

    Of the configuration, and of every layer that encodes: its settings and weights.
    """
    digest = sha256(json.dumps(model.config.raw, sort_keys=True).encode())
    for part in (model.embed_tokens, *model.encoder_layers):
        for name, module in sorted(part.named_modules()):
            # such as an adapter's scale; private ones say whether it is being trained
            numbers = sorted(
                (key, value)
                for key, value in vars(module).items()
                if isinstance(value, int | float) and key[0] != "_"
            )
            digest.update(repr([name, *numbers]).encode())
        arrays: Any = tree_flatten(part.parameters())
        digest.update(checksum(dict(arrays)).encode())
    return digest.hexdigest()


def _arrays(cache: PrefixCache) -> dict[str, mx.array]:
    """Return everything a cache is made of, by its name in a file."""
    snapshots = {s.column: s for s in [*cache.snapshots, cache.snapshot()]}
    full = {
        f"full.{i}.{j}": part
        for i, parts in enumerate(cache.history)
        for j, part in enumerate(parts)
    }
    sliding = {
        f"sliding.{i}.{j}.{column}": part
        for column, snapshot in snapshots.items()
        for i, parts in snapshot.windows.items()
        for j, part in enumerate(parts)
    }
    return full | sliding


def _check(
    path: Path,
    header: dict[str, TensorInfo],
    arrays: dict[str, mx.array],
    prefix: Prefix,
) -> list[int]:
    """Check all arrays, set keys and ends, and return the columns of the snapshots."""
    kinds = {n: (i.dtype, len(i.shape), *i.shape[1:]) for n, i in header.items()}
    if kinds.get("keys") != (mx.int64, 2, 2) or kinds.get("ends") != (mx.int64, 1):
        raise CheckpointError(f"{path}: keys or ends are missing or of a wrong kind")
    keys = [high * WORD + low for high, low in np.array(arrays["keys"]).tolist()]
    ends = np.array(arrays["ends"]).tolist()
    rising = all(a < b for a, b in pairwise([0, *ends]))
    if not ends or not rising or ends[-1] != len(keys):
        raise CheckpointError(f"{path}: ends are not those of chunks of the keys")
    model, length = prefix.model, len(keys)
    if (largest := max(keys)) >= model.config.vocab_size:
        raise CheckpointError(f"{path}: holds id {largest}, which the model lacks")
    named = {name.rpartition(".")[2] for name in header if name.startswith("sliding.")}
    columns = [end for end in ends[:-1] if str(end) in named] + [length]
    cache, expected = model.make_cache(), {}
    model.encode(mx.array([[0]]), cache)
    for name, array in _arrays(cache).items():  # of one token: (1, K, 1, width)
        rows, heads, _, width = array.shape
        counts = {name: length}
        if name.startswith("sliding."):
            stem, window = name.removesuffix("1"), model.config.sliding_window
            counts = {f"{stem}{column}": min(column, window - 1) for column in columns}
        for other, count in counts.items():
            shape = rows, heads, count, width
            expected[other] = Expected(shape, (array.dtype,), "this model")
    found = {n: info for n, info in header.items() if n not in ("keys", "ends")}
    check_tensors(path, found, expected)
    prefix.keys, prefix.ends = keys, ends
    return columns
