"""A fine-tuning from names: a model, a folder of data, a folder for the adapter."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapters import folder as adapters
from ..adapters.lora import LoRA
from ..checkpoint import hub
from ..checkpoint.config import ModelConfig, read_config
from ..checkpoint.generation_config import read_generation_config
from ..errors import AdapterError, DataError, TrainingError
from ..loading import load, load_as_stored
from ..text.tokenizer import Tokenizer
from . import memory
from .batches import Batches, mean_losses
from .data import FILES, Dataset, ExampleReader
from .record import Validated, draw
from .settings import TrainSettings
from .trainer import LOG, STATE, Event, Trainer, TrainPlan

PICTURE = "loss.png"


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to fine-tune, and on what.

    model                   folder, hub id or built-in name
    data                    folder with train.jsonl and, if wanted, valid.jsonl
    adapter_path            folder that receives the adapter, the state and the log
    lora                    None for the weights themselves (full)
    num_layers, train_router   of a full fine-tuning; LoRA says its layers itself
    resume                  go on where the run in adapter_path was stopped
    resume_adapter_file     begin anew from these trained weights
    skip_bad                leave out rows that cannot be used
    """

    model: str | Path
    data: str | Path
    adapter_path: str | Path = "adapters"
    lora: LoRA | None = field(default_factory=LoRA)
    num_layers: int = -1
    train_router: bool = False
    settings: TrainSettings = field(default_factory=TrainSettings)
    resume: bool = False
    resume_adapter_file: str | Path | None = None
    skip_bad: bool = False
    revision: str | None = None


def train(
    model: str | Path,
    data: str | Path,
    adapter_path: str | Path = "adapters",
    *,
    on_event: Callable[[Event], None] | None = None,
    **options: Any,
) -> Validated | None:
    """Fine-tune a model on the JSONL files of a folder; returns the last validation.

    options     of `TrainRequest`: lora, settings, resume, …
    on_event    called with every Trained, Validated and Saved event

    `load(model, adapter_path)` then has the result. Raises DGemmaError, one line,
    before the first step; what was saved by then stays whatever comes after.
    """
    request = TrainRequest(model=model, data=data, adapter_path=adapter_path, **options)
    trainer, last = prepare(request), None
    for event in trainer.run():
        if isinstance(event, Validated):
            last = event
        if on_event is not None:
            on_event(event)
    finish(trainer)
    return last


def prepare(request: TrainRequest) -> Trainer:
    """Check everything, load the model, and stand before the next update."""
    folder = Path(request.adapter_path).expanduser()
    settings = request.settings
    if request.resume and request.resume_adapter_file is not None:
        raise TrainingError("--resume and --resume-adapter-file exclude one another")
    if not request.resume and (folder / STATE).exists():
        raise TrainingError(
            f"{folder}: holds a run already; add --resume, or choose another "
            "--adapter-path"
        )
    group = mx.distributed.init()
    source = hub.resolve(request.model, request.revision)
    train_set, valid = _data(source, request)
    memory.check(
        source,
        request.lora,
        settings,
        request.num_layers,
        ranks=group.size(),
        longest=train_set.longest,
    )
    model, _ = load_as_stored(request.model, revision=request.revision)
    plan = TrainPlan(
        settings=settings,
        train=train_set,
        valid=valid if settings.val_batches else None,
        folder=folder,
        lora=request.lora,
        num_layers=request.num_layers,
        router=request.train_router,
        described={
            "model": str(request.model),
            "data": str(request.data),
            **asdict(settings),
        },
        model_digest=digest(model.config),
    )
    trainer = Trainer(model, plan, group=group)
    if request.resume:
        trainer.resume()
    elif request.resume_adapter_file is not None:
        _begin_from(trainer, Path(request.resume_adapter_file).expanduser())
    return trainer


def _data(source: Path, request: TrainRequest) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what is validated on if there is any."""
    config = read_config(source)
    ends = read_generation_config(config, source).eos
    given = config, ends, Tokenizer.from_dir(source), request
    folder, valid = Path(request.data).expanduser(), None
    if (folder / FILES["valid"]).exists():
        valid = read(request.data, "valid", *given)
    return read(request.data, "train", *given), valid


def measure(request: TrainRequest, batches: int) -> tuple[float, float]:
    """Mean denoising and encoder loss over test.jsonl, the first `batches` or all (-1).

    Of the model with the adapter in adapter_path; of the base where that is "".
    """
    adapter = request.adapter_path or None
    model, tokenizer = load(request.model, adapter, revision=request.revision)
    data = read(
        request.data, "test", model.config, model.settings.eos, tokenizer, request
    )
    group = mx.distributed.init()
    shared = Batches(model.config, request.settings, group)
    return mean_losses(model, shared, data, "test", batches)


def finish(trainer: Trainer) -> Path | None:
    """Draw the losses; None where matplotlib is missing or another rank does it."""
    folder = trainer.plan.folder
    if trainer.rank or not draw(folder / LOG, folder / PICTURE):
        return None
    return folder / PICTURE


def digest(config: ModelConfig) -> str:
    """Tells one base from another: a hash of its config.json."""
    text = json.dumps(config.raw, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(
    data: str | Path,
    part: str,
    config: ModelConfig,
    ends: frozenset[int],
    tokenizer: Tokenizer,
    request: TrainRequest,
) -> Dataset:
    """The examples of train.jsonl, valid.jsonl or test.jsonl. Raises DataError."""
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold {FILES[part]}")
    longest = request.settings.max_seq_length
    reader = ExampleReader(tokenizer, config.canvas_length, ends, longest)
    return reader.read(folder / FILES[part], skip_bad=request.skip_bad)


def _begin_from(trainer: Trainer, path: Path) -> None:
    """Start from trained weights, with an optimizer that has seen nothing."""
    adapters.check_weights(trainer.model, trainer.plan.lora, path)
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    trained = adapters.trained(trainer.model)
    if strange := sorted(set(arrays) - set(trained)):
        raise AdapterError(f"{path}: {strange[0]} is not trained here")
    trainer.weights.begin(arrays)
