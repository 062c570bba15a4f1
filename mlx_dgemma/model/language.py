"""DiffusionGemma: one stack of weights run in two modes.

`encode` reads tokens causally and writes the prefix; `denoise` refines a canvas
that sees the prefix and all of itself. Only the layer scalars differ per mode,
and only denoising is self-conditioned. Knows nothing of sampling or text.
"""

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.config import LayerConfig, ModelConfig
from ..errors import SettingsError
from ..settings import Settings
from . import vocab
from .attention import (
    Attention,
    CausalView,
    RopeTables,
    canvas_mask,
    causal_tiles,
    rope_tables,
    tile_size,
)
from .cache import LayerKV, PrefixCache
from .layers import Experts, FeedForward, Router, SelfConditioning
from .vision import Image, ImageEncoder, embed_images

# runs a layer: given the layer, what it does to arrays, and those arrays
RunLayer = Callable[..., Any]
CausalViews = dict[LayerConfig, CausalView]  # by kind of layer


def run_plainly(layer: "Layer", run: Callable[..., Any], *arrays: Any) -> Any:
    """Run a layer and keep its activations for its gradient, if one is taken."""
    return run(*arrays)


class View(NamedTuple):
    """What the canvases of B rows see, by layer: the same in all their steps."""

    prefixes: list[LayerKV]  # () where the prefix is empty
    query_rope: list[RopeTables]  # at the canvases
    key_rope: list[RopeTables]  # at prefix and canvas, for layers that rotate keys late
    masks: list[mx.array | None]


