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
from dataclasses import dataclass, replace
from pathlib import Path

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

    def without_ties(self, compare: Callable[..., Iterator[Row]], *arguments):
        """Return the rows of `compare` on random tokens that are clearly routed."""
        for draw in range(DRAWS):
            self.random = np.random.default_rng([self.seed, draw])
            with self.oracle.watch_routing() as gaps:
                rows = list(compare(*arguments))
            if min((float(gap.min()) for gap in gaps), default=1.0) > TIED:
                return rows
        self.ties = True
        return rows

    def tokens(self, length: int) -> np.ndarray:
        """Return (1, length) random ids."""
        return self.random.integers(0, self.ours.config.vocab_size, (1, length))

    def both_modes(self, name: str, length: int) -> Iterator[Row]:
        """Compare encoder and decoder behind one prefix."""
        prompt = self.tokens(length)
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

    def chunked(self, length: int) -> Iterator[Row]:
        """Compare logits behind a prompt encoded in chunks."""
        prompt = self.tokens(length)
        canvas = self.tokens(self.ours.config.canvas_length)
        logits = self.oracle.denoise(canvas, self.oracle.encode(prompt)[1])
        for size in CHUNKS:
            prefix = self.ours.make_cache()
            for start in range(0, prompt.shape[1], size):
                self.ours.encode(ids(prompt[:, start : start + size]), prefix)
            mine = self.ours.denoise(ids(canvas), prefix)
            yield self.row(f"encoded {size} at a time: logits", mine, logits)

    def trajectory(self, length: int) -> Iterator[Row]:
        """Take each step of a `generate` of transformers as well.

        Every step starts from transformers' canvas and logits, so that rounding errors
        do not accumulate; the decisions are ours.
        """
        settings = self.ours.settings.replace(steps=TRAJECTORY_STEPS)
        theirs = self.oracle.generate(
            self.tokens(length)[0].tolist(),
            int(self.random.integers(2**31)),
            max_denoising_steps=TRAJECTORY_STEPS,
            max_new_tokens=settings.max_tokens,
            eos_token_id=sorted(settings.eos),
        )
        ours = [
            step
            for index in range(len(theirs.canvases))
            for step in self.canvas_steps(theirs, index, settings)
        ]
        mine, expected = stacked(ours), stacked(theirs.steps)
        for name in ("logits", "entropy"):
            yield self.row(f"trajectory: {name}", mx.array(mine[name]), expected[name])
        last = np.cumsum([len(steps) for steps in theirs.canvases]) - 1
        committed = np.concatenate([ours[step].argmax for step in last])
        mine["tokens"] = _padded(committed, settings.eos, self.oracle)
        expected["tokens"] = np.array(theirs.tokens)
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
        signal, streak = None, mx.zeros((1,), dtype=mx.int32)
        draft = mx.full((1, settings.canvas_length), -1)
        for number, step in enumerate(theirs.canvases[index]):
            temperature = settings.temperature(number)
            logits = self.ours.denoise(ids(step.canvas[None]), prefix, signal)
            processed = logits / temperature
            logp = processed - mx.logsumexp(processed, axis=-1, keepdims=True)
            entropy = -mx.sum(mx.exp(logp) * logp, axis=-1)
            argmax = mx.argmax(processed, axis=-1)
            streak = sampler.count_unchanged(argmax, draft, streak)
            stable = streak >= settings.stability
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

    def row(self, name: str, ours: mx.array, theirs: np.ndarray) -> Row:
        mine = np.array(ours.astype(mx.float32))
        difference = float(np.abs(mine - theirs).max())
        tolerance = TOLERANCE * max(1.0, float(np.abs(theirs).max()))
        return Row(name, mine.shape, difference, tolerance)


def _padded(tokens: np.ndarray, eos: frozenset[int], oracle: Oracle) -> np.ndarray:
    """Return committed tokens with padding behind the first eos, as transformers."""
    ends = np.flatnonzero(np.isin(tokens, sorted(eos)))
    pad = oracle.model.generation_config.pad_token_id
    if len(ends) and pad is not None:
        tokens = tokens.copy()
        tokens[ends[0] + 1 :] = pad
    return tokens


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
    console = Console()
    if not console.is_terminal:  # no column is folded in a file
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
