"""How many unseen puzzles `sudoku4` solves, ours beside transformers.

    python tests/bench/solve_rate.py [--count 500] [--steps 1,2,4,8,24] [--oracle]
    python tests/bench/solve_rate.py --recipes
    python tests/bench/solve_rate.py --shortcuts

Puzzles come from the side of the split that training never draws from. `--oracle`
also runs transformers' own `generate` (needs the extra `parity`). `--recipes`
converts the checkpoint by every recipe and shows size, largest change of the logits
and solve rate of each. `--shortcuts` compares the exact sampler with `--sampler
confidence`, one puzzle at a time. Prints Markdown.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "convert"))
from sudoku import held_out  # noqa: E402

from mlx_dgemma import convert, evaluate, load  # noqa: E402
from mlx_dgemma.checkpoint.hub import resolve  # noqa: E402
from mlx_dgemma.evaluation import Row  # noqa: E402
from mlx_dgemma.text.chat import chat_ids  # noqa: E402

ROWS = 50  # puzzles denoised together
RECIPES = {
    "8 bit": {"q_bits": 8},
    "mixed (experts 4, rest 8)": {"quant_predicate": "mixed"},
    "4 bit": {"q_bits": 4},
    "mxfp8": {"q_mode": "mxfp8"},
    "mxfp4": {"q_mode": "mxfp4"},
    "nvfp4": {"q_mode": "nvfp4"},
}
SAMPLERS = {
    "none": {},
    "--sampler confidence": {"sampler": "confidence"},
    "--sampler confidence --min-probability 0.5": {
        "sampler": "confidence",
        "min_probability": 0.5,
    },
}


def solve(model, tokenizer, pairs, steps: int | None) -> tuple[float, float]:
    """Return the share of `pairs` solved exactly, and mean steps per puzzle."""
    rows = [Row(puzzle, answer) for puzzle, answer in pairs]
    (result,) = evaluate(model, tokenizer, rows, steps=[steps], batch_size=ROWS)
    return result.exact, result.mean_steps


def sweep(name: str, pairs, steps: list[int], oracle: bool) -> None:
    """Print ours, and transformers' if asked, at every step cap."""
    model, tokenizer = load(name)
    print("| steps allowed | ours: solved | mean steps | transformers | mean steps |")
    print("| --- | --- | --- | --- | --- |")
    for cap in steps:
        rate, mean = solve(model, tokenizer, pairs, cap)
        theirs, their_mean = "", ""
        if oracle:
            from train_sudoku import evaluate as evaluate_torch

            found = evaluate_torch(resolve(name), len(pairs), cap)
            theirs, their_mean = f"{found[0]:.1%}", f"{found[1]:.2f}"
        print(f"| {cap} | {rate:.1%} | {mean:.2f} | {theirs} | {their_mean} |")


def recipes(name: str, pairs) -> None:
    """Print every recipe against the dense checkpoint."""
    dense, tokenizer = load(name)
    prompts = [chat_ids(tokenizer, puzzle) for puzzle, _ in pairs[:ROWS]]
    canvas = np.random.default_rng(0).integers(
        0, dense.config.vocab_size, (ROWS, dense.config.canvas_length)
    )

    def logits(model) -> np.ndarray:
        cache = model.make_cache()
        model.encode(mx.array(prompts, dtype=mx.int32), cache)
        return np.array(model.denoise(mx.array(canvas.astype(np.int32)), cache))

    exact = logits(dense)
    size = sum(f.stat().st_size for f in resolve(name).glob("*.safetensors"))
    rate, mean = solve(dense, tokenizer, pairs, None)
    print("| recipe | MB | bits per weight | max abs Δ logits | solved | mean steps |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| dense | {size / 1e6:.2f} | 32 | 0 | {rate:.1%} | {mean:.2f} |")
    with tempfile.TemporaryDirectory() as folder:
        for number, (label, how) in enumerate(RECIPES.items()):
            made = convert(name, Path(folder) / str(number), quantize=True, **how)
            model, _ = load(made.path)
            change = np.abs(logits(model) - exact).max()
            rate, mean = solve(model, tokenizer, pairs, None)
            print(
                f"| {label} | {made.bytes / 1e6:.2f} | {made.bits_per_weight:.2f} | "
                f"{change:.3f} | {rate:.1%} | {mean:.2f} |"
            )


def samplers(name: str, pairs) -> None:
    """Print the sampler "confidence" beside the exact one, puzzle by puzzle."""
    model, tokenizer = load(name)
    exact = model.settings
    rows = [Row(puzzle, answer) for puzzle, answer in pairs]
    print("| settings | steps allowed | solved | mean steps | ms a puzzle |")
    print("| --- | --- | --- | --- | --- |")
    for cap in (exact.steps, 2):
        for label, changes in SAMPLERS.items():
            model.settings = exact.replace(**changes)
            (found,) = evaluate(model, tokenizer, rows, steps=[cap], batch_size=1)
            print(
                f"| {label} | {cap} | {found.exact:.1%} | {found.mean_steps:.2f} | "
                f"{1e3 * found.seconds / len(rows):.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sudoku4")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", default="1,2,4,8,24")
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--recipes", action="store_true")
    parser.add_argument("--shortcuts", action="store_true")
    options = parser.parse_args()
    pairs = held_out(options.count)
    started = time.perf_counter()
    if options.recipes:
        recipes(options.model, pairs)
    elif options.shortcuts:
        samplers(options.model, pairs)
    else:
        steps = [int(cap) for cap in options.steps.split(",")]
        sweep(options.model, pairs, steps, options.oracle)
    seconds = time.perf_counter() - started
    print(f"\n{len(pairs)} unseen puzzles, {seconds:.0f} s on {mx.default_device()}")


if __name__ == "__main__":
    main()
