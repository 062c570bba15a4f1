"""The one denoising loop: canvases of any requests, one step at a time.

A tick takes one denoising step for every running canvas. Each has its own prefix,
settings, random keys and stop state, so requests come and go between ticks
without changing one another. Knows token ids, not text.
"""

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..errors import SettingsError
from ..model.cache import PrefixCache
from ..model.language import DiffusionGemma
from . import sampler
from .events import Commit, Event, Prefilled, Step
from .settings import Settings

PREFILL_STEP = 2048  # tokens encoded at a time, so that memory stays linear


@dataclass
class Canvas:
    """One canvas being denoised, and the request it belongs to."""

    request: int
    settings: Settings
    seed: int
    prefix: PrefixCache
    index: int = 0
    step: int = 0
    committed: int = 0  # tokens of earlier canvases
    tokens: mx.array = field(default_factory=lambda: mx.array([]))  # (L,) int32
    pinned: mx.array | None = None  # (L,) int32, -1 where free
    signal: mx.array | None = None  # (L, D)
    history: deque[mx.array] = field(default_factory=deque)  # argmax canvases

    def begin(self, vocab_size: int) -> None:
        """Start this canvas from noise, with its pinned tokens in place."""
        length = self.settings.canvas_length
        key = sampler.fold(self.seed, self.index, 0, sampler.CANVAS)
        self.tokens = sampler.random_tokens(key, length, vocab_size)
        self.pinned = None
        if self.settings.pinned:
            self.pinned = sampler.pinned_row(self.settings.pinned, self.index, length)
            self.tokens = mx.where(self.pinned >= 0, self.pinned, self.tokens)
        # an unevaluated array could be used in this thread only
        mx.eval(self.tokens, *([] if self.pinned is None else [self.pinned]))
        self.step, self.signal = 0, None
        self.history = deque(maxlen=self.settings.stability)


class Engine:
    """Denoises the canvases of any number of requests with one model."""

    def __init__(self, model: DiffusionGemma):
        self.model = model
        self.running: list[Canvas] = []
        self._numbers = itertools.count()
        # by canvas length: which canvases, and their prefixes joined
        self._joined: dict[int, tuple[tuple[tuple[int, int], ...], PrefixCache]] = {}

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
        vocab_size = self.model.config.vocab_size
        check_ids(prompt, settings, vocab_size)
        started = time.perf_counter()
        prefix = self.model.make_cache()
        self._encode(prompt, prefix, prefill_step_size)
        canvas = Canvas(next(self._numbers), settings, seed, prefix)
        canvas.begin(vocab_size)
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
        self._joined = {n: j for n, j in self._joined.items() if n in groups}
        events: list[Event] = []
        for canvases in groups.values():
            for canvas, step in zip(canvases, self._denoise(canvases), strict=True):
                events.append(step)
                if step.last:
                    events.append(self._commit(canvas, step.draft))
        return events

    def run(self) -> Iterator[Event]:
        """Tick until no canvas is left."""
        while self.running:
            yield from self.tick()

    def _encode(self, tokens: Sequence[int], prefix: PrefixCache, chunk: int) -> None:
        for start in range(0, len(tokens), chunk):
            ids = mx.array([tokens[start : start + chunk]], dtype=mx.int32)
            self.model.encode(ids, prefix)
            prefix.evaluate()

    def _denoise(self, canvases: list[Canvas]) -> list[Step]:
        """One step of canvases of one length."""
        length = canvases[0].settings.canvas_length
        logits = self.model.denoise(
            mx.stack([c.tokens for c in canvases]),
            self._prefix(canvases),
            self._signals(canvases),
        )
        uniforms, noise = self._draw(canvases, length)
        refined = sampler.refine(
            logits,
            temperatures=mx.array([c.settings.temperature(c.step) for c in canvases]),
            bounds=mx.array([c.settings.entropy_bound for c in canvases]),
            uniforms=uniforms,
            noise=noise,
            pinned=_pinned(canvases, length),
        )
        signals = self.model.self_condition(refined.processed)
        mean = mx.mean(refined.entropy, axis=-1)
        stops = [
            sampler.is_stable(refined.argmax[i], c.history, c.settings.stability)
            & (mean[i] < c.settings.confidence)
            for i, c in enumerate(canvases)
        ]
        stopped = mx.stack(stops)
        mx.eval(refined.argmax, refined.entropy, refined.accepted, refined.canvas)
        mx.eval(signals, mean, stopped)
        flags, means = np.array(stopped), np.array(mean)
        return [
            self._advance(c, i, refined, signals, float(means[i]), bool(flags[i]))
            for i, c in enumerate(canvases)
        ]

    def _advance(
        self,
        canvas: Canvas,
        row: int,
        refined: sampler.Refined,
        signals: mx.array,
        mean: float,
        stopped: bool,
    ) -> Step:
        """Move a canvas past the step just taken, and report that step."""
        canvas.tokens, canvas.signal = refined.canvas[row], signals[row]
        draft, accepted = refined.argmax[row], refined.accepted[row]
        entropy = refined.entropy[row]
        mx.eval(canvas.tokens, canvas.signal, draft, accepted, entropy)
        canvas.history.append(draft)
        canvas.step += 1
        return Step(
            request=canvas.request,
            canvas_index=canvas.index,
            step=canvas.step - 1,
            steps=canvas.settings.steps,
            temperature=canvas.settings.temperature(canvas.step - 1),
            draft=draft,
            canvas=canvas.tokens,
            accepted=accepted,
            entropy=entropy,
            mean_entropy=mean,
            stopped=stopped,
        )

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
        self._encode(whole, canvas.prefix, PREFILL_STEP)
        canvas.committed += len(whole)
        canvas.index += 1
        canvas.begin(self.model.config.vocab_size)
        return commit

    def _prefix(self, canvases: list[Canvas]) -> PrefixCache:
        """The prefix of one canvas, or those of several joined once per change."""
        length = canvases[0].settings.canvas_length
        if len(canvases) == 1:
            self._joined.pop(length, None)
            return canvases[0].prefix
        key = tuple((c.request, c.index) for c in canvases)
        known, joined = self._joined.get(length, (None, None))
        if joined is None or known != key:
            joined = PrefixCache.join(self.model.config, [c.prefix for c in canvases])
            joined.evaluate()
            self._joined[length] = (key, joined)
        return joined

    def _signals(self, canvases: list[Canvas]) -> mx.array | None:
        known = [c.signal for c in canvases if c.signal is not None]
        if not known:
            return None
        zeros = mx.zeros_like(known[0])
        return mx.stack([zeros if c.signal is None else c.signal for c in canvases])

    def _draw(self, canvases: list[Canvas], length: int) -> tuple[mx.array, mx.array]:
        """(B, L) uniforms and (B, L) random ids: the only draws of a step."""
        vocab_size = self.model.config.vocab_size
        uniforms, noise = [], []
        for c in canvases:
            key = sampler.fold(c.seed, c.index, c.step, sampler.PROPOSE)
            uniforms.append(mx.random.uniform(shape=(length,), key=key))
            key = sampler.fold(c.seed, c.index, c.step, sampler.RENOISE)
            noise.append(sampler.random_tokens(key, length, vocab_size))
        return mx.stack(uniforms), mx.stack(noise)


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


def _pinned(canvases: list[Canvas], length: int) -> mx.array | None:
    if all(c.pinned is None for c in canvases):
        return None
    free = mx.full((length,), -1, dtype=mx.int32)
    return mx.stack([free if c.pinned is None else c.pinned for c in canvases])
