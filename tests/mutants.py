"""Break each formula of the model and the sampler; some test must notice.

    python tests/mutants.py [--only WORD]

Every mutant is one change to a copy of the package. The golden trajectories run
against it, and where those cannot see the difference, the named test does. Prints a
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
GOLDEN = "tests/test_golden.py"


@dataclass(frozen=True)
class Mutant:
    """One formula made wrong."""

    formula: str
    file: str
    old: str
    new: str
    test: str = GOLDEN


def mutants() -> list[Mutant]:
    """Return all of them, from tests/mutants/*.toml."""
    files = sorted((ROOT / "tests" / "mutants").glob("*.toml"))
    tables = [tomllib.loads(file.read_text(encoding="utf-8")) for file in files]
    return [Mutant(**entry) for table in tables for entry in table["mutant"]]


def killed(mutant: Mutant) -> str:
    """The first test that fails on `mutant`; empty if it survives."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "mlx_dgemma", copy / "mlx_dgemma")
        for name in ("tests", "convert", "pyproject.toml"):
            (copy / name).symlink_to(ROOT / name)
        target = copy / "mlx_dgemma" / mutant.file
        source = target.read_text()
        if source.count(mutant.old) != 1:
            raise SystemExit(
                f"{mutant.formula}: stands {source.count(mutant.old)} times"
            )
        target.write_text(source.replace(mutant.old, mutant.new))
        command = [sys.executable, "-B", "-m", "pytest", "-xq", mutant.test]
        command += ["--rootdir", str(copy), "-k", "not files_are_those"]
        run = subprocess.run(
            command,
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
    if run.returncode not in (0, 1):
        raise SystemExit(
            f"{mutant.formula}: pytest ended with {run.returncode}\n{run.stdout}"
        )
    lines = run.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].partition(" ")[2] if failed else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="mutants whose file or formula has this word"
    )
    only = parser.parse_args().only
    chosen = [m for m in mutants() if only in f"{m.file} {m.formula}"]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(killed, chosen))
    for mutant, test in zip(chosen, results, strict=True):
        print(f"| {mutant.formula} | {mutant.file} | {test or 'SURVIVED'} |")
    survivors = results.count("")
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants noticed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
