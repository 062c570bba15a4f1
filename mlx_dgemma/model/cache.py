"""The encoded prefix: what every layer keeps of it, written only by encode.

Sliding layers keep keys and values. Full layers make both from one projection and
keep that, which halves them; how its keys were turned is kept once for all of them.

Rows of a batch end together: a shorter prefix has padding columns in front. So
an append is one slice for all rows, and a canvas always follows directly.

Full layers can be rewound to any column. Sliding layers forget what has left their
window, so what they showed at a few columns, the marks, is copied and put back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..checkpoint.config import ModelConfig

LayerKV = tuple[mx.array, ...]
SMALLEST = 256  # columns of the smallest buffer
MARKS = 4  # most marks: of the 26B release, each takes 0.2 GB


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
    """What one layer keeps, arrays of (B, K, columns, width), in order of columns.

    A sliding layer keeps the window that later tokens may see and `slack` columns
    more, which is how far it can be rewound.
    """

    def __init__(self, window: int | None, slack: int):
        self.keep = None if window is None else window - 1
        self.slack = slack
        self.first = 0  # columns before it were dropped
        self.last = 0
        self.reserved = 0  # columns to make room for at once
        self.buffers: LayerKV = ()

    def append(self, *new: mx.array) -> LayerKV:
        """Add T columns; returns what their queries may see, in column order."""
        start, count = self.last - self.first, new[0].shape[2]
        room = bucket(max(start + count, self.reserved))
        old = self.buffers or (None,) * len(new)
        self.buffers = tuple(
            _write(buffer, part, start, room)
            for buffer, part in zip(old, new, strict=True)
        )
        seen = self.visible_from(self.last)
        self.last += count
        columns = self._columns(seen, self.last)
        self._drop()
        return columns

    def visible_from(self, column: int) -> int:
        """The first column that a token or canvas at `column` may see."""
        return 0 if self.keep is None else max(0, column - self.keep)

    def read(self, room: int = 0) -> LayerKV:
        """What a canvas behind the prefix sees, and `room` empty columns behind it.

        Nothing when the prefix is empty.
        """
        if self.last == 0:
            return ()
        return self._columns(self.visible_from(self.last), self.last + room)

    @property
    def settled(self) -> bool:
        """Whether what a canvas reads has the window's width, from now on."""
        return self.keep is not None and self.last >= self.keep

    @property
    def room(self) -> int:
        """Empty columns to read, for shapes that change once per bucket only."""
        if self.settled:
            return 0
        whole = bucket(self.last)
        return (whole if self.keep is None else min(whole, self.keep)) - self.last

    def rewind(self, column: int) -> None:
        self.last = column
        if column == 0:
            self.first, self.buffers = 0, ()

    def restore(self, column: int, window: LayerKV) -> None:
        """Go back to a column of which only what was seen there is left."""
        width = window[0].shape[2]
        self.first, self.last = column - width, column
        room = bucket(width)
        self.buffers = tuple(_write(None, part, 0, room) for part in window)

    @property
    def earliest(self) -> int:
        """The earliest column this layer can be rewound to."""
        return 0 if self.first == 0 or self.keep is None else self.first + self.keep

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def _columns(self, start: int, end: int) -> LayerKV:
        window = slice(start - self.first, end - self.first)
        return tuple(buffer[:, :, window] for buffer in self.buffers)

    def _drop(self) -> None:
        """Forget columns nobody will see, once they are as many as those kept."""
        if self.keep is None:
            return
        needed = max(0, self.last - self.keep - self.slack)
        if needed - self.first <= self.keep + self.slack:
            return
        self.buffers = tuple(map(mx.contiguous, self._columns(needed, self.last)))
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


@dataclass(frozen=True)
class Snapshot:
    """What sliding layers showed at a column: with it one can go back there."""

    column: int
    windows: dict[int, LayerKV]  # by number of the layer

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.windows.values() for part in parts)


