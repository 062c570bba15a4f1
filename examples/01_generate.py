"""Load the built-in checkpoint and solve a puzzle.

python examples/01_generate.py
"""

from mlx_dgemma import generate, load

PUZZLE = "2001\n0004\n0040\n0300"

model, tokenizer = load("sudoku4")
print(generate(model, tokenizer, PUZZLE, seed=0))
