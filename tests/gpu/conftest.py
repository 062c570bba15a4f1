"""Tests marked `gpu` need a GPU; the others here run on any machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def gpu() -> str:
    """The name of the GPU's backend. Where there is none a test fails: it was asked for
    by `-m gpu`."""
    from mlx_dgemma import backends

    name = backends.current().name
    if name == "cpu":
        pytest.fail("no GPU here: `-m gpu` needs a Metal or CUDA device")
    return name
