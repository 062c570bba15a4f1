"""The denoising loop: canvases of any number of requests, one step at a time.

A tick takes one denoising step for every running canvas. Each has its own prefix,
settings, random keys and stop state, so requests come and go between ticks
without changing one another. Knows token ids, not text.
"""

import itertools
import math
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
from .canvas import BatchKey, Canvas, join_states, step_inputs
from .events import Commit, Event, Prefilled, Step
from .prefix import ImageSpan, Prefix, chunk_ends, prefix_keys
from .step import Pinned, stepper_for

PromptProgress = Callable[[int, int], None]  # tokens encoded, tokens in all
PREFILL_STEP = 2048  # tokens encoded at a time, so that memory stays linear


class Engine:
    """Denoises the canvases of any number of requests with one model.

    compiled   run compiled steps; None for the default of the device, as for `ahead`
    ahead      start each step before the host has read the one before; one started in
               vain is dropped, so no event changes
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
        # by batch: (request, canvas index) of its canvases, and their view. MLX copies
        # a buffer that is written while a view holds it, so views go before writes.
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
        prompt_progress_callback: PromptProgress = lambda done, total: None,
    ) -> Prefilled:
        """Encode a prompt, start its first canvas, and return the Prefilled event.

        prefix        reused as far as the prompt begins with it; the request writes to
                      it until it ends or is cancelled
        image_spans   pictures that replace the ids at their places, in order
        prompt_progress_callback   called before the first and after each chunk with
                      the tokens encoded and all; what it raises ends the request

        Raises SettingsError for ids outside the vocabulary, for a prompt beyond the
        model's context, for a prefix that belongs to another model or to a running
        request, and while another thread uses the engine.
        """
        check_request(prompt, settings, self.model.config)
        kept = prefix is not None
        prefix = Prefix(self.model) if prefix is None else prefix
        if prefix.model is not self.model:
            raise SettingsError("this prefix is another model's; make a new one")
        started = time.perf_counter()
        with self._used_here(), ExitStack() as on_failure:
            prefix.claim()
            on_failure.callback(prefix.release)
            prefix.cache.reserve(len(prompt) + settings.canvas_length)
            number = next(self._request_numbers)
            canvas = Canvas(number, settings, seed, prefix, prefill_step_size)
            canvas.start(self.model)
            keys = prefix_keys(prompt, image_spans)
            ends = chunk_ends(prompt, settings.eos, prefill_step_size, image_spans)
            reused = prefix.match_prefix(keys, ends)
            prompt_progress_callback(reused, len(prompt))
            new_ends = (end for end in ends if end > reused)
            for start, end in itertools.pairwise([reused, *new_ends]):
                inside = [span for span in image_spans if start <= span.start < end]
                images = [self._image(span, start) for span in inside]
                self._encode(prefix.cache, prompt[start:end], images)
                # a later prompt rarely shares the very end of this one
                prefix.extend(keys[start:end], snapshot=kept and end < len(prompt))
                prompt_progress_callback(end, len(prompt))
            self.running.append(canvas)
            on_failure.pop_all()  # from now on `cancel` releases the prefix
        return Prefilled(
            request=canvas.request,
            seed=seed,
            prompt_tokens=len(prompt),
            seconds=time.perf_counter() - started,
            reused=reused,
        )

    def cancel(self, request: int) -> None:
        """Drop a request; one that has ended already is ignored."""
        for canvas in self.running:
            if canvas.request == request:
                self._views.pop(canvas.batch_key, None)
                canvas.prefix.trim()
                canvas.prefix.release()
        self.running = [c for c in self.running if c.request != request]

    def tick(self) -> list[Event]:
        """Take one denoising step for every running canvas; return the events.

        Raises SettingsError while another thread uses the engine.
        """
        with self._used_here():
            batches: dict[BatchKey, list[Canvas]] = defaultdict(list)
            for canvas in self.running:
                batches[canvas.batch_key].append(canvas)
            steps = [
                step for batch in batches.values() for step in self._advance(batch)
            ]
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
            step = canvas.finish_step(one)
            steps.append((canvas, step))
            if not math.isfinite(step.mean_entropy):
                self.cancel(step.request)
                raise NumericError(
                    f"request {step.request}, canvas {step.canvas_index}, step "
                    f"{step.step}: the model computes NaN; its weights are damaged "
                    "(mlx_dgemma.convert --verify), or too large for float16: convert "
                    "with --dtype bfloat16"
                )
        return steps

    def _start(self, canvases: list[Canvas]) -> None:
        """Start one step of canvases of a batch, without waiting for it."""
        _, sampler, banned = canvases[0].batch_key
        stepper = stepper_for(self.model, self._compiled, sampler, banned)
        pinned = Pinned.of([canvas.pinned_tokens for canvas in canvases])
        view, inputs = self._view(canvases), step_inputs(canvases)
        state, stats = stepper(join_states(canvases), view, inputs, pinned)
        for row, canvas in enumerate(canvases):
            canvas.pending = state, stats, row
        mx.async_eval(state, stats)

    def _view(self, canvases: list[Canvas]) -> View:
        """Return what these canvases see; made again when one of them comes or goes."""
        length, _, _ = key = canvases[0].batch_key
        wanted = [(c.request, c.index) for c in canvases]
        known, view = self._views.get(key, (None, None))
        if view is None or known != wanted:
            cache, *others = [canvas.prefix.cache for canvas in canvases]
            if others:
                cache = PrefixCache.join(self.model.config, [cache, *others])
                cache.evaluate()
            view = self.model.view(cache, length, bucketed=self._compiled)
            self._views[key] = (wanted, view)
        return view

    def _commit(self, canvas: Canvas, draft: mx.array) -> Commit:
        """Make the draft final; encode it only if another canvas follows."""
        ids: list[int] = draft.tolist()  # type: ignore[assignment]
        settings = canvas.settings
        left = settings.max_tokens - canvas.committed
        end = next((i for i, token in enumerate(ids) if token in settings.eos), None)
        reason = "length" if len(ids) >= left else None
        if end is not None and end <= left:
            reason = "stop"
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
        self._views.pop(canvas.batch_key, None)
        ends = chunk_ends(ids, settings.eos, canvas.prefill_step_size)
        for start, end in itertools.pairwise([0, *ends]):
            self._encode(canvas.prefix.cache, ids[start:end])
        canvas.index, canvas.committed = canvas.index + 1, canvas.committed + len(ids)
        canvas.start(self.model)
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
    known = f"this model knows 0 to {vocab_size - 1}"
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise SettingsError(f"prompt holds id {token}; {known}")
    for position, token in settings.pinned.items():
        if token >= vocab_size:
            raise SettingsError(f"pinned[{position}] is {token}; {known}")
        if position >= settings.canvases * settings.canvas_length:
            wrong = f"pinned position {position} lies behind max_tokens"
            raise SettingsError(f"{wrong} {settings.max_tokens}")
