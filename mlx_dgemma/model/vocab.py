"""Between hidden states and the vocabulary: embedding, head, soft embeddings.

One tied matrix E of (V, D), dense or quantised, serves all three. `embed`,
`soft_embed` and `head` are plain functions; `read` is what a denoising step wants of
all V logits of a position, without ever holding them.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .. import backends
from .layers import dequantize

Embedding = nn.Embedding | nn.QuantizedEmbedding
BLOCK = 64  # tokens whose probabilities are summed before one of them is sampled
LOWEST = -1e30  # of a forbidden token; what is infinite would make its share NaN


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


@dataclass(frozen=True)
class VocabStats:
    """What one pass over the vocabulary says of N positions.

    With x the soft-capped logits over the temperature, m their maximum, e = exp(x - m)
    and Z = Σ e of a position:
    """

    argmax: mx.array  # (N,) int32
    peak: mx.array  # (N,) float32: 1 / Z, the probability of argmax
    entropy: mx.array  # (N,) float32 nats: log Z - Σ e · (x - m) / Z
    sample: mx.array  # (N,) int32: inverse CDF of e / Z at the position's uniform
    signal: mx.array  # (N, D): e / Z · E · sqrt(D), the self-conditioning signal

    @property
    def arrays(self) -> list[mx.array]:
        return [self.argmax, self.peak, self.entropy, self.sample, self.signal]


@dataclass(frozen=True)
class Banned:
    """Tokens that some of N positions must not become."""

    ids: tuple[int, ...]
    at: mx.array  # (N,) bool

    def some(self, rows: slice | mx.array) -> "Banned":
        """Of some of the positions only."""
        return Banned(self.ids, self.at[rows])

    def forbid(self, values: mx.array, ids: mx.array, first: int = 0) -> mx.array:
        """(N, C) values, the lowest where the token is banned.

        ids (C,) or (N, C), counted from the token `first` on.
        """
        hit = mx.any(ids[..., None] + first == mx.array(self.ids), axis=-1)
        lowest = max(LOWEST, mx.finfo(values.dtype).min)
        return mx.where(self.at[:, None] & hit, lowest, values)


def read(
    embedding: Embedding,
    hidden: mx.array,
    temperatures: mx.array,
    uniforms: mx.array,
    softcap: float,
    banned: Banned | None = None,
) -> VocabStats:
    """Argmax, entropy, a sample and the soft embedding of each position at once.

    hidden (N, D); temperatures and uniforms (N,), the uniforms in [0, 1). Chunks of
    the vocabulary pass by; e is relative to the highest logit so far, as in online
    softmax (arXiv 1805.02867). E is read, and dequantised, once for both of its
    products and each tile of positions. banned: tokens that have no part in anything,
    as if their logits were infinitely low.
    """
    most, readings = backends.current().vocabulary_rows, []
    for start in range(0, len(hidden), most):
        rows = slice(start, start + most)
        # one tile's chunks at a time
        after = [reading.signal for reading in readings[-1:]]
        tile = mx.depends([hidden[rows]], after)[0] if after else hidden[rows]
        some = None if banned is None else banned.some(rows)
        given = temperatures[rows], uniforms[rows], softcap, some
        readings.append(_read(embedding, tile, *given))
    if len(readings) == 1:
        return readings[0]
    columns = zip(*(reading.arrays for reading in readings), strict=True)
    return VocabStats(*(mx.concatenate(list(column)) for column in columns))


def _read(
    embedding: Embedding,
    hidden: mx.array,
    temperatures: mx.array,
    uniforms: mx.array,
    softcap: float,
    banned: Banned | None,
) -> VocabStats:
    """`read` of one tile of positions."""
    ask = _Asked(
        embedding,
        hidden.astype(backends.current().product_dtype(hidden.dtype)),
        (softcap / temperatures)[:, None],
        softcap,
        banned,
    )
    swept = _sweep(ask)
    cumulative = mx.cumsum(swept.sums, axis=-1)
    total = cumulative[:, -1:]
    block, rest = _search(cumulative, uniforms[:, None] * total)
    ids, e = _tokens_of(ask, block, swept.highest)
    inside = mx.cumsum(e, axis=-1)
    # the block again, summed in another order: scale what is left to its own sum
    weight = mx.take_along_axis(swept.sums, block, axis=-1)
    rest = rest / weight * inside[:, -1:]
    token = mx.take_along_axis(ids, _search(inside, rest)[0], axis=-1)
    # a GPU's running sums may dip by a rounding, and so lead to a block of nothing
    token = mx.where(weight > 0, token, swept.argmax)
    return VocabStats(
        argmax=swept.argmax[:, 0].astype(mx.int32),
        peak=(1 / total)[:, 0],
        entropy=(mx.log(total) - swept.product / total)[:, 0],
        sample=token[:, 0].astype(mx.int32),
        signal=(swept.soft / total * math.sqrt(hidden.shape[1])).astype(hidden.dtype),
    )


@dataclass(frozen=True)
class _Asked:
    """What a pass is about: (N, D) queries, (N, 1) softcap over temperature."""

    embedding: Embedding
    queries: mx.array
    scale: mx.array
    softcap: float
    banned: Banned | None

    def processed(self, logits: mx.array) -> mx.array:
        """Raw logits -> float32, soft-capped and over the temperature."""
        raw = logits.astype(mx.float32)
        return backends.current().softcap(raw, self.softcap, self.scale)

    def banned_in(self, rows: slice) -> Banned | None:
        """What is banned, if any of it is a token of these rows."""
        if self.banned is None:
            return None
        inside = any(rows.start <= token < rows.stop for token in self.banned.ids)
        return self.banned if inside else None


@dataclass(frozen=True)
class _Swept:
    """Sums over the vocabulary of e, relative to the (N, 1) highest x."""

    argmax: mx.array  # (N, 1)
    highest: mx.array
    sums: mx.array  # (N, V / BLOCK): of each block
    product: mx.array  # (N, 1): Σ e · (x - highest)
    soft: mx.array  # (N, D): e · E


def _sweep(ask: _Asked) -> _Swept:
    """Chunk by chunk over the vocabulary."""
    vocabulary, device = ask.embedding.weight.shape[0], backends.current()
    chunk = device.vocabulary_chunk
    queries, count = ask.queries, len(ask.queries)
    highest = mx.full((count, 1), -1e30)
    argmax = mx.zeros((count, 1), dtype=mx.uint32)
    signal = mx.zeros(queries.shape)
    parts = []
    for start in range(0, vocabulary, chunk):
        rows = slice(start, min(start + chunk, vocabulary))
        table = _rows(ask.embedding, rows, queries.dtype)
        # chunk after chunk: the graph alone would let all of them live at once
        (queries,) = mx.depends([queries], [signal, *(parts[-1] if parts else ())])
        logits, ban = queries @ table.T, ask.banned_in(rows)
        if ban is not None:
            logits = ban.forbid(logits, mx.arange(logits.shape[1]), start)
        # the cap rises with the logits, so the largest is so before it as well
        best = mx.argmax(logits, axis=-1, keepdims=True)
        value = ask.processed(mx.take_along_axis(logits, best, axis=-1))
        argmax = mx.where(value > highest, best + start, argmax)
        before, highest = highest, mx.maximum(highest, value)
        x = ask.processed(logits)
        if ban is not None:  # the cap has lifted what was forbidden
            x = ban.forbid(x, mx.arange(x.shape[1]), start)
        x = x - highest
        e = device.exp(x)
        parts.append((highest, _block_sums(e), mx.sum(e * x, axis=-1, keepdims=True)))
        signal = signal * mx.exp(before - highest) + e.astype(table.dtype) @ table
    # each part was relative to the highest so far: move all to the highest of all
    sums, product = [], mx.zeros_like(highest)
    for reference, part, weighted in parts:
        shift = reference - highest
        sums.append(part * mx.exp(shift))
        part_sum = mx.sum(part, axis=-1, keepdims=True)
        product = product + mx.exp(shift) * (weighted + shift * part_sum)
    return _Swept(argmax, highest, mx.concatenate(sums, axis=-1), product, signal)


def _tokens_of(
    ask: _Asked, blocks: mx.array, highest: mx.array
) -> tuple[mx.array, mx.array]:
    """The tokens of (N, b) blocks: (N, b · BLOCK) ids and e.

    Their logits are made again: to keep them all would take V for each position.
    """
    last = ask.embedding.weight.shape[0] - 1
    ids = (blocks[..., None] * BLOCK + mx.arange(BLOCK)).flatten(1)
    known = mx.minimum(ids, last)
    rows = ask.embedding(known).astype(ask.queries.dtype)
    x = ask.processed((rows @ ask.queries[..., None])[..., 0])
    if ask.banned is not None:
        x = ask.banned.forbid(x, known)
    x = x - highest
    return known, mx.where(ids == known, backends.current().exp(x), 0)


def _rows(embedding: Embedding, rows: slice, dtype: mx.Dtype) -> mx.array:
    """Some rows of E, dense."""
    if isinstance(embedding, nn.QuantizedEmbedding):
        return dequantize(embedding, dtype, rows)
    return embedding.weight[rows].astype(dtype)


def _block_sums(e: mx.array) -> mx.array:
    """(N, C) -> (N, ceil(C / BLOCK)), the last block filled up with zeros."""
    if over := e.shape[1] % BLOCK:
        e = mx.pad(e, [(0, 0), (0, BLOCK - over)])
    return mx.sum(e.reshape(len(e), -1, BLOCK), axis=-1)


def _search(cumulative: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
    """Where (N, 1) targets fall among (N, C) running sums, and what is left there.

    Both (N, 1). Rounding may leave the target at the very end: then the last that
    adds anything is meant.
    """
    below = mx.sum(cumulative <= target, axis=-1, keepdims=True)
    last = mx.sum(cumulative < cumulative[:, -1:], axis=-1, keepdims=True)
    index = mx.minimum(below, last)
    before = mx.take_along_axis(cumulative, mx.maximum(index, 1) - 1, axis=-1)
    return index, target - mx.where(index > 0, before, 0)
