"""A fine-tuning from names: a model, a folder of data, a folder for the adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapters.lora import LoRA
from ..checkpoint import hub
from ..checkpoint.generation_config import read_generation_config
from ..errors import DataError, TrainingError
from ..loading import load, load_as_stored
from ..text.tokenizer import Tokenizer
from . import memory
from .batches import Batches
from .data import FILES, Dataset, ExampleReader
from .objective import mean_losses
from .record import Event, Validated
from .settings import TrainSettings
from .trainer import STATE, Trainer

DEFAULTS = TrainSettings()
USUAL_LORA = LoRA()


def train(
    model: str | Path,
    data: str | Path,
    adapter_path: str | Path = "adapters",
    *,
    on_event: Callable[[Event], None] | None = None,
    **options: Any,
) -> Validated | None:
    """Fine-tune a model on the JSONL files of a folder; return the last validation.

    model           folder, hub id or built-in name
    data            folder with train.jsonl and, if wanted, valid.jsonl
    adapter_path    folder that receives the adapter, the state and the log
    on_event        called with every Trained, Validated and Saved event
    options         those of `prepare`: lora, settings, resume, …

    `load(model, adapter_path)` then has the result. Raises DGemmaError, one line,
    before the first step; what was saved by then stays whatever comes after.
    """
    trainer, last = prepare(model, data, adapter_path, **options), None
    for event in trainer.run():
        if isinstance(event, Validated):
            last = event
        if on_event is not None:
            on_event(event)
    if trainer.rank == 0:
        trainer.draw()
    return last


def prepare(
    model: str | Path,
    data: str | Path,
    adapter_path: str | Path = "adapters",
    *,
    lora: LoRA | None = USUAL_LORA,
    num_layers: int = -1,
    train_router: bool = False,
    settings: TrainSettings = DEFAULTS,
    resume: bool = False,
    resume_adapter_file: str | Path | None = None,
    skip_bad: bool = False,
    revision: str | None = None,
) -> Trainer:
    """Check everything, load the model, and return a trainer before its next update.

    lora                      None to train the weights themselves
    num_layers, train_router  of that; a LoRA says its layers itself
    resume                    continue the run that was stopped in adapter_path
    resume_adapter_file       begin anew from these trained weights
    skip_bad                  leave out rows that cannot be used

    Raises DGemmaError, one line.
    """
    folder = Path(adapter_path).expanduser()
    if resume and resume_adapter_file is not None:
        raise TrainingError("--resume and --resume-adapter-file exclude one another")
    if not resume and (folder / STATE).exists():
        raise TrainingError(
            f"{folder}: holds a run already; add --resume, or choose another "
            "--adapter-path"
        )
    group, source = mx.distributed.init(), hub.resolve(model, revision)
    config, storage = memory.read_shape(source, None)
    ends, longest = read_generation_config(config, source).eos, settings.max_seq_length
    tokenizer = Tokenizer.from_dir(source)
    reader = ExampleReader(tokenizer, config.canvas_length, ends, longest)
    valid = None
    if settings.val_batches and (Path(data).expanduser() / FILES["valid"]).exists():
        valid = _read(reader, data, "valid", skip_bad)
    examples = _read(reader, data, "train", skip_bad)
    size, longest = group.size(), examples.longest
    memory.check(memory.Job(config, storage, settings, lora, num_layers, longest, size))
    trainer = Trainer(
        model=load_as_stored(model, revision=revision)[0],
        settings=settings,
        train=examples,
        valid=valid,
        folder=folder,
        lora=lora,
        num_layers=num_layers,
        train_router=train_router,
        source={"model": str(model), "data": str(data)},
        group=group,
    )
    if resume:
        trainer.resume()
    elif resume_adapter_file is not None:
        trainer.start_from(Path(resume_adapter_file).expanduser())
    return trainer


def measure(
    model: str | Path,
    data: str | Path,
    adapter_path: str | Path = "adapters",
    *,
    batches: int = 500,
    settings: TrainSettings = DEFAULTS,
    skip_bad: bool = False,
    revision: str | None = None,
) -> tuple[float, float]:
    """Return mean denoising and encoder loss over test.jsonl.

    adapter_path   "" for the base without an adapter
    batches        how many to measure, -1 for all
    """
    tuned, tokenizer = load(model, adapter_path or None, revision=revision)
    ends, longest = tuned.settings.eos, settings.max_seq_length
    reader = ExampleReader(tokenizer, tuned.config.canvas_length, ends, longest)
    examples = _read(reader, data, "test", skip_bad)
    order = Batches(tuned.config, settings, mx.distributed.init())
    return mean_losses(tuned, order, examples, "test", batches)


def _read(
    reader: ExampleReader, data: str | Path, part: str, skip_bad: bool
) -> Dataset:
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold {FILES[part]}")
    return reader.read(folder / FILES[part], skip_bad=skip_bad)
