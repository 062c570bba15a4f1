"""The training loop: which batch comes when, and what is written down.

A run is a sequence of updates. Everything an update does is a function of settings,
data and its number, so a run that stopped goes on to the same weights as one that did
not, and ranks that share a batch get the gradients one rank would have got.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map

from .. import backends
from ..adapters import folder as adapters
from ..adapters.lora import LoRA, adapt, unfreeze
from ..errors import SettingsError, TrainingError
from ..model.language import DiffusionGemma
from .batches import Batches, mean_losses
from .data import Dataset
from .record import Log, Saved, Trained, Validated
from .settings import TrainSettings
from .update import Gradients, Tree, Weights

STATE = "training_state.safetensors"
LOG = "log.jsonl"
Event = Trained | Validated | Saved


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What is trained on what, and where it goes.

    lora        None to train the weights themselves, of the last `num_layers` layers
    router      whether their routers are trained as well
    described   what adapter_config.json is to say beside that: the model, the flags
    """

    settings: TrainSettings
    train: Dataset
    valid: Dataset | None
    folder: Path
    lora: LoRA | None = None
    num_layers: int = -1
    router: bool = False
    described: dict[str, Any]
    model_digest: str = ""  # of the base's configuration

    @property
    def fingerprint(self) -> dict[str, str]:
        """What must be the same for a run to go on; by the name of its flag."""
        given = {name: str(value) for name, value in asdict(self.settings).items()}
        for free in ("steps_per_report", "steps_per_eval", "save_every", "val_batches"):
            del given[free]
        given |= {"lora": str(self.lora), "num_layers": str(self.num_layers)}
        given |= {"train_router": str(self.router), "data": self.train.digest}
        return given | {"model": self.model_digest}


