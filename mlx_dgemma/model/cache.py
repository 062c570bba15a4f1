"""The encoded prefix: what every layer stores of it. Only `encode` writes it.

Sliding layers store keys and values. Full layers compute both from one projection and
store that, which is half as much; the rotations of their keys are stored once.

Rows of a batch end at the same column: a shorter prefix has padding columns in front.
So an append is one slice for all rows, and a canvas follows directly.

Full layers can be rewound to any column. Sliding layers drop columns that have left
their window; to rewind further, copies of the window at a few columns (snapshots) are
restored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..checkpoint.config import ModelConfig

LayerKV = tuple[mx.array, ...]  # keys and values, or the projection they are made of
MIN_BUFFER = 256  # columns
MAX_SNAPSHOTS = 4  # of the 26B release, each takes 0.2 GB


def bucket(columns: int) -> int:
    """Return `columns` rounded up to one of eight sizes per doubling.

    Buffers and compiled shapes then change rarely, and at most a ninth is empty.
    """
    step = max(MIN_BUFFER, (1 << columns.bit_length()) // 16)
    return -(-columns // step) * step


@dataclass(frozen=True)
class Span:
    """Columns begin … end-1 of a cache; row i's prefix begins at row_starts[i]."""

    begin: int
    end: int
    row_starts: tuple[int, ...]

    @property
    def padded(self) -> bool:
        """Whether a row has padding inside the span."""
        return any(start > self.begin for start in self.row_starts)


class LayerCache:
    """What one layer stores: arrays of (B, K, columns, width), in order of columns.

    A sliding layer stores the window that later tokens may see and `slack` columns
    more, so that it can be rewound by that many.
    """

    def __init__(self, window: int | None, slack: int):
        # columns before a token that it may see; None: all
        self.lookback = None if window is None else window - 1
        self.slack = slack
        self.begin = 0  # columns before it were dropped
        self.end = 0
        self.reserved = 0  # columns to make room for at once
        self.buffers: LayerKV = ()

    def append(self, *new: mx.array) -> LayerKV:
        """Add T columns; return what their queries may see, in column order."""
        start, count = self.end - self.begin, new[0].shape[2]
        size = bucket(max(start + count, self.reserved))
        old = self.buffers or (None,) * len(new)
        self.buffers = tuple(
            _write(buffer, part, start, size)
            for buffer, part in zip(old, new, strict=True)
        )
        seen = self.visible_from(self.end)
        self.end += count
        columns = self._columns(seen, self.end)
        self._drop()
        return columns

    def visible_from(self, column: int) -> int:
        """Return the first column that a token or canvas at `column` may see."""
        return 0 if self.lookback is None else max(0, column - self.lookback)

    def read(self, room: int = 0) -> LayerKV:
        """Return what a canvas sees and `room` empty columns; () without a prefix."""
        if self.end == 0:
            return ()
        return self._columns(self.visible_from(self.end), self.end + room)

    @property
    def window_full(self) -> bool:
        """Whether a canvas reads a whole window, as it does from then on."""
        return self.lookback is not None and self.end >= self.lookback

    @property
    def room(self) -> int:
        """Empty columns to read, so that shapes change once per bucket."""
        if self.window_full:
            return 0
        size = bucket(self.end)
        return (size if self.lookback is None else min(size, self.lookback)) - self.end

    def rewind(self, column: int) -> None:
        self.end = column
        if column == 0:
            self.begin, self.buffers = 0, ()

    def restore(self, column: int, window: LayerKV) -> None:
        """Rewind to `column` with a copy of the window there."""
        width = window[0].shape[2]
        self.begin, self.end = column - width, column
        size = bucket(width)
        self.buffers = tuple(_write(None, part, 0, size) for part in window)

    @property
    def earliest(self) -> int:
        """The earliest column this layer can be rewound to."""
        if self.begin == 0 or self.lookback is None:
            return 0
        return self.begin + self.lookback

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def _columns(self, start: int, end: int) -> LayerKV:
        window = slice(start - self.begin, end - self.begin)
        return tuple(buffer[:, :, window] for buffer in self.buffers)

    def _drop(self) -> None:
        """Drop columns out of reach, once they are as many as those kept."""
        if self.lookback is None:
            return
        needed = max(0, self.end - self.lookback - self.slack)
        if needed - self.begin <= self.lookback + self.slack:
            return
        self.buffers = tuple(map(mx.contiguous, self._columns(needed, self.end)))
        self.begin = needed


