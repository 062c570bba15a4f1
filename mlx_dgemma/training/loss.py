"""What training asks of the vocabulary, with no (N, V) logits ever held.

Each function passes over chunks of the tied matrix E and makes their logits again
when gradients are wanted. x are the soft-capped logits, c · tanh(h · Eᵀ / c).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import backends
from ..backends import differentiable
from ..model.layers import dequantize
from ..model.vocab import Embedding


def cross_entropy(
    embedding: Embedding, hidden: mx.array, targets: mx.array, softcap: float
) -> mx.array:
    """log Σ e^x - x[target] of (N, D) hidden states and (N,) ids: (N,) float32 nats.

    Differentiable in the hidden states and, where E is dense, in E.
    """
    given = hidden, targets
    return _tiled(lambda h, t: _tile_entropy(embedding, h, t, softcap), *given)


def signal(embedding: Embedding, hidden: mx.array, softcap: float) -> mx.array:
    """softmax(x) · E · sqrt(D) of (N, D) hidden states, which get no gradient.

    E gets one where it is dense, as in transformers: the first pass is a guess, its
    embedding is not.
    """
    hidden = mx.stop_gradient(hidden)
    return _tiled(lambda h: _tile_signal(embedding, h, softcap), hidden)


def _tiled(make: Callable[..., mx.array], *given: mx.array) -> mx.array:
    """`make` of some rows at a time of all that is given, one tile's chunks alive."""
    most = backends.current().vocabulary_rows
    tiles = list[mx.array]()
    for start in range(0, len(given[0]), most):
        first, *rest = (array[start : start + most] for array in given)
        if tiles:
            (first,) = mx.depends([first], tiles[-1:])
        tiles.append(make(first, *rest))
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles)


def _tile_signal(embedding: Embedding, hidden: mx.array, softcap: float) -> mx.array:
    """`signal` of one tile of positions."""
    device, root = backends.current(), math.sqrt(hidden.shape[-1])
    dtype = device.product_dtype(hidden.dtype)
    queries = hidden.astype(dtype)

    def soft(*weight: mx.array) -> mx.array:
        head, y = _Head(embedding, weight, dtype, softcap), mx.zeros(queries.shape)
        total = head.log_sum(queries)
        for rows in head.chunks:
            x, table = head.x(queries, rows, [y])
            y = y + (device.exp(x - total).astype(dtype) @ table).astype(mx.float32)
        return (y * root).astype(hidden.dtype)

    def back(weight: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        head, parts = _Head(embedding, (weight,), dtype, softcap), []
        total, given = head.log_sum(queries), (cotangent * root).astype(dtype)
        for rows in head.chunks:
            x, _ = head.x(queries, rows, parts[-1:])
            p = device.exp(x - total).astype(dtype)
            parts.append((p.T @ given).astype(weight.dtype))
        return mx.concatenate(parts)

    if isinstance(embedding, nn.QuantizedEmbedding):
        return mx.stop_gradient(soft())
    return differentiable(soft, back)(embedding.weight)


def _tile_entropy(
    embedding: Embedding, hidden: mx.array, targets: mx.array, softcap: float
) -> mx.array:
    """`cross_entropy` of one tile of positions."""
    device = backends.current()
    dtype = device.product_dtype(hidden.dtype)

    def forth(hidden: mx.array, *weight: mx.array) -> tuple[mx.array, mx.array]:
        """The entropies, and (N, 1) log Σ e^x for the way back."""
        head = _Head(embedding, weight, dtype, softcap)
        total, wanted = head.log_sum_and(hidden.astype(dtype), targets)
        return (total - wanted)[:, 0], total

    def back(primals: Any, cotangents: Any, outputs: Any) -> Any:
        """Gradients of the states and of E, chunk by chunk."""
        # a single primal comes as it is, several as a tuple
        hidden, *weight = primals if isinstance(primals, tuple | list) else (primals,)
        head = _Head(embedding, weight, dtype, softcap)
        queries, total, given = hidden.astype(dtype), outputs[1], cotangents[0][:, None]
        gradient, parts = mx.zeros(queries.shape), []
        for rows in head.chunks:
            x, table = head.x(queries, rows, [gradient, *parts[-1:]])
            hit = targets[:, None] == mx.arange(rows.start, rows.stop)
            d = (device.exp(x - total) - hit) * given
            d = (d * (1 - mx.square(x / softcap))).astype(dtype)  # through the cap
            gradient = gradient + (d @ table).astype(mx.float32)
            if weight:
                parts.append((d.T @ queries).astype(weight[0].dtype))
        gradient = gradient.astype(hidden.dtype)
        return (gradient, mx.concatenate(parts)) if weight else gradient

    entropy = differentiable(forth, back)
    if isinstance(embedding, nn.QuantizedEmbedding):
        return entropy(hidden)[0]
    return entropy(hidden, embedding.weight)[0]


@dataclass(frozen=True)
class _Head:
    """The vocabulary as a head, chunk by chunk.

    weight: the dense E as an argument, so that it can have a gradient; nothing where
    the embedding is quantised.
    """

    embedding: Embedding
    weight: Sequence[mx.array]
    dtype: mx.Dtype
    softcap: float

    @property
    def chunks(self) -> list[slice]:
        vocabulary = self.embedding.weight.shape[0]
        chunk = backends.current().vocabulary_chunk
        return [
            slice(start, min(start + chunk, vocabulary))
            for start in range(0, vocabulary, chunk)
        ]

    def x(
        self, queries: mx.array, rows: slice, after: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        """(N, C) float32 logits of a chunk, and its (C, D) rows of E.

        after: what is computed before: the graph alone would let all chunks live.
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

    def log_sum(self, queries: mx.array) -> mx.array:
        """(N, 1) log Σ e^x."""
        return self.log_sum_and(queries, mx.full((len(queries),), -1))[0]

    def log_sum_and(
        self, queries: mx.array, targets: mx.array
    ) -> tuple[mx.array, mx.array]:
        """(N, 1) log Σ e^x, and x of the (N,) targets."""
        device, highest = backends.current(), mx.full((len(queries), 1), -1e30)
        total, wanted = mx.zeros_like(highest), mx.zeros_like(highest)
        for rows in self.chunks:
            x, _ = self.x(queries, rows, [total, wanted])
            before = highest
            highest = mx.maximum(highest, mx.max(x, axis=-1, keepdims=True))
            total = total * mx.exp(before - highest)
            total = total + mx.sum(device.exp(x - highest), axis=-1, keepdims=True)
            index, width = targets[:, None] - rows.start, rows.stop - rows.start
            here = mx.take_along_axis(x, mx.clip(index, 0, width - 1), axis=-1)
            wanted = mx.where((index >= 0) & (index < width), here, wanted)
        return highest + mx.log(total), wanted
