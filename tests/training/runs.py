"""Small runs for the tests of the trainer: data, requests, command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import mlx_dgemma

ROOT = Path(mlx_dgemma.__file__).parents[1]  # of the package under test


def write_rows(folder: Path, *, train: int = 24, valid: int = 5) -> Path:
    """Prompts of letters to answer in digits, some longer than a canvas."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("valid", valid), ("test", valid)):
        rows = []
        for _ in range(count):
            prompt = "".join(rng.choice(list("abcdefgh"), rng.integers(1, 12)))
            answer = "".join(rng.choice(list("0123456789"), rng.integers(1, 40)))
            rows.append(json.dumps({"prompt": prompt, "completion": answer}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    """`mlx_dgemma.lora --train` with what makes a run short."""
    flags = {"model": model, "data": data, "adapter-path": out, "batch-size": 4}
    flags |= {"warmup-steps": 3, "learning-rate": 1e-2, "rank": 4, "val-batches": 1}
    given = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "mlx_dgemma.lora", "--train", *given, *more]


def run(parts: list[str]) -> subprocess.CompletedProcess[str]:
    """The command, done."""
    return subprocess.run(parts, capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
