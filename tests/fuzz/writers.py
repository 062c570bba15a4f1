"""Two processes write one file again and again while it is read: never torn.

    python tests/fuzz/writers.py [--count 100000] [--folder /dev/shm]

Exits with 1 if a read found anything but one writer's whole file, or if a write failed.
"""

import argparse
import multiprocessing as mp
import sys
import tempfile
from pathlib import Path

from mlx_dgemma.files.atomic import write_atomically

SIZES = {b"a": 40_624, b"b": 130_984}


def write(path: Path, sign: bytes, count: int) -> None:
    for _ in range(count):
        write_atomically(path, lambda p: p.write_bytes(sign * SIZES[sign]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path, torn, reads = Path(folder) / "file", 0, 0
        write(path, b"a", 1)
        writers = [
            mp.Process(target=write, args=(path, sign, given.count)) for sign in SIZES
        ]
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            data = path.read_bytes()
            reads += 1
            torn += data[:1] not in SIZES or data != data[:1] * SIZES[data[:1]]
        failed = sum(writer.exitcode != 0 for writer in writers)
        left = [p.name for p in Path(folder).iterdir() if p != path]
    print(f"2 x {given.count:,} writes, {reads:,} reads: {torn} torn, {failed} failed")
    sys.exit(bool(torn or failed or left))


if __name__ == "__main__":
    main()
