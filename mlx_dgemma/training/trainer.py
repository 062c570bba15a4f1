"""The training loop: which batch comes when, and what is written down.

A run is a sequence of updates. Everything an update does is a function of settings,
data and its number, so a run that stopped goes on to the same weights as one that did
not, and ranks that share a batch get the gradients one rank would have got.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map

from .. import backends
from ..adapters import folder as adapters
from ..adapters.lora import adapt, unfreeze
from ..errors import (
    AdapterError,
    CheckpointError,
    NumericError,
    SettingsError,
    TrainingError,
)
from ..files.atomic import LOCK, locked, save_arrays
from ..files.safetensors import (
    Expected,
    check_tensors,
    checksum,
    load_file,
    load_tensors,
)
from ..model.language import DiffusionGemma
from .batches import Batches
from .data import Dataset
from .objective import mean_losses
from .record import Event, Log, Saved, Trained, Validated, draw
from .settings import Run
from .update import Gradients, Weights

STATE, LOG, PICTURE = "training_state.safetensors", "log.jsonl", "loss.png"
# Settings that may differ when a run is resumed.
FREE = ("steps_per_report", "steps_per_eval", "save_every", "val_batches")


class Trainer:
    """One run. `events` makes its updates; `stop` ends it after the current one.

    model      gets its adapters, or is unfrozen, here
    valid      None for no validation
    compiled   whether batches are traced; None for what the backend prefers
    """

    def __init__(
        self,
        run: Run,
        model: DiffusionGemma,
        train: Dataset,
        valid: Dataset | None = None,
        *,
        compiled: bool | None = None,
        group: mx.distributed.Group | None = None,
    ):
        self.run, self.settings, self.folder = run, run.settings, run.folder
        self.model, self.train, self.valid = model, train, valid
        self.group = mx.distributed.init() if group is None else group
        self.rank, self.ranks = self.group.rank(), self.group.size()
        if self.settings.batch_size % self.ranks:
            raise SettingsError(
                f"batch_size is {self.settings.batch_size}; it must be a multiple of "
                f"the {self.ranks} ranks"
            )
        if run.lora is not None:
            adapt(model, run.lora, self.settings.seed)
        else:
            unfreeze(model, run.num_layers, router=run.train_router)
        compiled = backends.current().compiles if compiled is None else compiled
        self.gradients = Gradients(model, self.settings, compiled=compiled)
        self.weights = Weights(model, self.settings)
        self.batches = Batches(model.config, self.settings, self.group)
        self.done = 0  # micro-batches
        self.tokens = 0  # trained on by all ranks, as far as reported
        self.on_update: Callable[[int], None] = lambda done: None  # micro-batches done
        self._stopped = False

    @property
    def fingerprint(self) -> dict[str, str]:
        """What must be the same for a run to be resumed, by the name of its flag."""
        config = json.dumps(self.model.config.raw, sort_keys=True)
        settings = asdict(self.settings).items()
        return {name: str(value) for name, value in settings if name not in FREE} | {
            "lora": str(self.run.lora),
            "num_layers": str(self.run.num_layers),
            "train_router": str(self.run.train_router),
            "data": self.train.digest,
            "model": hashlib.sha256(config.encode()).hexdigest()[:16],
        }

    def stop(self) -> None:
        """End the run after the current update; what was reached is saved."""
        self._stopped = True

    def resume(self) -> None:
        """Continue from the state in the folder. Raises TrainingError if it cannot."""
        path = self.folder / STATE
        if not path.is_file():
            raise TrainingError(f"{path}: no such file; nothing to --resume")
        try:
            infos, arrays, metadata = load_file(path)
        except CheckpointError as error:
            raise TrainingError(f"{path}: cannot be read ({error})") from None
        for name, value in self.fingerprint.items():
            if metadata.get(name) != value:
                raise TrainingError(
                    f"{path}: {name} was {metadata.get(name)} and is {value} now; "
                    "give the same, or begin anew with --resume-adapter-file"
                )
        own = self.weights.state().items()
        expected = {n: Expected(a.shape, (a.dtype,), "this run") for n, a in own}
        check_tensors(path, infos, expected, error=TrainingError)
        numbers = [metadata.get(name, "") for name in ("iteration", "trained_tokens")]
        whole = all(n.isascii() and n.isdecimal() and len(n) < 19 for n in numbers)
        if not whole or metadata.get("arrays") != checksum(arrays):
            why = "damaged; begin anew with --resume-adapter-file"
            raise TrainingError(f"{path}: {why}")
        self.weights.restore(arrays)
        self.done, self.tokens = map(int, numbers)

    def start_from(self, path: Path) -> None:
        """Start from trained weights, with a fresh optimizer."""
        infos = adapters.check_weights(self.model, self.run.lora, path)
        arrays = load_tensors(infos)
        if unknown := sorted(set(arrays) - set(adapters.trained(self.model))):
            raise AdapterError(f"{path}: {unknown[0]} is not trained here")
        self.weights.replace(arrays)

    def events(self) -> Iterator[Event]:
        """Train to the last iteration, or until `stop`, and yield all events.

        Raises TrainingError where another run writes to the folder, and for an update
        that computes NaN.
        """
        if self.rank:
            yield from self._events()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / LOCK) as free:
            if not free:
                raise TrainingError(f"{self.folder}: another run is writing to it")
            yield from self._events()
            (self.folder / LOCK).unlink(missing_ok=True)

    def _events(self) -> Iterator[Event]:
        settings, figures, saved = self.settings, [], self.done
        log = Log(self.folder / LOG, self.done, writes=self.rank == 0)
        if self.done == 0 and self.valid is not None:
            yield log.add(self._validate(self.valid))
        while self.done < settings.iters and not self._any_rank_stopped():
            try:
                figures.append(self._update())
                self.on_update(self.done)
            except NumericError as error:
                failed = self.done
                self.done -= settings.grad_accumulation_steps
                if saved < self.done:
                    yield self._save()
                raise TrainingError(
                    f"iteration {failed}: {error}; iteration {self.done} is kept. Look "
                    "at the rows, or lower --learning-rate"
                ) from None
            if self._due(settings.steps_per_report):
                yield log.add(self._report(figures))
                figures = []
            if self.valid is not None and self._due(settings.steps_per_eval):
                yield log.add(self._validate(self.valid))
            if self._due(settings.save_every):
                yield self._save()
                saved = self.done
        if saved < self.done:
            yield self._save()

    def draw(self) -> bool:
        """Draw the losses into the folder; return False without matplotlib."""
        return draw(self.folder / LOG, self.folder / PICTURE)

    def _any_rank_stopped(self) -> bool:
        """Whether any rank stops: the others would wait for it forever."""
        if self.ranks == 1:
            return self._stopped
        stopped = mx.array(int(self._stopped))
        return mx.distributed.all_sum(stopped, group=self.group).item() != 0

    def _due(self, every: int) -> bool:
        """Whether the last update passed a multiple of `every`, or ended the run."""
        before = self.done - self.settings.grad_accumulation_steps
        return self.done // every > before // every or self.done == self.settings.iters

    def _update(self) -> tuple[float, ...]:
        """Make an update; return mean losses, gradient norm, tokens and seconds."""
        began, count = time.perf_counter(), self.settings.grad_accumulation_steps
        number, tree, summed = self.done // count, self.weights.tree, None
        losses, tokens = mx.zeros((2,)), 0
        for _ in range(count):
            batch = self.batches.train(self.train, self.done)
            found, gradients = self.gradients(tree, batch)
            if summed is not None:
                gradients = tree_map(mx.add, summed, gradients)
            summed, losses = gradients, losses + mx.stack([*found])
            mx.eval(summed, losses)
            tokens += batch.tokens.size
            self.done += 1
        gradients = tree_map(lambda g: g / count, summed)
        if self.ranks > 1:
            gradients = average_gradients(gradients, self.group)
        norm: Any = self.weights.update(gradients, number).item()
        means: Any = (losses / count).tolist()
        return (*means, norm, tokens, time.perf_counter() - began)

    def _report(self, figures: list[tuple[float, ...]]) -> Trained:
        """Return the means of some updates over all ranks."""
        sums, count = list(map(sum, zip(*figures, strict=True))), len(figures)
        *_, norm, tokens, seconds = sums
        own = mx.array([sums[0] / count, sums[1] / count, tokens])
        every: Any = mx.distributed.all_sum(own, group=self.group).tolist()
        denoising, encoding, tokens = every
        self.tokens += int(tokens)
        batches = self.settings.grad_accumulation_steps
        return Trained(
            iteration=self.done,
            denoising=denoising / self.ranks,
            encoding=encoding / self.ranks,
            norm=norm / count,
            learning_rate=self.settings.rate(self.done // batches - 1),
            iterations_per_second=batches * count / seconds,
            tokens_per_second=tokens / seconds,
            trained_tokens=self.tokens,
            peak_memory=mx.get_peak_memory(),
        )

    def _validate(self, data: Dataset) -> Validated:
        """Return mean losses over validation data, with the same noise every time."""
        count = self.settings.val_batches
        found = mean_losses(self.model, self.batches, data, "valid", count)
        return Validated(self.done, *found)

    def _save(self) -> Saved:
        """Write the adapter and all that a resumed run needs, each file atomically."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            weights: Any = dict(tree_flatten(self.weights.tree))
            names = {"model": str(self.run.model), "data": str(self.run.data)}
            config = adapters.config_of(self.run.lora, self.run.num_layers)
            described = names | asdict(self.settings) | config
            adapters.save(self.folder, weights, described)
            save_arrays(self.folder / f"{self.done:07}_{adapters.WEIGHTS}", weights)
            # the state comes last: a run that is killed before repeats the save
            state = self.weights.state()
            metadata = self.fingerprint | {
                "iteration": str(self.done),
                "trained_tokens": str(self.tokens),
                "arrays": checksum(state),
            }
            save_arrays(self.folder / STATE, state, metadata)
        return Saved(self.done, self.folder / adapters.WEIGHTS)
