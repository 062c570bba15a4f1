"""What a user sees: recorded trajectories followed, puzzles solved."""

import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from parts import Setting

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "bench")]

import solve_rate  # noqa: E402
from parity import RECIPES  # noqa: E402
from sudoku import held_out  # noqa: E402

from mlx_dgemma import backends, convert, load  # noqa: E402

# Of 500 puzzles all are solved on a CPU, dense and by each of these recipes: another
# device rounds otherwise and so draws other tokens, but solves as many.
SOLVED = 0.99
CODED = ("8 bit", "mixed", "4 bit", "mxfp8", "mxfp4", "nvfp4")


def tests(setting: Setting, paths: tuple[str, ...]) -> dict:
    """pytest on this device: how many tests, and which failed."""
    report = setting.scratch / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *paths]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    cases = list(ET.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "tests": len(cases),
        "failed": failed,
        "passed": bool(cases) and not failed,
    }


def sudoku(setting: Setting, recipe: str | None) -> dict:
    """Unseen puzzles through `sudoku4`, dense or by a recipe: how many are solved."""
    pairs = held_out(20 if setting.rehearsal else 500)
    name: str | Path = "sudoku4"
    if recipe is not None:
        name = setting.scratch / "model"
        convert("sudoku4", name, quantize=True, **RECIPES[recipe])
    model, tokenizer = load(name)
    begun = time.perf_counter()
    solved, steps = solve_rate.solve(model, tokenizer, pairs, None)
    return {
        "puzzles": len(pairs),
        "solved": solved,
        "mean_steps": steps,
        "seconds": time.perf_counter() - begun,
        "device": backends.current().description(),
        "passed": solved >= SOLVED,
    }
