"""DiffusionGemma in MLX: load, convert, generate by denoising, fine-tune.

    from mlx_dgemma import load, generate
    model, tokenizer = load("sudoku4")
    print(generate(model, tokenizer, "1204\\n…"))

Nothing heavy is imported before it is used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of _HOMES once more, for type checkers
    from .adapters.fuse import fuse as fuse
    from .adapters.lora import LoRA as LoRA
    from .checkpoint.convert import Converted as Converted
    from .checkpoint.convert import convert as convert
    from .diffusion.conversation import Conversation as Conversation
    from .diffusion.engine import Engine as Engine
    from .diffusion.events import Commit as Commit
    from .diffusion.events import Event as Event
    from .diffusion.events import Prefilled as Prefilled
    from .diffusion.events import Step as Step
    from .diffusion.generation import GenerateOptions as GenerateOptions
    from .diffusion.generation import generate as generate
    from .diffusion.generation import stream_generate as stream_generate
    from .diffusion.prefix import Prefix as Prefix
    from .diffusion.prompt import ImageSource as ImageSource
    from .errors import DGemmaError as DGemmaError
    from .evaluation import Result as Result
    from .evaluation import Row as Row
    from .evaluation import evaluate as evaluate
    from .loading import load as load
    from .model.cache import PrefixCache as PrefixCache
    from .model.language import DiffusionGemma as DiffusionGemma
    from .settings import Settings as Settings
    from .settings import SettingsOverrides as SettingsOverrides
    from .text.chat import Prompt as Prompt
    from .text.replies import Answer as Answer
    from .text.replies import Call as Call
    from .text.replies import Malformed as Malformed
    from .text.replies import Part as Part
    from .text.replies import Thought as Thought
    from .text.tokenizer import Tokenizer as Tokenizer
    from .training.finetune import train as train
    from .training.record import Validated as Validated
    from .training.settings import TrainSettings as TrainSettings

__version__ = "0.1.0"
_HOMES = {
    name: module
    for module, names in {
        "adapters.fuse": "fuse",
        "adapters.lora": "LoRA",
        "checkpoint.convert": "Converted convert",
        "diffusion.conversation": "Conversation",
        "diffusion.engine": "Engine",
        "diffusion.events": "Commit Event Prefilled Step",
        "diffusion.generation": "GenerateOptions generate stream_generate",
        "diffusion.prefix": "Prefix",
        "diffusion.prompt": "ImageSource",
        "errors": "DGemmaError",
        "evaluation": "Result Row evaluate",
        "loading": "load",
        "model.cache": "PrefixCache",
        "model.language": "DiffusionGemma",
        "settings": "Settings SettingsOverrides",
        "text.chat": "Prompt",
        "text.replies": "Answer Call Malformed Part Thought",
        "text.tokenizer": "Tokenizer",
        "training.finetune": "train",
        "training.record": "Validated",
        "training.settings": "TrainSettings",
    }.items()
    for name in names.split()
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(ModuleType):
    """Keeps `mlx_dgemma.convert` a function although a module has that name too.

    Importing a submodule sets it as an attribute of its package.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = import_module(f".{_HOMES[name]}", __name__).__dict__[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


sys.modules[__name__].__class__ = _Package
