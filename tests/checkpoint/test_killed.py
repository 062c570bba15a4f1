"""A conversion that is killed: its target holds the old model, the new one or nothing.

    python test_killed.py SOURCE TARGET STEP

converts, but is killed before a step: `tensor-12`, `copy-1`, `fsync-2` or `rename-1`.
"""

import collections
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint.folders import listing, whole

from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.files import atomic

ROOT = Path(__file__).parents[2]


def kill(source: Path, target: Path, step: str) -> None:
    """Convert with --overwrite in a process that is killed at that step."""
    run = subprocess.run(
        [sys.executable, __file__, source, target, step],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert run.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("step", ["tensor-50", "copy-1", "fsync-3", "rename-1"])
def test_a_killed_conversion_leaves_no_target_and_the_next_one_clears_up(
    tiny, tmp_path, step
):
    kill(tiny, tmp_path / "out", step)
    (hidden,) = listing(tmp_path)  # what it was writing
    assert hidden.startswith(".out.")
    convert(tiny, tmp_path / "out")
    whole(tmp_path / "out", tiny)
    assert listing(tmp_path) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["tensor-9", "exchange-1", "remove-1"])
def test_killed_while_overwriting_the_old_or_the_new_model_stands(
    tiny, older, out, step
):
    kill(tiny, out, step)
    (out / ".lock").unlink(missing_ok=True)  # nobody minds it
    whole(out, tiny if step == "remove-1" else older)
    convert(tiny, out, overwrite=True)
    whole(out, tiny)
    assert listing(out.parent) == ["out"]


def main(source: str, target: str, stop: str) -> None:
    counts: collections.Counter[str] = collections.Counter()

    def step(kind: str) -> None:
        counts[kind] += 1
        if f"{kind}-{counts[kind]}" == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping(kind: str, function):
        return lambda *args, **kwargs: (step(kind), function(*args, **kwargs))[1]

    atomic.fsync = stepping("fsync", atomic.fsync)
    atomic.exchange = stepping("exchange", atomic.exchange)
    Path.rename = stepping("rename", Path.rename)
    shutil.copyfile = stepping("copy", shutil.copyfile)
    shutil.rmtree = stepping("remove", shutil.rmtree)
    convert(source, target, overwrite=True, progress=lambda *_: step("tensor"))


if __name__ == "__main__":
    main(*sys.argv[1:])
