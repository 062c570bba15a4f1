"""Parts of `run.py` that give a verdict, as tests on a Metal or CUDA device."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import plan
from parts import Setting

from mlx_dgemma import backends

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

JUDGED = ("ops", "parity", "trajectory", "sudoku", "kernels")
PARTS = {part.name: part for part in plan.parts() if part.section in JUDGED}


@pytest.mark.parametrize("name", PARTS)
def test_part(name, gpu, tmp_path):
    part, device = PARTS[name], backends.current()
    for variable, value in part.environment.items():
        os.environ.setdefault(variable, value)  # read once, before the first product
    free = device.info_number("free_memory") or device.memory()
    why = plan.obstacle(part, tmp_path, free, gpu)
    if why is not None and "installed" not in why:
        pytest.skip(why)  # a smaller card, another backend
    assert why is None
    figures = part.run(Setting(rehearsal=False, scratch=tmp_path))
    assert figures["passed"], figures
