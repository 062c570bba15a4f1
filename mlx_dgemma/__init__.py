"""DiffusionGemma in MLX: load, convert, generate by denoising, fine-tune.

    from mlx_dgemma import load, generate
    model, tokenizer = load("sudoku4")
    print(generate(model, tokenizer, "1204\\n…"))

Nothing heavy is imported before it is used.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
# the stub lists the names for type checkers: imports of one name each
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {
    node.names[0].name: node.module
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
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
