"""What the engine reports, in the order a request sees it.

    Prefilled, (Step … Step, Commit) for each canvas

Every event has `text`: the final text it adds, "" for all but commits. Arrays are
evaluated: any thread may read them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import mlx.core as mx

if TYPE_CHECKING:
    from ..text.replies import Part


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """The prompt is encoded."""

    text: ClassVar[str] = ""
    request: int
    seed: int
    prompt_tokens: int
    seconds: float
    reused: int = 0  # tokens of the prompt that were encoded before

    @property
    def encoded(self) -> int:
        """Tokens of the prompt that had to be encoded."""
        return self.prompt_tokens - self.reused


@dataclass(frozen=True, kw_only=True)
class Step:
    """A denoising step was taken. Nothing here is final before the Commit."""

    text: ClassVar[str] = ""
    request: int
    canvas_index: int
    step: int  # 0 … steps-1
    steps: int  # maximum steps of this canvas
    temperature: float
    draft: mx.array  # (L,) int32 argmax canvas: the best guess so far
    canvas: mx.array  # (L,) int32 input of the next step
    accepted: mx.array  # (L,) bool
    entropy: mx.array  # (L,) nats
    mean_entropy: float  # nats
    stopped: bool  # stable and confident: this canvas is done

    @property
    def last(self) -> bool:
        """Whether the Commit of this canvas comes next."""
        return self.stopped or self.step + 1 == self.steps


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A canvas is final."""

    request: int
    canvas_index: int
    tokens: tuple[int, ...]  # up to the end of the text, without its eos
    steps: int  # denoising steps this canvas took
    finish_reason: Literal["stop", "length"] | None  # None: another canvas follows
    # The engine knows ids only; `stream_generate` and `Conversation` fill in the rest.
    text: str = ""  # what the tokens add to the answer
    parts: tuple["Part", ...] = ()  # the same, with thoughts and calls
    pending_text: str = ""  # may begin a stop string: the next commit decides


Event = Prefilled | Step | Commit
