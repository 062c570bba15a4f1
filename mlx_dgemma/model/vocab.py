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
class Reading:
    """What one pass over the vocabulary says of N positions.

    With x the soft-capped logits over the temperature, m their maximum, e = exp(x - m)
    and Z = Σ e of a position:
    """

    argmax: mx.array  # (N,) int32
    entropy: mx.array  # (N,) float32 nats: log Z - Σ e · (x - m) / Z
    sample: mx.array  # (N,) int32: inverse CDF of e / Z at the position's uniform
    signal: mx.array  # (N, D): e / Z · E · sqrt(D), the self-conditioning signal

    @property
    def arrays(self) -> list[mx.array]:
        return [self.argmax, self.entropy, self.sample, self.signal]


def read(
    embedding: Embedding,
    hidden: mx.array,
    temperatures: mx.array,
    uniforms: mx.array,
    softcap: float,
) -> Reading:
    """Argmax, entropy, a sample and the soft embedding of each position at once.

    hidden (N, D); temperatures and uniforms (N,), the uniforms in [0, 1). Chunks of
    the vocabulary pass by; e is relative to the highest logit so far, as in online
    softmax (arXiv 1805.02867). E is read once, and dequantised once, for both of its
    products.
    """
    vocabulary, chunk = embedding.weight.shape[0], backends.vocabulary_chunk()
    dtype = backends.product_dtype(hidden.dtype)
    queries, scale = hidden.astype(dtype), (softcap / temperatures)[:, None]
    highest = mx.full((len(hidden), 1), -1e30)
    argmax = mx.zeros((len(hidden), 1), dtype=mx.uint32)
    soft = mx.zeros(hidden.shape)
    parts = []
    for start in range(0, vocabulary, chunk):
        table = _rows(embedding, slice(start, min(start + chunk, vocabulary)), dtype)
        # chunk after chunk: the graph alone would let all of them live at once
        (queries,) = mx.depends([queries], [soft, *(parts[-1] if parts else ())])
        x = _processed(queries @ table.T, softcap, scale)
        best = mx.argmax(x, axis=-1, keepdims=True)
        value = mx.take_along_axis(x, best, axis=-1)
        argmax = mx.where(value > highest, best + start, argmax)
        before, highest = highest, mx.maximum(highest, value)
        x = x - highest
        e = backends.exp(x)
        parts.append((highest, _block_sums(e), mx.sum(e * x, axis=-1, keepdims=True)))
        soft = soft * mx.exp(before - highest) + e.astype(dtype) @ table
    shifts = [reference - highest for reference, _, _ in parts]
    sums = mx.concatenate(
        [s * mx.exp(d) for d, (_, s, _) in zip(shifts, parts, strict=True)], axis=-1
    )
    cumulative = mx.cumsum(sums, axis=-1)
    total = cumulative[:, -1:]
    # the parts' Σ e · x, each moved from its own reference to the highest
    product = sum(
        mx.exp(d) * (p + d * mx.sum(s, axis=-1, keepdims=True))
        for d, (_, s, p) in zip(shifts, parts, strict=True)
    )
    block, rest = _search(cumulative, uniforms[:, None] * total)
    ids = block * BLOCK + mx.arange(BLOCK)
    known = mx.minimum(ids, vocabulary - 1)
    x = embedding(known).astype(dtype) @ queries[..., None]
    e = backends.exp(_processed(x[..., 0], softcap, scale) - highest)
    inside = mx.cumsum(mx.where(ids == known, e, 0), axis=-1)
    # the block again, summed in another order: scale what is left to its own sum
    rest = rest / mx.take_along_axis(sums, block, axis=-1) * inside[:, -1:]
    token = mx.take_along_axis(known, _search(inside, rest)[0], axis=-1)
    root = math.sqrt(hidden.shape[1])
    return Reading(
        argmax=argmax[:, 0].astype(mx.int32),
        entropy=(mx.log(total) - product / total)[:, 0],
        sample=token[:, 0].astype(mx.int32),
        signal=(soft / total * root).astype(hidden.dtype),
    )


def _rows(embedding: Embedding, rows: slice, dtype: mx.Dtype) -> mx.array:
    """Some rows of E, dense."""
    if isinstance(embedding, nn.QuantizedEmbedding):
        return dequantize(embedding, dtype, rows)
    return embedding.weight[rows].astype(dtype)


def _processed(logits: mx.array, softcap: float, scale: mx.array) -> mx.array:
    """Raw logits, soft-capped and over the temperature; scale is softcap over it."""
    return backends.tanh(logits.astype(mx.float32) / softcap) * scale


def _block_sums(e: mx.array) -> mx.array:
    """(N, C) -> (N, ceil(C / BLOCK)), the last block filled up with zeros."""
    if over := e.shape[1] % BLOCK:
        e = mx.pad(e, [(0, 0), (0, BLOCK - over)])
    return mx.sum(e.reshape(len(e), -1, BLOCK), axis=-1)


def _search(cumulative: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
    """Where (N, 1) targets fall among (N, C) running sums, and what is left there.

    Both (N, 1). Rounding may leave the target at the very end: the last is meant.
    """
    below = mx.sum(cumulative <= target, axis=-1, keepdims=True)
    index = mx.minimum(below, cumulative.shape[-1] - 1)
    before = mx.take_along_axis(cumulative, mx.maximum(index, 1) - 1, axis=-1)
    return index, target - mx.where(index > 0, before, 0)
