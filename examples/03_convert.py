"""Quantise a checkpoint and compare the two: size, and what they answer.

python examples/03_convert.py
"""

import tempfile
from pathlib import Path

from mlx_dgemma import convert, generate, load

PUZZLE = "4000\n0310\n0430\n0000"

with tempfile.TemporaryDirectory() as folder:
    converted = convert(
        "sudoku4", Path(folder) / "sudoku4-8bit", quantize=True, q_bits=8
    )
    print(f"{converted.source_bytes:,} -> {converted.bytes:,} bytes")
    print(f"{converted.bits_per_weight:.2f} bits per weight")
    for name in ("sudoku4", converted.path):
        model, tokenizer = load(name)
        print(generate(model, tokenizer, PUZZLE, seed=0).split())
