"""NVIDIA's GPUs, through MLX's CUDA backend. `tests/gpu/run.py` measures on one."""

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from .. import installation
from .base import Backend

PTX_CACHE = "MLX_PTX_CACHE_DIR"


@dataclass(eq=False)
class CUDA(Backend):
    """The first NVIDIA GPU that is visible."""

    name = "cuda"
    product_rows: int = 128  # MLX's tensor-core kernel takes multiples of 128 only

    def missing(self) -> str | None:
        if not mx.cuda.is_available():  # how MLX was built, not what is here
            return installation.several_libraries() or installation.NO_CUDA
        if mx.device_count(self.kind) == 0:
            return installation.NO_GPU
        major = self.info_number("compute_capability_major")
        minor = self.info_number("compute_capability_minor")
        if major is not None and minor is not None and (major, minor) < (7, 5):
            found = f"{self.description()} has compute capability {major}.{minor}"
            return f"{found}, MLX needs 7.5 or newer"
        if not installation.has_headers(Path(mx.__file__).parents[1]):
            return installation.NO_HEADERS
        return None

    def prepare(self) -> None:
        """Keep kernels made at run time, minutes of work, for the next process."""
        super().prepare()
        if PTX_CACHE in os.environ:
            return
        # a folder for each of what kernels depend on, which their file names leave out
        architecture = str(self.info().get("architecture"))
        kernels = "-".join([version("mlx"), *installation.installed(), architecture])
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = cache / "mlx-dgemma" / "ptx" / kernels
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[PTX_CACHE] = str(folder)
        except (OSError, RuntimeError):  # no place to write to, or no home
            pass

    def memory(self) -> int | None:
        return self.info_number("total_memory")
