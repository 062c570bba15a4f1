"""Cross entropy and self-conditioning signal over the vocabulary, in bounded memory.

Each function goes over chunks of the tied matrix E for a tile of positions at a time,
and computes their logits again for gradients: the (N, V) logits never exist at once.
x are the soft-capped logits, c · tanh(h · Eᵀ / c).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import backends
from ..backends import differentiable
from ..model.layers import dequantize
from ..model.vocab import LOWEST, Embedding


def cross_entropy(
    embedding: Embedding, hidden: mx.array, targets: mx.array, softcap: float
) -> mx.array:
    """Return log Σ e^x - x[target], (...) float32 nats, of (..., D) states, (...) ids.

    Differentiable in the states and, where E is dense, in E.
    """

    def tile(hidden: mx.array, targets: mx.array) -> mx.array:
        return _cross_entropy(embedding, hidden, targets, softcap)

    flat = hidden.reshape(-1, hidden.shape[-1])
    return _tiled(tile, flat, targets.flatten()).reshape(targets.shape)


def signal(embedding: Embedding, hidden: mx.array, softcap: float) -> mx.array:
    """Return softmax(x) · E · sqrt(D), (..., D), of (..., D) states.

    The states get no gradient; E gets one where it is dense, as in transformers.
    """
    flat = mx.stop_gradient(hidden).reshape(-1, hidden.shape[-1])
    return _tiled(lambda h: _signal(embedding, h, softcap), flat).reshape(hidden.shape)


def _tiled(function: Callable[..., mx.array], *inputs: mx.array) -> mx.array:
    """Apply a function to tiles of rows, one tile after another."""
    rows, tiles = backends.current().vocabulary_rows, list[mx.array]()
    for start in range(0, len(inputs[0]), rows):
        first, *rest = (array[start : start + rows] for array in inputs)
        if tiles:
            (first,) = mx.depends([first], tiles[-1:])
        tiles.append(function(first, *rest))
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles)


def _signal(embedding: Embedding, hidden: mx.array, softcap: float) -> mx.array:
    device, root = backends.current(), math.sqrt(hidden.shape[-1])
    dtype = device.product_dtype(hidden.dtype)
    queries = hidden.astype(dtype)

    def forward(*weight: mx.array) -> mx.array:
        head, y = _Head(embedding, weight, dtype, softcap), mx.zeros(queries.shape)
        total, _ = head.log_sum(queries)
        for rows in head.chunks:
            x, table = head.logits(queries, rows, [y])
            y = y + (device.exp(x - total).astype(dtype) @ table).astype(mx.float32)
        return (y * root).astype(hidden.dtype)

    def backward(weight: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        head, parts = _Head(embedding, (weight,), dtype, softcap), list[mx.array]()
        (total, _), given = head.log_sum(queries), (cotangent * root).astype(dtype)
        for rows in head.chunks:
            x, _ = head.logits(queries, rows, parts[-1:])
            p = device.exp(x - total).astype(dtype)
            parts.append((p.T @ given).astype(weight.dtype))
        return mx.concatenate(parts)

    if isinstance(embedding, nn.QuantizedEmbedding):
        return mx.stop_gradient(forward())
    return differentiable(forward, backward)(embedding.weight)


def _cross_entropy(
    embedding: Embedding, hidden: mx.array, targets: mx.array, softcap: float
) -> mx.array:
    device = backends.current()
    dtype = device.product_dtype(hidden.dtype)

    def forward(hidden: mx.array, *weight: mx.array) -> tuple[mx.array, mx.array]:
        """Return the (N,) entropies, and (N, 1) log Σ e^x for the backward pass."""
        head = _Head(embedding, weight, dtype, softcap)
        total, wanted = head.log_sum(hidden.astype(dtype), targets)
        return (total - wanted)[:, 0], total

    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        """Return the gradients of the states and of E, made chunk by chunk."""
        # a single primal comes as it is, several as a tuple
        hidden, *weight = primals if isinstance(primals, tuple | list) else (primals,)
        head = _Head(embedding, weight, dtype, softcap)
        queries, total, given = hidden.astype(dtype), outputs[1], cotangents[0][:, None]
        gradient, parts = mx.zeros(queries.shape), []
        for rows in head.chunks:
            x, table = head.logits(queries, rows, [gradient, *parts[-1:]])
            hit = targets[:, None] == mx.arange(rows.start, rows.stop)
            d = (device.exp(x - total) - hit) * given
            d = (d * (1 - mx.square(x / softcap))).astype(dtype)  # through the cap
            gradient = gradient + (d @ table).astype(mx.float32)
            if weight:
                parts.append((d.T @ queries).astype(weight[0].dtype))
        gradient = gradient.astype(hidden.dtype)
        return (gradient, mx.concatenate(parts)) if weight else gradient

    dense = () if isinstance(embedding, nn.QuantizedEmbedding) else (embedding.weight,)
    return differentiable(forward, backward)(hidden, *dense)[0]


class _Head:
    """The vocabulary as a head, chunk by chunk.

    weight   the dense E as an argument, so that it can have a gradient; empty where the
             embedding is quantised
    """

    def __init__(
        self,
        embedding: Embedding,
        weight: Sequence[mx.array],
        dtype: mx.Dtype,
        softcap: float,
    ):
        self.embedding, self.weight = embedding, weight
        self.dtype, self.softcap = dtype, softcap
        size, chunk = len(embedding.weight), backends.current().vocabulary_chunk
        starts = range(0, size, chunk)
        self.chunks = [slice(start, min(start + chunk, size)) for start in starts]

    def logits(
        self, queries: mx.array, rows: slice, after: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        """Return the (N, C) float32 logits of a chunk, and its (C, D) rows of E.

        after   what must be computed before, or all chunks would be alive at once
        """
        if after:
            (queries,) = mx.depends([queries], after)
        if isinstance(self.embedding, nn.QuantizedEmbedding):
            table = dequantize(self.embedding, self.dtype, rows)
        else:
            table = self.weight[0][rows].astype(self.dtype)
        logits = (queries @ table.T).astype(mx.float32)
        cap = mx.array(self.softcap)
        return backends.current().softcap(logits, self.softcap, cap), table

    def log_sum(
        self, queries: mx.array, targets: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Return (N, 1) log Σ e^x, and (N, 1) x of the (N,) targets, if any."""
        device, highest = backends.current(), mx.full((len(queries), 1), LOWEST)
        total, wanted = mx.zeros_like(highest), mx.zeros_like(highest)
        for rows in self.chunks:
            x, _ = self.logits(queries, rows, [total, wanted])
            before = highest
            highest = mx.maximum(highest, mx.max(x, axis=-1, keepdims=True))
            total = total * mx.exp(before - highest)
            total = total + mx.sum(device.exp(x - highest), axis=-1, keepdims=True)
            if targets is not None:
                index, width = targets[:, None] - rows.start, rows.stop - rows.start
                here = mx.take_along_axis(x, mx.clip(index, 0, width - 1), axis=-1)
                wanted = mx.where((index >= 0) & (index < width), here, wanted)
        return highest + mx.log(total), wanted
