"""One canvas of a request, from its noise to its commit."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import NumericError
from ..model.cache import PrefixCache
from ..settings import Settings
from . import sampler
from .events import Step
from .prefix import Prefix
from .step import State, StepInputs, StepStats

RUN_AHEAD_FACTOR = 10  # mean entropies above this multiple of `confidence`


class BatchKey(NamedTuple):
    """Canvases with equal keys take their steps together."""

    length: int
    sampler: str
    banned: tuple[int, ...]  # tokens that a canvas must not begin with


@dataclass
class Canvas:
    """One canvas being denoised, and the request it belongs to."""

    request: int
    settings: Settings
    seed: int
    cache: PrefixCache
    prefix: Prefix | None  # the owner of `cache`, if it outlives the request
    chunk: int  # tokens encoded at a time
    state: State  # of the batch that this canvas is in
    row: int = 0  # of this canvas in `state`
    index: int = 0  # number of the canvas in the request
    step: int = 0  # steps reported
    committed: int = 0  # tokens of earlier canvases
    mean: float = math.inf  # nats: mean entropy of the last step reported
    # a step that was started and is not reported yet, and the row in it
    pending: tuple[State, StepStats, int] | None = None

    def start_next(self, state: State) -> None:
        """Start the next canvas from its first state."""
        self.state, self.row, self.pending = state, 0, None
        self.index, self.step, self.mean = self.index + 1, 0, math.inf

    @property
    def batch_key(self) -> BatchKey:
        banned = tuple(sorted(self.settings.eos)) if self.missing_tokens else ()
        return BatchKey(self.settings.canvas_length, self.settings.sampler, banned)

    @property
    def missing_tokens(self) -> int:
        """How many of its leading positions must not become an eos."""
        return max(0, self.settings.min_tokens - self.committed)

    @property
    def may_run_ahead(self) -> bool:
        """Whether another step is allowed, and likely needed."""
        more = self.step < self.settings.steps
        return more and self.mean > RUN_AHEAD_FACTOR * self.settings.confidence

    def advance(self) -> StepStats:
        """Move on to the step that was started; return what it reports."""
        assert self.pending is not None
        self.state, stats, self.row = self.pending
        self.pending, self.step = None, self.step + 1
        return stats

    def finish_step(self, stats: StepStats) -> Step:
        """Wait for the step the canvas has come to, and return its event."""
        state, row, step = self.state, self.row, self.step - 1
        arrays = state.draft, state.canvas, stats.accepted, stats.entropy
        draft, canvas, accepted, entropy = rows = [array[row] for array in arrays]
        mx.eval(rows, stats.mean, stats.stopped)
        self.mean = float(np.array(stats.mean)[row])
        if not math.isfinite(self.mean):
            raise NumericError(
                f"request {self.request}, canvas {self.index}, step {step}: the model "
                "computes NaN; its weights are damaged (mlx_dgemma.convert --verify), "
                "or too large for float16: convert with --dtype bfloat16"
            )
        return Step(
            request=self.request,
            canvas_index=self.index,
            step=step,
            steps=self.settings.steps,
            temperature=self.settings.temperature(step),
            draft=draft,
            canvas=canvas,
            accepted=accepted,
            entropy=entropy,
            mean_entropy=self.mean,
            stopped=bool(np.array(stats.stopped)[row]),
        )


def join_states(canvases: list[Canvas]) -> State:
    """Return the states of canvases as one; usually they are one batch already."""
    first = canvases[0].state
    together = all(c.state is first and c.row == i for i, c in enumerate(canvases))
    if together and len(first.unchanged) == len(canvases):
        return first
    return State.join([c.state.row(c.row) for c in canvases])


def step_inputs(canvases: list[Canvas]) -> StepInputs:
    """Return keys and settings for the next step of each canvas."""
    purposes = sampler.PROPOSE, sampler.RENOISE
    keys = [
        sampler.random_key(c.seed, c.index, c.step, p)
        for c in canvases
        for p in purposes
    ]
    columns = {
        "temperature": [c.settings.temperature(c.step) for c in canvases],
        "entropy_bound": [c.settings.entropy_bound for c in canvases],
        "stability": [c.settings.stability for c in canvases],
        "confidence": [c.settings.confidence for c in canvases],
        "min_probability": [c.settings.min_probability for c in canvases],
        "min_tokens": [c.missing_tokens for c in canvases],
    }
    return StepInputs(
        keys=mx.array(np.array(keys).reshape(-1, 2, 2)),
        **{name: mx.array(values, mx.float32) for name, values in columns.items()},
    )
