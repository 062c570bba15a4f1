"""What lies under MLX on this machine, and what is wrong with it. Imports no MLX.

On Linux one of several packages gives MLX its library: `mlx-cpu`, `mlx-cuda-12`,
`mlx-cuda-13`. All write the same file, and each asks for its own of the system
(https://ml-explore.github.io/mlx/build/html/install.html).
"""

import ctypes
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GLIBC = "2.35"
LIBRARIES = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
REINSTALL = "pip uninstall -y mlx {}, then install mlx-dgemma with one extra only"
NEEDS_GLIBC = re.compile(r"version `GLIBC_([\d.]+)' not found")
NO_DEVICE = re.compile(r"cuda\w+\(.*\) failed: (.+)")
NEEDS_FILE = re.compile(r"(lib[\w+.-]+\.so[\d.]*): cannot open shared object file")


@dataclass(frozen=True)
class Toolkit:
    """A release of CUDA that MLX comes for.

    driver    the first NVIDIA driver that runs it
    accepts   CUDA version the driver must report, as cuDriverGetVersion counts
    headers   its headers inside site-packages, which kernels made at run time need
    runtime   the package that brings those
    """

    extra: str
    driver: str
    accepts: int
    headers: str
    runtime: str


TOOLKITS = {
    "mlx-cuda-12": Toolkit(
        "cuda12",
        "550.54.14",
        12000,
        "nvidia/cuda_runtime/include",
        "nvidia-cuda-runtime-cu12",
    ),
    "mlx-cuda-13": Toolkit(
        "cuda13", "580", 13000, "nvidia/cu13/include", "nvidia-cuda-runtime"
    ),
}


def installed() -> tuple[str, ...]:
    """Which of LIBRARIES are installed; several overwrite one another."""
    return tuple(name for name in LIBRARIES if _is_installed(name))


def clash(names: tuple[str, ...]) -> str | None:
    """What is wrong with several libraries of MLX, and the mend; None if nothing."""
    if len(names) < 2:
        return None
    return (
        f"{' and '.join(names)} are installed together and overwrite each other's "
        f"libmlx.so: {REINSTALL.format(' '.join(names))}"
    )


def toolkit() -> Toolkit:
    """Of the CUDA library that is installed; the newest where none or several."""
    cuda = [name for name in installed() if name in TOOLKITS]
    return TOOLKITS[cuda[0] if len(cuda) == 1 else "mlx-cuda-13"]


def cuda_missing() -> str:
    """Why this MLX computes on no NVIDIA GPU, and what to install."""
    if (several := clash(installed())) is not None:
        return several
    if sys.platform == "darwin":
        return "MLX knows NVIDIA's GPUs on Linux only; a Mac computes on metal or cpu"
    return (
        "this MLX was installed without CUDA: pip uninstall -y mlx mlx-cpu, then pip "
        "install 'mlx-dgemma[cuda13]' (driver 580 or newer) or [cuda12] (550.54.14)"
    )


def invisible_gpu(environment: Mapping[str, str] = os.environ) -> str:
    """Why MLX's CUDA library sees no GPU, and the mend."""
    kit, accepted = toolkit(), driver_accepts()
    if accepted is not None and accepted < kit.accepts:
        older = TOOLKITS["mlx-cuda-12"]
        way = f"update it to {kit.driver} or newer"
        if kit is not older and accepted >= older.accepts:
            way += f", or install mlx-dgemma[{older.extra}] in place of [{kit.extra}]"
        return (
            f"the NVIDIA driver knows CUDA up to {_dotted(accepted)}, this MLX needs "
            f"{_dotted(kit.accepts)}: {way}"
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"no NVIDIA GPU is visible: CUDA_VISIBLE_DEVICES is {visible!r}"
    return "no NVIDIA GPU is visible; does nvidia-smi list one?"


def driver_accepts(library: str = "libcuda.so.1") -> int | None:
    """The newest CUDA that the NVIDIA driver runs, 13000 for 13.0; None without one."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None
    found = ctypes.c_int()
    failed = driver.cuDriverGetVersion(ctypes.byref(found))
    return None if failed else found.value


def headers_missing(
    site_packages: Path, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Why MLX could make no kernels at run time, and the mend; None if it can.

    It looks for CUDA's headers beside itself, then where CUDA_HOME or CUDA_PATH says,
    then in /usr/local/cuda.
    """
    kit = toolkit()
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    places = [site_packages / kit.headers, Path(home or "/usr/local/cuda") / "include"]
    if any(place.is_dir() for place in places):
        return None
    return (
        f"CUDA's headers are missing, which MLX makes kernels with: pip install "
        f"{kit.runtime}, or set CUDA_HOME to a CUDA toolkit"
    )


def explain(error: ImportError) -> str | None:
    """Why MLX's library did not load, and the mend; None if it is not about that."""
    text = str(error)
    if needed := NEEDS_GLIBC.search(text):
        known = ", which Ubuntu 22.04 and Debian 12 have" if needed[1] == GLIBC else ""
        return (
            f"MLX needs glibc {needed[1]} or newer{known}: use a newer system or "
            "container"
        )
    kit, failed, found = toolkit(), NO_DEVICE.search(text), NEEDS_FILE.search(text)
    several = clash(installed())
    if several is not None and (about := failed or found):
        return f"MLX did not load ({about[0]}): {several}"
    if failed is not None:
        return (
            f"MLX for CUDA did not start ({failed[1]}): {invisible_gpu()}; without an "
            f"NVIDIA GPU install mlx-dgemma[cpu] in place of [{kit.extra}]"
        )
    if "libmlx." in text:
        return "MLX has no backend here; install mlx-dgemma[cpu], [cuda13] or [cuda12]"
    if found is None:
        return None
    file = found[1]
    if file.startswith("libcuda."):
        return (
            f"no NVIDIA driver here ({file} is missing), which MLX for CUDA needs: "
            f"install driver {kit.driver} or newer, or mlx-dgemma[cpu] in place of "
            f"[{kit.extra}]"
        )
    return (
        f"{file} is missing, which MLX needs: pip install --force-reinstall "
        f"'mlx-dgemma[{kit.extra if 'mlx-cpu' not in installed() else 'cpu'}]'"
    )


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _dotted(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
