"""Several requests in one engine: each tick is one step for all of them.

python examples/05_many_at_once.py
"""

from mlx_dgemma import Commit, Engine, load
from mlx_dgemma.text.chat import chat_ids

PUZZLES = ["4000\n0310\n0430\n0000", "1030\n0010\n3000\n0020", "0020\n0200\n0014\n0400"]

model, tokenizer = load("sudoku4")
engine = Engine(model)
for seed, puzzle in enumerate(PUZZLES):
    engine.admit(chat_ids(tokenizer, puzzle), model.settings, seed)

ticks = 0
while engine.running:
    ticks += 1
    for event in engine.tick():
        if isinstance(event, Commit):
            answer = tokenizer.decode(event.tokens).replace("\n", " ")
            print(f"tick {ticks}: request {event.request} is done: {answer}")
