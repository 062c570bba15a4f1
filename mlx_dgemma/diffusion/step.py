"""One denoising step of B canvases, from arrays to arrays.

    State ─ model ─ vocabulary ─ accept ─ renoise ─► State
                            └► draft, entropy, stop flags

Traced once for each number of rows and bucket of prefixes where the device gains
from it. What the host gives, keys and dials, depends on no result: a step can be
started before anybody looked at the one before it.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..model.language import DiffusionGemma, View
from ..model.vocab import Banned, VocabStats
from ..settings import SAMPLERS
from . import sampler

ROUND = 32  # free positions are counted in these, so that shapes rarely change


@dataclass(frozen=True)
class State:
    """What a step of B canvases hands to the next one."""

    canvas: mx.array  # (B, L) int32
    signal: mx.array  # (B, L, D), zeros before the first step
    draft: mx.array  # (B, L) int32 argmax canvas, -1 before the first step
    streak: mx.array  # (B,) int32: how many drafts in a row equal this one
    held: mx.array  # (B, L) int32: tokens revealed for good, -1 elsewhere

    @classmethod
    def first(cls, canvas: mx.array, width: int, dtype: mx.Dtype) -> "State":
        """Of one canvas before its first step."""
        return cls(
            canvas=canvas[None],
            signal=mx.zeros((1, len(canvas), width), dtype=dtype),
            draft=mx.full((1, len(canvas)), -1, dtype=mx.int32),
            streak=mx.zeros((1,), dtype=mx.int32),
            held=mx.full((1, len(canvas)), -1, dtype=mx.int32),
        )

    @property
    def arrays(self) -> list[mx.array]:
        return [self.canvas, self.signal, self.draft, self.streak, self.held]

    def row(self, index: int) -> "State":
        """The state of one canvas."""
        return State(*(array[index : index + 1] for array in self.arrays))

    @classmethod
    def join(cls, states: Sequence["State"]) -> "State":
        """The states of several canvases as one."""
        columns = zip(*(state.arrays for state in states), strict=True)
        return cls(*(mx.concatenate(list(column)) for column in columns))


@dataclass(frozen=True)
class StepStats:
    """What a step found, beside the next state."""

    accepted: mx.array  # (B, L) bool
    entropy: mx.array  # (B, L) nats
    mean: mx.array  # (B,) nats
    stopped: mx.array  # (B,) bool: stable and confident

    @property
    def arrays(self) -> list[mx.array]:
        return [self.accepted, self.entropy, self.mean, self.stopped]


@dataclass(frozen=True)
class StepInputs:
    """What the host tells each of B canvases for one step."""

    keys: mx.array  # (B, 2, 2) uint32: random keys to propose and to renoise with
    # (B, 6): temperature, entropy bound, stability, confidence, least probability, how
    # many of the first positions must not become what is banned
    numbers: mx.array


@dataclass(frozen=True)
class Pinned:
    """Positions whose token is given: nobody reads the vocabulary for them."""

    tokens: mx.array  # (B, L) int32, -1 where free
    free: mx.array  # (F,) int32 into the B · L positions, the last one repeated

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "Pinned | None":
        """Of (L,) rows of given ids, -1 where free; None when nothing is given."""
        tokens = np.stack(rows)
        free = np.flatnonzero(tokens < 0).astype(np.int32)
        if len(free) == tokens.size:
            return None
        free = np.pad(free, (0, -len(free) % ROUND if len(free) else 0), mode="edge")
        return cls(mx.array(tokens), mx.array(free))


@dataclass(frozen=True)
class StepConfig:
    """How steps are taken, alike for all canvases of a batch."""

    sampler: str = SAMPLERS[0]
    banned: tuple[int, ...] = ()  # tokens that a canvas must not begin with


class Stepper:
    """Takes denoising steps with one model; `traces` counts how often it was traced.

    It does not keep the model alive.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        *,
        compiled: bool,
        config: StepConfig = StepConfig(),
    ):
        self._model, self.config = weakref.ref(model), config
        self.traces = 0
        self._compiled = mx.compile(self._trace) if compiled else None

    @property
    def model(self) -> DiffusionGemma:
        model = self._model()
        assert model is not None
        return model

    def __call__(
        self, state: State, view: View, dials: StepInputs, pins: Pinned | None
    ) -> tuple[State, StepStats]:
        """The next state and what was found; nothing is evaluated."""
        given = None if pins is None else [pins.tokens, pins.free]
        inputs = [dials.keys, dials.numbers]
        arrays = state.arrays, view.arrays, inputs, given
        if self._compiled is None:
            after, found = self._step(*arrays)
        else:
            after, found = self._compiled(self.model.parameters(), *arrays)
        return State(*after), StepStats(*found)

    def _trace(self, weights: dict, *arrays: Any) -> Any:
        """`_step` of other weights: after training, the same trace runs on new ones."""
        own = self.model.parameters()
        self.model.update(weights)
        try:
            return self._step(*arrays)
        finally:
            self.model.update(own)

    def _step(self, state, seen, dials, given):
        self.traces += 1
        state, view, dials = State(*state), View(*seen), StepInputs(*dials)
        pins = None if given is None else Pinned(*given)
        uniforms, noise = self.draw(dials.keys, state.canvas.shape[1])
        hidden = self.model.denoise_hidden(state.canvas, view, state.signal)
        reading = self.read(hidden, dials.numbers, uniforms, pins)
        decide = DECISIONS[self.config.sampler]
        after, found = decide(state, reading, dials.numbers, noise, pins)
        return after.arrays, found.arrays

    def draw(self, keys: mx.array, length: int) -> tuple[mx.array, mx.array]:
        """(B, L) uniforms and (B, L) random ids: the only draws of a step."""
        vocabulary = self.model.config.vocab_size
        uniforms = [mx.random.uniform(shape=(length,), key=key[0]) for key in keys]
        noise = [sampler.random_tokens(key[1], length, vocabulary) for key in keys]
        return mx.stack(uniforms), mx.stack(noise)

    def read(
        self,
        hidden: mx.array,
        numbers: mx.array,
        uniforms: mx.array,
        pins: Pinned | None,
    ) -> VocabStats:
        """The vocabulary's answer at (B, L) positions, each field (B, L, …).

        A given position is certain of its token: entropy 0, its own embedding.
        """
        B, L, D = hidden.shape
        flat = hidden.reshape(B * L, D)
        temperature = mx.broadcast_to(numbers[:, :1], (B, L)).flatten()
        banned = None
        if self.config.banned:
            first = mx.arange(L) < numbers[:, 5:]
            banned = Banned(self.config.banned, first.flatten())
        if pins is None:
            found = self.model.vocab_stats(
                flat, temperature, uniforms.flatten(), banned
            )
            return _shaped(found, B, L)
        tokens = mx.maximum(pins.tokens, 0).flatten()
        nothing = mx.zeros((B * L,))
        certain = VocabStats(
            argmax=tokens,
            peak=nothing + 1,
            entropy=nothing,
            sample=tokens,
            signal=self.model.embed(tokens[None])[0],
        )
        if pins.free.size == 0:
            return _shaped(certain, B, L)
        free = pins.free
        some = None if banned is None else banned.select(free)
        found = self.model.vocab_stats(
            flat[free], temperature[free], uniforms.flatten()[free], some
        )
        return _shaped(_placed(certain, found, free), B, L)


