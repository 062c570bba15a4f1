"""Honest numbers of one request, added up from its events."""

import time
from dataclasses import dataclass, field

import mlx.core as mx

from .events import Commit, Event, Prefilled, Step

LISTED = 8  # canvases whose steps are given one by one


@dataclass
class Report:
    """Counts of one request; wall time runs since the report was made."""

    prompt_tokens: int = 0
    seed: int = 0
    committed_tokens: int = 0
    steps_per_canvas: list[int] = field(default_factory=list)
    running_steps: int = 0  # steps of a canvas that is not committed yet
    finish_reason: str | None = None
    started: float = field(default_factory=time.perf_counter)

    def add(self, event: Event) -> None:
        if isinstance(event, Prefilled):
            self.prompt_tokens, self.seed = event.prompt_tokens, event.seed
        elif isinstance(event, Step):
            self.running_steps = event.step + 1
        elif isinstance(event, Commit):
            self.committed_tokens += len(event.tokens)
            self.steps_per_canvas.append(event.steps)
            self.running_steps = 0
            self.finish_reason = event.finish_reason

    @property
    def denoising_steps(self) -> int:
        """All steps taken, those of an unfinished canvas included."""
        return sum(self.steps_per_canvas) + self.running_steps

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens per denoising step."""
        return self.committed_tokens / max(1, self.denoising_steps)

    def line(self) -> str:
        """One line for a person."""
        seconds = time.perf_counter() - self.started
        return (
            f"{_count(self.prompt_tokens, 'prompt token')} · "
            f"{_count(self.committed_tokens, 'committed token')} · "
            f"{self._canvases()} · "
            f"{self.tokens_per_forward:.2f} tokens per forward · "
            f"{self.committed_tokens / seconds:.1f} tok/s wall · "
            f"peak memory {size(mx.get_peak_memory())} · seed {self.seed}"
        )

    def _canvases(self) -> str:
        done = self.steps_per_canvas
        text = _count(len(done), "canvas", "canvases")
        if len(done) > LISTED:
            text += f" ({sum(done) / len(done):.1f} steps each, at most {max(done)})"
        elif done:
            text += (
                f" ({' + '.join(map(str, done))} {'step' if done == [1] else 'steps'})"
            )
        if self.running_steps:
            text += f" and {_count(self.running_steps, 'step')} of one not finished"
        return text


def size(count: int) -> str:
    """Bytes for a person, in decimal units."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
