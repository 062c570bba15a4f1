"""How long a model takes on this machine, phase by phase.

Measured on the engine that `generate` runs. All steps are taken and canvases do not
stop early, unless the prompt is a real one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from .. import __version__, backends
from ..diffusion.engine import PREFILL_STEP, Engine
from ..diffusion.events import Commit
from ..model.cache import PrefixCache
from ..model.language import DiffusionGemma
from ..settings import Settings
from .cost import Storage, floor_seconds, step_cost

REPEATS = 3  # of each part of a step
COPY_BYTES = 1 << 28
MATRIX_SIZE = 4096  # of the square matrices multiplied to find the peak rate


@dataclass(frozen=True)
class Workload:
    """What to measure.

    prompts             token ids of each row; all rows are denoised together
    canvases, steps     canvases per row, denoising steps per canvas (at most)
    early               whether canvases stop when they are done, and texts at an eos
    """

    prompts: Sequence[Sequence[int]]
    canvases: int = 1
    steps: int = 16
    early: bool = False
    prefill_step_size: int = PREFILL_STEP

    def settings(self, base: Settings) -> Settings:
        max_tokens = self.canvases * base.canvas_length
        settings = base.replace(steps=self.steps, max_tokens=max_tokens)
        if self.early:
            return settings
        return settings.replace(confidence=0.0, eos=frozenset())


@dataclass(frozen=True)
class Trial:
    """One run of a workload, or the median of several."""

    prefill_tps: float  # prompt tokens per second
    step_seconds: float  # median denoising step of all rows together
    tokens: float  # committed, of all rows
    tokens_per_forward: float  # committed tokens per denoising step of a row
    canvases_per_second: float  # prefill not included
    wall_tps: float  # committed tokens per second, prefill included
    peak_bytes: float

    @classmethod
    def median(cls, trials: Sequence["Trial"]) -> "Trial":
        """Return the median of each figure."""
        rows = [asdict(trial) for trial in trials]
        return cls(**{k: statistics.median(r[k] for r in rows) for k in rows[0]})


def machine() -> dict[str, str]:
    """Return the device and the versions that figures come from."""
    return {
        "device": backends.current().description(),
        "mlx": version("mlx"),
        "mlx_dgemma": __version__,
    }


def random_prompts(model: DiffusionGemma, rows: int, tokens: int) -> list[list[int]]:
    """Return prompts of random ids, the same in every run."""
    rng = np.random.default_rng(0)
    return rng.integers(0, model.config.vocab_size, (rows, tokens)).tolist()


def run(model: DiffusionGemma, job: Workload, seed: int = 0) -> Trial:
    """Run a workload once; row r is denoised with seed + r."""
    mx.clear_cache()
    mx.reset_peak_memory()
    settings = job.settings(model.settings)
    engine = Engine(model)
    started = time.perf_counter()
    prefill = sum(
        engine.admit(prompt, settings, seed + row, job.prefill_step_size).seconds
        for row, prompt in enumerate(job.prompts)
    )
    encoded = time.perf_counter()
    ticks: list[float] = []
    commits: list[Commit] = []
    while engine.running:
        begun = time.perf_counter()
        finished = [e for e in engine.tick() if isinstance(e, Commit)]
        if all(commit.finish_reason is not None for commit in finished):
            ticks.append(time.perf_counter() - begun)  # no canvas was encoded in it
        commits += finished
    ended = time.perf_counter()
    tokens = sum(len(commit.tokens) for commit in commits)
    return Trial(
        prefill_tps=sum(map(len, job.prompts)) / prefill,
        step_seconds=statistics.median(ticks),
        tokens=tokens,
        tokens_per_forward=tokens / sum(commit.steps for commit in commits),
        canvases_per_second=len(commits) / (ended - encoded),
        wall_tps=tokens / (ended - started),
        peak_bytes=mx.get_peak_memory(),
    )


def time_parts(model: DiffusionGemma, job: Workload) -> dict[str, float]:
    """Return median seconds of the parts of a step behind the prompts.

    body          embeddings to the last hidden state
    vocabulary    hidden state to argmax, entropy, sample and signal
    commit        encoding a finished canvas of one row
    """
    length, rows = model.config.canvas_length, len(job.prompts)
    tokens = random_prompts(model, rows, length)
    canvas = mx.array(tokens, dtype=mx.int32)

    def encode(tokens: mx.array, cache: PrefixCache) -> None:
        for start in range(0, tokens.shape[1], job.prefill_step_size):
            model.encode(tokens[:, start : start + job.prefill_step_size], cache)
            cache.evaluate()

    caches = [model.make_cache() for _ in job.prompts]  # the engine has one per row too
    for prompt, cache in zip(job.prompts, caches, strict=True):
        cache.reserve(len(prompt) + length)
        encode(mx.array([prompt], dtype=mx.int32), cache)
    first = caches[0]
    batch = first if rows == 1 else PrefixCache.join(model.config, caches)
    batch.evaluate()
    compiles = backends.current().compiles
    view = model.view(batch, length, bucketed=compiles)
    signal = mx.zeros_like(model.embed(canvas))
    temperature = mx.full((canvas.size,), 0.6)
    uniforms = mx.full((canvas.size,), 0.5)

    def body(canvas: mx.array) -> mx.array:
        return model.denoise_hidden(canvas, view, signal).flatten(0, 1)

    def vocabulary(hidden: mx.array) -> list[mx.array]:
        return [*model.vocab_stats(hidden, temperature, uniforms)]

    def commit() -> None:
        encode(canvas[:1], first)
        first.rewind(first.length - length)

    if compiles:
        body, vocabulary = mx.compile(body), mx.compile(vocabulary)
    hidden = body(canvas)
    return {
        "body": _median_seconds(lambda: mx.eval(body(canvas))),
        "vocabulary": _median_seconds(lambda: mx.eval(vocabulary(hidden))),
        "commit": _median_seconds(commit),
    }


def peak_rates(model: DiffusionGemma) -> tuple[float, float]:
    """Return flops/s of a square product and bytes/s of a copy, measured now."""
    source = mx.zeros((COPY_BYTES // 4,))
    device = backends.current()
    size = MATRIX_SIZE // 4 if device.name == "cpu" else MATRIX_SIZE
    matrix = mx.ones((size, size), dtype=device.product_dtype(model.dtype))
    mx.eval(source, matrix)
    product = _median_seconds(lambda: mx.eval(matrix @ matrix))
    copy = _median_seconds(lambda: mx.eval(source + 1))
    return 2 * size**3 / product, 2 * source.nbytes / copy


def roofline(model: DiffusionGemma, job: Workload) -> dict[str, Any]:
    """Return the cost of a step by part, and its floor at the measured peak rates."""
    rows, prefix = len(job.prompts), len(job.prompts[0])
    shape = (rows, prefix, model.config.canvas_length)
    costs = step_cost(model.config, Storage.of_model(model), *shape)
    rates = peak_rates(model)
    return {
        "flops_per_second": rates[0],
        "bytes_per_second": rates[1],
        "parts": {
            part: cost._asdict() | {"seconds": floor_seconds({part: cost}, *rates)}
            for part, cost in costs.items()
        },
        "floor_seconds": floor_seconds(costs, *rates),
    }


def _median_seconds(call: Callable[[], object]) -> float:
    call()  # the first call also makes what later ones reuse
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)
