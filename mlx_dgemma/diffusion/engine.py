"""The one denoising loop: canvases of any requests, one step at a time.

A tick takes one denoising step for every running canvas. Each has its own prefix,
settings, random keys and stop state, so requests come and go between ticks
without changing one another. Knows token ids, not text.
"""

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .. import backends
from ..errors import SettingsError
from ..model.cache import PrefixCache
from ..model.language import DiffusionGemma, View
from . import sampler
from .events import Commit, Event, Prefilled, Step
from .settings import Settings
from .step import Dials, Outcome, Pins, State, Stepper

PREFILL_STEP = 2048  # tokens encoded at a time, so that memory stays linear
FAR = 10  # a mean entropy of this many times `confidence` is far from its end


@dataclass(frozen=True)
class Taken:
    """A denoising step of one canvas that was started: its row of a batch."""

    state: State
    outcome: Outcome
    row: int


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
    index: int = 0
    step: int = 0  # steps reported
    committed: int = 0  # tokens of earlier canvases
    mean: float = math.inf  # nats: mean entropy of the last step reported
    ahead: Taken | None = None  # a step started, not yet reported

    @property
    def far_from_done(self) -> bool:
        """Whether the step after the running one will surely, or likely, be wanted."""
        more = self.step + 1 < self.settings.steps
        return more and self.mean > FAR * self.settings.confidence


