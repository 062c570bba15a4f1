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

import solve_rate
from sudoku import held_out

from mlx_dgemma import backends, convert, load

NO_TF32 = {"MLX_ENABLE_TF32": "0"}  # float32 products in float32
TORCH = ("torch", "transformers", "safetensors")
MODULES = ("tests/test_backends.py", "tests/model", "tests/diffusion")
# On a CPU all 500 puzzles are solved, dense and quantised. Another device rounds
# differently and so samples other tokens, but must solve as many.
SOLVED = 0.99
SUDOKU_RECIPES = ("8 bit", "mixed", "4 bit", "mxfp8", "mxfp4", "nvfp4")


def parts() -> Iterator[Part]:
    """Yield every part; names are `section/what`."""
    for name, family in ops.families().items():
        yield Part(
            name=f"ops/{name}",
            says="each operation once at the 26B's shapes, against numpy",
            run=partial(_ops, family=family),
            memory=8 * GB,
            environment=NO_TF32,
        )
    yield from _parity()
    yield Part(
        name="trajectory/golden",
        says="trajectories recorded from transformers, step by step and as a whole",
        run=partial(pytest_on_device, paths=("tests/test_golden.py",)),
        environment=NO_TF32,
        seconds=180,
    )
    for recipe in (None, *SUDOKU_RECIPES):
        yield Part(
            name=f"sudoku/{recipe or 'dense'}",
            says=f"500 unseen puzzles; {SOLVED:.0%} must be solved",
            run=partial(sudoku, recipe=recipe),
        )
    yield from _full()
    yield Part(
        name="suite/modules",
        says="the tests of model, sampler and engine, on this device",
        run=partial(pytest_on_device, paths=MODULES),
        environment=NO_TF32,
        seconds=300,
    )


def _parity() -> Iterator[Part]:
    for size in parity.SIZES:
        for dtype in parity.TIED:
            layouts = ["release", "transformers"] if size == "tiny" else ["release"]
            for layout in layouts:
                yield Part(
                    name=f"parity/{size} {dtype} {layout}",
                    says="logits of two steps against transformers and MLX on the CPU: "
                    f"at most {parity.ALLOWED:g} times transformers' error",
                    run=partial(parity.dense, size=size, dtype=dtype, layout=layout),
                    memory=4 * GB,
                    needs=TORCH,
                    environment=NO_TF32,
                )
    for recipe in parity.RECIPES:
        yield Part(
            name=f"parity/{recipe}",
            says="quantised, bfloat16, against its weights made dense on the CPU: at "
            f"most {parity.ALLOWED:g} times the CPU's error",
            run=partial(parity.quantized, recipe=recipe),
            memory=2 * GB,
        )


def _full() -> Iterator[Part]:
    # the precision that most people will run comes first
    for precision in ("mixed", "bf16", "8 bit", "nvfp4", "4 bit"):
        memory, disk = full.required_bytes(precision)
        yield Part(
            name=f"full/{precision}",
            says="the 26B with random weights: load, prefill 8K tokens, 3 canvases of "
            "16 steps; beside a canvas of mlx-vlm on the same files, if installed",
            run=partial(full.measure_precision, precision=precision),
            memory=memory,
            disk=disk,
            seconds=420,
        )
    yield Part(
        name="full/transformers bf16",
        says="the same shape in transformers on torch, eager: a step, the prefill",
        run=full.measure_transformers,
        memory=full.required_bytes("bf16")[0] + 4 * GB,
        needs=TORCH,
        seconds=300,
    )


def _ops(setting: Setting, family: ops.Family) -> dict:
    return ops.run(family, ops.TOY if setting.rehearsal else ops.Shapes())


def pytest_on_device(setting: Setting, paths: tuple[str, ...]) -> dict:
    """Run tests on this device; return how many there are and which failed."""
    report = setting.scratch / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *paths]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    cases = list(ET.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
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
