"""The encoded prefix: keys and values of every layer, written only by encode.

Rows of a batch end together: a shorter prefix has padding columns in front. So
an append is one slice for all rows, and a canvas always follows directly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..checkpoint.config import ModelConfig

SMALLEST = 256  # columns of the smallest buffer


def bucket(columns: int) -> int:
    """A number of columns from `columns` up, of which there are eight per doubling.

    So buffers and compiled shapes change rarely, and at most a ninth is room.
    """
    step = max(SMALLEST, (1 << columns.bit_length()) // 16)
    return -(-columns // step) * step


@dataclass(frozen=True)
class Span:
    """Columns first … last-1 of a cache; row i's prefix begins at starts[i]."""

    first: int
    last: int
    starts: tuple[int, ...]


class LayerCache:
    """Keys and values of one layer, each (B, K, columns, head_dim), in order.

    A sliding layer keeps the window that later tokens may see and `slack` columns
    more, which is how far it can be rewound.
    """

    def __init__(self, window: int | None, slack: int):
        self.keep = None if window is None else window - 1
        self.slack = slack
        self.first = 0  # columns before it were dropped
        self.last = 0
        self.reserved = 0  # columns to make room for at once
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add T columns; returns what their queries may see, in column order."""
        start = self.last - self.first
        end = start + keys.shape[2]
        room = bucket(max(end, self.reserved))
        self.keys = _write(self.keys, keys, start, room)
        self.values = _write(self.values, values, start, room)
        seen = self.visible_from(self.last)
        self.last += keys.shape[2]
        both = self._columns(seen, self.last)
        self._drop()
        return both

    def visible_from(self, column: int) -> int:
        """The first column that a token or canvas at `column` may see."""
        return 0 if self.keep is None else max(0, column - self.keep)

    def read(self, room: int = 0) -> tuple[mx.array, mx.array] | None:
        """What a canvas behind the prefix sees, and `room` empty columns behind it.

        None when the prefix is empty.
        """
        if self.keys is None or self.last == 0:
            return None
        return self._columns(self.visible_from(self.last), self.last + room)

    @property
    def room(self) -> int:
        """Empty columns to read, for shapes that change once per bucket only."""
        if self.keep is not None and self.last >= self.keep:
            return 0
        whole = bucket(self.last)
        return (whole if self.keep is None else min(whole, self.keep)) - self.last

    def rewind(self, column: int) -> None:
        self.last = column
        if column == 0:
            self.keys = self.values = None

    @property
    def earliest(self) -> int:
        """The earliest column this layer can be rewound to."""
        return 0 if self.first == 0 or self.keep is None else self.first + self.keep

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.keys, self.values) if a is not None)

    def _columns(self, start: int, end: int) -> tuple[mx.array, mx.array]:
        assert self.keys is not None and self.values is not None
        window = slice(start - self.first, end - self.first)
        return self.keys[:, :, window], self.values[:, :, window]

    def _drop(self) -> None:
        """Forget columns nobody will see, once they are as many as those kept."""
        if self.keep is None:
            return
        needed = max(0, self.last - self.keep - self.slack)
        if needed - self.first <= self.keep + self.slack:
            return
        self.keys, self.values = (
            mx.contiguous(a) for a in self._columns(needed, self.last)
        )
        self.first = needed


def _write(buffer: mx.array | None, new: mx.array, start: int, room: int) -> mx.array:
    """Put `new` into the buffer at column `start`; a larger one if it has no room.

    In place, as long as nobody else holds the buffer.
    """
    B, K, columns, width = new.shape
    if buffer is None:
        buffer = mx.zeros((B, K, room, width), dtype=new.dtype)
    elif buffer.shape[2] < start + columns:
        more = mx.zeros((B, K, room - start, width), dtype=new.dtype)
        buffer = mx.concatenate([buffer[:, :, :start], more], axis=2)
    buffer[:, :, start : start + columns] = new
    return buffer


class PrefixCache:
    """The prefixes of B rows through all layers.

    `slack` is how many tokens the cache can always be rewound by.
    """

    def __init__(self, config: ModelConfig, slack: int | None = None):
        slack = config.canvas_length if slack is None else slack
        self.layers = [
            LayerCache(config.sliding_window if layer.sliding else None, slack)
            for layer in config.layers
        ]
        self.columns = 0
        self.starts: tuple[int, ...] = (0,)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Prefix length of each row, in tokens."""
        return tuple(self.columns - start for start in self.starts)

    @property
    def length(self) -> int:
        """Length of the longest prefix, in tokens."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held, room included."""
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """Make room for a prefix of that many tokens at the first append."""
        for layer in self.layers:
            if layer.keep is None:
                layer.reserved = tokens

    def begin(self, rows: int, new: int) -> None:
        """Account for `new` columns that all layers are about to append."""
        if self.columns == 0:
            self.starts = (0,) * rows
        elif rows != len(self.starts):
            raise ValueError(f"{rows} rows of tokens for {len(self.starts)} prefixes")
        self.columns += new

    def span(self, layer: LayerCache, new: int = 0) -> Span:
        """What the last `new` columns, or a canvas behind them, see in one layer."""
        first = layer.visible_from(self.columns - new)
        return Span(first, self.columns, self.starts)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens of each row's longest prefix.

        Raises ValueError when the length is not in the past, or so early that the
        sliding layers no longer hold their window.
        """
        column = min(self.starts) + length
        earliest = max(layer.earliest for layer in self.layers)
        if not max(earliest, max(self.starts)) <= column <= self.columns:
            raise ValueError(
                f"cannot rewind to {length} tokens: possible from "
                f"{max(earliest, max(self.starts)) - min(self.starts)} to {self.length}"
            )
        for layer in self.layers:
            layer.rewind(column)
        self.columns = column

    def evaluate(self) -> None:
        """Compute what was appended, so that its inputs can be freed."""
        mx.eval([a for c in self.layers for a in (c.keys, c.values) if a is not None])

    @classmethod
    def join(
        cls, config: ModelConfig, caches: Sequence["PrefixCache"]
    ) -> "PrefixCache":
        """One cache over the rows of several; reads them once, changes none.

        Sliding layers bring only the window a canvas sees, so the result cannot be
        rewound past it.
        """
        joined = cls(config, slack=0)
        joined.columns = max(cache.columns for cache in caches)
        joined.starts = tuple(
            start + joined.columns - cache.columns
            for cache in caches
            for start in cache.starts
        )
        for index, layer in enumerate(joined.layers):
            layer.last = joined.columns
            layer.first = layer.visible_from(joined.columns)
            parts = [cache.layers[index].read() for cache in caches]
            columns = joined.columns - layer.first
            layer.keys, layer.values = _stack(parts, columns, layer.room)
        return joined


def _stack(
    parts: Sequence[tuple[mx.array, mx.array] | None], columns: int, room: int
) -> tuple[mx.array, mx.array]:
    """Pad each part in front to `columns`, add `room` behind, and stack the rows."""
    shape = next(p[0].shape for p in parts if p is not None)
    dtype = next(p[0].dtype for p in parts if p is not None)
    keys, values = [], []
    for part in parts:
        k, v = part or (mx.zeros((1, shape[1], 0, shape[3]), dtype=dtype),) * 2
        pad = [(0, 0), (0, 0), (columns - k.shape[2], room), (0, 0)]
        keys.append(mx.pad(k, pad))
        values.append(mx.pad(v, pad))
    return mx.concatenate(keys), mx.concatenate(values)
