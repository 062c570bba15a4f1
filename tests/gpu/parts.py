"""What a part of a run on a GPU is: something to do in a process of its own."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

GB = 10**9


@dataclass(frozen=True)
class Setting:
    """Where a part runs.

    rehearsal   at toy sizes, on the CPU: shows that the code runs, measures nothing
    scratch     a folder for checkpoints; emptied when the part is done
    """

    rehearsal: bool
    scratch: Path

    @property
    def torch_device(self) -> str:
        """Where torch computes: beside MLX on a CUDA device, else on the CPU."""
        import torch

        return "cuda" if not self.rehearsal and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing a run does.

    name      section/what, unique
    says      what it does and what it is judged by, in words
    run       does it: Setting -> figures; where they hold `passed`, that is the verdict
    memory    bytes of device memory it needs, and disk of the scratch folder
    needs     packages beyond this one's
    seconds   after which it is given up
    backend   the only one it is for; None for all
    """

    name: str
    says: str
    run: Callable[[Setting], dict[str, Any]]
    memory: int = GB
    disk: int = 0
    needs: tuple[str, ...] = ()
    seconds: int = 120
    environment: dict[str, str] = field(default_factory=dict)
    backend: str | None = None

    @property
    def section(self) -> str:
        return self.name.partition("/")[0]


def seconds_of(call: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        mx.eval(call())
        mx.synchronize()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken[1:]))


def apart(found: mx.array, exact: np.ndarray) -> dict[str, float]:
    """How far off `found` is: its largest error, and ‖error‖ over ‖exact‖."""
    error = np.array(found.astype(mx.float32)).astype(np.float64) - exact
    size = float(np.linalg.norm(exact)) or 1.0
    largest = float(np.abs(error).max()) if error.size else 0.0
    return {"largest": largest, "relative": float(np.linalg.norm(error)) / size}
