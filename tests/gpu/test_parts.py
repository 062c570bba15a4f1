"""The judged parts of `run.py` as tests on a Metal or CUDA device (`-m gpu`)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import plan
from parts import Setting, free_memory

from mlx_dgemma import backends

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
PARTS = {part.name: part for part in plan.parts() if part.section != "full"}


@pytest.mark.parametrize("name", PARTS)
def test_part(name, tmp_path):
    part, device = PARTS[name], backends.current()
    assert device.name != "cpu", "`-m gpu` needs a Metal or CUDA device"
    why = part.obstacle(tmp_path, free_memory())
    if why is not None and "installed" not in why:
        pytest.skip(why)  # a smaller card
    assert why is None
    figures = part.run(Setting(rehearsal=False, scratch=tmp_path))
    assert figures["passed"], figures
