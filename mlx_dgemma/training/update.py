"""From a micro-batch to gradients, and from gradients to new weights.

The weights that are updated are float32 copies, whatever the model computes in: a
bfloat16 weight would swallow small updates. An adapter is float32 itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..model.language import DiffusionGemma
from .objective import Batch, Losses, losses
from .settings import TrainSettings

Tree = Any  # nested dicts and lists of arrays
BETAS = [0.95, 0.99]


class Gradients:
    """Losses and gradients of micro-batches, traced once per shape if compiled."""

    def __init__(
        self, model: DiffusionGemma, settings: TrainSettings, *, compiled: bool
    ):
        self.model, self.settings, self.compiled = model, settings, compiled
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, weights: Tree, batch: Batch) -> tuple[Losses, Tree]:
        """Gradients of what is trained, in float32."""
        key = (batch.column, len(batch), batch.guesses)
        if key not in self._programs:
            self._programs[key] = self._program(batch)
        (_, found), gradients = self._programs[key](weights, batch.arrays)
        # tracing has left its own arrays in the model
        self.model.update(weights)
        return Losses(*found), tree_map(lambda g: g.astype(mx.float32), gradients)

    def _program(self, example: Batch) -> Callable[..., Any]:
        settings = self.settings

        def objective(weights: Tree, arrays: list) -> tuple[mx.array, tuple]:
            self.model.update(weights)
            found = losses(
                self.model,
                example.filled(arrays),
                encoding=settings.encoder_loss_weight > 0,
                again=settings.grad_checkpoint,
            )
            weighted = settings.encoder_loss_weight * found.encoding
            return found.denoising + weighted, (found.denoising, found.encoding)

        program = mx.value_and_grad(objective)
        return mx.compile(program) if self.compiled else program


class Weights:
    """What is trained: float32 masters, and the optimizer's memory of them."""

    def __init__(self, model: DiffusionGemma, settings: TrainSettings):
        self.model, self.settings = model, settings
        trainable = model.trainable_parameters()
        self._dtypes = tree_map(lambda a: a.dtype, trainable)
        self.master: Tree = tree_map(lambda a: a.astype(mx.float32), trainable)
        self.optimizer = make_optimizer(settings)
        self.optimizer.init(self.master)
        self.put_back()

    @property
    def tree(self) -> Tree:
        """The trained weights as the model computes with them."""
        return tree_map(lambda a, dtype: a.astype(dtype), self.master, self._dtypes)

    def put_back(self) -> None:
        """Give the model its weights, evaluated."""
        weights = self.tree
        mx.eval(weights)
        self.model.update(weights)

    def update(self, gradients: Tree, number: int) -> mx.array:
        """Take update `number`; returns the norm the gradients had."""
        gradients, norm = optim.clip_grad_norm(gradients, self.settings.max_grad_norm)
        self.optimizer.learning_rate = self.settings.rate(number)
        self.master = self.optimizer.apply_gradients(gradients, self.master)
        mx.eval(self.master, self.optimizer.state, norm)
        self.put_back()
        return norm

    def begin(self, arrays: Mapping[str, mx.array]) -> None:
        """Start from other weights, given by path; the optimizer knows nothing yet."""
        self.master = tree_map_with_path(
            lambda path, a: arrays[path].astype(mx.float32) if path in arrays else a,
            self.master,
        )
        self.put_back()

    def arrays(self) -> dict[str, mx.array]:
        """All that a later run needs to go on as if it had not stopped."""
        return _flat("weights", self.master) | _flat("optimizer", self.optimizer.state)

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Take over what `arrays` gave.

        In the order of the trees as they are: the norm of gradients is a sum in that
        order, and must round as it would have.
        """
        self.master, self.optimizer.state = (
            tree_map_with_path(
                lambda path, _, part=part: arrays[f"{part}.{path}"], tree
            )
            for part, tree in (
                ("weights", self.master),
                ("optimizer", self.optimizer.state),
            )
        )
        mx.eval(self.master, self.optimizer.state)
        self.put_back()


def make_optimizer(settings: TrainSettings) -> optim.Optimizer:
    """The optimizer of the settings; its rate is set at every update."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adafactor":
        return optim.Adafactor(
            learning_rate=rate,
            weight_decay=decay,
            scale_parameter=False,
            relative_step=False,
        )
    if settings.optimizer == "adam":
        return optim.Adam(rate, betas=BETAS, bias_correction=True)
    return optim.AdamW(rate, betas=BETAS, weight_decay=decay, bias_correction=True)


def _flat(name: str, tree: Tree) -> dict[str, mx.array]:
    flat: Any = tree_flatten(tree)
    return {f"{name}.{path}": array for path, array in flat}
