"""Damaged and hostile files for every reader of the package.

    python tests/fuzz/loaders.py [--seconds 180] [--seed 0] [--case N] [NAME ...]

Each reader runs in a process of its own on files that are changed at random. A fault is
an exception that is no DGemmaError, a message of more than one line or 1,000
characters, more than 10 seconds or 2 GB for one file, or the end of the process. Prints
one line per fault, with the number that `--case` repeats alone, and exits with 1 if
there is one. Needs the extras `dev` and `cpu`.
"""

import argparse
import multiprocessing as mp
import random
import re
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic

from changes import changed
from readers import READERS

from mlx_dgemma.errors import DGemmaError

SECONDS, BYTES = 10, 2 * 2**30  # of one file
LONGEST = 1000  # characters of a message


def read_changed(name: str, good: Path, folder: Path, case: int) -> str | None:
    """Change one file of a good folder and read it; return the fault, if any."""
    reader = READERS[name]
    rng = random.Random(f"{name} {case}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    file = folder / rng.choice(reader.files)
    file.write_bytes(changed(file.name, file.read_bytes(), rng))
    try:
        reader.read(folder)
    except DGemmaError as error:
        text = str(error)
        if "\n" in text or len(text) > LONGEST:
            return f"{file.name}: message of {len(text)} characters: {text[:200]!r}"
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return f"{file.name}: {type(error).__name__} at {where}: {str(error)[:200]!r}"
    return None


def work(name: str, good: Path, folder: Path, case: int, pipe: Connection) -> None:
    """Read case after case; send its number before, and the fault after each."""
    warnings.simplefilter("ignore")
    usual = peak()
    while True:
        pipe.send((case, "begins"))
        fault = read_changed(name, good, folder, case)
        if fault is None and peak() - usual > BYTES:
            fault = f"{(peak() - usual) / 2**30:.1f} GB"
        pipe.send((case, fault))
        if fault is not None and fault.endswith(" GB"):
            return
        case += 1


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fuzz(name: str, seconds: float, first: int, report: Callable[[str], None]) -> int:
    """Read changed files for some seconds; return how many were read."""
    context = mp.get_context("spawn")
    end, case = monotonic() + seconds, first
    with tempfile.TemporaryDirectory() as work_folder:
        good = Path(work_folder) / "good"
        READERS[name].write(good)
        folder = Path(work_folder) / "changed"
        while monotonic() < end:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=work, args=(name, good, folder, case, theirs), daemon=True
            )
            process.start()
            theirs.close()
            case = 1 + watch(name, ours, case, end, report)
            process.kill()
            process.join()
    return case - first


def watch(
    name: str,
    pipe: Connection,
    case: int,
    end: float,
    report: Callable[[str], None],
) -> int:
    """Follow a process until it ends, hangs, or the time is over; return its case."""
    patience = 60.0  # to import and load
    while monotonic() < end:
        try:
            if not pipe.poll(patience):
                report(f"{name} {case}: still reading after {patience:.0f} s")
                return case
            case, fault = pipe.recv()
        except EOFError:
            report(f"{name} {case}: the process ended")
            return case
        patience = SECONDS if fault == "begins" else 60.0
        if fault not in (None, "begins"):
            report(f"{name} {case}: {fault}")
            if fault.endswith(" GB"):
                return case
    return case


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[[], *READERS])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    given = parser.parse_args()
    names = given.names or [*READERS]
    if given.case is not None:
        with tempfile.TemporaryDirectory() as work_folder:
            good = Path(work_folder) / "good"
            READERS[names[0]].write(good)
            print(read_changed(names[0], good, good.parent / "changed", given.case))
        return
    faults: list[str] = []

    def report(fault: str) -> None:
        """Print a fault; of one kind the first three."""
        kind = re.sub(r"\d+|'.*", "", fault)
        faults.append(kind)
        if faults.count(kind) <= 3:
            print(fault, flush=True)

    for name in names:
        count = fuzz(name, given.seconds, given.seed * 10**6, report)
        print(f"{name}: {count:,} files", flush=True)
    print(f"{len(faults)} faults")
    sys.exit(len(faults) > 0)


if __name__ == "__main__":
    main()
