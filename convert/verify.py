"""Ours against transformers on any checkpoint, tensor by tensor.

    python convert/verify.py --hf-path DIR [--mlx-path DIR] [--seed N]

Compares the encoder's hidden states, logits without and with self-conditioning,
behind prefixes shorter and longer than the sliding window, one chunk against many,
and a whole `generate` replayed with transformers' own draws. Prints a table; exits
with 1 if anything is off. Needs the extra `parity`.
"""

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
import mlx.core as mx
import numpy as np
from oracle import Oracle, Trajectory, load_oracle
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.diffusion import sampler
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit, Step
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.model.loading import load_model

# largest |Δ| allowed, as a share of the largest value: what float32 and 16-bit
# arithmetic in another order leaves after a few dozen layers
TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}
CHUNKS = (1, 3, 7)
MAX_NEW_STEPS = 8


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    shape: tuple[int, ...]
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN as well


class Verifier:
    """Our model and transformers', asked the same questions."""

    def __init__(self, ours: DiffusionGemma, oracle: Oracle, seed: int):
        self.ours, self.oracle = ours, oracle
        self.random = np.random.default_rng(seed)
        self.seed = seed
        self.tolerance = TOLERANCE[str(ours.dtype).removeprefix("mlx.core.")]

    def rows(self) -> Iterator[Row]:
        """Every comparison, one after the other."""
        window = self.ours.config.sliding_window
        for name, length in (
            ("short prefix", max(1, min(window - 2, 64))),
            ("prefix of window + 1", window + 1),
            ("prefix beyond the window", 2 * window + 5),
        ):
            yield from self.both_modes(name, self.tokens(length))
        yield from self.chunked(self.tokens(window + 9))
        yield from self.trajectory(self.tokens(window + 3))

    def tokens(self, length: int) -> np.ndarray:
        """(1, length) random ids."""
        return self.random.integers(0, self.ours.config.vocab_size, (1, length))

    def both_modes(self, name: str, prompt: np.ndarray) -> Iterator[Row]:
        """Encoder and decoder behind one prefix."""
        canvas = self.tokens(self.ours.config.canvas_length)
        hidden, cache = self.oracle.encode(prompt)
        prefix = self.ours.make_cache()
        yield self.row(
            f"{name}: hidden", self.ours.encode_hidden(ids(prompt), prefix), hidden
        )
        logits = self.oracle.denoise(canvas, cache)
        mine = self.ours.denoise(ids(canvas), prefix)
        yield self.row(f"{name}: logits", mine, logits)
        processed = logits / 0.6
        conditioned = self.oracle.denoise(canvas, cache, processed)
        signal = self.ours.self_condition(mx.array(processed))
        mine = self.ours.denoise(ids(canvas), prefix, signal)
        yield self.row(f"{name}: self-conditioned logits", mine, conditioned)

    def chunked(self, prompt: np.ndarray) -> Iterator[Row]:
        """Any chunking gives what one chunk gives."""
        canvas = self.tokens(self.ours.config.canvas_length)
        logits = self.oracle.denoise(canvas, self.oracle.encode(prompt)[1])
        for size in CHUNKS:
            prefix = self.ours.make_cache()
            for start in range(0, prompt.shape[1], size):
                self.ours.encode(ids(prompt[:, start : start + size]), prefix)
            mine = self.ours.denoise(ids(canvas), prefix)
            yield self.row(f"encoded {size} at a time: logits", mine, logits)

    def trajectory(self, prompt: np.ndarray) -> Iterator[Row]:
        """transformers' `generate`, its draws replayed through our engine."""
        settings = self.ours.config.settings.but(steps=MAX_NEW_STEPS)
        theirs = self.oracle.generate(
            prompt[0].tolist(),
            self.seed,
            max_denoising_steps=MAX_NEW_STEPS,
            max_new_tokens=settings.max_tokens,
            eos_token_id=sorted(settings.eos),
        )
        events = replay(self.ours, theirs, settings)
        steps = [event for event in events if isinstance(event, Step)]
        commits = [event for event in events if isinstance(event, Commit)]
        both = min(len(steps), len(theirs.steps))
        yield self.row(
            "trajectory: entropy",
            mx.stack([step.entropy for step in steps[:both]]),
            np.stack([step.entropy for step in theirs.steps[:both]]),
        )
        yield self.count(
            "trajectory: positions where argmax differs",
            [np.array(step.draft) for step in steps],
            [step.argmax for step in theirs.steps],
        )
        yield self.count(
            "trajectory: positions where acceptance differs",
            [np.array(step.accepted) for step in steps],
            [step.accepted for step in theirs.steps],
        )
        yield self.count(
            "trajectory: stop flags that differ",
            [np.array([step.stopped]) for step in steps],
            [np.array([step.stopped]) for step in theirs.steps],
        )
        tokens = [token for commit in commits for token in commit.tokens]
        end = next((i for i, t in enumerate(theirs.tokens) if t in settings.eos), None)
        expected = theirs.tokens[: settings.max_tokens][:end]
        same = tokens == expected
        yield Row("trajectory: committed tokens", (len(expected),), 1.0 - same, 0.0)

    def row(self, name: str, ours: mx.array, theirs: np.ndarray) -> Row:
        mine = np.array(ours.astype(mx.float32))
        difference = float(np.abs(mine - theirs).max())
        tolerance = self.tolerance * max(1.0, float(np.abs(theirs).max()))
        return Row(name, mine.shape, difference, tolerance)

    def count(self, name: str, ours: list, theirs: list) -> Row:
        """How many places differ; a step only one of them took counts whole."""
        different = sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=False))
        different += abs(len(ours) - len(theirs)) * ours[0].size
        return Row(name, (len(theirs), ours[0].size), different, 0.0)


