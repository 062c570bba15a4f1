"""Which device runs the model, and what follows from it. Nobody else asks.

Chosen once, when first needed: the device MLX computes on by default, or the one that
$MLX_DGEMMA_BACKEND or `choose` names.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from .. import installation
from ..errors import BackendError
from .cpu import CPU
from .cuda import CUDA
from .interface import Backend, Choices, ExpertPath, Limits
from .metal import Metal

__all__ = [
    "BACKENDS",
    "CPU",
    "CUDA",
    "Backend",
    "Choices",
    "ExpertPath",
    "Limits",
    "Metal",
    "choose",
    "chosen",
    "current",
    "peak_memory",
    "using",
]
ENVIRONMENT = "MLX_DGEMMA_BACKEND"
BACKENDS: dict[str, Backend] = {b.name: b for b in (CPU(), Metal(), CUDA())}


@dataclass(frozen=True)
class Chosen:
    """The backend in use, and why it is."""

    backend: Backend
    reason: str
    asked: bool = True  # or MLX's own default


_chosen: Chosen | None = None


def current() -> Backend:
    """The backend in use."""
    return chosen().backend


def chosen() -> Chosen:
    """The backend in use and why; chosen now if that did not happen before."""
    return _chosen or choose()


def choose(name: str | None = None, by: str = "the caller") -> Chosen:
    """Compute on the device of that name, "cpu", "metal" or "cuda", from now on.

    None: what $MLX_DGEMMA_BACKEND says, or else MLX's default device. `by` is who asks,
    for refusals and reasons. Arrays and models made before stay where they are: choose
    before loading. Raises BackendError, in one line with the mend, when the name is
    unknown or the device cannot be used here.
    """
    global _chosen
    found = _asked_for(name, by) if name is not None else _found()
    if (missing := found.backend.missing()) is not None:
        here = "" if found.asked else f"; {ENVIRONMENT}=cpu computes on the CPU"
        raise BackendError(f"{found.backend.name}: {missing}{here}")
    if (several := installation.clash(installation.installed())) is not None:
        warnings.warn(several, stacklevel=2)
    mx.set_default_device(mx.Device(found.backend.kind))
    found.backend.prepare()
    _chosen = found
    return found


@contextmanager
def using(backend: Backend) -> Iterator[Backend]:
    """Compute on another backend for a while, or on one with other choices."""
    global _chosen
    before, device = _chosen, mx.default_device()
    mx.set_default_device(mx.Device(backend.kind))
    _chosen = Chosen(backend, "asked for by the program")
    try:
        yield backend
    finally:
        _chosen = before
        mx.set_default_device(device)


def peak_memory() -> int:
    """Most bytes MLX has held since the process began."""
    return mx.get_peak_memory()


def _asked_for(name: str, by: str) -> Chosen:
    if name not in BACKENDS:
        raise BackendError(
            f"backend asked for by {by} is {name!r}; known: {', '.join(BACKENDS)}"
        )
    return Chosen(BACKENDS[name], f"asked for by {by}")


def _found() -> Chosen:
    if name := os.environ.get(ENVIRONMENT):
        return _asked_for(name, f"${ENVIRONMENT}")
    if mx.default_device().type == mx.DeviceType.cpu:
        name = "cpu"
    else:
        name = "metal" if mx.metal.is_available() else "cuda"
    reason = "the device MLX computes on by default here"
    return Chosen(BACKENDS[name], reason, asked=False)
