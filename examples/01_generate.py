"""Load the built-in checkpoint and solve a puzzle.

python examples/01_generate.py
"""

from mlx_dgemma import generate, load

PUZZLE = "4000\n0310\n0430\n0000"

model, tokenizer = load("sudoku4")
print(generate(model, tokenizer, PUZZLE, seed=0))
