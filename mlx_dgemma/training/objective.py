"""The training objective: what a batch is, and its loss.

Uniform noise at a level t of each example's own, plain cross entropy over all
positions of the canvas, and beside it the encoder's next-token loss. In half of the
examples the decoder sees its own first guess, made without gradient, as when
generating. After Google's recipe for DiffusionGemma (gemma/diffusion, sft_model.py)
and NVIDIA's (NeMo AutoModel, dllm); self-conditioning is switched off by zeros in
place of the signal, as in transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.config import ModelConfig
from ..model.language import DiffusionGemma
from . import loss
from .passes import Sight, denoise, encode

BUCKET = 32  # prefixes are padded to a multiple of it, so that shapes rarely change


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One example as a step sees it, on the host."""

    prefix: Sequence[int]  # prompt and the canvases before this one
    prompt: int  # how many of these are the prompt
    canvas: Sequence[int]  # L clean ids
    noisy: Sequence[int]  # L ids the decoder is given
    conditioned: bool  # whether it also sees its own first guess


@dataclass(frozen=True)
class Batch:
    """B samples as arrays, their canvases all at `column`."""

    tokens: mx.array  # (B, column + L) int32: padding, prefix, clean canvas
    noisy: mx.array  # (B, L) int32
    conditioned: mx.array  # (B, 1, 1) float32: 1 or 0
    weights: mx.array  # (B, column + L - 1) float32: of next-token pairs, 1 in all
    sight: Sight
    column: int
    guesses: bool  # whether any sample is conditioned

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        samples: Sequence[Sample],
        *,
        mask_prompt: bool = False,
    ) -> "Batch":
        """mask_prompt: the encoder's loss leaves out the tokens of the prompt."""
        longest = max(len(sample.prefix) for sample in samples)
        column = -(-longest // BUCKET) * BUCKET
        length = config.canvas_length
        tokens = np.zeros((len(samples), column + length), dtype=np.int32)
        weights = np.zeros((len(samples), column + length - 1), dtype=np.float32)
        starts = []
        for row, sample in enumerate(samples):
            start = column - len(sample.prefix)
            tokens[row, start:column] = sample.prefix
            tokens[row, column:] = sample.canvas
            # pair i predicts token i + 1
            first = start + (sample.prompt - 1 if mask_prompt else 0)
            pairs = column + length - 1 - first
            weights[row, first:] = 1 / (pairs * len(samples))
            starts.append(start)
        conditioned = [sample.conditioned for sample in samples]
        return cls(
            tokens=mx.array(tokens),
            noisy=mx.array([list(s.noisy) for s in samples], dtype=mx.int32),
            conditioned=mx.array(conditioned, dtype=mx.float32)[:, None, None],
            weights=mx.array(weights),
            sight=Sight.of(config, tuple(starts), column, column + length),
            column=column,
            guesses=any(conditioned),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def arrays(self) -> list:
        """Everything in it that differs between batches of one shape."""
        sight = self.sight
        parts = [
            [part[kind] for kind in sight.query_rope]
            for part in (sight.query_rope, sight.causal, sight.canvas)
        ]
        return [self.tokens, self.noisy, self.conditioned, self.weights, *parts]

    def filled(self, arrays: list) -> "Batch":
        """This batch with `arrays` of another of its shape."""
        tokens, noisy, conditioned, weights, *parts = arrays
        sight = Sight(
            *(dict(zip(self.sight.query_rope, part, strict=True)) for part in parts)
        )
        return Batch(
            tokens, noisy, conditioned, weights, sight, self.column, self.guesses
        )


@dataclass(frozen=True)
class Losses:
    """Means over the examples of a batch, nats a token."""

    denoising: mx.array
    encoding: mx.array


def losses(
    model: DiffusionGemma, batch: Batch, *, encoding: bool, again: bool
) -> Losses:
    """Both losses of a batch; each example weighs the same, however long it is.

    encoding    whether the encoder's is wanted; zero if not
    again       run layers anew for their gradients, which saves memory
    """
    tokens, sight, column = batch.tokens, batch.sight, batch.column
    clean = tokens[:, column:]
    read = tokens if encoding else tokens[:, :column]
    states, kept = encode(model, read, sight, again=again)
    given = batch.noisy, kept, sight, column
    guess = None
    if batch.guesses:
        first = denoise(model, *given, None, again=False)
        guess = _signal(model, first) * batch.conditioned.astype(first.dtype)
    hidden = denoise(model, *given, guess, again=again)
    denoising = mx.mean(_cross_entropy(model, hidden, clean))
    if not encoding:
        return Losses(denoising, mx.array(0.0))
    nats = _cross_entropy(model, states[:, :-1], tokens[:, 1:])
    return Losses(denoising, mx.sum(nats * batch.weights))


def _cross_entropy(
    model: DiffusionGemma, hidden: mx.array, targets: mx.array
) -> mx.array:
    """(B, T, D) states and (B, T) ids -> (B, T) nats."""
    softcap = model.config.final_logit_softcapping
    given = hidden.reshape(-1, hidden.shape[-1]), targets.flatten()
    return loss.cross_entropy(model.embed_tokens, *given, softcap).reshape(
        targets.shape
    )


def _signal(model: DiffusionGemma, hidden: mx.array) -> mx.array:
    """(B, L, D) states of the first pass -> (B, L, D) signal of the second."""
    softcap = model.config.final_logit_softcapping
    flat = mx.stop_gradient(hidden.reshape(-1, hidden.shape[-1]))
    return loss.signal(model.embed_tokens, flat, softcap).reshape(hidden.shape)
