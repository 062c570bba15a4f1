"""Another model, for a target that is taken."""

import shutil
from pathlib import Path

import pytest
from tiny import write_tiny


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """Another model, with a file that the tiny one lacks."""
    folder = write_tiny(tmp_path_factory.mktemp("older") / "model", seed=1)
    (folder / "LICENSE").write_text("of old")
    return folder


@pytest.fixture
def out(older, tmp_path) -> Path:
    """A target at which a model lies already, alone in its parent."""
    return shutil.copytree(older, tmp_path / "out")
