"""NVIDIA's GPUs, through MLX's CUDA backend.

The choices follow from MLX's source (0.32): its quantised tensor-core kernel takes 16
bits, 4 or 8 of them per weight, and outputs in multiples of 128; sorted rows of experts
run grouped from 4 rows per expert on; attention of heads wider than 128 is unfused.
Not measured on a GPU yet: `tests/gpu/run.py` does that.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from .. import installation
from . import gpu
from .interface import Backend, Choices, Limits, keep_float32, whole

CAPABILITY = (7, 5)  # Turing, the oldest that MLX is compiled for
PTX_CACHE = "MLX_PTX_CACHE_DIR"
CHOICES = replace(gpu.CHOICES, product_rows=128)
WHY = gpu.WHY | {
    "product_rows": "its fast quantised kernel takes multiples of 128 only",
    "fused_attention": "it has no fused kernel for heads wider than 128",
    "experts": "one row per pair, sorted, runs grouped on tensor cores",
}


class CUDA(Backend):
    """An NVIDIA GPU, the first that is visible."""

    name = "cuda"
    kind = mx.DeviceType.gpu
    why = WHY

    def __init__(self, choices: Choices = CHOICES):
        super().__init__(choices)

    def missing(self) -> str | None:
        if not mx.cuda.is_available():  # says how MLX was built, not what is here
            return installation.cuda_missing()
        if mx.device_count(self.kind) == 0:
            return installation.invisible_gpu()
        capability = _capability(self.info())
        if capability is not None and capability < CAPABILITY:
            return (
                f"{self.description()} has compute capability "
                f"{'.'.join(map(str, capability))}, MLX needs 7.5 or newer"
            )
        return installation.headers_missing(Path(mx.__file__).parents[1])

    def prepare(self) -> None:
        """Keep the kernels that MLX makes at run time, minutes of work in all, where
        the next process finds them: MLX's own place is emptied with /tmp."""
        keep_float32()
        if PTX_CACHE not in os.environ and (kernels := self._kernels()) is not None:
            os.environ[PTX_CACHE] = str(kernels)

    def limits(self) -> Limits:
        info = self.info()
        return Limits(whole(info, "total_memory"), whole(info, "free_memory"))

    def _kernels(self) -> Path | None:
        """A folder of their own for what kernels depend on but are not named after.

        None where there is no home to write to; MLX would keep nothing at all there.
        """
        toolkit, architecture = installation.toolkit(), self.info().get("architecture")
        made_for = f"mlx-{version('mlx')}-{toolkit.extra}-{architecture}"
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = cache / "mlx-dgemma" / "ptx" / made_for
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # RuntimeError: nobody knows where home is
            return None
        return folder


def _capability(info: Mapping[str, str | int]) -> tuple[int, int] | None:
    major = whole(info, "compute_capability_major")
    minor = whole(info, "compute_capability_minor")
    return None if major is None or minor is None else (major, minor)
