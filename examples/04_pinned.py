"""Give some of the answer: pinned positions stand, the rest is denoised around them.

python examples/04_pinned.py
"""

from mlx_dgemma import generate, load

PUZZLE = "2001\n0004\n0040\n0300"

model, tokenizer = load("sudoku4")
# the answer has a token per character, so position and character agree
givens = {
    position: tokenizer.encode(character)[0]
    for position, character in enumerate(PUZZLE)
    if character != "0"
}
print(f"{len(givens)} of {len(PUZZLE)} positions are given")
print(generate(model, tokenizer, PUZZLE, seed=0, pinned=givens))
