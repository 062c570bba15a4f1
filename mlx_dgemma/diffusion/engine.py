"""The one denoising loop: canvases of any requests, one step at a time.

A tick takes one denoising step for every running canvas. Each has its own prefix,
settings, random keys and stop state, so requests come and go between ticks
without changing one another. Knows token ids, not text.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import mlx.core as mx

from .. import backends
from ..errors import SettingsError
from ..model.cache import PrefixCache
from ..model.language import DiffusionGemma, View
from ..model.vision import Image
from ..settings import Settings
from . import sampler
from .canvas import BatchKey, Canvas, PendingStep, dials, joined, pins
from .events import Commit, Event, Prefilled, Step
from .image_spans import ImageSpan, keys_of
from .prefix import Prefix, chunk_ends
from .step import State, Stepper

PREFILL_STEP = 2048  # tokens encoded at a time, so that memory stays linear


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
        device = backends.current()
        self._ahead = device.runs_ahead if ahead is None else ahead
        self._compiled = device.compiles if compiled is None else compiled
        self._numbers = itertools.count()
        # by lane: which canvases, and what they see
        self._views: dict[BatchKey, tuple[tuple[tuple[int, int], ...], View]] = {}

    def admit(
        self,
        prompt: Sequence[int],
        settings: Settings,
        seed: int,
        prefill_step_size: int = PREFILL_STEP,
        *,
        prefix: Prefix | None = None,
        image_spans: Sequence[ImageSpan] = (),
    ) -> Prefilled:
        """Encode a prompt and start its first canvas; returns its event.

        prefix: of what it holds the prompt's beginning is not encoded again. The
        request writes to it until it ends or is cancelled. image_spans: pictures that
        stand in the prompt instead of its ids there, in order.

        Raises SettingsError for ids outside the vocabulary, and for a prefix that is
        another model's or another running request's.
        """
        check_ids(prompt, settings, self.model.config.vocab_size)
        if prefix is not None:
            prefix.check_free()
            if prefix.model is not self.model:
                raise SettingsError("this prefix is another model's; make a new one")
        started = time.perf_counter()
        cache = self.model.make_cache() if prefix is None else prefix.cache
        cache.reserve(len(prompt) + settings.canvas_length)
        canvas = Canvas(
            request=next(self._numbers),
            settings=settings,
            seed=seed,
            prefix=cache,
            owner=prefix,
            chunk=prefill_step_size,
            state=self._first(settings, seed, 0, 0),
        )
        spans, reused = [place.span for place in image_spans], 0
        ends = chunk_ends(prompt, settings.eos, prefill_step_size, spans)

        def encode(start: int, end: int) -> None:
            images = self._images(image_spans, start, end)
            self._append(canvas, prompt[start:end], images)

        if prefix is None:
            for start, end in itertools.pairwise([0, *ends]):
                encode(start, end)
        else:
            reused = prefix.fill(keys_of(prompt, image_spans), ends, encode)
        self.running.append(canvas)  # from now on `cancel` gives the prefix back
        if prefix is not None:
            prefix.in_use = True
        return Prefilled(
            request=canvas.request,
            seed=seed,
            prompt_tokens=len(prompt),
            seconds=time.perf_counter() - started,
            reused=reused,
        )

    def cancel(self, request: int) -> None:
        """Forget a request. What it committed stays with whoever received it."""
        for canvas in self.running:
            if canvas.request == request and canvas.owner is not None:
                canvas.owner.in_use = False
                canvas.owner.trim()
        self.running = [c for c in self.running if c.request != request]
        # views hold prefixes, which may be wanted for writing now
        self._views = {
            lane: (seen, view)
            for lane, (seen, view) in self._views.items()
            if all(number != request for number, _ in seen)
        }

    def tick(self) -> list[Event]:
        """One denoising step for every running canvas; what came of it."""
        lanes: dict[BatchKey, list[Canvas]] = defaultdict(list)
        for canvas in self.running:
            lanes[canvas.lane].append(canvas)
        self._views = {n: view for n, view in self._views.items() if n in lanes}
        steps = [step for lane in lanes.values() for step in self._advance(lane)]
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

    def _first(
        self, settings: Settings, seed: int, index: int, committed: int
    ) -> State:
        """Canvas number `index` before its first step: noise around what is given."""
        config, length = self.model.config, settings.canvas_length
        key = sampler.fold(seed, index, 0, sampler.CANVAS)
        tokens = sampler.random_tokens(key, length, config.vocab_size)
        pinned = mx.array(sampler.pinned_row(settings.pinned, committed, length))
        tokens = mx.where(pinned >= 0, pinned, tokens)
        state = State.first(tokens, config.hidden_size, self.model.dtype)
        mx.eval(state.arrays)  # an unevaluated array can be used in this thread only
        return state

    def _encode(self, canvas: Canvas, tokens: Sequence[int]) -> None:
        start = 0
        for end in chunk_ends(tokens, canvas.settings.eos, canvas.chunk):
            self._append(canvas, tokens[start:end])
            start = end

    def _append(
        self, canvas: Canvas, tokens: Sequence[int], images: Sequence[Image] = ()
    ) -> None:
        ids = mx.array([tokens], dtype=mx.int32)
        self.model.encode(ids, canvas.prefix, images)
        canvas.prefix.evaluate()

    def _images(
        self, image_spans: Sequence[ImageSpan], start: int, end: int
    ) -> list[Image]:
        """Pictures among the tokens start … end-1, looked at now."""
        inside = [place for place in image_spans if start <= place.start < end]
        if not inside:
            return []
        if (eyes := self.model.vision) is None:
            raise SettingsError("pictures were given; this checkpoint reads text only")
        return [
            Image(
                place.start - start,
                eyes.encode_image(place.picture.patches, place.picture.positions),
            )
            for place in inside
        ]

    def _advance(self, lane: list[Canvas]) -> list[tuple[Canvas, Step]]:
        """Take a step of canvases of a lane, starting the next if it is wanted."""
        if new := [canvas for canvas in lane if canvas.ahead is None]:
            self._start(new)
        taken = [canvas.take() for canvas in lane]
        if self._ahead and all(canvas.wants_ahead for canvas in lane):
            self._start(lane)
        steps = []
        for canvas, one in zip(lane, taken, strict=True):
            steps.append((canvas, canvas.report(one)))
        return steps

    def _start(self, canvases: list[Canvas]) -> None:
        """Start one step of these canvases, and look at nothing."""
        lane = canvases[0].lane
        stepper = self.model.programs.get(
            (Stepper, self._compiled, lane.config),
            lambda: Stepper(self.model, compiled=self._compiled, config=lane.config),
        )
        state, outcome = stepper(
            joined(canvases),
            self._seen(canvases),
            dials(canvases),
            pins(canvases, lane.length),
        )
        for row, canvas in enumerate(canvases):
            canvas.ahead = PendingStep(state, outcome, row)
        mx.async_eval(state.arrays, outcome.arrays)

    def _seen(self, canvases: list[Canvas]) -> View:
        """What these canvases see, made again only when one of them comes or goes."""
        lane = canvases[0].lane
        key = tuple((c.request, c.index) for c in canvases)
        known, view = self._views.get(lane, (None, None))
        if view is None or known != key:
            prefix = canvases[0].prefix
            if len(canvases) > 1:
                prefix = PrefixCache.join(
                    self.model.config, [c.prefix for c in canvases]
                )
                prefix.evaluate()
            view = self.model.view(prefix, lane.length, bucketed=self._compiled)
            self._views[lane] = (key, view)
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
        self._views.pop(canvas.lane, None)
        self._encode(canvas, whole)
        canvas.committed += len(whole)
        following = canvas.seed, canvas.index + 1, canvas.committed
        canvas.begin(self._first(settings, *following))
        return commit


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
