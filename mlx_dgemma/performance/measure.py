"""How long a model takes on this machine, phase by phase.

Measured on the engine that `generate` runs, with every step wanted: canvases do not
stop early, unless the prompt is a real one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
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
from . import cost

REPEATS = 3  # of a step taken apart
COPY_BYTES = 1 << 28
PRODUCT = 4096  # rows and columns of the matrices multiplied to find the ceiling


@dataclass(frozen=True)
class Workload:
    """What to measure.

    prompts             token ids of each row, all rows denoised together
    canvases, steps     canvases per row, denoising steps per canvas (at most)
    early               whether canvases stop when they are done, and texts at an eos
    """

    prompts: Sequence[Sequence[int]]
    canvases: int = 1
    steps: int = 16
    early: bool = False
    prefill_step_size: int = PREFILL_STEP

    def settings(self, known: Settings) -> Settings:
        changed = known.replace(
            steps=self.steps, max_tokens=self.canvases * known.canvas_length
        )
        return (
            changed if self.early else changed.replace(confidence=0.0, eos=frozenset())
        )


@dataclass(frozen=True)
class Trial:
    """What one run of a job, or the median of several, took."""

    prefill_tps: float  # prompt tokens per second
    step_seconds: float  # median denoising step of all rows together
    tokens_per_forward: float  # committed tokens per denoising step of a row
    canvases_per_second: float  # prefill not included
    wall_tps: float  # committed tokens per second, prefill included
    peak_bytes: float

    @classmethod
    def median(cls, trials: Sequence["Trial"]) -> "Trial":
        """Each figure's median."""
        columns = {f.name: [vars(t)[f.name] for t in trials] for f in fields(cls)}
        return cls(**{name: statistics.median(c) for name, c in columns.items()})


@dataclass(frozen=True)
class Anatomy:
    """One denoising step taken apart, and a commit: median seconds."""

    body: float  # embeddings to the last hidden state
    vocabulary: float  # hidden state to argmax, entropy, sample and signal
    commit: float  # encoding a finished canvas of one row


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches in one copy and one product."""

    bytes_per_second: float  # read and written
    flops_per_second: float


@dataclass(frozen=True)
class Machine:
    """Where figures come from."""

    device: str = field(default_factory=lambda: backends.current().description())
    mlx: str = field(default_factory=lambda: version("mlx"))
    mlx_dgemma: str = __version__


def random_prompts(model: DiffusionGemma, rows: int, tokens: int) -> list[list[int]]:
    """Prompts of random ids, the same in every run."""
    rng = np.random.default_rng(0)
    return rng.integers(0, model.config.vocab_size, (rows, tokens)).tolist()


def run(model: DiffusionGemma, job: Workload, seed: int = 0) -> Trial:
    """One trial of a job; row r is denoised with seed + r."""
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
        tokens_per_forward=tokens / sum(commit.steps for commit in commits),
        canvases_per_second=len(commits) / (ended - encoded),
        wall_tps=tokens / (ended - started),
        peak_bytes=mx.get_peak_memory(),
    )


def dissect(model: DiffusionGemma, job: Workload) -> Anatomy:
    """Time the parts of a step behind the prompts, and the commit after it."""
    length, chunk = model.config.canvas_length, job.prefill_step_size
    shape = (len(job.prompts), length)
    canvas = mx.random.randint(0, model.config.vocab_size, shape, key=mx.random.key(0))
    caches = []  # one a row, as the engine has them
    for prompt in job.prompts:
        caches.append(model.make_cache())
        caches[-1].reserve(len(prompt) + length)
        _encode(model, mx.array([prompt], dtype=mx.int32), caches[-1], chunk)
    first, *others = caches
    together = PrefixCache.join(model.config, caches) if others else first
    together.evaluate()
    body, vocabulary = _parts_of_a_step(model, together, canvas)

    def commit() -> None:
        _encode(model, canvas[:1], first, chunk)
        first.rewind(first.length - length)

    return Anatomy(body, vocabulary, commit=_median(commit))


def _encode(
    model: DiffusionGemma, tokens: mx.array, cache: PrefixCache, chunk: int
) -> None:
    for start in range(0, tokens.shape[1], chunk):
        model.encode(tokens[:, start : start + chunk], cache)
        cache.evaluate()


def _parts_of_a_step(
    model: DiffusionGemma, cache: PrefixCache, canvas: mx.array
) -> tuple[float, float]:
    """Median seconds of the layers and of the vocabulary."""
    compiles = backends.current().compiles
    view = model.view(cache, canvas.shape[1], bucketed=compiles)
    signal = mx.zeros((*canvas.shape, model.config.hidden_size), dtype=model.dtype)
    temperature = mx.full((canvas.size,), 0.6)
    uniforms = mx.random.uniform(shape=(canvas.size,), key=mx.random.key(1))

    def body(canvas: mx.array) -> mx.array:
        return model.denoise_hidden(canvas, view, signal).flatten(0, 1)

    def vocabulary(hidden: mx.array) -> list[mx.array]:
        return model.read(hidden, temperature, uniforms).arrays

    if compiles:
        body, vocabulary = mx.compile(body), mx.compile(vocabulary)
    hidden = body(canvas)
    return (
        _median(lambda: mx.eval(body(canvas))),
        _median(lambda: mx.eval(vocabulary(hidden))),
    )


def ceilings(model: DiffusionGemma) -> Ceilings:
    """The bandwidth of a copy and the rate of a square product, measured now."""
    source = mx.zeros((COPY_BYTES // 4,))
    device = backends.current()
    size = PRODUCT // 4 if device.name == "cpu" else PRODUCT
    matrix = mx.ones((size, size), dtype=device.product_dtype(model.dtype))
    mx.eval(source, matrix)
    copy = _median(lambda: mx.eval(source + 1))
    product = _median(lambda: mx.eval(matrix @ matrix))
    return Ceilings(2 * source.nbytes / copy, 2 * size**3 / product)


def roofline(model: DiffusionGemma, job: Workload) -> dict[str, Any]:
    """What a step costs by `cost`, and its floor under the measured ceilings."""
    found = ceilings(model)
    limits = found.flops_per_second, found.bytes_per_second
    costs = cost.step_cost(
        model.config,
        cost.Loaded.of(model),
        len(job.prompts),
        len(job.prompts[0]),
        model.config.canvas_length,
    )
    parts = {
        part: asdict(one) | {"seconds": cost.floor_seconds({part: one}, *limits)}
        for part, one in costs.items()
    }
    floor = cost.floor_seconds(costs, *limits)
    return asdict(found) | {"parts": parts, "floor_seconds": floor}


def _median(call: Callable[[], object]) -> float:
    call()  # what is made once is not what it costs each time
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)
