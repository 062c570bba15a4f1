"""Computing on another device for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_dgemma import backends


@contextmanager
def using(backend: backends.Backend) -> Iterator[backends.Backend]:
    before, device = backends._current, mx.default_device()
    mx.set_default_device(mx.Device(backend.kind))
    backends._current = backend
    try:
        yield backend
    finally:
        backends._current = before
        mx.set_default_device(device)
