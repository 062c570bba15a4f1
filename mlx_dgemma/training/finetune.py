"""A fine-tuning from names: a model, a folder of data, a folder for the adapter."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..adapters.folder import CONFIG, WEIGHTS
from ..adapters.lora import LoRA
from ..checkpoint import hub
from ..checkpoint.config import ModelConfig
from ..checkpoint.generation_config import read_generation_config
from ..errors import DataError, TrainingError
from ..files.opening import user_path
from ..loading import load, load_as_stored
from ..text.tokenizer import Tokenizer
from . import fit
from .batches import Batches
from .data import FILES, Dataset, ExampleReader
from .memory import Job, read_shape
from .objective import mean_losses
from .record import Event, Validated, read
from .settings import Run, TrainSettings
from .trainer import LOG, PICTURE, STATE, Trainer

USUAL_LORA, USUAL_SETTINGS = LoRA(), TrainSettings()


def train(
    model: str | Path,
    data: str | Path,
    adapter_path: str | Path = "adapters",
    *,
    lora: LoRA | None = USUAL_LORA,
    num_layers: int = -1,
    train_router: bool = False,
    settings: TrainSettings = USUAL_SETTINGS,
    resume: bool = False,
    resume_adapter_file: str | Path | None = None,
    skip_bad: bool = False,
    revision: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Validated | None:
    """Fine-tune a model on the JSONL files of a folder; return the last validation.

    model                     folder, hub id or built-in name
    data                      folder with train.jsonl and, if wanted, valid.jsonl
    adapter_path              folder that receives the adapter, the state and the log
    lora                      None to train the weights themselves
    num_layers, train_router  of that; a LoRA says its layers itself
    resume                    continue the run that was stopped in adapter_path
    resume_adapter_file       begin anew from these trained weights
    skip_bad                  leave out rows that cannot be used
    revision                  branch, tag or commit of a hub id
    on_event                  called with every Trained, Validated and Saved event

    `load(model, adapter_path)` then has the result. Raises DGemmaError, one line,
    before the first step; what was saved by then stays whatever comes after.
    """
    run = Run(
        model=model,
        data=data,
        adapter_path=adapter_path,
        lora=lora,
        num_layers=num_layers,
        train_router=train_router,
        settings=settings,
        resume=resume,
        resume_adapter_file=resume_adapter_file,
        skip_bad=skip_bad,
        revision=revision,
    )
    trainer, last = prepare(run), None
    for event in trainer.events():
        if isinstance(event, Validated):
            last = event
        if on_event is not None:
            on_event(event)
    if trainer.rank == 0:
        trainer.draw()
    return last


def prepare(run: Run) -> Trainer:
    """Check everything, load the model, and return a trainer before its next update.

    Raises DGemmaError, one line.
    """
    if run.resume and run.resume_adapter_file is not None:
        raise TrainingError("--resume and --resume-adapter-file exclude one another")
    if not run.resume:
        _check_unused(run.folder)
    settings, source = run.settings, hub.resolve(run.model, run.revision)
    config, storage = read_shape(source, None)
    ends = read_generation_config(config, source).eos
    reader = _reader(Tokenizer.from_dir(source), config, ends, settings)
    valid = None
    if settings.val_batches and (user_path(run.data) / FILES["valid"]).exists():
        valid = _read(reader, run, "valid")
    train, ranks = _read(reader, run, "train"), mx.distributed.init().size()
    job = Job(config, storage, settings, run.lora, run.num_layers)
    fit.check(replace(job, longest=train.longest, ranks=ranks))
    model, _ = load_as_stored(run.model, revision=run.revision)
    trainer = Trainer(run, model, train, valid)
    if run.resume:
        trainer.resume()
    elif run.resume_adapter_file is not None:
        trainer.start_from(user_path(run.resume_adapter_file))
    return trainer


def _check_unused(folder: Path) -> None:
    """Refuse a folder with a file that the run would replace, or mix with its own.

    The log of a run that was killed before its first save may go.
    """
    if (folder / STATE).exists():
        raise TrainingError(
            f"{folder}: holds a run already; add --resume, or choose another "
            "--adapter-path"
        )
    found = [name for name in (WEIGHTS, CONFIG, PICTURE) if (folder / name).exists()]
    found += sorted(path.name for path in folder.glob(f"*_{WEIGHTS}"))
    if found:
        why = "is there already; choose another --adapter-path"
        raise TrainingError(f"{folder / found[0]}: {why}")
    read(folder / LOG)  # raises TrainingError for one of anything else


def measure(run: Run, batches: int = 500) -> tuple[float, float]:
    """Return mean denoising and encoder loss over test.jsonl.

    run.adapter_path   "" for the base without an adapter
    batches            how many to measure, -1 for all
    """
    model, tokenizer = load(run.model, run.adapter_path or None, revision=run.revision)
    reader = _reader(tokenizer, model.config, model.settings.eos, run.settings)
    data = _read(reader, run, "test")
    order = Batches(model.config, run.settings, mx.distributed.init())
    return mean_losses(model, order, data, "test", batches)


def _reader(
    tokenizer: Tokenizer,
    config: ModelConfig,
    ends: frozenset[int],
    settings: TrainSettings,
) -> ExampleReader:
    return ExampleReader(
        tokenizer,
        config.canvas_length,
        ends,
        settings.max_seq_length,
        config.vocab_size,
        settings.allow_special,
    )


def _read(reader: ExampleReader, run: Run, part: str) -> Dataset:
    folder = user_path(run.data)
    if folder.is_file():
        raise DataError(
            f"{folder}: is a file; give the folder that holds {FILES[part]}"
        )
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold {FILES[part]}")
    return reader.read(folder / FILES[part], skip_bad=run.skip_bad)