def replay(model: DiffusionGemma, trajectory: Trajectory, settings) -> list:
    """Our engine's events over the draws transformers made."""
    starts = deque(trajectory.starts)
    proposals = deque(step.proposal for step in trajectory.steps)
    noises = deque(step.noise for step in trajectory.steps)
    idle = np.zeros(settings.canvas_length)

    def following(draws: deque) -> np.ndarray:
        return draws.popleft() if draws else idle  # ours took more steps

    def draw(engine, canvases, length):
        return mx.zeros((1, length)), ids(following(noises)[None])

    with (
        mock.patch.object(
            sampler, "random_tokens", lambda key, length, vocab: ids(following(starts))
        ),
        mock.patch.object(
            sampler, "propose", lambda processed, u: ids(following(proposals)[None])
        ),
        mock.patch.object(Engine, "_draw", draw),
    ):
        engine = Engine(model)
        engine.admit(trajectory.prompt, settings, seed=0)
        return list(engine.run())


def ids(array: np.ndarray) -> mx.array:
    return mx.array(array.astype(np.int32))


def print_table(rows: list[Row]) -> None:
    table = Table("compared", "shape", "max |Δ|", "tolerance", "verdict")
    for row in rows:
        table.add_row(
            row.name,
            " × ".join(map(str, row.shape)),
            f"{row.difference:.3g}",
            f"{row.tolerance:.3g}",
            "[green]ok[/]" if row.passed else "[red]DIFFERS[/]",
        )
    # wide enough that no column is folded, also into a file
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


@click.command()
@click.option("--hf-path", required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--mlx-path",
    type=click.Path(exists=True, path_type=Path),
    help="Our conversion of it.  [default: load --hf-path directly]",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def main(hf_path: Path, mlx_path: Path | None, seed: int) -> None:
    """Compare ours with transformers on a checkpoint, tensor by tensor."""
    folder = mlx_path or hf_path
    try:
        ours = load_model(folder, read_config(folder))
    except DGemmaError as error:
        raise click.ClickException(str(error)) from None
    dtype = str(ours.dtype).removeprefix("mlx.core.")
    verifier = Verifier(ours, load_oracle(hf_path, dtype), seed)
    rows = list(verifier.rows())
    print_table(rows)
    failed = sum(not row.passed for row in rows)
    click.echo(f"{len(rows) - failed} of {len(rows)} agree, {dtype}, seed {seed}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
