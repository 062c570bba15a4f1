"""The decisions of one denoising step, as pure functions of arrays.

    entropy ─► accept ─► renoise ─► next canvas
    argmax ──► reveal, stop?

Knows nothing of the model. The functions work on B rows, each with its own bound and
keys; they are transformers' EntropyBoundSampler and StableAndConfidentStoppingCriteria
(arXiv 2505.24857).
"""

import hashlib

import mlx.core as mx
import numpy as np

CANVAS, PROPOSE, RENOISE = "canvas", "propose", "renoise"


def random_key(seed: int, canvas: int, step: int, purpose: str) -> np.ndarray:
    """Return a random key, (2,) uint32, that depends on these four values only.

    So a draw does not depend on batch neighbours, the live view or early stops.
    """
    text = f"{seed}/{canvas}/{step}/{purpose}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)


def random_tokens(key: mx.array | np.ndarray, length: int, vocab_size: int) -> mx.array:
    """Return (L,) int32 ids, uniform over the vocabulary."""
    return mx.random.randint(0, vocab_size, (length,), key=mx.array(key))


def accept(entropies: mx.array, bounds: mx.array) -> mx.array:
    """Return which of (B, L) positions to accept under (B,) entropy bounds, in nats.

    In order of rising entropy, those whose predecessors' entropies sum to at most
    the bound. The position of lowest entropy is always accepted.
    """
    order = mx.argsort(entropies, axis=-1)
    ordered = mx.take_along_axis(entropies, order, axis=-1)
    chosen = mx.cumsum(ordered, axis=-1) - ordered <= bounds[:, None]
    return mx.take_along_axis(chosen, mx.argsort(order, axis=-1), axis=-1)


def count_unchanged(draft: mx.array, before: mx.array, count: mx.array) -> mx.array:
    """Return how many drafts in a row equal the newest, (B, L) argmax: (B,) int32.

    before is the last draft, count what was returned for it.
    """
    same = mx.all(draft == before, axis=-1)
    return mx.where(same, count + 1, 0)


def reveal(
    argmax: mx.array, peak: mx.array, revealed: mx.array, min_probability: mx.array
) -> mx.array:
    """Return the tokens revealed for good, (B, L) int32, -1 elsewhere.

    Adds argmax where its probability `peak` is at least (B,) min_probability, and the
    likeliest position in any case (mlx-vlm's confidence-threshold sampler).
    """
    hidden = revealed < 0
    likely = hidden & (peak >= min_probability[:, None])
    best = mx.argmax(mx.where(hidden, peak, -1), axis=-1, keepdims=True)
    forced = hidden & (mx.arange(revealed.shape[1]) == best)
    likely = likely | (forced & ~mx.any(likely, axis=-1, keepdims=True))
    return mx.where(likely, argmax, revealed)
