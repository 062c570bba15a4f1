"""Compare ours with transformers on any dense checkpoint, tensor by tensor.

    python convert/verify.py --hf-path DIR [--mlx-path DIR] [--seed N]

Compares the encoder's hidden states and logits without and with self-conditioning,
behind prefixes shorter and longer than the sliding window, one chunk against many,
and every step of a whole `generate` of transformers. Both compute in float32 whatever
the files hold. Random tokens are drawn again while a router is nearly undecided about
one: a rounding error would send it to another expert. Prints a table; exits with 1 if
anything differs. Needs the extra `parity`.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import click
import mlx.core as mx
import numpy as np
from oracle import Oracle, RecordedStep, Trajectory, load_oracle, stacked
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.quantize import read_quantization
from mlx_dgemma.diffusion import sampler
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.model.loading import load_model
from mlx_dgemma.settings import Settings

# largest |Δ| allowed, as a share of the largest value: float32 sums in another order
# differ by this much after a few dozen layers
TOLERANCE = 1e-4
TIED = 1e-4  # relative gap of router probabilities below which a choice is a near tie
DRAWS = 50  # attempts to find random tokens without near ties
CHUNKS = (1, 3, 7)
TRAJECTORY_STEPS = 8


class Row(NamedTuple):
    """One line of the table; NaN differs."""

    name: str
    shape: tuple[int, ...]
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


def compare(name: str, ours: mx.array, theirs: np.ndarray) -> Row:
    mine = np.array(ours.astype(mx.float32))
    difference = float(np.abs(mine - theirs).max())
    tolerance = TOLERANCE * max(1.0, float(np.abs(theirs).max()))
    return Row(name, mine.shape, difference, tolerance)


def ids(array: np.ndarray) -> mx.array:
    return mx.array(array.astype(np.int32))


class Verifier:
    """Our model and transformers' on the same inputs."""

    def __init__(self, ours: DiffusionGemma, oracle: Oracle, seed: int):
        self.ours, self.oracle, self.seed = ours, oracle, seed
        self.random = np.random.default_rng(seed)
        self.ties = False  # near ties could not be avoided

    def rows(self) -> Iterator[Row]:
        """Yield every comparison."""
        window = self.ours.config.sliding_window
        for name, length in (
            ("short prefix", max(1, min(window - 2, 64))),
            ("prefix of window + 1", window + 1),
            ("prefix beyond the window", 2 * window + 5),
        ):
            yield from self.without_ties(self.both_modes, name, length)
        yield from self.without_ties(self.chunked, window + 9)
        yield from self.without_ties(self.trajectory, window + 3)

    def without_ties(self, comparison: Callable[..., Iterator[Row]], *arguments):
        """Return rows of a comparison on random tokens that are clearly routed."""
        for draw in range(DRAWS):
            self.random = np.random.default_rng([self.seed, draw])
            with self.oracle.watch_routing() as gaps:
                rows = list(comparison(*arguments))
            if min((float(gap.min()) for gap in gaps), default=1.0) > TIED:
                return rows
        self.ties = True
        return rows

    def inputs(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a random prompt (1, length) and canvas (1, L)."""
        config = self.ours.config
        sizes = (length, config.canvas_length)
        prompt, canvas = (
            self.random.integers(0, config.vocab_size, (1, size)) for size in sizes
        )
        return prompt, canvas

    def both_modes(self, name: str, length: int) -> Iterator[Row]:
        """Compare encoder and decoder behind one prefix."""
        prompt, canvas = self.inputs(length)
        hidden, cache = self.oracle.encode(prompt)
        prefix = self.ours.make_cache()
        mine = self.ours.encode_hidden(ids(prompt), prefix)
        yield compare(f"{name}: hidden", mine, hidden)
        logits = self.oracle.denoise(canvas, cache)
        yield compare(f"{name}: logits", self.ours.denoise(ids(canvas), prefix), logits)
        processed = logits / 0.6
        signal = self.ours.self_condition(mx.array(processed))
        yield compare(
            f"{name}: self-conditioned logits",
            self.ours.denoise(ids(canvas), prefix, signal),
            self.oracle.denoise(canvas, cache, processed),
        )

    def chunked(self, length: int) -> Iterator[Row]:
        """Compare logits behind a prompt encoded in chunks."""
        prompt, canvas = self.inputs(length)
        logits = self.oracle.denoise(canvas, self.oracle.encode(prompt)[1])
        for size in CHUNKS:
            prefix = self.ours.make_cache()
            for start in range(0, length, size):
                self.ours.encode(ids(prompt[:, start : start + size]), prefix)
            mine = self.ours.denoise(ids(canvas), prefix)
            yield compare(f"encoded {size} at a time: logits", mine, logits)

    def trajectory(self, length: int) -> Iterator[Row]:
        """Take each step of a `generate` of transformers as well.

        Every step starts from transformers' canvas and logits, so that rounding errors
        do not accumulate; the decisions are ours.
        """
        settings = self.ours.settings.replace(steps=TRAJECTORY_STEPS)
        eos = sorted(settings.eos)
        theirs = self.oracle.generate(
            self.inputs(length)[0][0].tolist(),
            self.seed,
            max_denoising_steps=TRAJECTORY_STEPS,
            max_new_tokens=settings.max_tokens,
            eos_token_id=eos,
        )
        canvases = [
            list(self.canvas_steps(theirs, index, settings))
            for index in range(len(theirs.canvases))
        ]
        mine, expected = stacked([*chain(*canvases)]), stacked(theirs.steps)
        for name in ("logits", "entropy"):
            yield compare(f"trajectory: {name}", mx.array(mine[name]), expected[name])
        tokens = np.concatenate([steps[-1].argmax for steps in canvases])
        pad = self.oracle.model.generation_config.pad_token_id
        if pad is not None:  # transformers pads behind the first end
            ended = np.cumsum(np.isin(tokens, eos)) > np.isin(tokens, eos)
            tokens = np.where(ended, pad, tokens)
        mine["tokens"], expected["tokens"] = tokens, np.array(theirs.tokens)
        for name in ("accepted", "argmax", "stopped", "tokens"):
            different = int((mine[name] != expected[name]).sum())
            shape = expected[name].shape
            yield Row(f"trajectory: differences in {name}", shape, different, 0)

    def canvas_steps(
        self, theirs: Trajectory, index: int, settings: Settings
    ) -> Iterator[RecordedStep]:
        """Yield our decisions in every step of one of transformers' canvases."""
        before = theirs.prompt + theirs.tokens[: index * settings.canvas_length]
        prefix = self.ours.make_cache()
        self.ours.encode(ids(np.array([before])), prefix)
        signal, unchanged = None, mx.zeros((1,), dtype=mx.int32)
        draft = mx.full((1, settings.canvas_length), -1)
        for number, step in enumerate(theirs.canvases[index]):
            temperature = settings.temperature(number)
            logits = self.ours.denoise(ids(step.canvas[None]), prefix, signal)
            processed = logits / temperature
            logp = processed - mx.logsumexp(processed, axis=-1, keepdims=True)
            entropy = -mx.sum(mx.exp(logp) * logp, axis=-1)
            argmax = mx.argmax(processed, axis=-1)
            unchanged = sampler.count_unchanged(argmax, draft, unchanged)
            stable = unchanged >= settings.stability
            confident = mx.mean(entropy) < settings.confidence
            bounds = mx.array([settings.entropy_bound])
            yield replace(
                step,
                logits=np.array(logits[0]),
                entropy=np.array(entropy[0]),
                accepted=np.array(sampler.accept(entropy, bounds)[0]),
                argmax=np.array(argmax[0]),
                stopped=bool((stable & confident).item()),
            )
            draft = ids(step.argmax[None])
            signal = self.ours.self_condition(mx.array(step.logits[None]) / temperature)


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
    # no column is folded in a file
    width = None if sys.stdout.isatty() else 120
    Console(width=width).print(table)


@click.command()
@click.option("--hf-path", required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--mlx-path",
    type=click.Path(exists=True, path_type=Path),
    help="Our conversion of it.  [default: load --hf-path directly]",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def main(hf_path: Path, mlx_path: Path | None, seed: int) -> None:
    """Compare ours with transformers on a dense checkpoint, tensor by tensor."""
    folder = mlx_path or hf_path
    try:
        config = read_config(folder)
        if read_quantization(config.raw, str(folder)) is not None:
            raise click.ClickException(
                f"{folder}: is quantised, so it differs by design; "
                "verify a dense conversion"
            )
        ours = load_model(folder, config)
    except DGemmaError as error:
        raise click.ClickException(str(error)) from None
    ours.set_dtype(mx.float32)
    verifier = Verifier(ours, load_oracle(hf_path, "float32"), seed)
    rows = list(verifier.rows())
    print_table(rows)
    failed = sum(not row.passed for row in rows)
    click.echo(f"{len(rows) - failed} of {len(rows)} agree, float32, seed {seed}")
    if verifier.ties:
        click.echo(f"near ties of routers could not be avoided in {DRAWS} draws")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
