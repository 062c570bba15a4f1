"""Attention of one layer in its two modes, and the pure functions it stands on.

`rope_tables`, `causal_tiles`, `causal_mask` and `canvas_mask` are functions of
integers. Masks are True where a query may look; none is returned where none is needed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import backends
from ..checkpoint.config import LayerConfig, ModelConfig, Rope
from .cache import LayerCache, LayerKV, Span
from .layers import Linear

Tables = LayerKV  # cos and sin
FEWEST = 4  # queries of a tile, however long the prefix
Blocks = tuple[tuple[int, int], ...]  # columns of images: first, end
# of a number of queries at the end of what they see
MaskOf = Callable[[int, Span], mx.array | str | None]


class Tile(NamedTuple):
    """Queries begin … end-1 of those given, and the columns they may see.

    image   the first column of the image they are of, which they see all of
    """

    begin: int
    end: int
    seen: Span
    image: int | None = None


def rope_tables(rope: Rope, head_dim: int, positions: np.ndarray) -> Tables:
    """cos and sin, each (B, 1, T, rotated pairs) float32, for (B, T) positions.

    Made on the host: device trigonometry is inexact for large angles. The angle
    is a float32 product, as in transformers, so that both round alike.
    """
    pairs = np.arange(rope.rotated, dtype=np.float64)
    frequencies = rope.theta ** (-2 * pairs / head_dim) / rope.factor
    frequencies = frequencies.astype(np.float32)
    angles = (positions[:, None, :, None].astype(np.float32) * frequencies).astype(
        np.float64
    )
    return (
        mx.array(np.cos(angles).astype(np.float32)),
        mx.array(np.sin(angles).astype(np.float32)),
    )


def rotate(x: mx.array, query_rope: Tables) -> mx.array:
    """Rotary embedding of (B, H, T, head_dim), halves as pairs.

    The query_rope are of the first pairs; the others stand still.
    """
    cos, sin = (table.astype(x.dtype) for table in query_rope)
    turning, half = cos.shape[-1], x.shape[-1] // 2
    left, right = x[..., :turning], x[..., half : half + turning]
    left, right = left * cos - right * sin, right * cos + left * sin
    if turning == half:
        return mx.concatenate([left, right], axis=-1)
    still = x[..., turning:half], x[..., half + turning :]
    return mx.concatenate([left, still[0], right, still[1]], axis=-1)


def causal_tiles(
    new: int, span: Span, window: int | None, most: int, blocks: Blocks = ()
) -> list[Tile]:
    """Cut `new` queries at the end of `span` into tiles of at most `most`.

    So no query is multiplied with keys behind its tile, or long out of its window.
    Images are tiles of their own: each of their queries sees the whole image, in front
    of it what its window lets it see.
    """
    start, tiles = span.last - new, []
    for first, end, image in _runs(start, span.last, blocks):
        for column in range(first, end, most):
            last = min(column + most, end)
            least = span.first if window is None else column - window + 1
            least = max(span.first, least if image is None else min(least, image))
            seen = Span(least, last if image is None else end, span.starts)
            tiles.append(Tile(column - start, last - start, seen, image))
    return tiles


def _runs(
    first: int, last: int, blocks: Blocks
) -> Iterator[tuple[int, int, int | None]]:
    """Columns first … last-1 as runs of text and of one image each."""
    for begin, end in blocks:
        if first < begin:
            yield first, begin, None
        yield begin, end, begin
        first = end
    if first < last:
        yield first, last, None


def causal_mask(new: int, span: Span, window: int | None) -> mx.array | str | None:
    """Who `new` tokens at the end of `span` may see: (B|1, 1, new, keys), or a word.

    Key c of the span holds column span.first + c; a row's columns before its start
    are padding. A query sees itself and what lies before it, in sliding layers at
    most `window` columns, itself included.
    """
    keys = span.last - span.first
    padded = any(start > span.first for start in span.starts)
    if not padded and (window is None or keys <= window):
        return None if new == 1 else "causal"
    key: Any = np.arange(span.first, span.last)
    query = np.arange(span.last - new, span.last)[:, None]
    allowed = key <= query
    if window is not None:
        allowed &= query - key < window
    allowed = allowed[None]
    if padded:
        inside = key >= np.array(span.starts)[:, None]  # (B, keys)
        # A padding query must see something, or its softmax has nothing to sum.
        allowed = (allowed & inside[:, None]) | (key == query)
    return mx.array(allowed[:, None])


def image_mask(
    column: int, new: int, span: Span, window: int | None, image: int
) -> mx.array | None:
    """Who `new` queries of an image from `column` on see of `span`, which ends with it.

    (1, 1, new, keys), or None where all see all: the image from its column `image` on,
    in front of it everything or, in sliding layers, the last `window` columns with
    themselves. As transformers' `blockwise_overlay` beside its causal mask.
    """
    if window is None or column + new - 1 - span.first < window:
        return None
    key: Any = np.arange(span.first, span.last)
    query = np.arange(column, column + new)[:, None]
    return mx.array(((query - key < window) | (key >= image))[None, None])


def canvas_mask(
    length: int, span: Span, room: int = 0, *, always: bool = False
) -> mx.array | None:
    """Which keys, prefix then canvas, a canvas of `length` sees: (B, 1, 1, keys).

    All of them, but for the padding in front of shorter prefixes and the `room`
    behind all of them. None without any, unless there is `always` to be a mask.
    """
    padded = room > 0 or any(start > span.first for start in span.starts)
    if not padded and not always:
        return None
    key: Any = np.arange(span.first, span.last + room + length)
    empty = (key >= span.last) & (key < span.last + room)
    seen = (key >= np.array(span.starts)[:, None]) & ~empty
    return mx.array(seen[:, None, None])


class Attention(nn.Module):
    """Grouped-query attention, scale 1, q and k normed with weights, v without.

    Full layers have no v_proj: their values are the k_proj output before norm
    and rope. What a layer keeps of a token, `LayerKV`, is keys and values (sliding) or
    that output alone (full).
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.head_dim, self.sliding = layer.head_dim, layer.sliding
        self.window = config.sliding_window if layer.sliding else None
        self.heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        queries = config.num_attention_heads * layer.head_dim
        keys = layer.kv_heads * layer.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(width, queries, bias=bias)
        self.k_proj = Linear(width, keys, bias=bias)
        if layer.sliding:
            self.v_proj = Linear(width, keys, bias=bias)
        self.o_proj = Linear(queries, width, bias=bias)
        self.q_norm = nn.RMSNorm(layer.head_dim, eps=self.eps)
        self.k_norm = nn.RMSNorm(layer.head_dim, eps=self.eps)

    def write(self, x: mx.array, query_rope: Tables, cache: LayerCache) -> None:
        """Append (B, T, D) to the prefix; attend to nothing."""
        cache.append(*self.project_kv(x, query_rope))

    def encode(
        self,
        x: mx.array,
        query_rope: Tables,
        key_rope: Tables,
        cache: LayerCache,
        span: Span,
        mask_of: MaskOf,
        blocks: Blocks = (),
    ) -> mx.array:
        """Causal attention of (B, T, D) to the prefix and itself; writes the cache.

        query_rope are of the T tokens, key_rope of all they see; span is what that is, they
        included; mask_of gives the mask of a tile; blocks are the images among them.
        """
        kept = cache.append(*self.project_kv(x, query_rope))
        return self.attend_causal(x, kept, query_rope, key_rope, span, mask_of, blocks)

    def attend_causal(
        self,
        x: mx.array,
        kept: LayerKV,
        query_rope: Tables,
        key_rope: Tables,
        span: Span,
        mask_of: MaskOf,
        blocks: Blocks = (),
    ) -> mx.array:
        """`encode` where the cache is not ours to write: kept is of all in the span."""
        keys, values = self._keys_values(kept, key_rope)
        queries = self._queries(x, query_rope)
        most = self._tile(len(x), keys.shape[2])
        if self.window is not None:
            most = min(most, max(self.window // 2, 16))
        outputs: list[mx.array] = []
        device = backends.current()
        new = x.shape[1]
        for begin, end, seen, image in causal_tiles(
            new, span, self.window, most, blocks
        ):
            columns = slice(seen.first - span.first, seen.last - span.first)
            tile = _after(queries[:, :, begin:end], outputs)
            if image is None:
                mask = mask_of(end - begin, seen)
            else:
                column = span.last - new + begin
                mask = image_mask(column, end - begin, seen, self.window, image)
            outputs.append(
                device.attend(tile, keys[:, :, columns], values[:, :, columns], mask)
            )
        return self._output(outputs)

    def denoise(
        self,
        x: mx.array,
        query_rope: Tables,
        key_rope: Tables,
        prefix: LayerKV,
        mask: mx.array | None,
    ) -> mx.array:
        """Attention of a canvas (B, L, D) to the prefix and all of itself.

        query_rope are of the canvas, key_rope of prefix and canvas.
        """
        parts = self.project_kv(x, query_rope)
        if prefix:
            pairs = zip(prefix, parts, strict=True)
            parts = tuple(mx.concatenate([a, b], axis=2) for a, b in pairs)
        keys, values = self._keys_values(parts, key_rope)
        queries = self._queries(x, query_rope)
        outputs: list[mx.array] = []
        device = backends.current()
        most = self._tile(len(x), keys.shape[2])
        for begin in range(0, x.shape[1], most):
            tile = _after(queries[:, :, begin : begin + most], outputs)
            outputs.append(device.attend(tile, keys, values, mask))
        return self._output(outputs)

    def _tile(self, rows: int, keys: int) -> int:
        """How many queries may have their scores in memory at once."""
        most = backends.current().score_bytes
        return max(FEWEST, most // (4 * rows * self.heads * keys))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def project_kv(self, x: mx.array, query_rope: Tables) -> LayerKV:
        """What to keep of tokens, each part (B, K, T, head_dim)."""
        projected = self._heads(self.k_proj(x)).swapaxes(1, 2)
        if not self.sliding:
            return (projected,)
        values = self._heads(self.v_proj(x)).swapaxes(1, 2)
        keys = rotate(self.k_norm(projected), query_rope)
        return keys, mx.fast.rms_norm(values, None, self.eps)

    def _keys_values(
        self, parts: LayerKV, key_rope: Tables
    ) -> tuple[mx.array, mx.array]:
        """Keys and values of what was kept; key_rope are of the same columns."""
        if self.sliding:
            keys, values = parts
            return keys, values
        (projected,) = parts
        values = mx.fast.rms_norm(projected, None, self.eps)
        return rotate(self.k_norm(projected), key_rope), values

    def _queries(self, x: mx.array, query_rope: Tables) -> mx.array:
        return rotate(
            self.q_norm(self._heads(self.q_proj(x))).swapaxes(1, 2), query_rope
        )

    def _output(self, tiles: list[mx.array]) -> mx.array:
        y = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)
        return self.o_proj(y.swapaxes(1, 2).flatten(2))


def _after(tile: mx.array, outputs: list[mx.array]) -> mx.array:
    """`tile`, to be used once the outputs are there: one tile's scores at a time."""
    return mx.depends([tile], outputs[-1:])[0] if outputs else tile
