"""Shared by all tests: where helpers lie, and one tiny checkpoint."""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# as pyproject.toml says for this process: the tests need no fast BLAS
os.environ.setdefault("PYTHONWARNINGS", "ignore:MLX multiplies with a slow BLAS")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A dense float32 checkpoint; do not write to it."""
    from tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_model(tiny):
    """The tiny checkpoint, loaded: (model, tokenizer)."""
    from mlx_dgemma import load

    return load(tiny)


@pytest.fixture(scope="session")
def quantised(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint at 4 bits; do not write to it."""
    from mlx_dgemma.checkpoint.convert import convert

    folder = tmp_path_factory.mktemp("quantised") / "model"
    convert(tiny, folder, quantize=True)
    return folder


@pytest.fixture
def tuned(monkeypatch):
    """`tuned(vocabulary_chunk=128)`: other numbers of the backend in use."""
    from mlx_dgemma import backends

    def change(**numbers) -> None:
        for name, value in numbers.items():
            monkeypatch.setattr(backends.current(), name, value)

    return change


@pytest.fixture
def experts_run(monkeypatch):
    """`experts_run("blocks")`: the way experts run, whatever the device prefers."""
    from mlx_dgemma import backends

    def change(path: backends.ExpertPath) -> None:
        monkeypatch.setattr(backends.current(), "experts", lambda *a, **k: path)

    return change


@pytest.fixture
def as_gpu(unfused) -> Iterator[None]:
    """A GPU's numbers and operations, computed by the CPU."""
    from devices import using

    from mlx_dgemma import backends

    class Simulated(backends.Metal):
        kind = backends.CPU.kind

    with using(Simulated()):
        yield


@pytest.fixture
def unfused():
    """`mx.compile` traces and replays, but fuses nothing: on a CPU each fused kernel
    would wait for a C++ compiler. MLX has this mode, its Python package lacks a name
    for it."""
    import mlx.core as mx

    if mx.default_device().type != mx.DeviceType.cpu:
        yield
        return
    (library,) = (Path(mx.__file__).parent / "lib").glob("libmlx.*")
    set_mode = ctypes.CDLL(str(library))[
        "_ZN3mlx4core16set_compile_modeENS0_11CompileModeE"
    ]
    set_mode(2)  # CompileMode::no_fuse
    yield
    set_mode(3)  # CompileMode::enabled
