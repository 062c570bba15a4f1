"""One denoising step of B canvases, from arrays to arrays.

    State ─ model ─ vocabulary ─ accept ─ renoise ─► State
                            └► draft, entropy, stop flags

Traced once for each number of rows and bucket of prefixes where the device gains
from it. The inputs of a step depend on no result of the step before, so it can be
started before the host has read that one.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..model.language import DiffusionGemma, View
from ..model.vocab import Banned, VocabStats
from ..settings import SAMPLERS
from . import sampler

FREE_MULTIPLE = 32  # free positions are padded to a multiple, so shapes rarely change


class State(NamedTuple):
    """B canvases between two denoising steps."""

    canvas: mx.array  # (B, L) int32
    signal: mx.array  # (B, L, D), zeros before the first step
    draft: mx.array  # (B, L) int32 argmax canvas, -1 before the first step
    unchanged: mx.array  # (B,) int32: how many drafts in a row equal this one
    revealed: mx.array  # (B, L) int32: tokens revealed for good, -1 elsewhere

    @classmethod
    def first(cls, canvas: mx.array, width: int, dtype: mx.Dtype) -> "State":
        """Return the state of one (L,) canvas before its first step."""
        return cls(
            canvas=canvas[None],
            signal=mx.zeros((1, len(canvas), width), dtype=dtype),
            draft=mx.full((1, len(canvas)), -1, dtype=mx.int32),
            unchanged=mx.zeros((1,), dtype=mx.int32),
            revealed=mx.full((1, len(canvas)), -1, dtype=mx.int32),
        )


class StepStats(NamedTuple):
    """What a step reports beside the next state."""

    accepted: mx.array  # (B, L) bool
    entropy: mx.array  # (B, L) nats
    mean_entropy: mx.array  # (B,) nats
    stopped: mx.array  # (B,) bool: stable and confident


class StepInputs(NamedTuple):
    """Random keys and settings of B canvases for one step; (B,) float32 but `keys`."""

    keys: mx.array  # (B, 2, 2) uint32: to propose and to renoise with
    temperature: mx.array
    entropy_bound: mx.array
    stability: mx.array
    confidence: mx.array
    min_probability: mx.array
    min_tokens: mx.array  # leading positions that must not become a banned token


class Pinned(NamedTuple):
    """Positions whose token is fixed: the vocabulary is not computed for them."""

    tokens: mx.array  # (B, L) int32, -1 where free
    free: mx.array  # (F,) int32 into the B · L positions, the last one repeated

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "Pinned | None":
        """Stack B rows of (L,) pinned ids, -1 where free; None if all are free."""
        tokens = np.stack(rows)
        free = np.flatnonzero(tokens < 0).astype(np.int32)
        if len(free) == tokens.size:
            return None
        padding = -len(free) % FREE_MULTIPLE if len(free) else 0
        free = np.pad(free, (0, padding), mode="edge")
        return cls(mx.array(tokens), mx.array(free))


class Stepper:
    """One denoising step as a function, compiled or not; it keeps no model alive.

    sampler   as in `Settings`
    banned    tokens that a canvas must not begin with, see `StepInputs.min_tokens`
    """

    def __init__(
        self,
        model: DiffusionGemma,
        compiled: bool,
        sampler: str = SAMPLERS[0],
        banned: tuple[int, ...] = (),
    ):
        self._model, self._sampler, self._banned = weakref.ref(model), sampler, banned
        self._compiled = mx.compile(self._trace) if compiled else None

    @property
    def model(self) -> DiffusionGemma:
        model = self._model()
        assert model is not None
        return model

    def __call__(
        self, state: State, view: View, inputs: StepInputs, pinned: Pinned | None
    ) -> tuple[State, StepStats]:
        """Return the next state and what the step reports, unevaluated."""
        arrays = state, view, inputs, pinned
        if self._compiled is None:
            after, stats = self._step(*arrays)
        else:
            after, stats = self._compiled(self.model.parameters(), *arrays)
        return State(*after), StepStats(*stats)

    def _trace(self, weights: dict, *arrays: Any) -> Any:
        """`_step` with the weights as an input, so that training needs no new trace."""
        own = self.model.parameters()
        self.model.update(weights)
        try:
            return self._step(*arrays)
        finally:
            self.model.update(own)

    def _step(self, state, view, inputs, pinned):
        # a compiled function receives plain tuples
        state, view, inputs = State(*state), View(*view), StepInputs(*inputs)
        pinned = None if pinned is None else Pinned(*pinned)
        uniforms, noise = self.draw(inputs.keys, state.canvas.shape[1])
        hidden = self.model.denoise_hidden(state.canvas, view, state.signal)
        found = self._vocab_stats(hidden, inputs, uniforms, pinned)
        return self._decide(state, found, inputs, noise)

    def draw(self, keys: mx.array, length: int) -> tuple[mx.array, mx.array]:
        """Return (B, L) uniforms and (B, L) random ids: the only draws of a step."""
        vocabulary = self.model.config.vocab_size
        uniforms = [mx.random.uniform(shape=(length,), key=key[0]) for key in keys]
        noise = [sampler.random_tokens(key[1], length, vocabulary) for key in keys]
        return mx.stack(uniforms), mx.stack(noise)

    def _vocab_stats(
        self,
        hidden: mx.array,
        inputs: StepInputs,
        uniforms: mx.array,
        pinned: Pinned | None,
    ) -> VocabStats:
        """Return the statistics of (B, L) positions, each field (B, L, …)."""
        B, L, D = hidden.shape
        flat, uniforms, banned = hidden.reshape(B * L, D), uniforms.flatten(), None
        temperature = mx.broadcast_to(inputs.temperature[:, None], (B, L)).flatten()
        if self._banned:
            leading = mx.arange(L) < inputs.min_tokens[:, None]
            banned = Banned(self._banned, leading.flatten())
        if pinned is None:
            found = self.model.vocab_stats(flat, temperature, uniforms, banned)
        else:
            found = self._pinned_stats(pinned.tokens)
            if (free := pinned.free).size:
                banned = None if banned is None else banned.select(free)
                at_free = self.model.vocab_stats(
                    flat[free], temperature[free], uniforms[free], banned
                )
                for array, new in zip(found, at_free, strict=True):
                    array[free] = new
        return VocabStats(*(a.reshape(B, L, *a.shape[1:]) for a in found))

    def _pinned_stats(self, tokens: mx.array) -> VocabStats:
        """Return the statistics of positions that are certain of (B, L) tokens."""
        tokens = mx.maximum(tokens, 0).flatten()
        return VocabStats(
            argmax=tokens,
            peak=mx.ones(tokens.shape),
            entropy=mx.zeros(tokens.shape),
            sample=mx.array(tokens),  # a copy: the arrays are assigned to
            signal=self.model.embed(tokens[None])[0],
        )

    def _decide(
        self, state: State, found: VocabStats, inputs: StepInputs, noise: mx.array
    ) -> tuple[State, StepStats]:
        """Accept or reveal tokens, renoise the rest, and set the stop flags."""
        draft, proposal, revealed = found.argmax, found.sample, state.revealed
        if self._sampler == "entropy-bound":
            # pinned positions have entropy 0, so they are accepted
            accepted = sampler.accept(found.entropy, inputs.entropy_bound)
        elif self._sampler == "confidence":
            # mlx-vlm's confidence-threshold sampler at its temperature 0
            minimum = inputs.min_probability
            revealed = sampler.reveal(found.argmax, found.peak, revealed, minimum)
            accepted, proposal = revealed >= 0, revealed
            draft = mx.where(accepted, revealed, found.argmax)
        else:
            raise NotImplementedError(self._sampler)
        canvas = mx.where(accepted, proposal, noise)
        unchanged = sampler.count_unchanged(draft, state.draft, state.unchanged)
        mean = mx.mean(found.entropy, axis=-1)
        stopped = (unchanged >= inputs.stability) & (mean < inputs.confidence)
        if self._sampler == "confidence":
            stopped = stopped | mx.all(accepted, axis=-1)
        after = State(canvas, found.signal, draft, unchanged, revealed)
        return after, StepStats(accepted, found.entropy, mean, stopped)


_STEPPERS: dict[int, dict[Any, Stepper]] = {}


def stepper_for(
    model: DiffusionGemma, compiled: bool, sampler: str, banned: tuple[int, ...]
) -> Stepper:
    """Return the `Stepper` of these arguments; it is kept as long as the model is."""
    if id(model) not in _STEPPERS:
        _STEPPERS[id(model)] = {}
        weakref.finalize(model, _STEPPERS.pop, id(model))
    steppers, options = _STEPPERS[id(model)], (compiled, sampler, banned)
    if options not in steppers:
        steppers[options] = Stepper(model, *options)
    return steppers[options]
