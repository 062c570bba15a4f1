"""An encoded prefix that outlives its request: the next encodes only what is new.

Rounding depends on where chunks end, and where they end depends on the tokens alone.
So a prefix that is reused is, bit for bit, the one of a prompt encoded from the start.

Its file is safetensors: `keys` and `ends`, part j of what keeps all columns as
`full.i.j`, the window of sliding layer i at column c as `sliding.i.j.c`; and in its
metadata its layout, what model encoded it and a sum of all arrays. Its owner alone may
read it: it holds what was said.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import __version__
from ..errors import CheckpointError, SettingsError
from ..files.atomic import save_arrays
from ..files.opening import user_path
from ..files.safetensors import (
    Expected,
    TensorInfo,
    check_tensors,
    checksum,
    load_file,
)
from ..model.cache import LayerKV, PrefixCache, Snapshot
from ..model.language import DiffusionGemma

if TYPE_CHECKING:
    from ..media.images import Picture

MIN_SHARE = 16  # a chunk may end early once it has 1/16 of its maximum
DIGEST_PART = 2**60  # of a picture's digest, enough to distinguish pictures
KIND, LAYOUT = "mlx-dgemma prompt cache", "2"
WORD = 2**60  # a key of any size is written as two int64: key // WORD, key % WORD


@dataclass(frozen=True)
class ImageSpan:
    """A picture whose soft tokens stand at the ids start … end-1 of a prompt."""

    start: int
    picture: "Picture"

    @property
    def end(self) -> int:
        return self.start + self.picture.soft_tokens


def prefix_keys(ids: Sequence[int], image_spans: Sequence[ImageSpan]) -> list[int]:
    """Return a number per token that identifies what is encoded there.

    Its id, or for a soft token a negative one of the picture's digest and place in it.
    """
    keys = list(ids)
    for span in image_spans:
        first = -1 - int(span.picture.digest[:15], 16) * DIGEST_PART
        keys[span.start : span.end] = [first - i for i in range(span.end - span.start)]
    return keys


def chunk_ends(
    tokens: Sequence[int],
    eos: Set[int],
    maximum: int,
    image_spans: Sequence[ImageSpan] = (),
) -> list[int]:
    """Return where the chunks that a prompt is encoded in end; the last ends with it.

    A chunk has at most `maximum` tokens, and ends behind an eos, the end of a turn,
    unless it is small. A picture stays in one chunk, however long that gets. The tokens
    behind an end never move it.
    """
    inside = {end for span in image_spans for end in range(span.start + 1, span.end)}
    minimum = -(-maximum // MIN_SHARE)
    ends, start = [], 0
    for end in range(1, len(tokens)):
        size = end - start
        if size < minimum or end in inside:
            continue
        if size >= maximum or tokens[end - 1] in eos:
            ends.append(end)
            start = end
    return [*ends, len(tokens)]


class Prefix:
    """The encoded prefix of one model, reused from one request to the next.

    keys     what is encoded, see `prefix_keys`
    ends     of the chunks it was encoded in

    A running request claims it, so that no other writes behind them.
    """

    def __init__(self, model: DiffusionGemma):
        self.model = model
        self.cache = model.make_cache()
        self.keys: list[int] = []
        self.ends: list[int] = []
        self._claimed = Lock()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def in_use(self) -> bool:
        """Whether a running request writes behind it."""
        return self._claimed.locked()

    def claim(self) -> None:
        """Take the prefix for one request; any thread may `release` it.

        Raises SettingsError while another request has it.
        """
        if not self._claimed.acquire(blocking=False):
            raise SettingsError(
                "a running request writes to this prefix; let it end or cancel it first"
            )

    def release(self) -> None:
        self._claimed.release()

    def match_prefix(self, keys: Sequence[int], ends: Sequence[int]) -> int:
        """Forget what a prompt of these keys and chunks lacks; return what is left."""
        shared = [0]
        for mine, other in zip(self.ends, ends, strict=False):
            chunk = slice(shared[-1], mine)
            if mine != other or self.keys[chunk] != list(keys[chunk]):
                break
            shared.append(mine)
        return self._rewind(shared)

    def trim(self) -> int:
        """Forget a reply, which the next prompt chunks anew; return what is left."""
        return self._rewind([0, *self.ends])

    def extend(self, keys: Sequence[int], *, snapshot: bool) -> None:
        """Record a chunk that was just encoded; `snapshot`: to be rewound to later."""
        self.keys += keys
        self.ends.append(len(self.keys))
        if snapshot:
            self.cache.save_snapshot()

    def _rewind(self, ends: Sequence[int]) -> int:
        """Rewind to the last of these ends that the cache still reaches."""
        length = max(end for end in ends if self.cache.can_rewind_to(end))
        self.cache.rewind(length)
        self.ends = [end for end in self.ends if end <= length]
        del self.keys[length:]
        return length


def save_prefix(path: str | Path, prefix: Prefix) -> None:
    """Write an encoded prefix to a file, which is replaced whole or not at all.

    Raises CheckpointError when nothing is encoded, or the file cannot be written.
    """
    path = user_path(path)
    prefix.claim()
    try:
        _save(path, prefix)
    finally:
        prefix.release()


def _save(path: Path, prefix: Prefix) -> None:
    if not prefix.trim():
        raise CheckpointError(f"{path}: nothing is encoded yet; ask something first")
    cache = prefix.cache
    arrays = {
        "keys": mx.array(np.array([divmod(k, WORD) for k in prefix.keys], np.int64)),
        "ends": mx.array(np.array(prefix.ends, np.int64)),
        **_arrays(cache, [*cache.snapshots, cache.snapshot()]),
    }
    metadata = {"kind": KIND, "layout": LAYOUT, "version": __version__}
    metadata |= {"model": fingerprint(prefix.model), "arrays": checksum(arrays)}
    try:
        save_arrays(path, arrays, metadata, private=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from None


def load_prefix(path: str | Path, model: DiffusionGemma) -> Prefix:
    """Return the prefix in a file that `save_prefix` wrote with the same model.

    Raises CheckpointError for another model or layout, and for a damaged file.
    """
    path = user_path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    again = "delete it and save it again"
    try:
        header, arrays, metadata = load_file(path)
    except CheckpointError:
        wrong = "damaged, or not a safetensors file"
        raise CheckpointError(f"{path}: {wrong}; {again}") from None
    if metadata.get("kind") != KIND:
        raise CheckpointError(f"{path}: not a prompt cache; give another file")
    if (layout := metadata.get("layout")) != LAYOUT:
        wrong = f"of layout {layout!r}, but this version reads {LAYOUT!r}"
        raise CheckpointError(f"{path}: {wrong}; {again}")
    if metadata.get("arrays") != checksum(arrays):
        raise CheckpointError(f"{path}: damaged; {again}")
    if metadata.get("model") != fingerprint(model):
        raise CheckpointError(
            f"{path}: encoded by another model, or with another adapter; load that "
            "one, or delete the file"
        )
    try:
        return _restore(path, header, arrays, model)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {again}") from None


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


def _restore(
    path: Path,
    header: dict[str, TensorInfo],
    arrays: dict[str, mx.array],
    model: DiffusionGemma,
) -> Prefix:
    """Return the prefix that a file holds, after checking every array."""
    kinds = {n: (i.dtype, len(i.shape), *i.shape[1:]) for n, i in header.items()}
    if kinds.get("keys") != (mx.int64, 2, 2) or kinds.get("ends") != (mx.int64, 1):
        raise CheckpointError(f"{path}: keys or ends are missing or of a wrong kind")
    prefix = Prefix(model)
    pairs: Any = arrays.pop("keys").tolist()
    ends: Any = arrays.pop("ends").tolist()
    prefix.keys, prefix.ends = [high * WORD + low for high, low in pairs], ends
    rising = all(a < b for a, b in pairwise([0, *ends]))
    if not ends or not rising or ends[-1] != len(prefix):
        raise CheckpointError(f"{path}: ends are not those of chunks of the keys")
    if (largest := max(prefix.keys)) >= model.config.vocab_size:
        raise CheckpointError(f"{path}: holds id {largest}, which the model lacks")
    suffixes = {n.rpartition(".")[2] for n in arrays if n.startswith("sliding.")}
    columns = [end for end in ends[:-1] if str(end) in suffixes] + ends[-1:]
    # a cache of one token has the same arrays, each of one column: (1, K, 1, width)
    one, expected = model.make_cache(), dict[str, Expected]()
    model.encode(mx.array([[0]]), one)
    windows = one.snapshot().windows
    for name, array in _arrays(one, [Snapshot(c, windows) for c in columns]).items():
        rows, heads, _, width = array.shape
        count = len(prefix)
        if name.startswith("sliding."):
            count = min(int(name.split(".")[3]), model.config.sliding_window - 1)
        shape = rows, heads, count, width
        expected[name] = Expected(shape, (array.dtype,), "this model")
    check_tensors(path, {name: header[name] for name in arrays}, expected)
    mx.eval(arrays)  # read now, whatever happens to the file later
    parts: dict[str, LayerKV] = defaultdict(tuple)  # by "full.i" and "sliding.i.c"
    for name in sorted(arrays):
        kind, layer, _, *column = name.split(".")
        parts[".".join([kind, layer, *column])] += (arrays[name],)
    prefix.cache.resume(
        [parts[f"full.{i}"] for i in range(len(one.history))],
        [Snapshot(c, {i: parts[f"sliding.{i}.{c}"] for i in windows}) for c in columns],
    )
    return prefix


def _arrays(cache: PrefixCache, snapshots: Iterable[Snapshot]) -> dict[str, mx.array]:
    """Return what full layers of a cache store, and snapshots, by name in a file."""
    full = {
        f"full.{i}.{j}": part
        for i, parts in enumerate(cache.history)
        for j, part in enumerate(parts)
    }
    sliding = {
        f"sliding.{i}.{j}.{snapshot.column}": part
        for snapshot in snapshots
        for i, parts in snapshot.windows.items()
        for j, part in enumerate(parts)
    }
    return full | sliding