def _write(buffer: mx.array | None, new: mx.array, start: int, size: int) -> mx.array:
    """Put `new` into the buffer at column `start`; grow it to `size` if too small.

    In place, as long as nothing else holds the buffer.
    """
    B, K, columns, width = new.shape
    if buffer is None:
        buffer = mx.zeros((B, K, size, width), dtype=new.dtype)
    elif buffer.shape[2] < start + columns:
        more = mx.zeros((B, K, size - start, width), dtype=new.dtype)
        buffer = mx.concatenate([buffer[:, :, :start], more], axis=2)
    buffer[:, :, start : start + columns] = new
    return buffer


@dataclass(frozen=True)
class Snapshot:
    """Copies of the sliding layers' windows at a column, to rewind to it."""

    column: int
    windows: dict[int, LayerKV]  # by number of the layer

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.windows.values() for part in parts)


def least_useful(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Return the snapshot to drop; never the last.

    Dropping one costs encoding the columns since the one before it again. Rewinding is
    the likelier, the nearer a snapshot is to the end.
    """
    before = [0, *(snapshot.column for snapshot in snapshots)]
    end = snapshots[-1].column
    _, index = min(
        ((snapshot.column - before[i]) / (end - snapshot.column), i)
        for i, snapshot in enumerate(snapshots[:-1])
    )
    return snapshots[index]


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
        # cos and sin of every column's position, for layers that rotate keys late
        self.key_rope = {
            layer: LayerCache(None, slack)
            for layer in config.layers
            if not layer.sliding
        }
        self._entries = [*self.layers, *self.key_rope.values()]
        self.columns = 0
        self.row_starts: tuple[int, ...] = (0,)
        self.snapshots: list[Snapshot] = []  # in order of columns

    @property
    def lengths(self) -> tuple[int, ...]:
        """Prefix length of each row, in tokens."""
        return tuple(self.columns - start for start in self.row_starts)

    @property
    def length(self) -> int:
        """Length of the longest prefix, in tokens."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, room and snapshots included."""
        return sum(part.nbytes for part in [*self._entries, *self.snapshots])

    def reserve(self, tokens: int) -> None:
        """Make room for a prefix of that many tokens at the first append."""
        for entry in self._entries:
            if entry.lookback is None:
                entry.reserved = tokens

    def add_columns(self, rows: int, new: int) -> None:
        """Account for `new` columns that all layers are about to append."""
        if self.columns == 0:
            self.row_starts = (0,) * rows
        self.columns += new

    def span(self, layer: LayerCache, new: int = 0) -> Span:
        """Return what the last `new` columns, or a canvas behind them, see."""
        first = layer.visible_from(self.columns - new)
        return Span(first, self.columns, self.row_starts)

    def save_snapshot(self) -> None:
        """Store a snapshot of this length; drop one if there are too many."""
        if not self.columns or self._snapshot_at(self.columns):
            return
        self.snapshots.append(self.snapshot())
        if len(self.snapshots) > MAX_SNAPSHOTS:
            self.snapshots.remove(least_useful(self.snapshots))

    def snapshot(self) -> Snapshot:
        """Return copies of the sliding layers' windows."""
        windows = {
            index: tuple(map(mx.contiguous, layer.read()))
            for index, layer in enumerate(self.layers)
            if layer.lookback is not None
        }
        mx.eval(windows)  # unevaluated, they would hold the buffers
        return Snapshot(self.columns, windows)

    def can_rewind_to(self, length: int) -> bool:
        """Return whether `rewind` accepts that many tokens."""
        column = min(self.row_starts) + length
        inside = self._earliest <= column <= self.columns
        empty = length == 0 and max(self.row_starts) == 0
        return inside or empty or self._snapshot_at(column) is not None

    def rewind(self, length: int) -> None:
        """Drop all but the first `length` tokens of each row's longest prefix.

        Raises ValueError when the length is not in the past, or so early that the
        sliding layers no longer hold their window and there is no snapshot.
        """
        start = min(self.row_starts)
        column = start + length
        if not self.can_rewind_to(length):
            others = [f", {snapshot.column - start}" for snapshot in self.snapshots]
            raise ValueError(
                f"cannot rewind to {length} tokens: possible from "
                f"{self._earliest - start} to {self.length}{''.join(others)}"
            )
        snapshot = self._snapshot_at(column)
        for index, layer in enumerate(self.layers):
            if snapshot is not None and column < layer.earliest:
                layer.restore(column, snapshot.windows[index])
            else:
                layer.rewind(column)
        for entry in self.key_rope.values():
            entry.rewind(column)
        self.columns = column
        self.snapshots = [one for one in self.snapshots if one.column <= column]
        self.evaluate()  # another thread may be the next to use it

    @property
    def _earliest(self) -> int:
        """The earliest column that can be rewound to without a snapshot."""
        return max(*(layer.earliest for layer in self.layers), *self.row_starts)

    def _snapshot_at(self, column: int) -> Snapshot | None:
        return next((one for one in self.snapshots if one.column == column), None)

    @property
    def history(self) -> list[LayerKV]:
        """What full layers store of all columns, and the rotations of their keys."""
        return [entry.read() for entry in self._entries if entry.lookback is None]

    def resume(self, history: Sequence[LayerKV], snapshots: Sequence[Snapshot]) -> None:
        """Fill the empty cache as one row of these; it ends at the last snapshot."""
        full = [entry for entry in self._entries if entry.lookback is None]
        for entry, parts in zip(full, history, strict=True):
            entry.append(*parts)
        end = snapshots[-1]
        self.add_columns(1, end.column)
        for index, window in end.windows.items():
            self.layers[index].restore(end.column, window)
        self.evaluate()
        self.snapshots = list(snapshots[:MAX_SNAPSHOTS])

    def evaluate(self) -> None:
        """Compute what was appended, so that its inputs can be freed."""
        mx.eval([entry.buffers for entry in self._entries])

    @classmethod
    def join(
        cls, config: ModelConfig, caches: Sequence["PrefixCache"]
    ) -> "PrefixCache":
        """Return one cache over the rows of several; reads them once, changes none.

        Sliding layers bring only the window a canvas sees, so the result cannot be
        rewound past it.
        """
        joined = cls(config, slack=0)
        joined.columns = max(cache.columns for cache in caches)
        joined.row_starts = tuple(
            start + joined.columns - cache.columns
            for cache in caches
            for start in cache.row_starts
        )
        many = zip(joined._entries, *(cache._entries for cache in caches), strict=True)
        for entry, *entries in many:
            entry.end = joined.columns
            entry.begin = entry.visible_from(joined.columns)
            parts = [one.read() for one in entries]
            entry.buffers = _stack(parts, joined.columns - entry.begin, entry.room)
        return joined


def _stack(parts: Sequence[LayerKV], columns: int, room: int) -> LayerKV:
    """Pad each row in front to `columns`, add `room` behind, and stack the rows."""
    some = next(part for part in parts if part)
    empty = tuple(mx.zeros((1, *a.shape[1:2], 0, *a.shape[3:]), a.dtype) for a in some)
    stacked = []
    for arrays in zip(*(part or empty for part in parts), strict=True):
        padded = [
            mx.pad(a, [(0, 0), (0, 0), (columns - a.shape[2], room), (0, 0)])
            for a in arrays
        ]
        stacked.append(mx.concatenate(padded))
    return tuple(stacked)
