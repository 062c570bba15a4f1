"""Drawing events on a terminal: the canvas while it is denoised, then the text.

The canvas is drawn on stderr, the text goes to stdout. What the model writes is
never sent to a terminal as it is: control characters are shown as pictures.
"""

import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from ..diffusion.events import Commit, Event, Step

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

    from ..text.tokenizer import Tokenizer

SECONDS_PER_FRAME = 1 / 20
SPECIAL = "·"


def harmless(text: str) -> str:
    """`text` with nothing in it that could steer a terminal.

    C0 controls become their pictures (␛), others their code point; newlines stay.
    """
    return "".join(c if c == "\n" or not _steers(c) else _picture(c) for c in text)


def _steers(character: str) -> bool:
    # Cc: control; Cf: invisible formatting, among it the bidirectional overrides
    category = unicodedata.category(character)
    return category == "Cc" or (category == "Cf" and character not in "\u200d\u200c")


def _picture(character: str) -> str:
    code = ord(character)
    if character == "\t":
        return "    "
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


class View(Protocol):
    """Takes the events of one request, in order."""

    def show(self, event: Event) -> None: ...


@contextmanager
def screen(tokenizer: "Tokenizer", show: bool) -> Iterator[View]:
    """The view for this terminal; live only if asked for and stderr is a terminal."""
    view = _Live(tokenizer) if show and sys.stderr.isatty() else _Plain()
    try:
        yield view
    finally:
        view.close()


class _Plain:
    """Committed text as it comes."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.open_line = False

    def show(self, event: Event) -> None:
        if isinstance(event, Commit) and event.text:
            self.write(event.text)

    def write(self, text: str) -> None:
        sys.stdout.write(harmless(text) if self.terminal else text)
        sys.stdout.flush()
        self.open_line = not text.endswith("\n")

    def close(self) -> None:
        if self.open_line:
            sys.stdout.write("\n")
            sys.stdout.flush()


class _Live(_Plain):
    """The canvas redrawn after each step, cleared when its text is committed."""

    def __init__(self, tokenizer: "Tokenizer"):
        super().__init__()
        self.tokenizer = tokenizer
        self.line = ""  # the last line of committed text, not ended yet
        self.live: Live | None = None
        self.drawn = 0.0

    def show(self, event: Event) -> None:
        if isinstance(event, Step):
            self._draw(event)
        elif isinstance(event, Commit):
            self._clear()
            # a line is written once it is whole, so that redrawing cannot eat it
            whole, newline, self.line = (self.line + event.text).rpartition("\n")
            if newline:
                self.write(whole + newline)

    def close(self) -> None:
        self._clear()
        if self.line:
            self.write(self.line)
        super().close()

    def _draw(self, step: Step) -> None:
        now = time.monotonic()
        if now - self.drawn < SECONDS_PER_FRAME and not step.stopped:
            return
        self.drawn = now
        if self.live is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True, highlight=False)
            self.live = Live(console=console, auto_refresh=False, transient=True)
            self.live.start()
        self.live.update(canvas_text(self.tokenizer, step, self.line), refresh=True)

    def _clear(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def canvas_text(tokenizer: "Tokenizer", step: Step, before: str = "") -> "Text":
    """One frame: accepted tokens solid, drafts dim, and a line of numbers.

    Special tokens are dots, those at the end left out; `before` is committed text
    that the canvas continues.
    """
    from rich.text import Text

    tokens: list[int] = step.draft.tolist()  # type: ignore[assignment]
    accepted: list[bool] = step.accepted.tolist()  # type: ignore[assignment]
    frame = Text(harmless(before), style="bold", no_wrap=False)
    while tokens and tokens[-1] in tokenizer.special_ids:
        tokens.pop()
    pieces = tokenizer.detokenizer()
    for token, sure in zip(tokens, accepted, strict=False):
        special = token in tokenizer.special_ids
        piece = SPECIAL if special else pieces.add([token])
        frame.append(harmless(piece), style="bold" if sure else "dim")
    frame.append(harmless(pieces.finish()), style="dim")
    count = sum(accepted)
    frame.append(
        f"\nstep {step.step + 1}/{step.steps} · {count}/{len(accepted)} accepted · "
        f"entropy {step.mean_entropy:.3f} nats",
        style="cyan",
    )
    return frame
