"""The training objective: the losses of a batch.

Uniform noise at a level of each example's own, plain cross entropy over all positions
of the canvas, and beside it the encoder's next-token loss. In a share of the examples
the decoder also sees its own first guess, made without gradient. After Google's recipe
for DiffusionGemma (gemma/diffusion, sft_model.py) and NVIDIA's (NeMo AutoModel, dllm).
Self-conditioning is switched off by a signal of zeros, as in transformers.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..model.language import DiffusionGemma
from . import loss
from .batches import Batch, Batches
from .data import Dataset
from .passes import AttentionInputs, checkpointed, denoise, encode, plain


@dataclass(frozen=True)
class Losses:
    """Means over the examples of a batch, in nats per token."""

    denoising: mx.array
    encoding: mx.array


def losses(
    model: DiffusionGemma,
    batch: Batch,
    *,
    encoding: bool = True,
    checkpoint: bool = False,
) -> Losses:
    """Return both losses of a batch; every example has the same weight.

    encoding     whether to compute the encoder's loss; zero if not
    checkpoint   run layers again for their gradients, which saves memory
    """
    through = checkpointed if checkpoint else plain
    tokens, column = batch.tokens, batch.column
    inputs = AttentionInputs.of(model.config, batch.starts, tokens.shape[1])
    read = tokens if encoding else tokens[:, :column]
    states, kv = encode(model, read, inputs, through)
    canvas, signal = (batch.noisy, kv, inputs, column), None
    if batch.any_conditioned:
        guess = denoise(model, *canvas, None)
        signal = _signal(model, guess) * batch.conditioned.astype(guess.dtype)
    hidden = denoise(model, *canvas, signal, through)
    denoising = mx.mean(_cross_entropy(model, hidden, tokens[:, column:]))
    if not encoding:
        return Losses(denoising, mx.array(0.0))
    nats = _cross_entropy(model, states[:, :-1], tokens[:, 1:])
    return Losses(denoising, mx.sum(nats * batch.weights))


def mean_losses(
    model: DiffusionGemma, batches: Batches, data: Dataset, stream: str, count: int
) -> tuple[float, float]:
    """Return the mean losses of the first `count` batches, -1 for all, of all ranks."""
    sums = mx.zeros((3,))
    for batch in batches.fixed(data, stream, count):
        found = losses(model, batch)
        mean = mx.stack([found.denoising, found.encoding, mx.array(1.0)])
        sums = sums + mean * len(batch)
        mx.eval(sums)
    every: Any = mx.distributed.all_sum(sums, group=batches.group).tolist()
    denoising, encoding, rows = every
    return denoising / rows, encoding / rows


def _cross_entropy(
    model: DiffusionGemma, hidden: mx.array, targets: mx.array
) -> mx.array:
    """Return the (B, T) nats of (B, T) ids under (B, T, D) states."""
    flat, softcap = hidden.reshape(-1, hidden.shape[-1]), _softcap(model)
    nats = loss.cross_entropy(model.embed_tokens, flat, targets.flatten(), softcap)
    return nats.reshape(targets.shape)


def _signal(model: DiffusionGemma, hidden: mx.array) -> mx.array:
    """Return the (B, L, D) signal that the (B, L, D) states of a guess give."""
    flat, softcap = hidden.reshape(-1, hidden.shape[-1]), _softcap(model)
    return loss.signal(model.embed_tokens, flat, softcap).reshape(hidden.shape)


def _softcap(model: DiffusionGemma) -> float:
    return model.config.final_logit_softcapping
