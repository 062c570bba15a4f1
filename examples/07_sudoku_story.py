"""The Sudoku story: an adapter learns a puzzle format that the model does not know.

python examples/07_sudoku_story.py [ITERATIONS [PICTURE.png]]

`sudoku4` knows four lines, with 0 for an empty cell. Here the puzzle is one word and
an empty cell is a point. Plots how many unseen puzzles are solved by step cap.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from mlx_dgemma import LoRA, TrainSettings, evaluate, load, train
from mlx_dgemma.evaluation import load_scorer, read_rows, table

ITERS = int(sys.argv[1]) if len(sys.argv) > 1 else 600
PICTURE = Path(sys.argv[2] if len(sys.argv) > 2 else "sudoku_story.png")
TRIAL = ITERS < 100  # too few to learn anything: use little data, too
SUDOKU = Path(__file__).parent / "sudoku"
STEPS = (1, 2, 4, 8, 24)

with tempfile.TemporaryDirectory() as folder:
    data, adapter = Path(folder) / "data", Path(folder) / "adapter"
    counts = ["100", "2", "2"] if TRIAL else ["20000", "64", "200"]
    command = [sys.executable, SUDOKU / "data.py", "--size", "4", "--givens", "4-8"]
    command += ["--empty", ".", "--row", "", "--out", data]
    for name, count in zip(("--train", "--valid", "--test"), counts, strict=True):
        command += [name, count]
    subprocess.run(command, check=True)
    rows, results = read_rows(data), {}
    scorer = load_scorer(f"{SUDOKU / 'score.py'}:score", rows)
    settings = TrainSettings(
        iters=ITERS,
        batch_size=2 if TRIAL else 32,
        learning_rate=2e-3,
        warmup_steps=50,
        val_batches=2,
    )
    train("sudoku4", data, adapter, lora=LoRA(), settings=settings, on_event=print)
    for name, adapter_path in (("base", None), ("tuned", adapter)):
        model, tokenizer = load("sudoku4", adapter_path)
        results[name] = evaluate(model, tokenizer, rows, scorer=scorer, steps=STEPS)

print("\n".join(table(results)))
figure = Figure(figsize=(6, 4), layout="constrained")
axes = figure.add_subplot()
for name, found in results.items():
    axes.plot(STEPS, [100 * one.exact for one in found], "o-", label=name)
axes.set(xlabel="denoising steps allowed", ylabel="% solved", ylim=(-3, 103))
axes.legend()
figure.savefig(PICTURE)
