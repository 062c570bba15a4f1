"""Batches of noisy samples as arrays, and which examples each rank sees when."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.config import ModelConfig
from .corruption import Sample, corrupt, draw_key, shuffled_indices
from .data import Dataset, Example
from .settings import TrainSettings

BUCKET = 32  # prefixes are padded to a multiple of it, so that shapes rarely change


@dataclass(frozen=True)
class Batch:
    """B samples, padded in front so that all canvases begin at `column`."""

    tokens: mx.array  # (B, column + L) int32: padding, prefix, clean canvas
    noisy: mx.array  # (B, L) int32
    self_conditioned: mx.array  # (B, 1, 1) float32: 1 or 0
    weights: mx.array  # (B, column + L - 1) float32: of next-token pairs, sum 1
    starts: mx.array  # (B,) int32: first column of each row that is not padding
    column: int
    needs_guess: bool

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        samples: Sequence[Sample],
        *,
        mask_prompt: bool = False,
    ) -> "Batch":
        """mask_prompt: the encoder's loss leaves out the tokens of the prompt."""
        rows, length = len(samples), config.canvas_length
        longest = max(len(sample.prefix) for sample in samples)
        column = -(-longest // BUCKET) * BUCKET
        tokens = np.zeros((rows, column + length), dtype=np.int32)
        weights = np.zeros((rows, column + length - 1), dtype=np.float32)
        starts = [column - len(sample.prefix) for sample in samples]
        for row, (start, sample) in enumerate(zip(starts, samples, strict=True)):
            tokens[row, start:column] = sample.prefix
            tokens[row, column:] = sample.canvas
            # pair i predicts token i + 1
            first = start + (sample.prompt - 1 if mask_prompt else 0)
            weights[row, first:] = 1 / ((column + length - 1 - first) * rows)
        self_conditioned = [sample.self_conditioned for sample in samples]
        return cls(
            mx.array(tokens),
            mx.array([list(sample.noisy) for sample in samples], dtype=mx.int32),
            mx.array(self_conditioned, dtype=mx.float32)[:, None, None],
            mx.array(weights),
            mx.array(starts, dtype=mx.int32),
            column,
            any(self_conditioned),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays in the order of the fields."""
        return [
            self.tokens,
            self.noisy,
            self.self_conditioned,
            self.weights,
            self.starts,
        ]


class Batches:
    """The batches of one rank, which has every `ranks`-th example of a whole batch."""

    def __init__(
        self, config: ModelConfig, settings: TrainSettings, group: mx.distributed.Group
    ):
        self.config, self.settings, self.group = config, settings, group
        self.rank, self.ranks = group.rank(), group.size()

    def train(self, data: Dataset, step: int) -> Batch:
        """Return this rank's share of micro-batch `step`."""
        size = self.settings.batch_size
        chosen = shuffled_indices(self.settings.seed, len(data), step * size, size)
        examples = [data.examples[index] for index in chosen]
        own = range(self.rank, size, self.ranks)
        return self._batch(examples, "train", step, own)

    def fixed(self, data: Dataset, stream: str, batches: int) -> Iterator[Batch]:
        """Yield this rank's share of the first `batches` batches, -1 for all.

        They have the same noise every time.
        """
        size = self.settings.batch_size
        count = len(data) if batches == -1 else min(len(data), batches * size)
        for start in range(0, count, size):
            own = range(start + self.rank, min(start + size, count), self.ranks)
            if own:  # the last batch may have nothing for a rank
                yield self._batch(data.examples, stream, 0, own)

    def _batch(
        self, examples: Sequence[Example], stream: str, step: int, positions: range
    ) -> Batch:
        config, settings = self.config, self.settings
        size, seed = (config.canvas_length, config.vocab_size), settings.seed
        samples = [
            corrupt(examples[n], *size, settings, draw_key(seed, stream, step, n))
            for n in positions
        ]
        return Batch.of(config, samples, mask_prompt=settings.mask_prompt)