_STEPPERS: dict[int, dict[Any, Stepper]] = {}


def stepper_for(
    model: DiffusionGemma, config: StepConfig, *, compiled: bool
) -> Stepper:
    """Return the stepper of a model and config; it is kept as long as the model is."""
    if id(model) not in _STEPPERS:
        _STEPPERS[id(model)] = {}
        weakref.finalize(model, _STEPPERS.pop, id(model))
    known = _STEPPERS[id(model)]
    if (config, compiled) not in known:
        known[config, compiled] = Stepper(model, compiled=compiled, config=config)
    return known[config, compiled]


def _bounded(
    state: State,
    reading: VocabStats,
    numbers: mx.array,
    noise: mx.array,
    pins: Pinned | None,
) -> tuple[State, StepStats]:
    """Accept the surest samples under the entropy bound, renoise the rest."""
    accepted = sampler.accept(reading.entropy, numbers[:, 1])
    if pins is not None:
        accepted = accepted | (pins.tokens >= 0)
    canvas = mx.where(accepted, reading.sample, noise)
    streak, mean, stopped = _stop(state, reading, numbers)
    after = State(canvas, reading.signal, reading.argmax, streak, state.held)
    return after, StepStats(accepted, reading.entropy, mean, stopped)


def _confident(
    state: State,
    reading: VocabStats,
    numbers: mx.array,
    noise: mx.array,
    pins: Pinned | None,
) -> tuple[State, StepStats]:
    """Reveal what is likely enough, for good; done when all is revealed.

    The confidence-threshold sampler of mlx-vlm at its temperature 0.
    """
    held = sampler.reveal(reading.argmax, reading.peak, state.held, numbers[:, 4])
    accepted = held >= 0
    draft = mx.where(accepted, held, reading.argmax)
    streak, mean, stopped = _stop(state, replace(reading, argmax=draft), numbers)
    stopped = stopped | mx.all(accepted, axis=-1)
    canvas = mx.where(accepted, held, noise)
    after = State(canvas, reading.signal, draft, streak, held)
    return after, StepStats(accepted, reading.entropy, mean, stopped)


def _stop(
    state: State, reading: VocabStats, numbers: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """(B,) streaks, mean entropies, and whether a canvas is stable and confident."""
    streak = sampler.count_unchanged(reading.argmax, state.draft, state.streak)
    mean = mx.mean(reading.entropy, axis=-1)
    return streak, mean, (streak >= numbers[:, 2]) & (mean < numbers[:, 3])


DECISIONS: dict[str, Callable[..., tuple[State, StepStats]]] = dict(
    zip(SAMPLERS, (_bounded, _confident), strict=True)
)


def _placed(everywhere: VocabStats, found: VocabStats, at: mx.array) -> VocabStats:
    """A reading with some of its positions replaced."""
    arrays = []
    for whole, part in zip(everywhere.arrays, found.arrays, strict=True):
        whole = mx.array(whole)  # a copy: assignment changes its left side
        whole[at] = part
        arrays.append(whole)
    return VocabStats(*arrays)


def _shaped(reading: VocabStats, rows: int, length: int) -> VocabStats:
    return VocabStats(*(a.reshape(rows, length, *a.shape[1:]) for a in reading.arrays))
