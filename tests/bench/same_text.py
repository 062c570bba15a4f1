"""Whether two versions of this package write the same text, and denoise it alike.

    python tests/bench/same_text.py --record before.json      in one version
    python tests/bench/same_text.py --against before.json     in another

Denoises 50 unseen puzzles, seed = puzzle number, with `sudoku4`: alone, in batches
of 2, 4 and 8, alone with other prefill step sizes, compiled and ahead of the host as on
a GPU, and drawn live in a terminal. Every draft, next canvas and set of accepted
positions of every step is compared, not only the text. Where the two part, the
entropies of the positions that differ are printed. Exit code 1 when a text differs.
"""

import argparse
import contextlib
import json
import os
import pty
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "convert"))
from sudoku import held_out  # noqa: E402

from mlx_dgemma import load, stream_generate  # noqa: E402
from mlx_dgemma.diffusion.engine import Engine  # noqa: E402
from mlx_dgemma.diffusion.events import Commit, Step  # noqa: E402
from mlx_dgemma.text.chat import chat_ids  # noqa: E402

SEEDS = 50
AS_ON_A_GPU = {"compiled": True, "ahead": True}


def denoise(model, tokenizer, batch: int, prefill: int, **engine) -> list[dict]:
    """Text and every step of each puzzle, `batch` of them denoised together."""
    runs = []
    for start in range(0, SEEDS, batch):
        denoiser = Engine(model, **engine)
        rows: dict[int, dict] = {}
        for seed in range(start, min(start + batch, SEEDS)):
            ids = chat_ids(tokenizer, PUZZLES[seed][0])
            admitted = denoiser.admit(ids, model.settings, seed, prefill)
            rows[admitted.request] = {"seed": seed, "steps": []}
        for event in denoiser.run():
            row = rows[event.request]
            if isinstance(event, Step):
                row["steps"].append(
                    {
                        "draft": event.draft.tolist(),
                        "canvas": event.canvas.tolist(),
                        "accepted": event.accepted.tolist(),
                        "entropy": event.entropy.tolist(),
                    }
                )
            elif isinstance(event, Commit):
                row["text"] = tokenizer.decode(event.tokens)
        runs.extend(rows.values())
    return runs


def drawn(model, tokenizer) -> list[str]:
    """The text of each puzzle while its canvas is drawn in a terminal."""
    from mlx_dgemma.cli.render import screen

    master, slave = pty.openpty()
    reader = threading.Thread(target=_drain, args=(master,), daemon=True)
    reader.start()
    texts = []
    os.environ["TERM"] = "xterm"
    with (
        os.fdopen(slave, "w") as terminal,
        contextlib.redirect_stdout(terminal),
        contextlib.redirect_stderr(terminal),
    ):
        for seed in range(SEEDS):
            events = stream_generate(model, tokenizer, PUZZLES[seed][0], seed=seed)
            with screen(tokenizer, True) as view:
                text = ""
                assert type(view).__name__ == "_Live"
                for event in events:
                    view.show(event)
                    text += event.text if isinstance(event, Commit) else ""
            texts.append(text)
    return texts


def _drain(file: int) -> None:
    with contextlib.suppress(OSError):  # the other end was closed
        while os.read(file, 65536):
            pass


def differences(expected: list[dict], found: list[dict]) -> list[str]:
    """A line for each seed whose text or whose steps differ, with the reason."""
    lines = []
    for old, new in zip(expected, found, strict=True):
        assert old["seed"] == new["seed"]
        same = old["text"] == new["text"]
        if same and len(old["steps"]) == len(new["steps"]):
            trouble = [
                (number, what)
                for number, (a, b) in enumerate(
                    zip(old["steps"], new["steps"], strict=True)
                )
                for what in ("draft", "canvas", "accepted")
                if a[what] != b[what]
            ]
        else:
            trouble = [(min(len(old["steps"]), len(new["steps"])) - 1, "length")]
        if not same or trouble:
            number, what = trouble[0] if trouble else (0, "text")
            a, b = old["steps"][number], new["steps"][number]
            where = [
                i for i in range(len(a["draft"])) if a["canvas"][i] != b["canvas"][i]
            ]
            entropies = [(i, a["entropy"][i], b["entropy"][i]) for i in where[:4]]
            verdict = "same text" if same else "TEXT DIFFERS"
            lines.append(
                f"seed {old['seed']}: {verdict}; {what} parts at step {number}, where "
                f"(position, entropy, entropy) {entropies}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    model, tokenizer = load("sudoku4")
    if options.record:
        options.record.write_text(json.dumps(denoise(model, tokenizer, 1, 2048)))
        return
    expected = json.loads(options.against.read_text())
    failed = False
    ways = [(1, 2048, {}), (1, 64, {}), (1, 3, {}), (2, 2048, {}), (4, 2048, {})]
    ways += [(8, 2048, {})] + [(b, 2048, AS_ON_A_GPU) for b in (1, 4)]
    for batch, prefill, engine in ways:
        found = denoise(model, tokenizer, batch, prefill, **engine)
        lines = differences(expected, found)
        texts = sum("TEXT" in line for line in lines)
        failed |= texts > 0
        how = f"batch {batch}, prefill step {prefill}" + ", as on a GPU" * bool(engine)
        whole = SEEDS - len(lines)
        print(
            f"{how}: {SEEDS - texts} of {SEEDS} texts the same, {whole} in every step"
        )
        for line in lines:
            print("  " + line)
    pairs = zip(drawn(model, tokenizer), expected, strict=True)
    same = sum(text == run["text"] for text, run in pairs)
    print(f"drawn in a terminal: {same} of {SEEDS} texts the same")
    sys.exit(failed or same < SEEDS)


PUZZLES = held_out(SEEDS)

if __name__ == "__main__":
    main()
