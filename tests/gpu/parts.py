"""What a part of a GPU run is, and when it cannot run on a machine."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dgemma import backends

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9


def free_memory() -> int | None:
    """Return the device memory in bytes that a part may use, if the device says so."""
    device = backends.current()
    return device.info_number("free_memory") or device.memory()


class Setting(NamedTuple):
    """Where a part runs."""

    rehearsal: bool  # toy sizes on the CPU: shows that the code runs
    scratch: Path  # a folder for checkpoints, removed when the part is done


@dataclass(frozen=True)
class Part:
    """One thing that a run does, in a process of its own."""

    name: str  # section/what, unique
    run: Callable[[Setting], dict[str, Any]]  # returns figures, `passed` the verdict
    memory: int = GB  # of the device, in bytes
    disk: int = 0  # of the scratch folder, in bytes
    needs: tuple[str, ...] = ()  # packages beyond those of this project
    seconds: int = 120  # time limit

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
