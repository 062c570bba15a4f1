"""One canvas of a request, from its noise to its commit."""

import math
from dataclasses import dataclass, field
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from ..model.language import DiffusionGemma
from ..settings import Settings
from . import sampler
from .events import Step
from .prefix import Prefix
from .step import State, StepInputs, StepStats

RUN_AHEAD_FACTOR = 10  # mean entropies above this multiple of `confidence`


# Canvases of one length, sampler and tokens they must not begin with share a batch.
BatchKey: TypeAlias = tuple[int, str, tuple[int, ...]]


@dataclass
class Canvas:
    """One canvas being denoised, and the request it belongs to."""

    request: int
    settings: Settings
    seed: int
    prefix: Prefix  # what the canvas follows
    prefill_step_size: int
    index: int = 0  # number of the canvas in the request
    committed: int = 0  # tokens of earlier canvases
    state: State = field(init=False)  # of the batch that this canvas is in
    row: int = 0  # of this canvas in `state`
    step: int = 0  # steps reported
    mean_entropy: float = math.inf  # nats, of the last step reported
    # a step that was started and is not reported yet, and the row in it
    pending: tuple[State, StepStats, int] | None = None

    def start(self, model: DiffusionGemma) -> None:
        """Fill the canvas with noise and pinned ids, before its first step."""
        length, config = self.settings.canvas_length, model.config
        key = sampler.random_key(self.seed, self.index, 0, sampler.CANVAS)
        noise = sampler.random_tokens(key, length, config.vocab_size)
        pinned = mx.array(self.pinned_tokens)
        tokens = mx.where(pinned >= 0, pinned, noise)
        self.state = State.first(tokens, config.hidden_size, model.dtype)
        self.row, self.step, self.mean_entropy, self.pending = 0, 0, math.inf, None
        mx.eval(self.state)  # an unevaluated array can be used in this thread only

    @property
    def pinned_tokens(self) -> np.ndarray:
        """Pinned ids of this canvas, (L,) int32, -1 where a position is free."""
        row = np.full(self.settings.canvas_length, -1, np.int32)
        for position, token in self.settings.pinned.items():
            if 0 <= position - self.committed < len(row):
                row[position - self.committed] = token
        return row

    @property
    def batch_key(self) -> BatchKey:
        banned = tuple(sorted(self.settings.eos)) if self.missing_tokens else ()
        return self.settings.canvas_length, self.settings.sampler, banned

    @property
    def missing_tokens(self) -> int:
        """How many of its leading positions must not become an eos."""
        return max(0, self.settings.min_tokens - self.committed)

    @property
    def may_run_ahead(self) -> bool:
        """Whether another step is allowed, and likely needed."""
        likely = self.mean_entropy > RUN_AHEAD_FACTOR * self.settings.confidence
        return likely and self.step < self.settings.steps

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
        mx.eval(rows, stats.mean_entropy, stats.stopped)
        self.mean_entropy = float(np.array(stats.mean_entropy)[row])
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
            mean_entropy=self.mean_entropy,
            stopped=bool(np.array(stats.stopped)[row]),
        )


def join_states(canvases: list[Canvas]) -> State:
    """Return the states of canvases as one; usually they are one batch already."""
    first = canvases[0].state
    together = all(c.state is first and c.row == i for i, c in enumerate(canvases))
    if together and len(first.unchanged) == len(canvases):
        return first
    rows = [[array[c.row : c.row + 1] for array in c.state] for c in canvases]
    return State(*(mx.concatenate(list(column)) for column in zip(*rows, strict=True)))


def step_inputs(canvases: list[Canvas]) -> StepInputs:
    """Return keys and settings for the next step of each canvas."""
    purposes = sampler.PROPOSE, sampler.RENOISE
    keys = [
        [sampler.random_key(c.seed, c.index, c.step, purpose) for purpose in purposes]
        for c in canvases
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
        keys=mx.array(np.array(keys)),
        **{name: mx.array(values, mx.float32) for name, values in columns.items()},
    )
