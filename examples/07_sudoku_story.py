"""The Sudoku story: a puzzle format the model does not know, learned by an adapter.

python examples/07_sudoku_story.py [ITERATIONS [PICTURE.png]]

`sudoku4` knows four lines and 0 for empty. Here all stands in one word and a point is
empty. Draws how many unseen puzzles are solved by the denoising steps allowed.
"""

import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from mlx_dgemma import LoRA, TrainSettings, evaluate, load, train
from mlx_dgemma.evaluation.evaluate import read_rows, table
from mlx_dgemma.evaluation.sudoku import write_data

ITERS = int(sys.argv[1]) if len(sys.argv) > 1 else 600
REHEARSAL = ITERS < 100  # too few to learn anything: little data, too
PICTURE = Path(sys.argv[2] if len(sys.argv) > 2 else "sudoku_story.png")
STEPS = (1, 2, 4, 8, 24)

with tempfile.TemporaryDirectory() as folder:
    data, adapter = Path(folder) / "data", Path(folder) / "adapter"
    write_data(
        data,
        size=4,
        givens=(4, 8),
        train=100 if REHEARSAL else 20_000,
        valid=2 if REHEARSAL else 64,
        test=2 if REHEARSAL else 200,
        empty=".",
        row="",
    )
    settings = TrainSettings(
        iters=ITERS,
        batch_size=2 if REHEARSAL else 32,
        learning_rate=2e-3,
        warmup_steps=50,
        val_batches=2,
    )
    train("sudoku4", data, adapter, lora=LoRA(), settings=settings, on_event=print)
    rows, results = read_rows(data), {}
    for name, adapter_path in (("base", None), ("tuned", adapter)):
        model, tokenizer = load("sudoku4", adapter_path)
        results[name] = evaluate(model, tokenizer, rows, task="sudoku", steps=STEPS)

print("\n".join(table(results)))
figure = Figure(figsize=(6, 4), layout="constrained")
axes = figure.add_subplot()
for name, found in results.items():
    axes.plot(STEPS, [100 * one.exact for one in found], "o-", label=name)
axes.set(xlabel="denoising steps allowed", ylabel="% solved", ylim=(-3, 103))
axes.legend()
figure.savefig(PICTURE)
