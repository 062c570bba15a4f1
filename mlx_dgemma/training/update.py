"""From a micro-batch to gradients, and from gradients to new weights.

The optimizer updates float32 copies, whatever the model computes in: a bfloat16 weight
would swallow small updates. An adapter is float32 itself.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..errors import NumericError
from ..model.language import DiffusionGemma
from .batches import Batch
from .objective import Losses, losses
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
        """Return the losses, and the gradients of `weights` in float32."""
        key = batch.column, len(batch), batch.needs_guess
        if key not in self._programs:
            self._programs[key] = self._program(batch.column, batch.needs_guess)
        (_, found), gradients = self._programs[key](weights, batch.arrays)
        self.model.update(weights)  # tracing has left its own arrays in the model
        return Losses(*found), tree_map(lambda g: g.astype(mx.float32), gradients)

    def _program(self, column: int, needs_guess: bool) -> Callable[..., Any]:
        settings = self.settings

        def objective(weights: Tree, arrays: list) -> tuple[mx.array, tuple]:
            self.model.update(weights)
            found = losses(
                self.model,
                Batch(*arrays, column=column, needs_guess=needs_guess),
                encoding=settings.encoder_loss_weight > 0,
                checkpoint=settings.grad_checkpoint,
            )
            weighted = settings.encoder_loss_weight * found.encoding
            return found.denoising + weighted, tuple(found)

        program = mx.value_and_grad(objective)
        return mx.compile(program) if self.compiled else program


class Weights:
    """What is trained: float32 masters, and the optimizer with its state."""

    def __init__(self, model: DiffusionGemma, settings: TrainSettings):
        self.model, self.settings = model, settings
        trainable = model.trainable_parameters()
        self._dtypes = tree_map(lambda a: a.dtype, trainable)
        self.master: Tree = tree_map(lambda a: a.astype(mx.float32), trainable)
        self.optimizer = make_optimizer(settings)
        self.optimizer.init(self.master)
        self._update_model()

    @property
    def tree(self) -> Tree:
        """The trained weights in the dtypes that the model computes with."""
        return tree_map(lambda a, dtype: a.astype(dtype), self.master, self._dtypes)

    def _update_model(self) -> None:
        weights = self.tree
        mx.eval(weights)
        self.model.update(weights)

    def update(self, gradients: Tree, number: int) -> mx.array:
        """Make update `number`; return the norm the gradients had before clipping.

        Raises NumericError, nothing changed, when the norm is not finite.
        """
        gradients, norm = optim.clip_grad_norm(gradients, self.settings.max_grad_norm)
        value: Any = norm.item()
        if not math.isfinite(value):
            raise NumericError(f"the norm of the gradients is {value}")
        self.optimizer.learning_rate = self.settings.rate(number)
        self.master = self.optimizer.apply_gradients(gradients, self.master)
        mx.eval(self.master, self.optimizer.state, norm)
        self._update_model()
        return norm

    def replace(self, arrays: Mapping[str, mx.array]) -> None:
        """Take other weights by their paths; the optimizer stays as it is."""
        self.master = tree_map_with_path(
            lambda path, a: arrays.get(path, a).astype(mx.float32), self.master
        )
        self._update_model()

    def state(self) -> dict[str, mx.array]:
        """Return all that a later run needs to continue to the same bits."""
        flat: Any = tree_flatten(self._state)
        return dict(flat)

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Take over what `state` returned.

        The trees keep their order: a norm is a sum in that order, and rounds with it.
        """
        state = tree_map_with_path(lambda path, _: arrays[path], self._state)
        self.master, self.optimizer.state = state["weights"], state["optimizer"]
        mx.eval(self.master, self.optimizer.state)
        self._update_model()

    @property
    def _state(self) -> Tree:
        return {"weights": self.master, "optimizer": self.optimizer.state}


def make_optimizer(settings: TrainSettings) -> optim.Optimizer:
    """Return the optimizer of the settings; its rate is set at every update."""
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
