"""DiffusionGemma: one stack of weights run in two modes.

`encode` reads tokens causally and writes the prefix; `denoise` refines a canvas
that sees the prefix and all of itself. Only the layer scalars differ per mode,
and only denoising is self-conditioned. Knows nothing of sampling or text.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache as memo
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.config import LayerConfig, ModelConfig
from ..settings import Settings
from . import vocab
from .attention import (
    Attention,
    Blocks,
    MaskOf,
    Tables,
    canvas_mask,
    causal_mask,
    rope_tables,
)
from .cache import LayerKV, PrefixCache, Span
from .layers import Experts, FeedForward, Router, SelfConditioning
from .vision import Image, placed

if TYPE_CHECKING:
    from .loading import ImageEncoder


@dataclass(frozen=True)
class View:
    """What the canvases of B rows see, by layer: the same in all their steps."""

    prefixes: list[LayerKV]  # nothing where the prefix is empty
    query_rope: list[Tables]  # of the canvases' own positions
    key_rope: list[Tables]  # of the prefixes' and their own, where keys are turned late
    masks: list[mx.array | None]

    @property
    def arrays(self) -> list[list]:
        return [self.prefixes, self.query_rope, self.key_rope, self.masks]


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
        """(B, T, D) -> (B, T, D); `attend` is the attention in the mode at hand."""
        h = x + self.post_attention_layernorm(attend(self.input_layernorm(x)))
        dense = self.mlp(self.pre_feedforward_layernorm(h))
        flat = h.reshape(-1, h.shape[-1])
        indices, weights = self.router(flat)  # the raw residual, not its norm
        mixed = self.experts(self.pre_feedforward_layernorm_2(flat), indices, weights)
        both = self.post_feedforward_layernorm_1(dense)
        both = both + self.post_feedforward_layernorm_2(mixed.reshape(h.shape))
        return (h + self.post_feedforward_layernorm(both)) * scalar


@dataclass(frozen=True)
class _Seen:
    """What tokens being encoded see in layers of one kind."""

    query_rope: Tables  # of their own positions
    key_rope: Tables  # of all they see, where keys are turned late
    mask_of: MaskOf
    blocks: Blocks


def branch(layer: Layer) -> Layer:
    """A layer of the same parts and arrays, whose parts can be replaced apart."""
    other = copy(layer)
    for name, part in layer.items():
        if isinstance(part, nn.Module) and part.children():
            other[name] = copy(part)
    return other


@dataclass(frozen=True)
class EncoderLayers:
    """Layers for encoding alone. No list, or nn.Module would count them too."""

    layers: list[Layer]


class Programs:
    """What was compiled for one model, kept as long as the model is."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def get(self, name: Any, make: Callable[[], Any]) -> Any:
        """The program of that name, made when it is first wanted."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class DiffusionGemma(nn.Module):
    """The model; build it with `mlx_dgemma.load`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.programs = config, Programs()
        # what the checkpoint wants to be sampled with; not read here
        self.settings = Settings(canvas_length=config.canvas_length)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, layer) for layer in config.layers]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)
        self.apart: EncoderLayers | None = None
        self.vision: ImageEncoder | None = (
            None  # None where a checkpoint reads text only
        )

    @property
    def encoder_layers(self) -> list[Layer]:
        """`layers`, unless adapters differ by mode: then branches of them."""
        return self.layers if self.apart is None else self.apart.layers

    @property
    def dtype(self) -> mx.Dtype:
        """What the model computes in: its norms are never quantised."""
        return self.norm.weight.dtype

    def make_cache(self) -> PrefixCache:
        """An empty prefix, for any number of rows."""
        return PrefixCache(self.config)

    def encode(
        self, tokens: mx.array, cache: PrefixCache, images: Sequence[Image] = ()
    ) -> None:
        """Append (B, T) token ids to the prefixes of B rows.

        The only writer of the cache; any chunking that leaves images whole gives the
        same prefix. images, in order, stand in place of tokens of a single row. The
        last layer stops at its keys and values: nobody reads its output. Raises
        ValueError, the cache untouched, for ids the model has no row for, for another
        number of rows than the cache has, and for images that do not fit.
        """
        if tokens.shape[1] == 0:
            return
        h, seen = self._begin_encoding(tokens, cache, images)
        for index in range(len(self.encoder_layers) - 1):
            h = self._encode_layer(index, h, seen[self.config.layers[index]], cache)
        last, kind = self.encoder_layers[-1], self.config.layers[-1]
        x, entry = last.input_layernorm(h), cache.layers[-1]
        last.self_attn.write(x, seen[kind].query_rope, entry)

    def encode_hidden(
        self, tokens: mx.array, cache: PrefixCache, images: Sequence[Image] = ()
    ) -> mx.array:
        """`encode`, returning the (B, T, D) normed hidden state of the last layer."""
        if tokens.shape[1] == 0:
            return mx.zeros((*tokens.shape, self.config.hidden_size), dtype=self.dtype)
        h, seen = self._begin_encoding(tokens, cache, images)
        for index, kind in enumerate(self.config.layers):
            h = self._encode_layer(index, h, seen[kind], cache)
        return self.norm(h)

    def denoise(
        self, canvas: mx.array, cache: PrefixCache, signal: mx.array | None = None
    ) -> mx.array:
        """One denoising pass over the canvases of B rows; never writes the cache.

        canvas (B, L) ids below V, unchecked: a look would cost a wait; signal (B, L, D)
        from `self_condition`, or None at the first step (rows of zeros mean the same).
        Returns (B, L, V) float32 logits, soft-capped.
        """
        view = self.view(cache, canvas.shape[1])
        return self.logits(self.denoise_hidden(canvas, view, signal))

    def view(self, cache: PrefixCache, length: int, *, bucketed: bool = False) -> View:
        """What canvases of `length` behind the prefixes see, made once for all steps.

        It holds the cache's arrays: encode with it gone, or that copies them.
        bucketed: with empty columns, masked, so that shapes rarely change.
        """
        layers = self.config.layers
        room = [layer.room if bucketed else 0 for layer in cache.layers]
        query_rope = self._tables(cache, cache.columns, length)
        key_rope = query_rope | {
            kind: tuple(map(_behind, entry.read(entry.room if bucketed else 0), own))
            for kind, entry in cache.key_rope.items()
            if (own := query_rope[kind]) and cache.columns
        }
        masks = self._per_kind(
            lambda i: canvas_mask(
                length,
                cache.span(cache.layers[i]),
                room[i],
                # also where a bucket is full just now: the next prefix has room again
                always=bucketed and not cache.layers[i].settled,
            )
        )
        return View(
            [c.read(extra) for c, extra in zip(cache.layers, room, strict=True)],
            [query_rope[kind] for kind in layers],
            [key_rope[kind] for kind in layers],
            [masks[kind] for kind in layers],
        )

    def denoise_hidden(
        self,
        canvas: mx.array,
        view: View,
        signal: mx.array | None = None,
        through: "Through" = lambda layer, run, *given: run(*given),
    ) -> mx.array:
        """`denoise` up to the (B, L, D) normed hidden state of the last layer.

        through runs each layer on hidden states and prefix.
        """
        h = self.self_conditioning(self.embed(canvas), signal)
        seen = zip(
            view.prefixes, view.query_rope, view.key_rope, view.masks, strict=True
        )
        for layer, (prefix, *rest) in zip(self.layers, seen, strict=True):
            h = through(layer, partial(_denoise_layer, layer, *rest), h, prefix)
        return self.norm(h)

    def read(
        self,
        hidden: mx.array,
        temperatures: mx.array,
        uniforms: mx.array,
        banned: vocab.Banned | None = None,
    ) -> vocab.VocabStats:
        """`vocab.read` of (N, D) normed hidden states, (N,) temperatures, uniforms."""
        softcap = self.config.final_logit_softcapping
        given = self.embed_tokens, hidden, temperatures, uniforms, softcap
        return vocab.read(*given, banned)

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
    ) -> tuple[mx.array, dict[LayerConfig, "_Seen"]]:
        """The embedded tokens, and what they see in each kind of layer."""
        rows, new = tokens.shape
        extremes: list[int] = mx.stack([tokens.min(), tokens.max()]).tolist()  # type: ignore[assignment]
        lowest, highest = extremes
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"ids run from {lowest} to {highest}; this model knows 0 to "
                f"{self.config.vocab_size - 1}"
            )
        # what can be refused, before the cache knows
        embedded = placed(self.embed(tokens), images)
        cache.begin(rows, new)
        query_rope = self._tables(cache, cache.columns - new, new)
        key_rope = query_rope | {
            kind: entry.append(*query_rope[kind])
            for kind, entry in cache.key_rope.items()
        }
        masks, first = self._per_kind(self._masks), cache.columns - new
        blocks = tuple((first + image.start, first + image.end) for image in images)
        return embedded, {
            k: _Seen(query_rope[k], key_rope[k], masks[k], blocks) for k in query_rope
        }

    def _masks(self, index: int) -> MaskOf:
        """Masks of a layer's tiles; layers of a kind, and like tiles, share them."""
        sliding = self.config.layers[index].sliding
        window = self.config.sliding_window if sliding else None
        made = memo(lambda new, span: causal_mask(new, span, window))

        def mask_of(new: int, span: Span) -> mx.array | str | None:
            if all(start <= span.first for start in span.starts):
                # without padding, only how many columns there are matters
                span = Span(0, span.last - span.first, (0,))
            return made(new, span)

        return mask_of

    def _encode_layer(
        self, index: int, h: mx.array, seen: "_Seen", cache: PrefixCache
    ) -> mx.array:
        layer, entry = self.encoder_layers[index], cache.layers[index]
        attend = partial(
            layer.self_attn.encode,
            query_rope=seen.query_rope,
            key_rope=seen.key_rope,
            cache=entry,
            span=cache.span(entry, h.shape[1]),
            mask_of=seen.mask_of,
            blocks=seen.blocks,
        )
        return layer(h, attend, layer.encoder_scalar)

    def _per_kind(self, make: Callable[[int], object]) -> dict:
        """`make(index of the first such layer)` for each distinct kind of layer."""
        first: dict[LayerConfig, int] = {}
        for index, kind in enumerate(self.config.layers):
            first.setdefault(kind, index)
        return {kind: make(index) for kind, index in first.items()}

    def _tables(
        self, cache: PrefixCache, column: int, count: int
    ) -> dict[LayerConfig, Tables]:
        """Rope query_rope of `count` columns from `column`, per kind of layer."""
        positions = np.arange(column, column + count) - np.array(cache.starts)[:, None]
        return {
            kind: rope_tables(kind.rope, kind.head_dim, positions)
            for kind in set(self.config.layers)
        }


# a layer, what it does to arrays, and those
Through = Callable[..., Any]


def _denoise_layer(
    layer: Layer,
    query_rope: Tables,
    key_rope: Tables,
    mask: mx.array | None,
    h: mx.array,
    prefix: LayerKV,
) -> mx.array:
    attend = partial(
        layer.self_attn.denoise,
        query_rope=query_rope,
        key_rope=key_rope,
        prefix=prefix,
        mask=mask,
    )
    return layer(h, attend, layer.decoder_scalar)


def _behind(prefix: mx.array, own: mx.array) -> mx.array:
    """A table of the prefix's columns, and the canvas's behind it."""
    return mx.concatenate([prefix, own], axis=2)
