"""Shared by all tests: where helpers lie, and one tiny checkpoint."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


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
