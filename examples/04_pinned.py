"""Give some of the answer: pinned positions stand, the rest is denoised around them.

python examples/04_pinned.py
"""

from mlx_dgemma import generate, load

PUZZLE = "4000\n0310\n0430\n0000"

model, tokenizer = load("sudoku4")
# the answer has a token per character, so position and character agree
givens = {
    position: tokenizer.encode(character)[0]
    for position, character in enumerate(PUZZLE)
    if character != "0"
}
print(f"{len(givens)} of {len(PUZZLE)} positions are given")
print(generate(model, tokenizer, PUZZLE, seed=0, pinned=givens))
