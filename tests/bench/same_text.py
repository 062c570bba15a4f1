"""Compare the texts and every denoising step of two versions of this package.

    python tests/bench/same_text.py --record before.json      in one version
    python tests/bench/same_text.py --against before.json     in the other

Denoises 50 unseen puzzles with `sudoku4`, the seed is the puzzle's number: alone, in
batches of 2, 4 and 8, with other prefill step sizes, and compiled and ahead of the host
as on a GPU. Drafts, next canvases and accepted positions are compared as well. Exits
with 1 when a text differs.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "convert"))
from sudoku import held_out  # noqa: E402

from mlx_dgemma import load  # noqa: E402
from mlx_dgemma.diffusion.engine import Engine  # noqa: E402
from mlx_dgemma.diffusion.events import Commit, Step  # noqa: E402
from mlx_dgemma.text.chat import chat_ids  # noqa: E402

SEEDS = 50
AS_ON_A_GPU = {"compiled": True, "ahead": True}
WAYS = [(1, 2048, {}), (1, 64, {}), (1, 3, {}), (2, 2048, {}), (4, 2048, {})]
WAYS += [(8, 2048, {}), (1, 2048, AS_ON_A_GPU), (4, 2048, AS_ON_A_GPU)]


def denoise(model, tokenizer, batch: int, prefill: int, **engine_options) -> list[dict]:
    """Return text and steps of each puzzle, `batch` of them denoised together."""
    puzzles, runs = held_out(SEEDS), []
    for start in range(0, SEEDS, batch):
        engine = Engine(model, **engine_options)
        rows: dict[int, dict] = {}
        for seed in range(start, min(start + batch, SEEDS)):
            ids = chat_ids(tokenizer, puzzles[seed][0])
            admitted = engine.admit(ids, model.settings, seed, prefill)
            rows[admitted.request] = {"seed": seed, "steps": []}
        for event in engine.run():
            row = rows[event.request]
            if isinstance(event, Step):
                arrays = (event.draft, event.canvas, event.accepted)
                row["steps"].append([array.tolist() for array in arrays])
            elif isinstance(event, Commit):
                row["text"] = tokenizer.decode(event.tokens)
        runs.extend(rows.values())
    return runs


def first_difference(old: dict, new: dict) -> str | None:
    """Say where two runs of a seed differ first, or None."""
    verdict = "same text" if old["text"] == new["text"] else "TEXT DIFFERS"
    pairs = zip(old["steps"], new["steps"], strict=False)
    for number, (a, b) in enumerate(pairs):
        for name, x, y in zip(("draft", "canvas", "accepted"), a, b, strict=True):
            if x != y:
                where = [i for i in range(len(x)) if x[i] != y[i]]
                return f"{verdict}; {name} of step {number} differs at {where}"
    if len(old["steps"]) != len(new["steps"]):
        return f"{verdict}; {len(old['steps'])} steps became {len(new['steps'])}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--record", type=Path)
    which.add_argument("--against", type=Path)
    options = parser.parse_args()
    model, tokenizer = load("sudoku4")
    if options.record:
        options.record.write_text(json.dumps(denoise(model, tokenizer, 1, 2048)))
        return
    expected, failed = json.loads(options.against.read_text()), False
    for batch, prefill, engine_options in WAYS:
        found = denoise(model, tokenizer, batch, prefill, **engine_options)
        pairs = list(zip(expected, found, strict=True))
        same = sum(old["text"] == new["text"] for old, new in pairs)
        different = {
            old["seed"]: what
            for old, new in pairs
            if (what := first_difference(old, new))
        }
        failed |= same < SEEDS
        how = ", as on a GPU" if engine_options else ""
        print(
            f"batch {batch}, prefill step {prefill}{how}: {same} of {SEEDS} texts the "
            f"same, {SEEDS - len(different)} in every step"
        )
        for seed, what in different.items():
            print(f"  seed {seed}: {what}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
