"""Attention of one layer in its two modes, and the pure functions it is made of.

`rope_tables`, `causal_tiles` and the masks are functions of integers. Masks are True
where a query may look; there is none where slicing the keys does.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import backends
from ..checkpoint.config import LayerConfig, ModelConfig, Rope
from .cache import LayerCache, LayerKV, Span
from .layers import Linear

RopeTables = LayerKV  # cos and sin
MIN_TILE = 4  # queries of a tile, however long the prefix
ImageColumns = tuple[tuple[int, int], ...]  # first and end column of each image


class Tile(NamedTuple):
    """Some of the queries of a pass and the keys they see; slices of both."""

    queries: slice
    keys: slice
    mask: mx.array | str | None  # of these queries and keys, as `Backend.attend` takes


class CausalView(NamedTuple):
    """What tokens being encoded see in layers of one kind."""

    query_rope: RopeTables  # at the tokens
    key_rope: RopeTables  # at all columns they see, for layers that rotate keys late
    tiles: list[Tile]


def rope_tables(rope: Rope, head_dim: int, positions: np.ndarray) -> RopeTables:
    """cos and sin, each (B, 1, T, rotated pairs) float32, for (B, T) positions.

    Made on the host: device trigonometry is inexact for large angles. The angle
    is a float32 product, as in transformers, so that both round alike.
    """
    pairs = np.arange(rope.rotated, dtype=np.float64)
    frequencies = rope.theta ** (-2 * pairs / head_dim) / rope.factor
    return cos_sin(positions[:, None], frequencies.astype(np.float32))


def cos_sin(positions: np.ndarray, frequencies: np.ndarray) -> RopeTables:
    """cos and sin of (…, T) positions times (pairs,) float32 frequencies."""
    angles = positions[..., None].astype(np.float32) * frequencies
    exact = angles.astype(np.float64)
    return tuple(mx.array(f(exact).astype(np.float32)) for f in (np.cos, np.sin))


def rotate(x: mx.array, tables: RopeTables) -> mx.array:
    """Rotary embedding of (B, H, T, head_dim), halves as pairs.

    The tables are of the first pairs; the others are not rotated.
    """
    cos, sin = (table.astype(x.dtype) for table in tables)
    rotated, half = cos.shape[-1], x.shape[-1] // 2
    left, right = x[..., :rotated], x[..., half : half + rotated]
    left, right = left * cos - right * sin, right * cos + left * sin
    if rotated == half:
        return mx.concatenate([left, right], axis=-1)
    rest = x[..., rotated:half], x[..., half + rotated :]
    return mx.concatenate([left, rest[0], right, rest[1]], axis=-1)


def tile_size(rows: int, heads: int, keys: int, window: int | None = None) -> int:
    """Return how many queries may have their scores in memory at once."""
    size = max(MIN_TILE, backends.current().score_bytes // (4 * rows * heads * keys))
    return size if window is None else min(size, max(window // 2, 16))


def causal_tiles(
    new: int, span: Span, window: int | None, size: int, images: ImageColumns = ()
) -> list[Tile]:
    """Cut `new` queries at the end of `span` into tiles of at most `size`.

    So no query is multiplied with keys behind its tile, or in front of its window.
    Images are tiles of their own: each of their queries sees the whole image, and in
    front of it what its window lets it see.
    """
    start, tiles = span.end - new, list[Tile]()
    for first, end, image in _runs(start, span.end, images):
        for column in range(first, end, size):
            last = min(column + size, end)
            begin = span.begin if window is None else column - window + 1
            begin = max(span.begin, begin if image is None else min(begin, image))
            seen = Span(begin, last if image is None else end, span.row_starts)
            queries = slice(column - start, last - start)
            keys = slice(seen.begin - span.begin, seen.end - span.begin)
            mask = causal_mask(range(column, last), seen, window, image)
            tiles.append(Tile(queries, keys, mask))
    return tiles


def _runs(
    column: int, end: int, images: ImageColumns
) -> Iterator[tuple[int, int, int | None]]:
    """Columns column … end-1 as runs of text and of one image each: begin, end, and
    the begin again where the run is an image."""
    for first, behind in images:
        if column < first:
            yield column, first, None
        yield first, behind, first
        column = behind
    if column < end:
        yield column, end, None


def causal_mask(
    queries: range, span: Span, window: int | None, image: int | None = None
) -> mx.array | str | None:
    """Which columns of `span` the queries at these columns see: (B|1, 1, T, keys).

    A query sees itself and the columns before it, in sliding layers at most `window`
    columns, itself included. A row's columns before its start are padding. Queries of
    an image, which begins at `image` and ends the span, see all of it, as in
    transformers' `blockwise_overlay`. "causal" or None where that says the same.
    """
    in_window = window is None or queries[-1] - span.begin < window
    if in_window and not span.padded:
        return "causal" if image is None and len(queries) > 1 else None
    key: Any = np.arange(span.begin, span.end)
    query = np.array(queries)[:, None]
    seen = key <= query
    if window is not None:
        seen &= query - key < window
    if image is not None:
        seen |= key >= image
    seen = seen[None]
    if span.padded:
        inside = key >= np.array(span.row_starts)[:, None]  # (B, keys)
        # a padding query must see something, or its softmax has nothing to sum
        seen = (seen & inside[:, None]) | (key == query)
    return mx.array(seen[:, None])


def canvas_mask(
    length: int, span: Span, room: int = 0, *, always: bool = False
) -> mx.array | None:
    """Which keys, prefix then canvas, a canvas of `length` sees: (B, 1, 1, keys).

    All of them but the padding in front of shorter prefixes and the `room` of empty
    columns behind all prefixes. None without any, unless `always` asks for a mask.
    """
    if room == 0 and not span.padded and not always:
        return None
    key: Any = np.arange(span.begin, span.end + room + length)
    empty = (key >= span.end) & (key < span.end + room)
    seen = (key >= np.array(span.row_starts)[:, None]) & ~empty
    return mx.array(seen[:, None, None])


def attend_all(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None = None
) -> mx.array:
    """`Backend.attend` in tiles, where all queries see the same keys."""
    rows, heads, count, _ = queries.shape
    size = tile_size(rows, heads, keys.shape[2])
    tiles = [
        Tile(slice(begin, begin + size), slice(None), mask)
        for begin in range(0, count, size)
    ]
    return attend_tiles(queries, keys, values, tiles)


def attend_tiles(
    queries: mx.array, keys: mx.array, values: mx.array, tiles: list[Tile]
) -> mx.array:
    """`Backend.attend` of one tile after the other."""
    outputs = list[mx.array]()
    for tile in tiles:
        some = queries[:, :, tile.queries]
        if outputs:  # wait for the tile before, so that scores of one tile are alive
            (some,) = mx.depends([some], outputs[-1:])
        k, v = keys[:, :, tile.keys], values[:, :, tile.keys]
        outputs.append(backends.current().attend(some, k, v, tile.mask))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


class Attention(nn.Module):
    """Grouped-query attention, scale 1, q and k normed with weights, v without.

    Full layers have no v_proj: their values are the k_proj output before norm and
    rope. So `LayerKV` holds keys and values (sliding), or that output alone (full).
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.head_dim, self.sliding = layer.head_dim, layer.sliding
        self.eps = config.rms_norm_eps
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

    def encode(self, x: mx.array, cache: LayerCache, view: CausalView) -> mx.array:
        """Causal attention of (B, T, D) to the prefix and itself; writes the cache."""
        kv = cache.append(*self.project_kv(x, view.query_rope))
        return self.attend_causal(x, kv, view)

    def attend_causal(self, x: mx.array, kv: LayerKV, view: CausalView) -> mx.array:
        """`encode` without a cache: kv is of all columns that the view is of."""
        keys, values = self._keys_values(kv, view.key_rope)
        queries = self._queries(x, view.query_rope)
        return self._output(attend_tiles(queries, keys, values, view.tiles))

    def denoise(
        self,
        x: mx.array,
        prefix: LayerKV,
        query_rope: RopeTables,
        key_rope: RopeTables,
        mask: mx.array | None,
    ) -> mx.array:
        """Attention of a canvas (B, L, D) to the prefix and all of itself.

        query_rope are of the canvas, key_rope of prefix and canvas.
        """
        kv = self.project_kv(x, query_rope)
        if prefix:
            pairs = zip(prefix, kv, strict=True)
            kv = tuple(mx.concatenate([a, b], axis=2) for a, b in pairs)
        keys, values = self._keys_values(kv, key_rope)
        queries = self._queries(x, query_rope)
        return self._output(attend_all(queries, keys, values, mask))

    def project_kv(self, x: mx.array, query_rope: RopeTables) -> LayerKV:
        """What the cache holds of tokens (B, T, D), each part (B, K, T, head_dim)."""
        projected = self._heads(self.k_proj(x)).swapaxes(1, 2)
        if not self.sliding:
            return (projected,)
        values = self._heads(self.v_proj(x)).swapaxes(1, 2)
        keys = rotate(self.k_norm(projected), query_rope)
        return keys, mx.fast.rms_norm(values, None, self.eps)

    def _keys_values(
        self, kv: LayerKV, key_rope: RopeTables
    ) -> tuple[mx.array, mx.array]:
        """Keys and values of cached columns; key_rope are of the same columns."""
        if self.sliding:
            keys, values = kv
            return keys, values
        (projected,) = kv
        values = mx.fast.rms_norm(projected, None, self.eps)
        return rotate(self.k_norm(projected), key_rope), values

    def _queries(self, x: mx.array, query_rope: RopeTables) -> mx.array:
        queries = self.q_norm(self._heads(self.q_proj(x)))
        return rotate(queries.swapaxes(1, 2), query_rope)

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def _output(self, y: mx.array) -> mx.array:
        return self.o_proj(y.swapaxes(1, 2).flatten(2))