class Trainer:
    """One run. `run` yields what happens; `stop` ends it after the update at hand."""

    def __init__(
        self,
        model: DiffusionGemma,
        plan: TrainPlan,
        *,
        compiled: bool | None = None,
        group: mx.distributed.Group | None = None,
    ):
        self.model, self.plan, self.settings = model, plan, plan.settings
        self.group = mx.distributed.init() if group is None else group
        self.rank, self.ranks = self.group.rank(), self.group.size()
        if self.settings.batch_size % self.ranks:
            raise SettingsError(
                f"batch_size is {self.settings.batch_size}; it must be a multiple of "
                f"the {self.ranks} ranks"
            )
        if plan.lora is not None:
            adapt(model, plan.lora, self.settings.seed)
        else:
            unfreeze(model, plan.num_layers, router=plan.router)
        compiled = backends.current().compiles if compiled is None else compiled
        self.gradients = Gradients(model, self.settings, compiled=compiled)
        self.weights = Weights(model, self.settings)
        self.batches = Batches(model.config, self.settings, self.group)
        self.done = 0  # micro-batches
        self._stopped = False

    def stop(self) -> None:
        """End after the update at hand, saving what was reached."""
        self._stopped = True

    def resume(self) -> None:
        """Go on from the state in the folder. Raises TrainingError when it cannot."""
        path = self.plan.folder / STATE
        if not path.is_file():
            raise TrainingError(f"{path}: no such file; nothing to --resume")
        loaded: Any
        try:
            loaded = mx.load(str(path), return_metadata=True)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(f"{path}: cannot be read ({error})") from None
        arrays, metadata = loaded
        for name, value in self.plan.fingerprint.items():
            if metadata.get(name) != value:
                raise TrainingError(
                    f"{path}: {name} was {metadata.get(name)} and is {value} now; "
                    "give the same, or begin anew with --resume-adapter-file"
                )
        self.weights.restore(arrays)
        self.done = int(metadata["iteration"])
        if self.rank == 0:
            adapters.drop_partials(self.plan.folder)

    def run(self) -> Iterator[Event]:
        """Train to the last iteration; yields Trained, Validated and Saved events.

        Stopped, what was reached by then is saved.
        """
        log = Log(self.plan.folder / LOG, self.done, writes=self.rank == 0)
        settings, report = self.settings, Report(self)
        if self.done == 0 and self.plan.valid is not None:
            yield log.add(self.validate())
        saved = self.done
        while self.done < settings.iters and not self._all_stop():
            began = time.perf_counter()
            report.add(*self._update(), time.perf_counter() - began)
            last = self.done == settings.iters
            if last or self._passed(settings.steps_per_report):
                yield log.add(report.take())
            if self.plan.valid is not None and (
                last or self._passed(settings.steps_per_eval)
            ):
                yield log.add(self.validate())
            if last or self._passed(settings.save_every):
                yield self.save()
                saved = self.done
        if saved < self.done:
            yield self.save()

    def _all_stop(self) -> bool:
        """Whether any rank was told to stop: the others would wait for it for ever."""
        if self.ranks == 1:
            return self._stopped
        told = mx.distributed.all_sum(mx.array(int(self._stopped)), group=self.group)
        return told.item() != 0

    def _passed(self, every: int) -> bool:
        """Whether the update just taken went past a multiple of `every`."""
        before = self.done - self.settings.grad_accumulation_steps
        return self.done // every > before // every

    def _update(self) -> tuple[list[mx.array], mx.array, int]:
        """One update: summed losses of its micro-batches, gradient norm, tokens."""
        count = self.settings.grad_accumulation_steps
        number = self.done // count
        summed, sums, tokens = None, [mx.array(0.0), mx.array(0.0)], 0
        tree = self.weights.tree
        for _ in range(count):
            batch = self.batches.train(self.plan.train, self.done)
            found, gradients = self.gradients(tree, batch)
            summed = gradients if summed is None else _add(summed, gradients)
            sums = [sums[0] + found.denoising, sums[1] + found.encoding]
            mx.eval(summed, sums)
            tokens += batch.tokens.size
            self.done += 1
        gradients = tree_map(lambda g: g / count, summed)
        if self.ranks > 1:
            gradients = average_gradients(gradients, self.group)
        norm = self.weights.update(gradients, number)
        return sums, norm, tokens

    def validate(self) -> Validated:
        """Mean losses over the validation data, under the same noise every time."""
        assert self.plan.valid is not None
        most = self.settings.val_batches
        given = self.model, self.batches, self.plan.valid, "valid", most
        return Validated(self.done, *mean_losses(*given))

    def save(self) -> Saved:
        """Write the adapter and all that a resumed run needs, each whole or not."""
        folder = self.plan.folder
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            metadata = self.plan.fingerprint | {"iteration": str(self.done)}
            adapters.save_arrays(folder / STATE, self.weights.arrays(), metadata)
            config = adapters.config_of(self.plan.lora, self.plan.num_layers)
            weights: Any = dict(tree_flatten(self.weights.tree))
            adapters.save(folder, weights, self.plan.described | config)
            numbered = folder / f"{self.done:07}_{adapters.WEIGHTS}"
            adapters.save_arrays(numbered, weights)
        return Saved(self.done, folder / adapters.WEIGHTS)


class Report:
    """Means over the updates since the last report."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.tokens = trainer, 0
        self.restart()

    def restart(self) -> None:
        self.sums, self.norms = mx.zeros((2,)), list[float]()
        self.batches, self.new, self.seconds = 0, 0, 0.0

    def add(
        self, sums: list[mx.array], norm: mx.array, tokens: int, seconds: float
    ) -> None:
        self.sums = self.sums + mx.stack(sums)
        self.norms.append(float(norm.item()))  # type: ignore[arg-type]
        self.batches += self.trainer.settings.grad_accumulation_steps
        self.new += tokens
        self.seconds += seconds

    def take(self) -> Trained:
        """The means over all ranks; begins anew."""
        trainer = self.trainer
        every = mx.distributed.all_sum(
            mx.concatenate([self.sums / self.batches, mx.array([self.new])]),
            group=trainer.group,
        )
        means: list[float] = every.tolist()  # type: ignore[assignment]
        denoising, encoding, tokens = means
        self.tokens += int(tokens)
        update = trainer.done // trainer.settings.grad_accumulation_steps - 1
        event = Trained(
            iteration=trainer.done,
            denoising=denoising / trainer.ranks,
            encoding=encoding / trainer.ranks,
            norm=sum(self.norms) / len(self.norms),
            learning_rate=trainer.settings.rate(update),
            iterations_per_second=self.batches / self.seconds,
            tokens_per_second=tokens / self.seconds,
            trained_tokens=self.tokens,
            peak_memory=mx.get_peak_memory(),
        )
        self.restart()
        return event


def _add(a: Tree, b: Tree) -> Tree:
    return tree_map(lambda x, y: x + y, a, b)
