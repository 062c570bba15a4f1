"""The two passes of a training step, and what the decoder may see of the first.

One causal pass encodes prompt, earlier canvases and the clean canvas, P + L columns;
the decoder sees the keys and values of the P columns before its canvas and nothing
later. Rows of a batch are padded in front, as in `model.cache`, so that all canvases
begin in the same column. Layers are run again for their gradients if asked.
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
    MaskOf,
    Tables,
    canvas_mask,
    causal_mask,
    rope_tables,
)
from ..model.cache import LayerCache, LayerKV, Span
from ..model.language import DiffusionGemma, Layer, View


@dataclass(frozen=True)
class Sight:
    """What S columns of tokens see, by kind of layer, as arrays alone.

    query_rope are of all columns. causal (B|1, 1, S, S) says who sees whom while
    encoding, canvas (B|1, 1, 1, keys + L) which keys a canvas at column P sees.
    """

    query_rope: dict[LayerConfig, Tables]
    causal: dict[LayerConfig, mx.array]
    canvas: dict[LayerConfig, mx.array]

    @classmethod
    def of(
        cls, config: ModelConfig, starts: tuple[int, ...], prefix: int, columns: int
    ) -> "Sight":
        """starts: the first column of each row that is no padding; prefix: P."""
        positions = np.arange(columns) - np.array(starts)[:, None]
        query_rope, causal, canvas = {}, {}, {}
        for kind in dict.fromkeys(config.layers):
            query_rope[kind] = rope_tables(kind.rope, kind.head_dim, positions)
            window = config.sliding_window if kind.sliding else None
            mask = causal_mask(columns, Span(0, columns, starts), window)
            causal[kind] = mask if isinstance(mask, mx.array) else _triangle(columns)
            seen = Span(first_seen(config, kind, prefix), prefix, starts)
            # always: with padding or without, one shape of graph
            mask = canvas_mask(config.canvas_length, seen, always=True)
            assert mask is not None
            canvas[kind] = mask
        return cls(query_rope, causal, canvas)


def first_seen(config: ModelConfig, kind: LayerConfig, column: int) -> int:
    """The first column that a canvas at `column` sees, as when generating."""
    window = config.sliding_window if kind.sliding else None
    return LayerCache(window, 0).visible_from(column)


def encode(
    model: DiffusionGemma, tokens: mx.array, sight: Sight, *, again: bool
) -> tuple[mx.array, list[LayerKV]]:
    """Causal pass over (B, S) ids: (B, S, D) normed states, and what layers keep.

    The sight may be of more columns. again: run each layer anew for its gradient, and
    hold only its input and output until then.
    """
    h, kept, columns = model.embed(tokens), [], tokens.shape[1]
    span = Span(0, columns, (0,))
    for layer, kind in zip(model.encoder_layers, model.config.layers, strict=True):
        query_rope = tuple(table[:, :, :columns] for table in sight.query_rope[kind])
        mask_of = _tiles_of(sight.causal[kind])
        view = CausalView(query_rope, query_rope, span, mask_of)
        run = partial(_encode_layer, layer, view)
        h, parts = through(again)(layer, run, h)
        kept.append(parts)
    return model.norm(h), kept


def denoise(
    model: DiffusionGemma,
    canvas: mx.array,
    kept: list[LayerKV],
    sight: Sight,
    column: int,
    signal: mx.array | None,
    *,
    again: bool,
) -> mx.array:
    """Bidirectional pass over (B, L) noisy ids at `column`: (B, L, D) normed states.

    Of what `encode` kept it sees the columns strictly before its own.
    """
    view = visible(model.config, kept, sight, column, canvas.shape[1])
    return model.denoise_hidden(canvas, view, signal, run_layer=through(again))


def visible(
    config: ModelConfig, kept: list[LayerKV], sight: Sight, column: int, length: int
) -> View:
    """What a canvas of `length` at `column` sees of the encoded columns."""
    prefixes, query_rope, key_rope = [], [], []
    for kind, parts in zip(config.layers, kept, strict=True):
        seen = slice(first_seen(config, kind, column), column)
        prefixes.append(tuple(part[:, :, seen] for part in parts))
        whole = sight.query_rope[kind]
        own = slice(column, column + length)
        query_rope.append(tuple(table[:, :, own] for table in whole))
        behind = slice(seen.start, column + length)
        key_rope.append(tuple(table[:, :, behind] for table in whole))
    masks: list[mx.array | None] = [sight.canvas[kind] for kind in config.layers]
    return View(prefixes, query_rope, key_rope, masks)


def through(again: bool) -> Callable[..., Any]:
    """How to run a layer on arrays: as it is, or `again` for its gradient."""
    return _checkpointed if again else _plainly


def _plainly(layer: Layer, run: Callable[..., Any], *given: Any) -> Any:
    return run(*given)


def _checkpointed(layer: Layer, run: Callable[..., Any], *given: Any) -> Any:
    """The weights and all that needs a gradient are arguments: MLX takes the rest
    for constants. Nothing is written but what is returned."""

    def inner(weights: dict, *given: Any) -> Any:
        layer.update(weights)
        return run(*given)

    return mx.checkpoint(inner)(layer.trainable_parameters(), *given)


def _encode_layer(
    layer: Layer, view: CausalView, h: mx.array
) -> tuple[mx.array, LayerKV]:
    kept: list[LayerKV] = []

    def attend(x: mx.array) -> mx.array:
        kept.append(layer.self_attn.project_kv(x, view.query_rope))
        return layer.self_attn.attend_causal(x, kept[0], view)

    h = layer(h, attend, layer.encoder_scalar)
    return h, kept[0]


def _tiles_of(mask: mx.array) -> MaskOf:
    """LayerKV of a (…, S, S) mask, for queries at the end of a span of columns."""
    return lambda new, span: mask[..., span.end - new : span.end, span.begin : span.end]


def _triangle(columns: int) -> mx.array:
    every = mx.arange(columns)
    return (every <= every[:, None])[None, None]
