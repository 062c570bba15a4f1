"""DiffusionGemma: one stack of weights run in two modes.

`encode` reads tokens causally and writes the prefix; `denoise` refines a canvas
that sees the prefix and all of itself. Only the layer scalars differ per mode,
and only denoising is self-conditioned. Knows nothing of sampling or text.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.config import LayerConfig, ModelConfig
from . import vocab
from .attention import Attention, Tables, canvas_mask, causal_mask, rope_tables
from .cache import PrefixCache
from .layers import Experts, FeedForward, Router, SelfConditioning


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


class DiffusionGemma(nn.Module):
    """The model; build it with `mlx_dgemma.load`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, layer) for layer in config.layers]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)

    @property
    def dtype(self) -> mx.Dtype:
        """What the model computes in: its norms are never quantised."""
        return self.norm.weight.dtype

    def make_cache(self) -> PrefixCache:
        """An empty prefix, for any number of rows."""
        return PrefixCache(self.config)

    def encode(self, tokens: mx.array, cache: PrefixCache) -> None:
        """Append (B, T) token ids to the prefixes of B rows.

        The only writer of the cache; any chunking gives the same prefix. The last
        layer stops at its keys and values: nobody reads its output. Raises
        ValueError, the cache untouched, for ids the model has no row for and for
        another number of rows than the cache has.
        """
        if tokens.shape[1] == 0:
            return
        h, tables, masks = self._begin_encoding(tokens, cache)
        for index, layer in enumerate(self.layers[:-1]):
            h = self._encode_layer(index, layer, h, tables, masks, cache)
        last, kind = self.layers[-1], self.config.layers[-1]
        last.self_attn.write(last.input_layernorm(h), tables[kind], cache.layers[-1])

    def encode_hidden(self, tokens: mx.array, cache: PrefixCache) -> mx.array:
        """`encode`, returning the (B, T, D) normed hidden state of the last layer."""
        if tokens.shape[1] == 0:
            return mx.zeros((*tokens.shape, self.config.hidden_size), dtype=self.dtype)
        h, tables, masks = self._begin_encoding(tokens, cache)
        for index, layer in enumerate(self.layers):
            h = self._encode_layer(index, layer, h, tables, masks, cache)
        return self.norm(h)

    def denoise(
        self, canvas: mx.array, cache: PrefixCache, signal: mx.array | None = None
    ) -> mx.array:
        """One denoising pass over the canvases of B rows; never writes the cache.

        canvas (B, L) ids below V, unchecked: a look would cost a wait; signal (B, L, D)
        from `self_condition`, or None at the first step (rows of zeros mean the same).
        Returns (B, L, V) float32 logits, soft-capped.
        """
        length = canvas.shape[1]
        h = self.self_conditioning(self._embed(canvas), signal)
        tables = self._tables(cache, cache.columns, length)
        masks = self._per_kind(
            lambda i: canvas_mask(length, cache.span(cache.layers[i]))
        )
        for index, layer in enumerate(self.layers):
            kind, entry = self.config.layers[index], cache.layers[index]
            h = layer(
                h,
                lambda x, layer=layer, kind=kind, entry=entry: layer.self_attn.denoise(
                    x, tables[kind], entry, masks[kind]
                ),
                layer.decoder_scalar,
            )
        return self.logits(self.norm(h))

    def self_condition(self, processed_logits: mx.array) -> mx.array:
        """(B, L, V) temperature-scaled logits of a step -> (B, L, D) signal."""
        return vocab.soft_embed(self.embed_tokens, processed_logits, self.dtype)

    def logits(self, hidden: mx.array) -> mx.array:
        """(B, T, D) normed hidden states -> (B, T, V) float32, soft-capped."""
        softcap = self.config.final_logit_softcapping
        return vocab.head(self.embed_tokens, hidden, softcap)

    def _embed(self, tokens: mx.array) -> mx.array:
        return vocab.embed(self.embed_tokens, tokens, self.dtype)

    def _begin_encoding(
        self, tokens: mx.array, cache: PrefixCache
    ) -> tuple[mx.array, dict[LayerConfig, Tables], dict]:
        rows, new = tokens.shape
        extremes: list[int] = mx.stack([tokens.min(), tokens.max()]).tolist()  # type: ignore[assignment]
        lowest, highest = extremes
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"ids run from {lowest} to {highest}; this model knows 0 to "
                f"{self.config.vocab_size - 1}"
            )
        embedded = self._embed(tokens)  # what can be refused, before the cache knows
        cache.begin(rows, new)
        window = self.config.sliding_window
        masks = self._per_kind(
            lambda i: causal_mask(
                new,
                cache.span(cache.layers[i], new),
                window if self.config.layers[i].sliding else None,
            )
        )
        tables = self._tables(cache, cache.columns - new, new)
        return embedded, tables, masks

    def _encode_layer(
        self, index: int, layer: Layer, h: mx.array, tables: dict, masks: dict, cache
    ) -> mx.array:
        kind, entry = self.config.layers[index], cache.layers[index]
        return layer(
            h,
            lambda x: layer.self_attn.encode(x, tables[kind], entry, masks[kind]),
            layer.encoder_scalar,
        )

    def _per_kind(self, make: Callable[[int], object]) -> dict:
        """`make(index of the first such layer)` for each distinct kind of layer."""
        first: dict[LayerConfig, int] = {}
        for index, kind in enumerate(self.config.layers):
            first.setdefault(kind, index)
        return {kind: make(index) for kind, index in first.items()}

    def _tables(
        self, cache: PrefixCache, column: int, count: int
    ) -> dict[LayerConfig, Tables]:
        """Rope tables of `count` columns from `column`, per kind of layer."""
        starts = cache.starts if any(cache.starts) else (0,)
        positions = np.arange(column, column + count) - np.array(starts)[:, None]
        return {
            kind: rope_tables(kind.rope, kind.head_dim, positions)
            for kind in set(self.config.layers)
        }
