"""What is wrong with how MLX is installed, in one line with the fix. Imports no MLX.

On Linux one of several packages gives MLX its library: all write the same file, and
each needs other things of the system.
"""

import os
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = {"mlx-cpu": "cpu", "mlx-cuda-12": "cuda12", "mlx-cuda-13": "cuda13"}
GLIBC = re.compile(r"version `GLIBC_([\d.]+)' not found")
NO_DEVICE = re.compile(r"cuda\w+\(.*\) failed: (.+)")
NO_FILE = re.compile(r"(lib[\w+.-]+\.so[\d.]*): cannot open shared object file")
DRIVERS = "mlx-dgemma[cuda13] needs driver 580 or newer, [cuda12] 550.54.14"
NO_GPU = (
    f"no NVIDIA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES; {DRIVERS}"
)
NO_CUDA = (
    "this MLX was installed without CUDA; on Linux: pip uninstall -y mlx mlx-cpu, then "
    f"pip install 'mlx-dgemma[cuda13]' or '[cuda12]'; {DRIVERS}"
)
HEADERS = ("nvidia/cu13/include", "nvidia/cuda_runtime/include")  # in site-packages
NO_HEADERS = (
    "CUDA's headers are missing, which MLX makes kernels with: pip install "
    "nvidia-cuda-runtime (for cuda12: nvidia-cuda-runtime-cu12), or set CUDA_HOME to a "
    "CUDA toolkit"
)


def explain(error: ImportError) -> str | None:
    """Return why MLX's library did not load; None if the error is about another."""
    text = str(error)
    if needed := GLIBC.search(text):
        return (
            f"MLX needs glibc {needed[1]} or newer; use a newer system or container "
            "(Ubuntu 22.04 and Debian 12 have 2.35)"
        )
    failed, file = NO_DEVICE.search(text), NO_FILE.search(text)
    if not (failed or file):
        return None
    if (several := several_libraries()) is not None:
        return f"MLX did not load: {several}"
    if failed:
        if "insufficient" in failed[1]:
            fix = f"update the driver or install mlx-dgemma[cpu]; {DRIVERS}"
        else:
            fix = f"{NO_GPU}; without an NVIDIA GPU install mlx-dgemma[cpu]"
        return f"{failed[1]}: {fix}"
    assert file is not None
    if file[1].startswith("libmlx."):
        return "MLX has no backend here; install mlx-dgemma[cpu], [cuda13] or [cuda12]"
    if file[1].startswith("libcuda."):
        fix = f"install one, or mlx-dgemma[cpu] instead; {DRIVERS}"
        return f"no NVIDIA driver here ({file[1]} is missing): {fix}"
    extra = next((LIBRARIES[name] for name in installed()), "cpu")
    fix = f"pip install --force-reinstall 'mlx-dgemma[{extra}]'"
    return f"{file[1]} is missing, which MLX needs: {fix}"


def installed() -> list[str]:
    """Return which of LIBRARIES are installed."""
    found = []
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            version(name)
            found.append(name)
    return found


def several_libraries() -> str | None:
    """Return why several libraries of MLX do not go together; None for one."""
    names = installed()
    if len(names) < 2:
        return None
    return (
        f"{' and '.join(names)} are installed together and overwrite each other's "
        f"libmlx.so: pip uninstall -y mlx {' '.join(names)}, then install mlx-dgemma "
        "with one extra only"
    )


def has_headers(site_packages: Path) -> bool:
    """Return whether MLX finds CUDA's headers, as it looks for them."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [site_packages / folder for folder in HEADERS]
    folders.append(Path(home or "/usr/local/cuda") / "include")
    return any(folder.is_dir() for folder in folders)
