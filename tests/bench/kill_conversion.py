"""Kill conversions at random moments; nothing may ever lie under the target's name.

    python tests/bench/kill_conversion.py --hf-path DIR [--times 10] [--seed 0]

Runs the real command in a process of its own, sends SIGKILL somewhere within the
time a whole conversion takes, and looks. At the end one conversion is left alone: it
must succeed and clear what the killed ones left beside the target.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def convert(source: str, target: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlx_dgemma.convert", "--hf-path", source]
    command += ["--mlx-path", str(target), "-q", "--q-bits", "4"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf-path", required=True)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        target = Path(folder).resolve() / "model"
        started = time.monotonic()
        assert convert(options.hf_path, target).wait() == 0
        whole = time.monotonic() - started
        for file in target.iterdir():
            file.unlink()
        target.rmdir()
        for number in range(options.times):
            moment = moments.uniform(0.1, 0.97) * whole
            process = convert(options.hf_path, target)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.wait()
            beside = sorted(p.name for p in target.parent.iterdir())
            print(f"{number + 1}: killed after {moment:.2f} s; beside: {beside}")
            assert not target.exists(), "something lies under the target's name"
        assert convert(options.hf_path, target).wait() == 0
        assert [p.name for p in target.parent.iterdir()] == ["model"]
        print(f"left alone: done in {whole:.1f} s, nothing beside it")


if __name__ == "__main__":
    main()
