"""Denoise with draws recorded from transformers instead of our own."""

from collections import deque
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dgemma.diffusion import sampler
from mlx_dgemma.diffusion.step import Stepper
from mlx_dgemma.model import vocab


def ids(array: np.ndarray) -> mx.array:
    return mx.array(array.astype(np.int32))


def feed(
    monkeypatch,
    noises: Sequence[np.ndarray],
    proposals: Sequence[np.ndarray] | None = None,
    starts: Sequence[np.ndarray] | None = None,
) -> None:
    """Give the next steps these (L,) ids to renoise with.

    Also, if given, these proposals in place of samples, and these first canvases.
    """
    noise = deque(noises)
    monkeypatch.setattr(
        Stepper,
        "draw",
        lambda self, keys, length: (mx.zeros((1, length)), ids(noise.popleft()[None])),
    )
    if proposals is not None:
        proposal, stats = deque(proposals), vocab.vocab_stats
        monkeypatch.setattr(
            vocab,
            "vocab_stats",
            lambda *given: stats(*given)._replace(sample=ids(proposal.popleft())),
        )
    if starts is not None:
        first = deque(starts)
        monkeypatch.setattr(
            sampler, "random_tokens", lambda key, length, size: ids(first.popleft())
        )
