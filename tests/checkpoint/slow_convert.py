"""Convert as usual, but stop at a given step and wait there to be killed.

    python slow_convert.py SOURCE TARGET STEP

STEP is a kind of step and its number, as in `tensor-12`, `copy-1`, `fsync-2` or
`rename-1`; the process says "there" before that step and sleeps. With `slow` it
never stops, but takes a moment for each step.
"""

import collections
import shutil
import sys
import time
from pathlib import Path

from mlx_dgemma.checkpoint import convert as conversion
from mlx_dgemma.files import atomic

SOURCE, TARGET, STEP = sys.argv[1:]
counts: collections.Counter[str] = collections.Counter()


def step(kind: str) -> None:
    counts[kind] += 1
    if f"{kind}-{counts[kind]}" == STEP:
        print("there", flush=True)
        time.sleep(60)
    elif STEP == "slow":
        time.sleep(0.003)


def told(kind: str, function):
    def call(*args, **kwargs):
        step(kind)
        return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    atomic.fsync = told("fsync", atomic.fsync)
    Path.rename = told("rename", Path.rename)
    shutil.copyfile = told("copy", shutil.copyfile)
    shutil.rmtree = told("remove", shutil.rmtree)
    if STEP == "slow":
        print("there", flush=True)
    conversion.convert(
        SOURCE, TARGET, overwrite=True, progress=lambda *_: step("tensor")
    )
