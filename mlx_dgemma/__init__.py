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

if TYPE_CHECKING:
    from .adapters.fuse import fuse
    from .adapters.lora import LoRA
    from .checkpoint.convert import convert
    from .diffusion.conversation import Conversation
    from .diffusion.events import Commit, Event, Prefilled, Step
    from .diffusion.generation import generate, stream_generate
    from .errors import DGemmaError
    from .evaluation import evaluate
    from .loading import load
    from .settings import Settings
    from .training.finetune import train
    from .training.settings import TrainSettings

__version__ = "0.1.0"
_HOME = {
    "Commit": "diffusion.events",
    "Conversation": "diffusion.conversation",
    "DGemmaError": "errors",
    "Event": "diffusion.events",
    "LoRA": "adapters.lora",
    "Prefilled": "diffusion.events",
    "Settings": "settings",
    "Step": "diffusion.events",
    "TrainSettings": "training.settings",
    "convert": "checkpoint.convert",
    "evaluate": "evaluation",
    "fuse": "adapters.fuse",
    "generate": "diffusion.generation",
    "load": "loading",
    "stream_generate": "diffusion.generation",
    "train": "training.finetune",
}
__all__ = [
    "Commit",
    "Conversation",
    "DGemmaError",
    "Event",
    "LoRA",
    "Prefilled",
    "Settings",
    "Step",
    "TrainSettings",
    "convert",
    "evaluate",
    "fuse",
    "generate",
    "load",
    "stream_generate",
    "train",
]


class _Package(ModuleType):
    """Keeps `mlx_dgemma.convert` a function although a module has that name too.

    Importing a submodule sets it as an attribute of its package, which would hide
    the function of the same name from then on.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = vars(import_module(f".{_HOME[name]}", __name__))[name]
        super().__setattr__(name, value)
        return value

    def __dir__(self) -> list[str]:
        return [*__all__, "__version__"]


sys.modules[__name__].__class__ = _Package