class Layer(nn.Module):
    """Attention, then a dense and a mixture feed-forward side by side."""

    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(width, eps=eps)
        self.pre_feedforward_layernorm_2 = nn.RMSNorm(width, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_feedforward_layernorm_1 = nn.RMSNorm(width, eps=eps)
        self.post_feedforward_layernorm_2 = nn.RMSNorm(width, eps=eps)
        self.encoder_scalar = mx.ones((1,))
        self.decoder_scalar = mx.ones((1,))

    def __call__(
        self, x: mx.array, attend: Callable[[mx.array], mx.array], scalar: mx.array
    ) -> mx.array:
        """(B, T, D) -> (B, T, D); `attend` is the attention of the mode."""
        h = x + self.post_attention_layernorm(attend(self.input_layernorm(x)))
        dense = self.mlp(self.pre_feedforward_layernorm(h))
        flat = h.reshape(-1, h.shape[-1])
        indices, weights = self.router(flat)  # the raw residual, not its norm
        mixed = self.experts(self.pre_feedforward_layernorm_2(flat), indices, weights)
        both = self.post_feedforward_layernorm_1(dense)
        both = both + self.post_feedforward_layernorm_2(mixed.reshape(h.shape))
        return (h + self.post_feedforward_layernorm(both)) * scalar


def copy_layer(layer: Layer) -> Layer:
    """Return a layer of the same arrays, whose parts can be replaced separately."""
    other = copy(layer)
    for name, part in layer.items():
        if isinstance(part, nn.Module) and part.children():
            other[name] = copy(part)
    return other


class DiffusionGemma(nn.Module):
    """The model; build it with `mlx_dgemma.load`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # the checkpoint's sampler defaults; not read here
        self.settings = Settings(canvas_length=config.canvas_length)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, layer) for layer in config.layers]
        # adapters may replace them; a list would count as parameters, a tuple does not
        self.encoder_layers = tuple(self.layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)
        self.vision: ImageEncoder | None = None  # where a checkpoint reads text only

    @property
    def dtype(self) -> mx.Dtype:
        """What the model computes in: its norms are never quantised."""
        return self.norm.weight.dtype

    def make_cache(self) -> PrefixCache:
        """Return an empty prefix, for any number of rows."""
        return PrefixCache(self.config)

    def encode(
        self, tokens: mx.array, cache: PrefixCache, images: Sequence[Image] = ()
    ) -> None:
        """Append (B, T) token ids to the prefixes of B rows.

        The only writer of the cache; any chunking that leaves images whole gives the
        same prefix up to rounding. images, in order, stand in place of tokens of a
        single row. Raises SettingsError, the cache untouched, for ids outside the
        vocabulary, for another number of rows than the cache has, and for images that
        do not fit.
        """
        if tokens.shape[1] == 0:
            return
        h, views = self._begin_encoding(tokens, cache, images)
        for index in range(len(self.layers) - 1):
            h = self._encode_layer(index, h, views, cache)
        # of the last layer only keys and values are needed
        last, view = self.encoder_layers[-1], views[self.config.layers[-1]]
        x = last.input_layernorm(h)
        cache.layers[-1].append(*last.self_attn.project_kv(x, view.query_rope))

    def encode_hidden(
        self, tokens: mx.array, cache: PrefixCache, images: Sequence[Image] = ()
    ) -> mx.array:
        """`encode`, returning the (B, T, D) normed hidden state of the last layer."""
        if tokens.shape[1] == 0:
            return mx.zeros((*tokens.shape, self.config.hidden_size), dtype=self.dtype)
        h, views = self._begin_encoding(tokens, cache, images)
        for index in range(len(self.layers)):
            h = self._encode_layer(index, h, views, cache)
        return self.norm(h)

    def denoise(
        self, canvas: mx.array, cache: PrefixCache, signal: mx.array | None = None
    ) -> mx.array:
        """One denoising pass over the canvases of B rows; never writes the cache.

        canvas (B, L) ids; signal (B, L, D) from `self_condition`, or None at the first
        step (zeros mean the same). Returns (B, L, V) float32 logits, soft-capped.
        Raises SettingsError for ids outside the vocabulary.
        """
        self._check_ids(canvas)
        view = self.view(cache, canvas.shape[1])
        return self.logits(self.denoise_hidden(canvas, view, signal))

    def view(self, cache: PrefixCache, length: int, *, bucketed: bool = False) -> View:
        """Return what canvases of `length` behind the prefixes see, for all steps.

        It holds the cache's arrays: drop it before encoding, which copies them
        otherwise. bucketed: add masked empty columns, so that shapes rarely change.
        """
        query_rope = self._rope(cache, cache.columns, length)
        key_rope, masks = dict(query_rope), {}
        for kind, entry in cache.key_rope.items():
            if prefix := entry.read(entry.room if bucketed else 0):
                pairs = zip(prefix, query_rope[kind], strict=True)
                key_rope[kind] = tuple(
                    mx.concatenate([*pair], axis=2) for pair in pairs
                )
        for kind, index in self._kinds():
            layer = cache.layers[index]
            room = layer.room if bucketed else 0
            # also where a bucket is full just now: the next prefix has room again
            always = bucketed and not layer.window_full
            masks[kind] = canvas_mask(length, cache.span(layer), room, always=always)
        kinds = self.config.layers
        return View(
            [layer.read(layer.room if bucketed else 0) for layer in cache.layers],
            [query_rope[kind] for kind in kinds],
            [key_rope[kind] for kind in kinds],
            [masks[kind] for kind in kinds],
        )

    def denoise_hidden(
        self,
        canvas: mx.array,
        view: View,
        signal: mx.array | None = None,
        run_layer: RunLayer = run_plainly,
    ) -> mx.array:
        """`denoise` up to the (B, L, D) normed hidden state of the last layer.

        The ids are not checked, as that would wait for them. run_layer calls what each
        layer does to hidden states and prefix.
        """
        h = self.self_conditioning(self.embed(canvas), signal)
        for layer, prefix, *given in zip(self.layers, *view, strict=True):
            h = run_layer(layer, partial(_denoise_layer, layer, *given), h, prefix)
        return self.norm(h)

    def vocab_stats(
        self,
        hidden: mx.array,
        temperatures: mx.array,
        uniforms: mx.array,
        banned: vocab.Banned | None = None,
    ) -> vocab.VocabStats:
        """`vocab.vocab_stats` of (N, D) normed hidden states."""
        softcap = self.config.final_logit_softcapping
        given = self.embed_tokens, hidden, temperatures, uniforms, softcap
        return vocab.vocab_stats(*given, banned)

    def embed(self, tokens: mx.array) -> mx.array:
        """(B, T) ids -> (B, T, D), times sqrt(D)."""
        return vocab.embed(self.embed_tokens, tokens, self.dtype)

    def self_condition(self, processed_logits: mx.array) -> mx.array:
        """(B, L, V) temperature-scaled logits of a step -> (B, L, D) signal."""
        return vocab.soft_embed(self.embed_tokens, processed_logits, self.dtype)

    def logits(self, hidden: mx.array) -> mx.array:
        """(B, T, D) normed hidden states -> (B, T, V) float32, soft-capped."""
        softcap = self.config.final_logit_softcapping
        return vocab.head(self.embed_tokens, hidden, softcap)

    def _begin_encoding(
        self, tokens: mx.array, cache: PrefixCache, images: Sequence[Image]
    ) -> tuple[mx.array, CausalViews]:
        """Return the embedded tokens, and what they see in each kind of layer."""
        rows, new = tokens.shape
        self._check_ids(tokens)
        if cache.columns and rows != len(cache.row_starts):
            prefixes = len(cache.row_starts)
            raise SettingsError(f"{rows} rows of tokens for {prefixes} prefixes")
        embedded = embed_images(self.embed(tokens), images)
        cache.add_columns(rows, new)
        start = cache.columns - new
        query_rope = self._rope(cache, start, new)
        key_rope = query_rope | {
            kind: entry.append(*query_rope[kind])
            for kind, entry in cache.key_rope.items()
        }
        columns = tuple((start + image.start, start + image.end) for image in images)
        views = {}
        for kind, index in self._kinds():
            window = self.config.sliding_window if kind.sliding else None
            span = cache.span(cache.layers[index], new)
            heads, keys = self.config.num_attention_heads, span.end - span.begin
            size = tile_size(rows, heads, keys, window)
            tiles = causal_tiles(new, span, window, size, columns)
            views[kind] = CausalView(query_rope[kind], key_rope[kind], tiles)
        return embedded, views

    def _check_ids(self, tokens: mx.array) -> None:
        """Raise SettingsError for ids without a row; MLX would read on behind it."""
        ends: list[int] = mx.stack([tokens.min(), tokens.max()]).tolist()  # type: ignore[assignment]
        if ends[0] < 0 or ends[1] >= self.config.vocab_size:
            known = f"this model knows 0 to {self.config.vocab_size - 1}"
            raise SettingsError(f"ids run from {ends[0]} to {ends[1]}; {known}")

    def _encode_layer(
        self, index: int, h: mx.array, views: CausalViews, cache: PrefixCache
    ) -> mx.array:
        layer, view = self.encoder_layers[index], views[self.config.layers[index]]
        attend = partial(layer.self_attn.encode, cache=cache.layers[index], view=view)
        return layer(h, attend, layer.encoder_scalar)

    def _kinds(self) -> list[tuple[LayerConfig, int]]:
        """Return each distinct kind of layer and the index of the first such layer."""
        layers = self.config.layers
        return [(kind, layers.index(kind)) for kind in dict.fromkeys(layers)]

    def _rope(
        self, cache: PrefixCache, column: int, count: int
    ) -> dict[LayerConfig, RopeTables]:
        """Return rope tables of `count` columns from `column`, per kind of layer."""
        starts = np.array(cache.row_starts)[:, None]
        positions = np.arange(column, column + count) - starts
        return {
            kind: rope_tables(kind.rope, kind.head_dim, positions)
            for kind, _ in self._kinds()
        }


def _denoise_layer(
    layer: Layer,
    query_rope: RopeTables,
    key_rope: RopeTables,
    mask: mx.array | None,
    h: mx.array,
    prefix: LayerKV,
) -> mx.array:
    def attend(x: mx.array) -> mx.array:
        return layer.self_attn.denoise(x, prefix, query_rope, key_rope, mask)

    return layer(h, attend, layer.decoder_scalar)
