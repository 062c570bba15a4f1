"""Between hidden states and the vocabulary: embedding, head, soft embeddings.

One tied matrix E of (V, D), dense or quantised, serves all three. `embed`,
`soft_embed` and `head` are plain functions. `vocab_stats` computes what a denoising
step needs of all V logits of a position without holding them all.
"""

import math
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .. import backends
from .layers import dequantize

Embedding = nn.Embedding | nn.QuantizedEmbedding
BLOCK = 64  # tokens whose probabilities are summed before one of them is sampled
LOWEST = -1e30  # logit of a banned token; an infinite one would make its share NaN


def embed(embedding: Embedding, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
    """(B, T) ids -> (B, T, D) in `dtype`, times sqrt(D) rounded to it."""
    x = embedding(tokens).astype(dtype)
    return x * mx.array(math.sqrt(x.shape[-1]), dtype=x.dtype)


def soft_embed(
    embedding: Embedding, processed_logits: mx.array, dtype: mx.Dtype
) -> mx.array:
    """(B, L, V) logits -> (B, L, D) in `dtype`: softmax · E · sqrt(D).

    The logits are rounded to that dtype before the float32 softmax and the
    probabilities after it, as transformers does between two steps.
    """
    logits = processed_logits.astype(dtype).astype(mx.float32)
    probabilities = mx.softmax(logits, axis=-1).astype(dtype)
    if isinstance(embedding, nn.QuantizedEmbedding):
        soft = mx.quantized_matmul(
            probabilities,
            embedding.weight,
            embedding.scales,
            embedding.get("biases"),
            transpose=False,
            group_size=embedding.group_size,
            bits=embedding.bits,
            mode=embedding.mode,
        )
    else:
        soft = probabilities @ embedding.weight
    return soft.astype(dtype) * mx.array(math.sqrt(soft.shape[-1]), dtype=dtype)


def head(embedding: Embedding, hidden: mx.array, softcap: float) -> mx.array:
    """(B, L, D) -> (B, L, V) float32: softcap · tanh(hidden · Eᵀ / softcap)."""
    logits = embedding.as_linear(hidden).astype(mx.float32)
    return mx.tanh(logits / softcap) * softcap


class VocabStats(NamedTuple):
    """What one pass over the vocabulary says of N positions.

    With x the soft-capped logits over the temperature, m their maximum, e = exp(x - m)
    and Z = Σ e of a position:
    """

    argmax: mx.array  # (N,) int32
    peak: mx.array  # (N,) float32: 1 / Z, the probability of argmax
    entropy: mx.array  # (N,) float32 nats: log Z - Σ e · (x - m) / Z
    sample: mx.array  # (N,) int32: inverse CDF of e / Z at the position's uniform
    signal: mx.array  # (N, D): e / Z · E · sqrt(D), the self-conditioning signal


class Banned(NamedTuple):
    """Tokens that some of N positions must not become."""

    ids: tuple[int, ...]
    at: mx.array  # (N,) bool

    def select(self, positions: slice | mx.array) -> "Banned":
        """Return the same for some of the positions."""
        return Banned(self.ids, self.at[positions])

    def mask(self, values: mx.array, ids: mx.array) -> mx.array:
        """Return (N, C) values of (C,) or (N, C) ids, very low where one is banned."""
        hit = mx.any(ids[..., None] == mx.array(self.ids), axis=-1)
        low = max(LOWEST, mx.finfo(values.dtype).min)
        return mx.where(self.at[:, None] & hit, low, values)


def vocab_stats(
    embedding: Embedding,
    hidden: mx.array,
    temperatures: mx.array,
    uniforms: mx.array,
    softcap: float,
    banned: Banned | None = None,
) -> VocabStats:
    """Return argmax, entropy, a sample and the soft embedding of each position.

    hidden (N, D); temperatures and uniforms (N,), the uniforms in [0, 1). The
    vocabulary is read in chunks; e is relative to the highest logit so far, as in
    online softmax (arXiv 1805.02867). E is read, and dequantised, once for both of its
    products and each tile of positions. banned: tokens that count as if their logits
    were infinitely low.
    """
    size, tiles = backends.current().vocabulary_rows, list[VocabStats]()
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        queries = hidden[rows]
        if tiles:  # one tile's chunks live at a time
            (queries,) = mx.depends([queries], [tiles[-1].signal])
        tile = _Tile(
            embedding,
            queries.astype(backends.current().product_dtype(hidden.dtype)),
            (softcap / temperatures[rows])[:, None],
            softcap,
            None if banned is None else banned.select(rows),
        )
        tiles.append(_tile_stats(tile, uniforms[rows, None], hidden.dtype))
    if len(tiles) == 1:
        return tiles[0]
    return VocabStats(*(mx.concatenate(list(c)) for c in zip(*tiles, strict=True)))


class _Tile(NamedTuple):
    """N positions in one pass: (N, D) queries, (N, 1) softcap over temperature."""

    embedding: Embedding
    queries: mx.array
    scale: mx.array
    softcap: float
    banned: Banned | None

    def processed(self, logits: mx.array) -> mx.array:
        """Raw logits -> float32, soft-capped and over the temperature."""
        raw = logits.astype(mx.float32)
        return backends.current().softcap(raw, self.softcap, self.scale)


def _tile_stats(tile: _Tile, uniforms: mx.array, dtype: mx.Dtype) -> VocabStats:
    """`vocab_stats` of one tile; uniforms (N, 1)."""
    argmax, highest, blocks, product, soft = _scan_vocabulary(tile)
    cumulative = mx.cumsum(blocks, axis=-1)
    total = cumulative[:, -1:]
    block, rest = _search(cumulative, uniforms * total)
    ids, e = _tokens_of(tile, block, highest)
    inside = mx.cumsum(e, axis=-1)
    # the block again, summed in another order: scale what is left to its own sum
    weight = mx.take_along_axis(blocks, block, axis=-1)
    rest = rest / weight * inside[:, -1:]
    token = mx.take_along_axis(ids, _search(inside, rest)[0], axis=-1)
    # a GPU's running sums may dip by a rounding, and so lead to a block of nothing
    token = mx.where(weight > 0, token, argmax)
    return VocabStats(
        argmax=argmax[:, 0].astype(mx.int32),
        peak=(1 / total)[:, 0],
        entropy=(mx.log(total) - product / total)[:, 0],
        sample=token[:, 0].astype(mx.int32),
        signal=(soft / total * math.sqrt(soft.shape[1])).astype(dtype),
    )


def _scan_vocabulary(tile: _Tile) -> tuple[mx.array, ...]:
    """Read the vocabulary chunk by chunk; return, with e relative to the highest x:

    argmax and highest x (N, 1), Σ e of each block (N, V / BLOCK),
    Σ e · (x - highest) (N, 1), e · E (N, D).
    """
    embedding, queries, banned = tile.embedding, tile.queries, tile.banned
    vocabulary, count, device = len(embedding.weight), len(queries), backends.current()
    highest = mx.full((count, 1), LOWEST)
    argmax = mx.zeros((count, 1), dtype=mx.uint32)
    soft = mx.zeros(queries.shape)
    parts = []
    for start in range(0, vocabulary, device.vocabulary_chunk):
        end = min(start + device.vocabulary_chunk, vocabulary)
        if isinstance(embedding, nn.QuantizedEmbedding):
            table = dequantize(embedding, queries.dtype, slice(start, end))
        else:
            table = embedding.weight[start:end].astype(queries.dtype)
        # chunk after chunk: the graph alone would let all of them live at once
        (queries,) = mx.depends([queries], [soft, *(parts[-1] if parts else ())])
        logits, ids = queries @ table.T, mx.arange(start, end)
        some = banned is not None and any(start <= i < end for i in banned.ids)
        ban = banned if some else None
        if ban is not None:
            logits = ban.mask(logits, ids)
        # the softcap is monotonic, so the argmax of raw logits is enough
        best = mx.argmax(logits, axis=-1, keepdims=True)
        value = tile.processed(mx.take_along_axis(logits, best, axis=-1))
        argmax = mx.where(value > highest, best + start, argmax)
        before, highest = highest, mx.maximum(highest, value)
        x = tile.processed(logits)
        if ban is not None:  # the softcap undoes the mask
            x = ban.mask(x, ids)
        x = x - highest
        e = device.exp(x)
        parts.append((highest, _block_sums(e), mx.sum(e * x, axis=-1, keepdims=True)))
        soft = soft * mx.exp(before - highest) + e.astype(table.dtype) @ table
    # each part is relative to the maximum so far: rescale to the final one
    sums, product = [], mx.zeros_like(highest)
    for reference, part, weighted in parts:
        shift = reference - highest
        sums.append(part * mx.exp(shift))
        part_sum = mx.sum(part, axis=-1, keepdims=True)
        product = product + mx.exp(shift) * (weighted + shift * part_sum)
    return argmax, highest, mx.concatenate(sums, axis=-1), product, soft


def _block_sums(e: mx.array) -> mx.array:
    """(N, C) -> (N, ceil(C / BLOCK)), the last block filled up with zeros."""
    if over := e.shape[1] % BLOCK:
        e = mx.pad(e, [(0, 0), (0, BLOCK - over)])
    return mx.sum(e.reshape(len(e), -1, BLOCK), axis=-1)


def _tokens_of(
    tile: _Tile, blocks: mx.array, highest: mx.array
) -> tuple[mx.array, mx.array]:
    """The tokens of (N, b) blocks: (N, b · BLOCK) ids and e.

    Their logits are made again: to keep them all would take V for each position.
    """
    last = len(tile.embedding.weight) - 1
    ids = (blocks[..., None] * BLOCK + mx.arange(BLOCK)).flatten(1)
    known = mx.minimum(ids, last)
    rows = tile.embedding(known).astype(tile.queries.dtype)
    x = tile.processed((rows @ tile.queries[..., None])[..., 0])
    if tile.banned is not None:
        x = tile.banned.mask(x, known)
    x = x - highest
    return known, mx.where(ids == known, backends.current().exp(x), 0)


def _search(cumulative: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
    """Where (N, 1) targets fall among (N, C) running sums, and the rest beyond the sum
    before; both (N, 1). A target at the very end falls to the last that adds anything.
    """
    below = mx.sum(cumulative <= target, axis=-1, keepdims=True)
    last = mx.sum(cumulative < cumulative[:, -1:], axis=-1, keepdims=True)
    index = mx.minimum(below, last)
    before = mx.take_along_axis(cumulative, mx.maximum(index, 1) - 1, axis=-1)
    return index, target - mx.where(index > 0, before, 0)
