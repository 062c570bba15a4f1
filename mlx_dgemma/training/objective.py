"""The training objective: the losses of a batch.

Uniform noise at a level of each example's own, plain cross entropy over all positions
of the canvas, and beside it the encoder's next-token loss. In a share of the examples
the decoder also sees its own first guess, made without gradient. After Google's recipe
for DiffusionGemma (gemma/diffusion, sft_model.py) and NVIDIA's (NeMo AutoModel, dllm).
Self-conditioning is switched off by a signal of zeros, as in transformers.
"""

from typing import Any, NamedTuple

import mlx.core as mx

from ..model.language import DiffusionGemma, run_plainly
from . import loss
from .batches import Batch, Batches
from .data import Dataset
from .passes import AttentionInputs, checkpointed, denoise, encode


class Losses(NamedTuple):
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
    run_layer = checkpointed if checkpoint else run_plainly
    tokens, column = batch.tokens, batch.column
    embedding, softcap = model.embed_tokens, model.config.final_logit_softcapping
    inputs = AttentionInputs.of(model.config, batch.starts, tokens.shape[1])
    seen = tokens if encoding else tokens[:, :column]
    states, kv = encode(model, seen, inputs, run_layer)
    canvas, signal = (batch.noisy, kv, inputs, column), None
    if batch.needs_guess:
        guess = denoise(model, *canvas, None)
        signal = loss.signal(embedding, guess, softcap)
        signal = signal * batch.self_conditioned.astype(guess.dtype)
    hidden = denoise(model, *canvas, signal, run_layer)
    nats = loss.cross_entropy(embedding, hidden, tokens[:, column:], softcap)
    denoising = mx.mean(nats)
    if not encoding:
        return Losses(denoising, mx.array(0.0))
    nats = loss.cross_entropy(embedding, states[:, :-1], tokens[:, 1:], softcap)
    return Losses(denoising, mx.sum(nats * batch.weights))


def mean_losses(
    model: DiffusionGemma, batches: Batches, data: Dataset, stream: str, count: int
) -> tuple[float, float]:
    """Return the mean losses of the first `count` batches, -1 for all, of all ranks."""
    sums = mx.zeros((3,))
    for batch in batches.fixed(data, stream, count):
        sums = sums + mx.stack([*losses(model, batch), mx.array(1.0)]) * len(batch)
        mx.eval(sums)
    every: Any = mx.distributed.all_sum(sums, group=batches.group).tolist()
    denoising, encoding, rows = every
    return denoising / rows, encoding / rows
