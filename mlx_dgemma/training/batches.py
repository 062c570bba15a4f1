"""Which examples a rank sees when, and what they lose without being trained on."""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..checkpoint.config import ModelConfig
from ..model.language import DiffusionGemma
from .corruption import Corruption, key_of, order
from .data import Dataset, Example
from .objective import Batch, losses
from .settings import TrainSettings


class Batches:
    """The noisy batches of one rank: every `ranks`-th place of the whole batch."""

    def __init__(
        self,
        config: ModelConfig,
        settings: TrainSettings,
        group: mx.distributed.Group,
    ):
        self.config, self.settings, self.group = config, settings, group
        self.rank, self.ranks = group.rank(), group.size()
        self.corruption = Corruption(
            levels=settings.levels, self_conditioning=settings.self_conditioning
        )

    def train(self, data: Dataset, step: int) -> Batch:
        """This rank's share of micro-batch `step`."""
        size, examples = self.settings.batch_size, data.examples
        chosen = order(self.settings.seed, len(examples), step * size, size)
        places = range(self.rank, size, self.ranks)
        shared = [examples[chosen[place]] for place in places]
        return self._of(shared, "train", step, places)

    def fixed(self, data: Dataset, stream: str, batches: int) -> Iterator[Batch]:
        """The first `batches` batches of a set, -1 for all, each time the same."""
        size = self.settings.batch_size
        most = len(data) if batches == -1 else min(len(data), batches * size)
        for start in range(0, most, size):
            places = range(start + self.rank, min(start + size, most), self.ranks)
            if places:  # the last batch may have nothing for a rank
                chosen = [data.examples[place] for place in places]
                yield self._of(chosen, stream, 0, places)

    def _of(
        self, examples: Sequence[Example], stream: str, step: int, places: Sequence[int]
    ) -> Batch:
        config, settings = self.config, self.settings
        samples = [
            self.corruption.sample(
                example,
                config.canvas_length,
                config.vocab_size,
                key_of(settings.seed, stream, step, place),
            )
            for example, place in zip(examples, places, strict=True)
        ]
        return Batch.of(config, samples, mask_prompt=settings.mask_prompt)


def mean_losses(
    model: DiffusionGemma, batches: Batches, data: Dataset, stream: str, most: int
) -> tuple[float, float]:
    """Mean denoising and encoder loss of the first `most` batches over all ranks."""
    sums = mx.zeros((3,))
    for batch in batches.fixed(data, stream, most):
        found, count = losses(model, batch, encoding=True, again=False), len(batch)
        part = [found.denoising * count, found.encoding * count, mx.array(float(count))]
        sums = sums + mx.stack(part)
        mx.eval(sums)
    sums = mx.distributed.all_sum(sums, group=batches.group)
    every: list[float] = sums.tolist()  # type: ignore[assignment]
    denoising, encoding, count = every
    return denoising / count, encoding / count