def least_useful(marks: Sequence[Snapshot]) -> Snapshot:
    """Which mark to forget: never the last.

    To lose one costs encoding what lies between it and the one before it again, and
    the nearer to the end, the likelier one goes back there.
    """
    before = [0, *(mark.column for mark in marks)]
    end = marks[-1].column
    _, index = min(
        ((mark.column - before[i]) / (end - mark.column), i)
        for i, mark in enumerate(marks[:-1])
    )
    return marks[index]


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
        # cos and sin of every column's position, for the layers that turn keys later
        self.key_rope = {
            layer: LayerCache(None, slack)
            for layer in config.layers
            if not layer.sliding
        }
        self.columns = 0
        self.starts: tuple[int, ...] = (0,)
        self.marks: list[Snapshot] = []  # in order of columns

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
        """Bytes held, room and marks included."""
        return sum(part.nbytes for part in [*self._entries, *self.marks])

    @property
    def _entries(self) -> list[LayerCache]:
        return [*self.layers, *self.key_rope.values()]

    def reserve(self, tokens: int) -> None:
        """Make room for a prefix of that many tokens at the first append."""
        for entry in self._entries:
            if entry.keep is None:
                entry.reserved = tokens

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

    def mark(self) -> None:
        """Make sure that one can come back to this length; copies the windows.

        Of more than MARKS lengths the least useful is forgotten.
        """
        if not self.columns or self._mark_at(self.columns):
            return
        self.marks.append(self.here())
        if len(self.marks) > MARKS:
            self.marks.remove(least_useful(self.marks))

    def here(self) -> Snapshot:
        """What sliding layers show now, as copies."""
        windows = {
            index: tuple(map(mx.contiguous, layer.read()))
            for index, layer in enumerate(self.layers)
            if layer.keep is not None
        }
        mx.eval(windows)  # unevaluated, they would hold the buffers
        return Snapshot(self.columns, windows)

    def reaches(self, length: int) -> bool:
        """Whether one can rewind to that many tokens of the longest prefix."""
        column = min(self.starts) + length
        inside = self._earliest <= column <= self.columns
        nothing = length == 0 and max(self.starts) == 0
        return inside or nothing or self._mark_at(column) is not None

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens of each row's longest prefix.

        Raises ValueError when the length is not in the past, or so early that the
        sliding layers no longer hold their window and no mark is there.
        """
        column = min(self.starts) + length
        if not self.reaches(length):
            marked = [f", {mark.column - min(self.starts)}" for mark in self.marks]
            raise ValueError(
                f"cannot rewind to {length} tokens: possible from "
                f"{self._earliest - min(self.starts)} to {self.length}{''.join(marked)}"
            )
        mark, restored = self._mark_at(column), False
        for index, layer in enumerate(self.layers):
            if mark is not None and column < layer.earliest:
                layer.restore(column, mark.windows[index])
                restored = True
            else:
                layer.rewind(column)
        for entry in self.key_rope.values():
            entry.rewind(column)
        self.columns = column
        self.marks = [mark for mark in self.marks if mark.column <= column]
        if restored:
            self.evaluate()  # another thread may be the next to use it

    @property
    def _earliest(self) -> int:
        """The earliest column that can be rewound to without a mark."""
        return max(*(layer.earliest for layer in self.layers), *self.starts)

    def _mark_at(self, column: int) -> Snapshot | None:
        return next((mark for mark in self.marks if mark.column == column), None)

    @property
    def history(self) -> list[LayerKV]:
        """What full layers keep of all columns, and how keys are turned there."""
        return [entry.read() for entry in self._entries if entry.keep is None]

    def resume(self, history: Sequence[LayerKV], marks: Sequence[Snapshot]) -> None:
        """Become, if empty, the one-row cache this was of; it ends at the last mark."""
        full = [entry for entry in self._entries if entry.keep is None]
        for entry, parts in zip(full, history, strict=True):
            entry.append(*parts)
        end = marks[-1]
        self.begin(1, end.column)
        for index, window in end.windows.items():
            self.layers[index].restore(end.column, window)
        self.evaluate()
        self.marks = list(marks[:MARKS])

    def evaluate(self) -> None:
        """Compute what was appended, so that its inputs can be freed."""
        mx.eval([entry.buffers for entry in self._entries])

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
        many = zip(joined._entries, *(cache._entries for cache in caches), strict=True)
        for entry, *entries in many:
            entry.last = joined.columns
            entry.first = entry.visible_from(joined.columns)
            parts = [one.read() for one in entries]
            entry.buffers = _stack(parts, joined.columns - entry.first, entry.room)
        return joined


def _stack(parts: Sequence[LayerKV], columns: int, room: int) -> LayerKV:
    """Pad each row in front to `columns`, add `room` behind, and stack the rows."""
    some = next(part for part in parts if part)
    nothing = tuple(
        mx.zeros((1, *a.shape[1:2], 0, *a.shape[3:]), a.dtype) for a in some
    )
    stacked = []
    for arrays in zip(*(part or nothing for part in parts), strict=True):
        padded = [
            mx.pad(a, [(0, 0), (0, 0), (columns - a.shape[2], room), (0, 0)])
            for a in arrays
        ]
        stacked.append(mx.concatenate(padded))
    return tuple(stacked)
