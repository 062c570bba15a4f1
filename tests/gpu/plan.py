"""The parts of a GPU run in order, the most telling first."""

import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import full
import ops
import parity
from parts import GB, ROOT, Part, Setting

sys.path.insert(0, str(ROOT / "tests" / "bench"))

import solve_rate  # finds convert/
from sudoku import held_out

from mlx_dgemma import backends, convert, load

# section -> what its parts do and how they are judged
SECTIONS = {
    "ops": "each MLX operation at the 26B's shapes, against the CPU or numpy",
    "parity": f"errors of logits are at most {parity.ALLOWED:g} times those of "
    "transformers on the CPU (dense) and of MLX on the CPU (quantised)",
    "trajectory": "trajectories recorded from transformers, step by step",
    "sudoku": "500 unseen puzzles, of which 99% must be solved",
    "full": "the 26B with random weights: load, prefill 8K tokens, 3 canvases of 16 "
    "steps; beside a canvas of mlx-vlm on the same files, if installed",
    "suite": "the tests of model, sampler and engine, on this device",
}
PARITY = "tests/parity/test_model_parity.py"
TORCH = ("torch", "transformers", "safetensors")
MODULES = ("tests/test_backends.py", "tests/model", "tests/diffusion")
# On a CPU all 500 puzzles are solved, dense and quantised. Another device rounds
# differently and so samples other tokens, but must solve as many.
SOLVED = 0.99
SUDOKU_RECIPES = ("8 bit", "mixed", "4 bit", "mxfp8", "mxfp4", "nvfp4")


def parts() -> Iterator[Part]:
    """Yield every part."""
    for name, family in ops.families().items():
        yield Part(f"ops/{name}", partial(_ops, family=family), memory=8 * GB)
    model = partial(pytest_on_device, paths=(PARITY, "-m", "parity"))
    yield Part("parity/transformers", model, 4 * GB, needs=TORCH, seconds=600)
    for recipe in parity.RECIPES:
        run = partial(parity.quantized, recipe=recipe)
        yield Part(f"parity/{recipe}", run, memory=2 * GB)
    golden = partial(pytest_on_device, paths=("tests/test_golden.py",))
    yield Part("trajectory/golden", golden, seconds=180)
    yield Part("sudoku/dense", partial(sudoku, recipe=None))
    for recipe in SUDOKU_RECIPES:
        yield Part(f"sudoku/{recipe}", partial(sudoku, recipe=recipe))
    # the precision that most people will run comes first
    for precision in ("mixed", "bf16", "8 bit", "nvfp4", "4 bit"):
        memory, disk = full.required_bytes(precision)
        run = partial(full.measure_precision, precision=precision)
        yield Part(f"full/{precision}", run, memory, disk, seconds=420)
    modules = partial(pytest_on_device, paths=MODULES)
    yield Part("suite/modules", modules, seconds=300)


def _ops(setting: Setting, family: ops.Family) -> dict:
    return ops.run(family, ops.TOY if setting.rehearsal else ops.Shapes())


def pytest_on_device(setting: Setting, paths: tuple[str, ...]) -> dict:
    """Run pytest on this device; return how many tests there are and which failed."""
    report = setting.scratch / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *paths]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    cases = list(ET.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if {"failure", "error"} & {child.tag for child in case}
    ]
    passed = bool(cases) and not failed
    return {"tests": len(cases), "failed": failed, "passed": passed}


def sudoku(setting: Setting, recipe: str | None) -> dict:
    """Solve unseen puzzles with `sudoku4`, dense or quantised."""
    pairs = held_out(20 if setting.rehearsal else 500)
    name: str | Path = "sudoku4"
    if recipe is not None:
        name = setting.scratch / "model"
        convert("sudoku4", name, quantize=True, **parity.RECIPES[recipe])
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
