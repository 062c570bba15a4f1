"""The forward process: which canvas of an example is trained, and its noise.

Every draw is a function of seed, stream, step and the example's position in the whole
batch, so a step can be repeated, resumed, or shared among ranks. Drawn on the host,
so that every device gets the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .data import Example
from .settings import TrainSettings

STREAMS = {"train": 0, "valid": 1, "test": 2}  # each with draws of its own
ORDER = 3  # the stream of the order of examples


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One noisy canvas of an example, and what comes before it."""

    prefix: Sequence[int]  # the prompt and the canvases before this one
    prompt: int  # how many tokens of the prefix are the prompt
    canvas: Sequence[int]  # L clean ids
    noisy: Sequence[int]  # L ids that the decoder sees
    self_conditioned: bool  # whether it also sees its own first guess


def draw_key(seed: int, stream: str, step: int, position: int) -> tuple[int, ...]:
    """Return the key of all draws for one example of a step."""
    return seed, STREAMS[stream], step, position


def corrupt(
    example: Example,
    length: int,
    vocab_size: int,
    settings: TrainSettings,
    key: Sequence[int],
) -> Sample:
    """Return a canvas of `length` tokens, chosen uniformly, under noise.

    The noise level t is uniform between `settings.levels`. A position is replaced with
    probability t, by any token of the vocabulary, perhaps its own.
    """
    rng = np.random.default_rng(key)
    index = int(rng.integers(example.canvases(length)))
    level = rng.uniform(*settings.levels)
    self_conditioned = bool(rng.random() < settings.self_conditioning)
    before, canvas = example.cut(length, index)
    replaced = rng.random(length) < level
    noise = rng.integers(0, vocab_size, length)
    return Sample(
        prefix=(*example.prompt, *before),
        prompt=len(example.prompt),
        canvas=canvas,
        noisy=np.where(replaced, noise, canvas).tolist(),
        self_conditioned=self_conditioned,
    )


def shuffled_indices(seed: int, count: int, first: int, wanted: int) -> list[int]:
    """Return `wanted` indices from `first` on, in endless shuffled epochs."""
    indices: list[int] = []
    while len(indices) < wanted:
        epoch, start = divmod(first + len(indices), count)
        shuffled = np.random.default_rng([seed, ORDER, epoch]).permutation(count)
        indices += shuffled[start : start + wanted - len(indices)].tolist()
    return indices
