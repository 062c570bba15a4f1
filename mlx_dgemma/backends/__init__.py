"""Which device computes, and its numbers. No other module asks which device this is.

The device is chosen once, when it is first needed: MLX's default device, or the one
that $MLX_DGEMMA_BACKEND or `choose` names.
"""

import os
import warnings
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from .. import installation
from ..errors import BackendError
from .base import Backend as Backend
from .base import ExpertPath as ExpertPath
from .base import differentiable as differentiable
from .cpu import CPU
from .cuda import CUDA
from .metal import Metal

ENVIRONMENT = "MLX_DGEMMA_BACKEND"
BACKENDS: dict[str, Backend] = {b.name: b for b in (CPU(), Metal(), CUDA())}
_current: Backend | None = None
_reason = ""
_process = 0  # which chose it


def current() -> Backend:
    """Return the backend in use; it is chosen now if it was not before.

    Raises BackendError in a process that was forked since.
    """
    if _current is None:
        return choose()
    if _process != os.getpid():
        raise BackendError(
            "this process was forked after a device was chosen, and MLX would wait "
            'for ever in it; start it with multiprocessing.get_context("spawn")'
        )
    return _current


def choose(name: str | None = None, by: str = "the caller") -> Backend:
    """Compute on the device "cpu", "metal" or "cuda" from now on; return its backend.

    name    None: what $MLX_DGEMMA_BACKEND says, or else MLX's default device
    by      who asks, for messages

    Arrays and models made before stay where they are, so choose before loading. Raises
    BackendError when the name is unknown or the device cannot be used here.
    """
    global _current, _reason, _process
    if name is None and (name := os.environ.get(ENVIRONMENT) or None):
        by = f"${ENVIRONMENT}"
    reason, advice = f"asked for by {by}", ""
    if name is None:
        name = "metal" if mx.metal.is_available() else "cuda"
        if mx.default_device().type == mx.DeviceType.cpu:
            name = "cpu"
        reason = "MLX's default device"
        advice = f"; {ENVIRONMENT}=cpu computes on the CPU"
    if name not in BACKENDS:
        raise BackendError(
            f"backend asked for by {by} is {name!r}; known: {', '.join(BACKENDS)}"
        )
    backend = BACKENDS[name]
    if (missing := backend.missing()) is not None:
        raise BackendError(f"{name}: {missing}{advice}")
    if (several := installation.several_libraries()) is not None:
        warnings.warn(several, stacklevel=2)
    mx.set_default_device(mx.Device(backend.kind))
    backend.prepare()
    _current, _reason, _process = backend, reason, os.getpid()
    return backend


def describe() -> dict[str, dict[str, Any]]:
    """Return the state of each backend, as JSON can hold it.

    Of the one in use also its device, memory and numbers.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, backend in BACKENDS.items():
        missing = backend.missing()
        ready = f"available: --backend {name}"
        found[name] = {"state": f"missing: {missing}" if missing else ready}
    try:
        backend = current()
    except BackendError as error:
        return found | {"none in use": {"state": str(error)}}
    found[backend.name] = {
        "state": f"in use: {_reason}",
        "device": backend.description(),
        "memory": backend.memory(),
        "free_memory": backend.info_number("free_memory"),
        **asdict(backend),
        "info": dict(backend.info()),
    }
    return found
