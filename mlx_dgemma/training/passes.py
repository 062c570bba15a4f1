"""The two passes of a training step.

The encoder reads prefix and clean canvas in one causal pass of P + L columns. The
decoder sees the keys and values of the P columns before its canvas and nothing later.
Rows are padded in front, as in `model.cache`, so that all canvases begin at column P.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.config import LayerConfig, ModelConfig
from ..model.attention import (
    CausalView,
    RopeTables,
    causal_tiles,
    rope_tables,
    tile_size,
)
from ..model.cache import LayerKV, Span
from ..model.language import DiffusionGemma, Layer, RunLayer, View, run_plainly


def checkpointed(layer: Layer, run: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer and keep its inputs alone; its gradient runs it again.

    Weights and all that needs a gradient must be arguments: MLX takes everything else
    for constants.
    """

    def inner(weights: dict, *inputs: Any) -> Any:
        layer.update(weights)
        return run(*inputs)

    return mx.checkpoint(inner)(layer.trainable_parameters(), *inputs)


@dataclass(frozen=True)
class AttentionInputs:
    """Positions and masks of B rows of S columns, by kind of layer."""

    rope: dict[LayerConfig, RopeTables]  # (B, 1, S, rotated pairs)
    causal: dict[LayerConfig, mx.array]  # (B, 1, S, S): whether a query sees a key
    tokens: mx.array  # (B, 1, 1, S): whether a column is no padding

    @classmethod
    def of(
        cls, config: ModelConfig, starts: mx.array, columns: int
    ) -> "AttentionInputs":
        """starts: (B,) first columns that are not padding."""
        key = mx.arange(columns)
        query, tokens = key[:, None], (key >= starts[:, None])[:, None, None]
        positions = mx.maximum(key - starts[:, None], 0)
        rope, causal = {}, {}
        for kind in dict.fromkeys(config.layers):
            every = rope_tables(kind.rope, kind.head_dim, np.arange(columns)[None])
            rope[kind] = tuple(table[0, 0][positions][:, None] for table in every)
            seen = key <= query
            if kind.sliding:
                seen = seen & (query - key < config.sliding_window)
            # a padding query must see something, or its softmax has nothing to sum
            causal[kind] = (seen & tokens) | (key == query)
        return cls(rope, causal, tokens)


def encode(
    model: DiffusionGemma,
    tokens: mx.array,
    inputs: AttentionInputs,
    run_layer: RunLayer = run_plainly,
) -> tuple[mx.array, list[LayerKV]]:
    """Return the (B, S, D) normed states of (B, S) ids, and keys and values by layer.

    `inputs` may be of more columns.
    """
    config, (rows, columns) = model.config, tokens.shape
    span, views = Span(0, columns, (0,)), {}
    for kind in dict.fromkeys(config.layers):
        window = config.sliding_window if kind.sliding else None
        size = tile_size(rows, config.num_attention_heads, columns, window)
        tiles = [
            tile._replace(mask=inputs.causal[kind][..., tile.queries, tile.keys])
            for tile in causal_tiles(columns, span, window, size)
        ]
        rope = tuple(table[:, :, :columns] for table in inputs.rope[kind])
        views[kind] = CausalView(rope, rope, tiles)
    h, kv = model.embed(tokens), []
    for layer, kind in zip(model.encoder_layers, config.layers, strict=True):
        h, layer_kv = run_layer(layer, partial(_encode_layer, layer, views[kind]), h)
        kv.append(layer_kv)
    return model.norm(h), kv


def _encode_layer(
    layer: Layer, view: CausalView, h: mx.array
) -> tuple[mx.array, LayerKV]:
    kv = list[LayerKV]()

    def attend(x: mx.array) -> mx.array:
        kv.append(layer.self_attn.project_kv(x, view.query_rope))
        return layer.self_attn.attend_causal(x, kv[0], view)

    return layer(h, attend, layer.encoder_scalar), kv[0]


def denoise(
    model: DiffusionGemma,
    canvas: mx.array,
    kv: list[LayerKV],
    inputs: AttentionInputs,
    column: int,
    signal: mx.array | None,
    run_layer: RunLayer = run_plainly,
) -> mx.array:
    """Return the (B, L, D) normed states of (B, L) noisy ids that begin at `column`.

    Of the encoder's keys and values the canvas sees the columns before its own; in
    sliding layers as many of them as when generating.
    """
    end, window = column + canvas.shape[1], model.config.sliding_window
    view = View([], [], [], [])
    for kind, layer_kv in zip(model.config.layers, kv, strict=True):
        first = max(0, column - window + 1) if kind.sliding else 0
        rope = inputs.rope[kind]
        view.prefixes.append(tuple(part[:, :, first:column] for part in layer_kv))
        view.query_rope.append(tuple(table[:, :, column:end] for table in rope))
        view.key_rope.append(tuple(table[:, :, first:end] for table in rope))
        view.masks.append(inputs.tokens[..., first:end])
    return model.denoise_hidden(canvas, view, signal, run_layer=run_layer)
