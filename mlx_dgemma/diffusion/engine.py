"""The denoising loop: canvases of any number of requests, one step at a time.

A tick takes one denoising step for every running canvas. Each has its own prefix,
settings, random keys and stop state, so requests come and go between ticks
without changing one another. Knows token ids, not text.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock

import mlx.core as mx

from .. import backends
from ..checkpoint.config import ModelConfig
from ..errors import NumericError, SettingsError
from ..model.cache import PrefixCache
from ..model.language import DiffusionGemma, View
from ..model.vision import Image
from ..settings import Settings
from . import sampler
from .canvas import BatchKey, Canvas, join_states, step_inputs
from .events import Commit, Event, Prefilled, Step
from .prefix import ImageSpan, Prefix, chunk_ends, prefix_keys
from .step import Pinned, State, stepper_for

PromptProgress = Callable[[int, int], None]  # tokens encoded, tokens in all
PREFILL_STEP = 2048  # tokens encoded at a time, so that memory stays linear


class Engine:
    """Denoises the canvases of any number of requests with one model.

    compiled   run compiled steps; None for the default of the device
    ahead      start each step before the host has read the one before; None for the
               default of the device. A step started behind the last one of its canvas
               is dropped, so no event changes.
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
        self._request_numbers = itertools.count()
        self._lock = Lock()
        # by batch: (request, canvas index) of its canvases, and their view
        self._views: dict[BatchKey, tuple[list[tuple[int, int]], View]] = {}

    def admit(
        self,
        prompt: Sequence[int],
        settings: Settings,
        seed: int,
        prefill_step_size: int = PREFILL_STEP,
        *,
        prefix: Prefix | None = None,
        image_spans: Sequence[ImageSpan] = (),
        prompt_progress_callback: PromptProgress | None = None,
    ) -> Prefilled:
        """Encode a prompt, start its first canvas, and return the Prefilled event.

        prefix        reused as far as the prompt begins with it; the request writes to
                      it until it ends or is cancelled
        image_spans   pictures that replace the ids at their places, in order
        prompt_progress_callback   called after each chunk with the tokens encoded and
                      those of the prompt; what it raises ends the request

        Raises SettingsError for ids outside the vocabulary, for a prompt beyond the
        model's context, for a prefix that belongs to another model or to a running
        request, and while another thread uses the engine.
        """
        check_request(prompt, settings, self.model.config)
        if prefix is not None and prefix.model is not self.model:
            raise SettingsError("this prefix is another model's; make a new one")
        with self._used_here(), ExitStack() as on_failure:
            if prefix is not None:
                prefix.claim()
                on_failure.callback(prefix.release)
            started = time.perf_counter()
            canvas = Canvas(
                request=next(self._request_numbers),
                settings=settings,
                seed=seed,
                cache=self.model.make_cache() if prefix is None else prefix.cache,
                prefix=prefix,
                chunk=prefill_step_size,
                state=self._first_state(settings, seed, 0, 0),
            )
            report = prompt_progress_callback or (lambda done, total: None)
            reused = self._prefill(canvas, prompt, image_spans, report)
            self.running.append(canvas)  # from now on `cancel` releases the prefix
            on_failure.pop_all()
            prefilled = Prefilled(
                request=canvas.request,
                seed=seed,
                prompt_tokens=len(prompt),
                seconds=time.perf_counter() - started,
                reused=reused,
            )
            return prefilled

    def _prefill(
        self,
        canvas: Canvas,
        prompt: Sequence[int],
        image_spans: Sequence[ImageSpan],
        report: PromptProgress,
    ) -> int:
        """Encode what of a prompt is not encoded yet; return how much was."""
        cache, prefix, settings = canvas.cache, canvas.prefix, canvas.settings
        cache.reserve(len(prompt) + settings.canvas_length)
        keys = prefix_keys(prompt, image_spans)
        ends = chunk_ends(prompt, settings.eos, canvas.chunk, image_spans)
        reused = 0 if prefix is None else prefix.match_prefix(keys, ends)
        report(reused, len(prompt))
        new_ends = [end for end in ends if end > reused]
        for start, end in itertools.pairwise([reused, *new_ends]):
            inside = [span for span in image_spans if start <= span.start < end]
            images = [self._image(span, start) for span in inside]
            self._encode(cache, prompt[start:end], images)
            if prefix is not None:
                prefix.extend(keys[start:end], last=end == len(prompt))
            report(end, len(prompt))
        return reused

    def cancel(self, request: int) -> None:
        """Drop a request; one that has ended already is ignored."""
        for canvas in self.running:
            if canvas.request == request and canvas.prefix is not None:
                canvas.prefix.trim()
                canvas.prefix.release()
        self.running = [c for c in self.running if c.request != request]
        # MLX copies a buffer that is written while a view still holds it
        self._views = {
            batch: (canvases, view)
            for batch, (canvases, view) in self._views.items()
            if all(number != request for number, _ in canvases)
        }

    def tick(self) -> list[Event]:
        """Take one denoising step for every running canvas; return the events.

        Raises SettingsError while another thread uses the engine.
        """
        with self._used_here():
            return self._tick()

    def _tick(self) -> list[Event]:
        batches: dict[BatchKey, list[Canvas]] = defaultdict(list)
        for canvas in self.running:
            batches[canvas.batch_key].append(canvas)
        self._views = {key: view for key, view in self._views.items() if key in batches}
        steps = [step for batch in batches.values() for step in self._advance(batch)]
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

    @contextmanager
    def _used_here(self) -> Iterator[None]:
        """Refuse a second thread: two would write to one cache."""
        if not self._lock.acquire(blocking=False):
            raise SettingsError(
                "another thread is using this; wait for it, or give each thread its own"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _first_state(
        self, settings: Settings, seed: int, index: int, committed: int
    ) -> State:
        """Return canvas number `index` before its first step: noise and pinned ids."""
        config, length = self.model.config, settings.canvas_length
        key = sampler.random_key(seed, index, 0, sampler.CANVAS)
        noise = sampler.random_tokens(key, length, config.vocab_size)
        pinned = mx.array(sampler.pinned_tokens(settings.pinned, committed, length))
        tokens = mx.where(pinned >= 0, pinned, noise)
        state = State.first(tokens, config.hidden_size, self.model.dtype)
        mx.eval(state)  # an unevaluated array can be used in this thread only
        return state

    def _encode(
        self, cache: PrefixCache, tokens: Sequence[int], images: Sequence[Image] = ()
    ) -> None:
        self.model.encode(mx.array([tokens], dtype=mx.int32), cache, images)
        cache.evaluate()

    def _image(self, span: ImageSpan, chunk_start: int) -> Image:
        if (vision := self.model.vision) is None:
            raise SettingsError("pictures were given; this checkpoint reads text only")
        patches, positions = span.picture.patches, span.picture.positions
        return Image(span.start - chunk_start, vision.encode_image(patches, positions))

    def _advance(self, batch: list[Canvas]) -> list[tuple[Canvas, Step]]:
        """Take a step of a batch, and start the next one if it is likely needed."""
        if new := [canvas for canvas in batch if canvas.pending is None]:
            self._start(new)
        stats = [canvas.advance() for canvas in batch]
        if self._ahead and all(canvas.may_run_ahead for canvas in batch):
            self._start(batch)
        steps = []
        for canvas, one in zip(batch, stats, strict=True):
            try:
                steps.append((canvas, canvas.finish_step(one)))
            except NumericError:
                self.cancel(canvas.request)
                raise
        return steps

    def _start(self, canvases: list[Canvas]) -> None:
        """Start one step of canvases of a batch, without waiting for it."""
        length, kind, banned = canvases[0].batch_key
        stepper = stepper_for(
            self.model, compiled=self._compiled, sampler=kind, banned=banned
        )
        pinned = Pinned.of(
            [
                sampler.pinned_tokens(c.settings.pinned, c.committed, length)
                for c in canvases
            ]
        )
        view, inputs = self._view(canvases), step_inputs(canvases)
        state, stats = stepper(join_states(canvases), view, inputs, pinned)
        for row, canvas in enumerate(canvases):
            canvas.pending = state, stats, row
        mx.async_eval(state, stats)

    def _view(self, canvases: list[Canvas]) -> View:
        """Return what these canvases see; made again when one of them comes or goes."""
        key = canvases[0].batch_key
        wanted = [(c.request, c.index) for c in canvases]
        known, view = self._views.get(key, (None, None))
        if view is None or known != wanted:
            cache = canvases[0].cache
            if len(canvases) > 1:
                cache = PrefixCache.join(self.model.config, [c.cache for c in canvases])
                cache.evaluate()
            view = self.model.view(cache, key.length, bucketed=self._compiled)
            self._views[key] = (wanted, view)
        return view

    def _commit(self, canvas: Canvas, argmax: mx.array) -> Commit:
        """Make the argmax canvas final; encode it only if another one follows."""
        ids: list[int] = argmax.tolist()  # type: ignore[assignment]
        settings = canvas.settings
        left = settings.max_tokens - canvas.committed
        end = next((i for i, token in enumerate(ids) if token in settings.eos), None)
        reason = None
        if end is not None and end <= left:
            reason = "stop"
        elif len(ids) >= left:
            reason = "length"
        commit = Commit(
            request=canvas.request,
            canvas_index=canvas.index,
            tokens=tuple(ids[:left][:end]),
            steps=canvas.step,
            finish_reason=reason,
        )
        if reason is not None:
            self.cancel(canvas.request)
            return commit
        # a view holds the prefix, which could then not be written in place
        self._views.pop(canvas.batch_key, None)
        ends = chunk_ends(ids, settings.eos, canvas.chunk)
        for start, end in itertools.pairwise([0, *ends]):
            self._encode(canvas.cache, ids[start:end])
        canvas.committed += len(ids)
        next_canvas = canvas.seed, canvas.index + 1, canvas.committed
        canvas.start_next(self._first_state(settings, *next_canvas))
        return commit


def check_request(
    prompt: Sequence[int], settings: Settings, config: ModelConfig
) -> None:
    """Raise SettingsError for what the model cannot answer.

    Ids, given or pinned, that it has no row for; and more tokens, those of the answer
    counted in, than positions it was trained with.
    """
    vocab_size, context = config.vocab_size, config.max_positions
    if not prompt:
        raise SettingsError("prompt is empty; give at least one token")
    if context is not None and len(prompt) + settings.max_tokens > context:
        raise SettingsError(
            f"the prompt has {len(prompt):,} tokens and max_tokens is "
            f"{settings.max_tokens:,}; together at most {context:,} fit this model "
            "(max_position_embeddings)"
        )
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
