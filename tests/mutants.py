"""Change one formula of the package at a time; some test must fail.

    python tests/mutants.py [--only WORD]

tests/mutants/*.toml lists the changes. Each is made in a copy of the package, and the
test that it names runs against the copy, by default the golden trajectories. Prints a
table; exits with 1 if a mutant survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-B", "-m", "pytest", "-xq", "-m", "not gpu and not parity"]


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in `file`, becomes `new`; `test` must fail."""

    formula: str
    file: str
    old: str
    new: str
    test: str = "tests/test_golden.py"


def find_failure(mutant: Mutant) -> str:
    """Return the first test that fails on `mutant`; empty if it survives."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        no_assets = shutil.ignore_patterns("assets", "__pycache__")
        shutil.copytree(ROOT / "mlx_dgemma", copy / "mlx_dgemma", ignore=no_assets)
        for name in (
            "mlx_dgemma/assets",
            "tests",
            "convert",
            "examples",
            "pyproject.toml",
        ):
            (copy / name).symlink_to(ROOT / name)
        target = copy / "mlx_dgemma" / mutant.file
        source = target.read_text()
        if (count := source.count(mutant.old)) != 1:
            raise SystemExit(f"{mutant.formula}: `old` stands {count} times")
        target.write_text(source.replace(mutant.old, mutant.new))
        run = subprocess.run(
            [*PYTEST, mutant.test, "--rootdir", folder, "-k", "not files_are_those"],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    if run.returncode not in (0, 1):
        raise SystemExit(f"{mutant.formula}: pytest ended with {run.returncode}\n{run}")
    for line in run.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return line.split(" - ")[0].partition(" ")[2]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a word of the file or formula")
    only = parser.parse_args().only
    tables = [
        tomllib.loads(file.read_text(encoding="utf-8"))
        for file in sorted((ROOT / "tests" / "mutants").glob("*.toml"))
    ]
    mutants = [Mutant(**entry) for table in tables for entry in table["mutant"]]
    mutants = [m for m in mutants if only in f"{m.file} {m.formula}"]
    survivors = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, test in zip(mutants, pool.map(find_failure, mutants), strict=True):
            survivors += not test
            row = f"| {mutant.formula} | {mutant.file} | {test or 'SURVIVED'} |"
            print(row, flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants noticed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
