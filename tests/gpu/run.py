"""Everything that only a GPU can show, in one call and one folder.

    python tests/gpu/run.py --out gpu               all of it, about 20 minutes
    python tests/gpu/run.py --only parity,mixed     the steps whose names hold a word
    python tests/gpu/run.py --dry-run               list the steps

Each step is a process of its own with a time limit, so a crash ends that step alone.
Its output goes to OUT/STEP.txt; OUT/summary.md is complete after each. Exits with 1 if
a step failed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTEST = ["-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
FULL = str(Path(__file__).with_name("full.py"))
# step -> seconds allowed, arguments of Python
STEPS = {
    "machine": (120, ["-m", "mlx_dgemma.benchmark", "--backends"]),
    "ops": (600, [*PYTEST, "tests/gpu", "-m", "gpu", "-k", "operation"]),
    "parity": (600, [*PYTEST, "tests/parity/test_model_parity.py", "-m", "parity"]),
    "quantized": (600, [*PYTEST, "tests/gpu", "-m", "gpu", "-k", "quantised"]),
    "golden": (180, [*PYTEST, "tests/test_golden.py"]),
    "sudoku": (300, [*PYTEST, "tests/gpu", "-m", "gpu", "-k", "puzzles"]),
    # the precision that most people will run comes first
    **{
        f"full {precision}": (420, [FULL, precision])
        for precision in ("mixed", "bf16", "8 bit", "nvfp4", "4 bit")
    },
    "suite": (
        300,
        [*PYTEST, "tests/test_backends.py", "tests/model", "tests/diffusion"],
    ),
}


def run_step(name: str, log: Path) -> str:
    """Run a step, write what it prints, and return how it ended."""
    seconds, arguments = STEPS[name]
    begun = time.perf_counter()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"FAILED: not done after {seconds} s"
    spent = time.perf_counter() - begun
    return f"passed in {spent:.0f} s" if code == 0 else f"FAILED with exit code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--only", default="", help="words of names, between commas")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    words = given.only.split(",")
    wanted = [name for name in STEPS if any(word in name for word in words)]
    if not wanted:
        parser.error(f"no step is named like {given.only!r}; --dry-run lists them")
    if given.dry_run:
        return print("\n".join(wanted))
    given.out.mkdir(parents=True, exist_ok=True)
    summary = ["| step | result |", "| --- | --- |"]
    for name in wanted:
        summary.append(f"| {name} | {run_step(name, given.out / f'{name}.txt')} |")
        print(summary[-1], flush=True)
        (given.out / "summary.md").write_text("\n".join(summary) + "\n")
    sys.exit(any("FAILED" in line for line in summary))


if __name__ == "__main__":
    main()
