"""One canvas of a request, from its noise to its commit."""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..model.cache import PrefixCache
from ..settings import Settings
from . import sampler
from .events import Step
from .prefix import Prefix
from .step import Pinned, State, StepConfig, StepInputs, StepStats

FAR = 10  # a mean entropy of this many times `confidence` is far from its end


@dataclass(frozen=True)
class PendingStep:
    """A denoising step of one canvas that was started: its row of a batch."""

    state: State
    outcome: StepStats
    row: int


@dataclass(frozen=True)
class BatchKey:
    """What canvases that step together have in common."""

    length: int
    config: StepConfig


@dataclass
class Canvas:
    """One canvas being denoised, and the request it belongs to."""

    request: int
    settings: Settings
    seed: int
    prefix: PrefixCache
    chunk: int  # tokens encoded at a time
    state: State  # of a batch …
    row: int = 0  # … in which this is its row
    owner: Prefix | None = None  # whose cache `prefix` is, if it outlives the request
    index: int = 0
    step: int = 0  # steps reported
    committed: int = 0  # tokens of earlier canvases
    mean: float = math.inf  # nats: mean entropy of the last step reported
    ahead: PendingStep | None = None  # a step started, not yet reported

    def begin(self, state: State) -> None:
        """Start the next canvas from its first state."""
        self.state, self.row = state, 0
        self.index, self.step, self.mean = self.index + 1, 0, math.inf
        self.ahead = None

    @property
    def lane(self) -> BatchKey:
        """Canvases of one lane step together."""
        banned = tuple(sorted(self.settings.eos)) if self.endless else ()
        config = StepConfig(self.settings.sampler, banned)
        return BatchKey(self.state.canvas.shape[1], config)

    @property
    def endless(self) -> int:
        """How many of its first positions must not become an eos."""
        return max(0, self.settings.min_tokens - self.committed)

    @property
    def wants_ahead(self) -> bool:
        """Whether a step behind the one just taken is allowed, and likely wanted."""
        more = self.step < self.settings.steps
        return more and self.mean > FAR * self.settings.confidence

    def take(self) -> PendingStep:
        """Move on to the step that was started."""
        assert self.ahead is not None
        taken, self.ahead = self.ahead, None
        self.state, self.row = taken.state, taken.row
        self.step += 1
        return taken

    def report(self, taken: PendingStep) -> Step:
        """Wait for a step and tell what it found."""
        state, outcome, row = taken.state, taken.outcome, taken.row
        rows = state.draft[row], state.canvas[row], outcome.accepted[row]
        entropy = outcome.entropy[row]
        mx.eval(rows, entropy, outcome.mean, outcome.stopped)
        draft, tokens, accepted = rows
        self.mean = float(np.array(outcome.mean)[row])
        step = self.step - 1
        return Step(
            request=self.request,
            canvas_index=self.index,
            step=step,
            steps=self.settings.steps,
            temperature=self.settings.temperature(step),
            draft=draft,
            canvas=tokens,
            accepted=accepted,
            entropy=entropy,
            mean_entropy=self.mean,
            stopped=bool(np.array(outcome.stopped)[row]),
        )


def joined(canvases: list[Canvas]) -> State:
    """The states of canvases, which mostly are one batch already."""
    whole = canvases[0].state
    together = all(c.state is whole and c.row == i for i, c in enumerate(canvases))
    if together and len(whole.streak) == len(canvases):
        return whole
    return State.join([c.state.row(c.row) for c in canvases])


def dials(canvases: list[Canvas]) -> StepInputs:
    """What the host tells the next step of each canvas."""
    keys = [
        [
            sampler.fold(c.seed, c.index, c.step, purpose)
            for purpose in (sampler.PROPOSE, sampler.RENOISE)
        ]
        for c in canvases
    ]
    numbers = [
        (
            c.settings.temperature(c.step),
            c.settings.entropy_bound,
            c.settings.stability,
            c.settings.confidence,
            c.settings.min_probability,
            c.endless,
        )
        for c in canvases
    ]
    return StepInputs(mx.array(np.array(keys)), mx.array(np.array(numbers, np.float32)))


def pins(canvases: list[Canvas], length: int) -> Pinned | None:
    """Which of the canvases' tokens are given."""
    return Pinned.of(
        [sampler.pinned_row(c.settings.pinned, c.committed, length) for c in canvases]
    )
