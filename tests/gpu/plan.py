"""What a run on a GPU does, part by part, the most telling first."""

import importlib.util
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import full
import kernels
import ops
import parity
import racing
import solving
from parts import GB, Part, Setting

LOW_ROUNDING = {"MLX_ENABLE_TF32": "0"}  # float32 products in float32
TORCH = ("torch", "transformers", "safetensors")
MODULES = ("tests/test_backends.py", "tests/model", "tests/diffusion")


def parts() -> Iterator[Part]:
    """All parts in order; names are `section/what`."""
    for name, family in ops.families().items():
        yield Part(
            name=f"ops/{name}",
            says="each operation once at the 26B's shapes, against numpy",
            run=partial(_ops, family=family),
            memory=8 * GB,
            environment=LOW_ROUNDING,
        )
    yield from _parity()
    yield Part(
        name="trajectory/golden",
        says="trajectories recorded from transformers, step by step and as a whole",
        run=partial(solving.tests, paths=("tests/test_golden.py",)),
        environment=LOW_ROUNDING,
        seconds=180,
    )
    for recipe in (None, *solving.CODED):
        yield Part(
            name=f"sudoku/{recipe or 'dense'}",
            says=f"500 unseen puzzles; {solving.SOLVED:.0%} must be solved",
            run=partial(solving.sudoku, recipe=recipe),
        )
    for candidate in kernels.CANDIDATES:
        yield Part(
            name=f"kernels/{candidate.name}",
            says="equal to, and how fast beside: " + candidate.replaces,
            run=partial(racing.race, name=candidate.name),
            memory=2 * GB,
            backend="cuda",
        )
    yield from _full()
    yield Part(
        name="suite/modules",
        says="the plain tests of model, sampler and engine, on this device",
        run=partial(solving.tests, paths=MODULES),
        environment=LOW_ROUNDING,
        seconds=300,
    )


def _parity() -> Iterator[Part]:
    for size in parity.SHAPES:
        for dtype in parity.TIED:
            for layout in (
                ("release", "transformers") if size == "tiny" else ["release"]
            ):
                yield Part(
                    name=f"parity/{size} {dtype} {layout}",
                    says="logits of two steps against transformers and MLX on the CPU: "
                    f"at most {parity.ALLOWED:g} times transformers' own error",
                    run=partial(parity.dense, size=size, dtype=dtype, layout=layout),
                    memory=4 * GB,
                    needs=TORCH,
                    environment=LOW_ROUNDING,
                )
    for recipe in parity.RECIPES:
        yield Part(
            name=f"parity/{recipe}",
            says="quantised, bfloat16, against its weights made dense on the CPU: at "
            f"most {parity.ALLOWED:g} times the CPU's error",
            run=partial(parity.coded, recipe=recipe),
            memory=2 * GB,
        )


def _full() -> Iterator[Part]:
    # what most people will run comes first
    for precision in ("mixed", "bf16", "8 bit", "nvfp4", "4 bit"):
        memory, disk = full.needed(precision)
        yield Part(
            name=f"full/{precision}",
            says="the 26B of noise: load, 8K tokens of prompt, 3 canvases of 16 steps; "
            "beside a canvas of mlx-vlm's on the same files, if it is installed",
            run=partial(full.measured, precision=precision),
            memory=memory,
            disk=disk,
            seconds=420,
        )
    memory, _ = full.needed("bf16")
    yield Part(
        name="full/transformers bf16",
        says="the same shape in transformers on torch, eager: a step, the prefill",
        run=full.transformers,
        memory=memory + 4 * GB,
        needs=TORCH,
        seconds=300,
    )


def obstacle(
    part: Part, scratch: Path, free: int | None, device: str | None = None
) -> str | None:
    """Why a part cannot run here, or None: a package, memory or disk it lacks.

    free: bytes of device memory nobody uses, None if the device does not say; device:
    the name of the backend, None if it does not matter.
    """
    if None not in (device, part.backend) and device != part.backend:
        return f"is for {part.backend} only"
    for package in part.needs:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if free is not None and part.memory > free:
        return f"needs {part.memory / GB:.0f} GB of memory, {free / GB:.0f} are free"
    disk = shutil.disk_usage(scratch).free
    if part.disk + GB > disk:
        return f"needs {part.disk / GB:.0f} GB of disk, {disk / GB:.0f} are free"
    return None


def _ops(setting: Setting, family: ops.Family) -> dict:
    return ops.run(family, ops.TOY if setting.rehearsal else ops.Sizes())
