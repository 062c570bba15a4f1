"""A part of a GPU run, where it runs, and when it cannot."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9


@dataclass(frozen=True)
class Setting:
    """Where a part runs.

    rehearsal   toy sizes on the CPU: shows that the code runs, measures nothing
    scratch     a folder for checkpoints, removed when the part is done
    """

    rehearsal: bool
    scratch: Path

    @property
    def torch_device(self) -> str:
        """torch computes on the CUDA device beside MLX, else on the CPU."""
        import torch

        return "cuda" if not self.rehearsal and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing that a run does, in a process of its own.

    name      section/what, unique
    says      what it does and how it is judged
    run       Setting -> figures; `passed` among them is the verdict
    memory    bytes of device memory it needs; `disk` bytes of the scratch folder
    needs     packages beyond those of this project
    seconds   time limit
    """

    name: str
    says: str
    run: Callable[[Setting], dict[str, Any]]
    memory: int = GB
    disk: int = 0
    needs: tuple[str, ...] = ()
    seconds: int = 120
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def section(self) -> str:
        return self.name.partition("/")[0]

    def obstacle(self, scratch: Path, free: int | None) -> str | None:
        """Return why the part cannot run here, or None.

        `free` is the device memory in bytes, None where the device does not report it.
        """
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if free is not None and self.memory > free:
            return f"needs {self.memory / GB:.0f} GB of memory, {free / GB:.0f} free"
        disk = shutil.disk_usage(scratch).free
        if self.disk + GB > disk:
            return f"needs {self.disk / GB:.0f} GB of disk, {disk / GB:.0f} free"
        return None
