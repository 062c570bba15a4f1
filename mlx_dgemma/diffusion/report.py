"""Counts and speeds of one request, added up from its events."""

import time
from dataclasses import dataclass, field

import mlx.core as mx

from .events import Commit, Event, Prefilled, Step

MAX_LISTED = 8  # canvases whose steps are listed one by one


@dataclass
class Report:
    """Counts of one request; wall time runs since the report was made."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    seed: int = 0
    committed_tokens: int = 0
    steps_per_canvas: list[int] = field(default_factory=list[int])
    running_steps: int = 0  # steps of a canvas that is not committed yet
    finish_reason: str | None = None
    started: float = field(default_factory=time.perf_counter)

    def add(self, event: Event) -> None:
        match event:
            case Prefilled():
                self.prompt_tokens, self.seed = event.prompt_tokens, event.seed
                self.prefill_seconds = event.seconds
            case Step():
                self.running_steps = event.step + 1
            case Commit():
                self.committed_tokens += len(event.tokens)
                self.steps_per_canvas.append(event.steps)
                self.running_steps = 0
                self.finish_reason = event.finish_reason

    @property
    def denoising_steps(self) -> int:
        """All steps taken, those of an unfinished canvas included."""
        return sum(self.steps_per_canvas) + self.running_steps

    def line(self) -> str:
        """Return one line for a person."""
        tokens, seconds = self.committed_tokens, time.perf_counter() - self.started
        return (
            f"{_count(self.prompt_tokens, 'prompt token')} · "
            f"{_count(tokens, 'committed token')} · {self._canvases()} · "
            f"{tokens / max(1, self.denoising_steps):.2f} tokens per forward · "
            f"{tokens / seconds:.1f} tok/s wall · "
            f"peak memory {format_bytes(mx.get_peak_memory())} · seed {self.seed}"
        )

    def summary(self) -> str:
        """Return the lines that `generate(verbose=True)` prints, as mlx-lm does."""
        seconds = time.perf_counter() - self.started - self.prefill_seconds
        prompt_speed = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        tokens, steps = self.committed_tokens, self.denoising_steps
        speed, per_step = tokens / max(seconds, 1e-9), tokens / max(1, steps)
        return (
            f"Prompt: {self.prompt_tokens} tokens, {prompt_speed:.3f} tokens-per-sec\n"
            f"Generation: {tokens} tokens, {speed:.3f} tokens-per-sec\n"
            f"Denoising: {steps} steps, {per_step:.3f} tokens-per-forward\n"
            f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB"
        )

    def _canvases(self) -> str:
        done = self.steps_per_canvas
        text = _count(len(done), "canvas", "canvases")
        if done:
            steps = " + ".join(map(str, done)) if len(done) <= MAX_LISTED else sum(done)
            text += f" ({steps} {'step' if done == [1] else 'steps'})"
        if self.running_steps:
            text += f" and {_count(self.running_steps, 'step')} of one not finished"
        return text


def format_bytes(count: int) -> str:
    """Return a number of bytes in decimal units, for a person."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