class Engine:
    """Denoises the canvases of any number of requests with one model.

    ahead: start each step before the host has looked at the one before. A step that
    turns out to come after its canvas was done is dropped: nothing else changes.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        *,
        compiled: bool | None = None,
        ahead: bool | None = None,
    ):
        self.model = model
        self.running: list[Canvas] = []
        self._ahead = backends.runs_ahead() if ahead is None else ahead
        compiled = backends.compiles() if compiled is None else compiled
        self._stepper = model.programs.get(
            ("step", compiled), lambda: Stepper(model, compiled=compiled)
        )
        self._numbers = itertools.count()
        # by canvas length: which canvases, and what they see
        self._views: dict[int, tuple[tuple[tuple[int, int], ...], View]] = {}

    def admit(
        self,
        prompt: Sequence[int],
        settings: Settings,
        seed: int,
        prefill_step_size: int = PREFILL_STEP,
    ) -> Prefilled:
        """Encode a prompt and start its first canvas; returns its event.

        Raises SettingsError for ids outside the vocabulary.
        """
        check_ids(prompt, settings, self.model.config.vocab_size)
        started = time.perf_counter()
        prefix = self.model.make_cache()
        prefix.reserve(len(prompt) + settings.canvas_length)
        canvas = Canvas(
            request=next(self._numbers),
            settings=settings,
            seed=seed,
            prefix=prefix,
            chunk=prefill_step_size,
            state=self._first(settings, seed, 0),
        )
        self._encode(canvas, prompt)
        self.running.append(canvas)
        return Prefilled(
            request=canvas.request,
            seed=seed,
            prompt_tokens=len(prompt),
            seconds=time.perf_counter() - started,
        )

    def cancel(self, request: int) -> None:
        """Forget a request. What it committed stays with whoever received it."""
        self.running = [c for c in self.running if c.request != request]

    def tick(self) -> list[Event]:
        """One denoising step for every running canvas; what came of it."""
        groups: dict[int, list[Canvas]] = defaultdict(list)
        for canvas in self.running:
            groups[canvas.settings.canvas_length].append(canvas)
        self._views = {n: view for n, view in self._views.items() if n in groups}
        steps = [step for group in groups.values() for step in self._advance(group)]
        events: list[Event] = []
        for canvas, step in steps:
            events.append(step)
            if step.last:
                events.append(self._commit(canvas, step.draft))
        return events

    def run(self) -> Iterator[Event]:
        """Tick until no canvas is left."""
        while self.running:
            yield from self.tick()

    def _first(self, settings: Settings, seed: int, index: int) -> State:
        """Canvas number `index` before its first step: noise around what is given."""
        config, length = self.model.config, settings.canvas_length
        key = sampler.fold(seed, index, 0, sampler.CANVAS)
        tokens = sampler.random_tokens(key, length, config.vocab_size)
        pinned = mx.array(sampler.pinned_row(settings.pinned, index, length))
        tokens = mx.where(pinned >= 0, pinned, tokens)
        state = State.first(tokens, config.hidden_size, self.model.dtype)
        mx.eval(state.arrays)  # an unevaluated array can be used in this thread only
        return state

    def _encode(self, canvas: Canvas, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), canvas.chunk):
            part = tokens[start : start + canvas.chunk]
            self.model.encode(mx.array([part], dtype=mx.int32), canvas.prefix)
            canvas.prefix.evaluate()

    def _advance(self, group: list[Canvas]) -> list[tuple[Canvas, Step]]:
        """Take a step of canvases of one length, starting the next if it is wanted."""
        if new := [canvas for canvas in group if canvas.ahead is None]:
            self._start(new)
        taken = []
        for canvas in group:
            assert canvas.ahead is not None
            taken.append(canvas.ahead)
            canvas.state, canvas.row = canvas.ahead.state, canvas.ahead.row
            canvas.step, canvas.ahead = canvas.step + 1, None
        if self._ahead and all(canvas.far_from_done for canvas in group):
            self._start(group)
        return [(c, _report(c, t)) for c, t in zip(group, taken, strict=True)]

    def _start(self, canvases: list[Canvas]) -> None:
        """Start one step of these canvases, and look at nothing."""
        length = canvases[0].settings.canvas_length
        pinned = [
            sampler.pinned_row(c.settings.pinned, c.index, length) for c in canvases
        ]
        state, outcome = self._stepper(
            _joined(canvases), self._view(canvases), _dials(canvases), Pins.of(pinned)
        )
        rows = [Taken(state, outcome, row) for row in range(len(canvases))]
        for canvas, taken in zip(canvases, rows, strict=True):
            canvas.ahead = taken
        mx.async_eval(state.arrays, outcome.arrays)

    def _view(self, canvases: list[Canvas]) -> View:
        """What these canvases see, made again only when one of them comes or goes."""
        length = canvases[0].settings.canvas_length
        key = tuple((c.request, c.index) for c in canvases)
        known, view = self._views.get(length, (None, None))
        if view is None or known != key:
            prefix = canvases[0].prefix
            if len(canvases) > 1:
                prefix = PrefixCache.join(
                    self.model.config, [c.prefix for c in canvases]
                )
                prefix.evaluate()
            view = self.model.view(prefix, length, bucketed=self._stepper.compiled)
            self._views[length] = (key, view)
        return view

    def _commit(self, canvas: Canvas, argmax: mx.array) -> Commit:
        """Make the argmax canvas final; encode it only if another one follows."""
        whole: list[int] = argmax.tolist()  # type: ignore[assignment]
        settings = canvas.settings
        end = next((i for i, t in enumerate(whole) if t in settings.eos), None)
        tokens = tuple(whole[: settings.max_tokens - canvas.committed][:end])
        reason = None
        if end is not None and canvas.committed + end <= settings.max_tokens:
            reason = "stop"
        elif canvas.committed + len(whole) >= settings.max_tokens:
            reason = "length"
        commit = Commit(
            request=canvas.request,
            canvas_index=canvas.index,
            tokens=tokens,
            steps=canvas.step,
            finish_reason=reason,
        )
        if reason is not None:
            self.cancel(canvas.request)
            return commit
        # a view holds the prefix, which could then not be written in place
        self._views.pop(settings.canvas_length, None)
        self._encode(canvas, whole)
        canvas.committed += len(whole)
        canvas.index += 1
        canvas.step, canvas.mean, canvas.ahead = 0, math.inf, None
        canvas.state, canvas.row = self._first(settings, canvas.seed, canvas.index), 0
        return commit


def _joined(canvases: list[Canvas]) -> State:
    """The states of canvases, which mostly are one batch already."""
    whole = canvases[0].state
    together = all(c.state is whole and c.row == i for i, c in enumerate(canvases))
    if together and len(whole.streak) == len(canvases):
        return whole
    return State.join([c.state.row(c.row) for c in canvases])


def _dials(canvases: list[Canvas]) -> Dials:
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
        )
        for c in canvases
    ]
    return Dials(mx.array(np.array(keys)), mx.array(np.array(numbers, np.float32)))


def _report(canvas: Canvas, taken: Taken) -> Step:
    """Wait for a step and tell what it found."""
    state, outcome, row = taken.state, taken.outcome, taken.row
    rows = state.draft[row], state.canvas[row], outcome.accepted[row]
    entropy = outcome.entropy[row]
    mx.eval(rows, entropy, outcome.mean, outcome.stopped)
    draft, tokens, accepted = rows
    canvas.mean = float(np.array(outcome.mean)[row])
    step = canvas.step - 1
    return Step(
        request=canvas.request,
        canvas_index=canvas.index,
        step=step,
        steps=canvas.settings.steps,
        temperature=canvas.settings.temperature(step),
        draft=draft,
        canvas=tokens,
        accepted=accepted,
        entropy=entropy,
        mean_entropy=canvas.mean,
        stopped=bool(np.array(outcome.stopped)[row]),
    )


def check_ids(prompt: Sequence[int], settings: Settings, vocab_size: int) -> None:
    """Raise SettingsError for ids, given or pinned, the model has no row for."""
    if not prompt:
        raise SettingsError("prompt is empty; give at least one token")
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise SettingsError(
                f"prompt holds id {token}; this model knows 0 to {vocab_size - 1}"
            )
    for position, token in settings.pinned.items():
        if token >= vocab_size:
            raise SettingsError(
                f"pinned[{position}] is {token}; this model knows 0 to {vocab_size - 1}"
            )
        if position >= settings.canvases * settings.canvas_length:
            raise SettingsError(
                f"pinned position {position} lies behind max_tokens "
                f"{settings.max_tokens}"
            )
