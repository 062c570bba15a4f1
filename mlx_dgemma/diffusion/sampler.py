"""One denoising step as pure functions of logits and random numbers.

    logits ─ process ─► propose ─► accept ─► renoise ─► next canvas
                  └───► entropy ─────┘           └► stop?

Knows nothing of the model. The functions work on B rows, each with its own
temperature, bound and keys; they are transformers' EntropyBoundSampler and
StableAndConfidentStoppingCriteria (arXiv 2505.24857).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

CANVAS, PROPOSE, RENOISE = "canvas", "propose", "renoise"


def fold(seed: int, canvas: int, step: int, purpose: str) -> np.ndarray:
    """A random key, (2,) uint32, that depends on these four and on nothing else.

    So a draw is the same whoever shares the batch, looks on or stops early.
    """
    text = f"{seed}/{canvas}/{step}/{purpose}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)


def random_tokens(key: mx.array | np.ndarray, length: int, vocab_size: int) -> mx.array:
    """(L,) int32 ids, uniform over the vocabulary."""
    key = mx.array(key)
    return mx.random.randint(0, vocab_size, (length,), key=key)


def process(logits: mx.array, temperatures: mx.array) -> mx.array:
    """(B, L, V) logits over (B,) temperatures -> (B, L, V) float32."""
    return logits.astype(mx.float32) / temperatures[:, None, None]


def pin(processed: mx.array, pinned: mx.array) -> mx.array:
    """Make each pinned position certain of its token.

    pinned (B, L) holds the given id, or -1. A certain position has entropy 0, is
    its own proposal and argmax, and its soft embedding is the token's own.
    """
    ids = mx.arange(processed.shape[-1])
    certain = mx.where(ids == pinned[..., None], 0.0, -mx.inf)
    return mx.where((pinned >= 0)[..., None], certain, processed)


def entropy(processed: mx.array) -> mx.array:
    """(B, L, V) processed logits -> (B, L) nats."""
    logp = processed - mx.logsumexp(processed, axis=-1, keepdims=True)
    # an impossible token adds 0, not 0 · -inf
    return -mx.sum(mx.exp(logp) * mx.maximum(logp, mx.finfo(mx.float32).min), axis=-1)


def propose(processed: mx.array, uniforms: mx.array) -> mx.array:
    """Sample each position by inverse CDF from one uniform: (B, L) int32 ids.

    uniforms (B, L) in [0, 1).
    """
    cumulative = mx.cumsum(mx.softmax(processed, axis=-1), axis=-1)
    target = uniforms[..., None] * cumulative[..., -1:]
    below = mx.sum(cumulative <= target, axis=-1)
    # rounding of the sum may leave the target at its very end
    return mx.minimum(below, processed.shape[-1] - 1).astype(mx.int32)


def accept(entropies: mx.array, bounds: mx.array) -> mx.array:
    """Which of (B, L) positions to accept under (B,) entropy bounds, in nats.

    In order of rising entropy, those whose predecessors' entropies sum to at most
    the bound. The surest position is always accepted.
    """
    order = mx.argsort(entropies, axis=-1)
    ordered = mx.take_along_axis(entropies, order, axis=-1)
    chosen = mx.cumsum(ordered, axis=-1) - ordered <= bounds[:, None]
    return mx.take_along_axis(chosen, mx.argsort(order, axis=-1), axis=-1)


def count_unchanged(argmax: mx.array, before: mx.array, streak: mx.array) -> mx.array:
    """How many canvases in a row equal the newest (B, L) argmax: (B,) int32.

    before is the last argmax canvas, streak what was counted for it; a canvas is
    stable once the count reaches the setting `stability`.
    """
    same = mx.all(argmax == before, axis=-1)
    return mx.where(same, streak + 1, 0)


def reveal(
    argmax: mx.array, peak: mx.array, held: mx.array, least: mx.array
) -> mx.array:
    """Tokens revealed for good, (B, L) int32, -1 where none is.

    To those held already: argmax where its probability `peak` is at least (B,) least,
    and the likeliest one in any case (mlx-vlm's confidence-threshold sampler).
    """
    open_ = held < 0
    sure = open_ & (peak >= least[:, None])
    likeliest = mx.argmax(mx.where(open_, peak, -1), axis=-1, keepdims=True)
    forced = open_ & (mx.arange(held.shape[1]) == likeliest)
    sure = sure | (forced & ~mx.any(sure, axis=-1, keepdims=True))
    return mx.where(sure, argmax, held)


@dataclass(frozen=True)
class Refined:
    """What one denoising step made of B canvases; each (B, L) but `processed`."""

    processed: mx.array  # (B, L, V) float32
    argmax: mx.array
    entropy: mx.array
    accepted: mx.array
    canvas: mx.array


def refine(
    logits: mx.array,
    *,
    temperatures: mx.array,
    bounds: mx.array,
    uniforms: mx.array,
    noise: mx.array,
    pinned: mx.array | None = None,
) -> Refined:
    """One step of B rows: propose, accept the surest, renoise the rest.

    logits (B, L, V); temperatures and bounds (B,); uniforms and noise (B, L), the
    noise being random ids; pinned (B, L) ids or -1, or None when nothing is given.
    The engine reads the vocabulary in one pass instead (`model.vocab.read`); this is
    the same in plain steps, for whoever holds all logits.
    """
    processed = process(logits, temperatures)
    if pinned is not None:
        processed = pin(processed, pinned)
    entropies = entropy(processed)
    accepted = accept(entropies, bounds)
    if pinned is not None:
        accepted = accepted | (pinned >= 0)
    canvas = mx.where(accepted, propose(processed, uniforms), noise)
    argmax = mx.argmax(processed, axis=-1).astype(mx.int32)
    return Refined(processed, argmax, entropies, accepted, canvas)


def pinned_row(pinned: Mapping[int, int], first: int, length: int) -> np.ndarray:
    """(L,) int32: the given ids of the canvas that begins at position `first`.

    -1 where nothing is given.
    """
    row = np.full(length, -1, np.int32)
    for position, token in pinned.items():
        if first <= position < first + length:
            row[position - first] = token
    return row
