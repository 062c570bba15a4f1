"""The forward process: which canvas is trained, how noisy it is, and the noise.

Every draw is a function of (seed, step, place of the example in the whole batch), so a
step can be repeated, resumed, or shared among ranks: which rank holds an example
follows from its place. Knows ids, not text. Host randomness, for every device alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .data import Example
from .objective import Sample

STREAMS = {"train": 0, "valid": 1, "test": 2}  # never the same draws for two of them
ORDER = 3  # nor for the order of the examples


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """How examples become noisy samples.

    levels              t is uniform between these; a position is replaced with
                        probability t by any token of the vocabulary, perhaps its own
    self_conditioning   share of samples whose decoder sees its own first guess
    """

    levels: tuple[float, float] = (1e-3, 1.0)
    self_conditioning: float = 0.5

    def sample(
        self,
        example: Example,
        length: int,
        vocab_size: int,
        key: Sequence[int],
    ) -> Sample:
        """One canvas of `length` of an example, chosen uniformly, under noise.

        Its prefix is the prompt and the canvases strictly before it.
        """
        rng = np.random.default_rng(key)
        chosen = int(rng.integers(example.canvases(length)))
        level = rng.uniform(*self.levels)
        conditioned = bool(rng.random() < self.self_conditioning)
        before, canvas = example.cut(length, chosen)
        replaced = rng.random(length) < level
        noise = rng.integers(0, vocab_size, length)
        return Sample(
            prefix=(*example.prompt, *before),
            prompt=len(example.prompt),
            canvas=canvas,
            noisy=np.where(replaced, noise, canvas).tolist(),
            conditioned=conditioned,
        )


def key_of(seed: int, stream: str, step: int, place: int) -> tuple[int, ...]:
    """Of the draws for one example; place is that in the batch of all ranks."""
    return seed, STREAMS[stream], step, place


def order(seed: int, count: int, first: int, wanted: int) -> list[int]:
    """Which of `count` examples come first, first + 1, … in endless shuffled epochs."""
    indices: list[int] = []
    while len(indices) < wanted:
        epoch, at = divmod(first + len(indices), count)
        shuffled = np.random.default_rng([seed, ORDER, epoch]).permutation(count)
        indices += shuffled[at : at + wanted - len(indices)].tolist()
    return indices
