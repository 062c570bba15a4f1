"""Honest numbers of one request, added up from its events."""

import time
from dataclasses import dataclass, field

from .. import backends
from .events import Commit, Event, Prefilled, Step


@dataclass
class Report:
    """Counts of one request; `seconds` is wall time since the report was made."""

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
        steps = " + ".join(map(str, self.steps_per_canvas)) or "0"
        return (
            f"{self.prompt_tokens} prompt tokens · "
            f"{self.committed_tokens} committed tokens · "
            f"{_count(len(self.steps_per_canvas), 'canvas', 'canvases')} "
            f"({steps} steps) · "
            f"{self.tokens_per_forward:.1f} tokens per forward · "
            f"{self.committed_tokens / seconds:.1f} tok/s wall · "
            f"peak {backends.peak_memory() / 1e9:.2f} GB · seed {self.seed}"
        )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
