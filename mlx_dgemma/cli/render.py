"""Drawing events on a terminal: the canvas while it is denoised, then the text.

The canvas is drawn on stderr, the text goes to stdout. What the model writes is
never sent to a terminal as it is: control characters are shown as pictures.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

from ..diffusion.events import Commit, Event, Step
from .common import harmless, is_terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..text.tokenizer import Tokenizer

SECONDS_PER_FRAME = 1 / 20
SPECIAL = "·"
UP, ERASE_LINE, ERASE_BELOW = "\x1b[{}A", "\x1b[K", "\x1b[J"
WRAP_OFF, WRAP_ON = "\x1b[?7l", "\x1b[?7h"


class View(Protocol):
    """Takes the events of one request, in order; or its steps, and what to say."""

    def wait(self, text: str) -> None:
        """What goes on before there is anything else to show."""
        ...

    def show(self, event: Event) -> None: ...

    def say(self, text: str, *, dim: bool = False) -> None:
        """Text that is final; a line of it is dim, for a person to see, or is not."""
        ...


@contextmanager
def screen(tokenizer: "Tokenizer", show: bool) -> Iterator[View]:
    """The view for this terminal; live only if asked for and stderr can be drawn on."""
    live = show and is_terminal(sys.stderr) and not is_dumb()
    view = _Live(tokenizer) if live else _Plain()
    try:
        yield view
    finally:
        view.close()


def is_dumb() -> bool:
    """Whether this terminal knows no codes; one of no name knows none."""
    return os.environ.get("TERM", "dumb") == "dumb"


class _Plain:
    """Committed text as it comes."""

    def __init__(self) -> None:
        self.terminal = is_terminal(sys.stdout)
        self.open_line = False

    def wait(self, text: str) -> None:
        pass

    def show(self, event: Event) -> None:
        if isinstance(event, Commit):
            self.say(event.text)

    def say(self, text: str, *, dim: bool = False) -> None:
        self.write(self.dressed(text, dim))

    def dressed(self, text: str, dim: bool) -> str:
        """The text as it may be sent: a file gets it as it is."""
        if not self.terminal:
            return text
        text = harmless(text)
        if dim and not is_dumb():
            # each line by itself: what is drawn between two of them is not dim
            lines = (line and click.style(line, dim=True) for line in text.split("\n"))
            text = "\n".join(lines)
        return text

    def write(self, text: str) -> None:
        if text:
            # bytes: the same ones whatever the locale, and colour codes of the model's
            click.echo(text.encode("utf-8", "replace"), nl=False)
            self.open_line = not text.endswith("\n")

    def close(self) -> None:
        if self.open_line:
            self.write("\n")


class _Live(_Plain):
    """The canvas, drawn over after each step; finished lines scroll away above it."""

    def __init__(self, tokenizer: "Tokenizer"):
        super().__init__()
        self.tokenizer = tokenizer
        self.surface = Surface()
        self.lines = ""  # committed lines that the next frame moves above the canvas
        self.line = ""  # the last line of committed text, not ended yet
        self.dim = False  # that line
        self.drawn = 0.0

    def wait(self, text: str) -> None:
        from rich.text import Text

        width = self.surface.size()[0] - 1
        self.surface.draw([Text(text[:width], style="dim")])

    def show(self, event: Event) -> None:
        if isinstance(event, Commit):
            self.say(event.text)
        elif isinstance(event, Step):
            now = time.monotonic()
            if now - self.drawn >= SECONDS_PER_FRAME:
                self.drawn = now
                self._draw(event)

    def say(self, text: str, *, dim: bool = False) -> None:
        if not self.terminal:
            super().say(text, dim=dim)
        # a line is written once it is whole, so that drawing cannot eat it
        whole, newline, self.line = (self.line + text).rpartition("\n")
        self.lines += self.dressed(whole + newline, dim)
        self.dim = dim

    def close(self) -> None:
        self.surface.erase()
        if self.terminal:
            self.write(self.lines + self.dressed(self.line, self.dim))
        super().close()

    def _draw(self, step: Step) -> None:
        if self.lines and self.terminal:
            self.surface.erase()
            self.write(self.lines)
        self.lines = ""
        size = self.surface.size()
        console = self.surface.console
        self.surface.draw(frame(console, self.tokenizer, step, self.line, *size))


class Surface:
    """Lines at the end of stderr's terminal that are drawn over again and again.

    Nothing is blanked before it is rewritten, so nothing flickers, and no mode of
    the terminal outlives a frame.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.widths: list[int] = []  # of the lines that are on the terminal

    def size(self) -> tuple[int, int]:
        """Columns and rows, asked anew: the person may have resized the window."""
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
        return columns or 80, rows or 24

    def draw(self, lines: "list[Text]") -> None:
        """Put lines, each narrower than the terminal, in place of the last ones."""
        from rich.text import Text

        with self.console.capture() as captured:
            self.console.print(Text("\n").join(lines), soft_wrap=True, end="")
        drawn = captured.get().replace("\n", f"{ERASE_LINE}\n")
        # unwrapped: a terminal may think a character wider than rich does
        self._send(f"{self._home()}{WRAP_OFF}{drawn}{ERASE_BELOW}{WRAP_ON}")
        self.widths = [line.cell_len for line in lines]

    def erase(self) -> None:
        """Leave the terminal as if nothing had been drawn."""
        if self.widths:
            # line by line: tmux moves a screen erased at once into its history
            blank = "\n".join([ERASE_LINE] * self._rows())
            self._send(f"{self._home()}{blank}{ERASE_BELOW}{self._home()}")
            self.widths = []

    def _home(self) -> str:
        rows = self._rows()
        return "\r" + (UP.format(rows - 1) if rows > 1 else "")

    def _rows(self) -> int:
        """Rows what is drawn takes now, as far as the terminal can be reached."""
        columns, rows = self.size()
        # a terminal made narrower has broken the lines that no longer fit
        return min(rows, sum(max(1, -(-width // columns)) for width in self.widths))

    def _send(self, codes: str) -> None:
        sys.stderr.write(codes)
        sys.stderr.flush()


def frame(
    console: "Console",
    tokenizer: "Tokenizer",
    step: Step,
    before: str,
    columns: int,
    rows: int,
) -> "list[Text]":
    """The canvas and its numbers as lines that fit into columns and rows.

    Of a canvas that is too tall, the end is shown.
    """
    from rich.text import Text

    width = max(2, columns - 1)  # a full last column is where terminals disagree
    text = canvas_text(tokenizer, step, before[-columns * rows :])
    lines = list(text.wrap(console, width, overflow="fold"))
    room = max(1, rows - 2)
    if len(lines) > room:
        lines = [Text("…", style="dim"), *lines[len(lines) - room + 1 :]]
    return [*lines, Text(numbers(step, width), style="cyan")]


def canvas_text(tokenizer: "Tokenizer", step: Step, before: str = "") -> "Text":
    """The draft: accepted tokens solid, others dim.

    Special tokens are dots, those at the end left out; `before` is committed text
    that the canvas continues.
    """
    from rich.text import Text

    tokens: list[int] = step.draft.tolist()  # type: ignore[assignment]
    accepted: list[bool] = step.accepted.tolist()  # type: ignore[assignment]
    text = Text().append(harmless(before), style="bold")
    while tokens and tokens[-1] in tokenizer.special_ids:
        tokens.pop()
    pieces = tokenizer.detokenizer()
    for token, sure in zip(tokens, accepted, strict=False):
        special = token in tokenizer.special_ids
        piece = SPECIAL if special else pieces.add([token])
        text.append(harmless(piece), style="bold" if sure else "dim")
    text.append(harmless(pieces.finish()), style="dim")
    return text


def numbers(step: Step, width: int) -> str:
    """One line about a step; what does not fit into `width` is left out."""
    accepted: list[bool] = step.accepted.tolist()  # type: ignore[assignment]
    parts = [
        f"step {step.step + 1}/{step.steps}",
        f"entropy {step.mean_entropy:.3f} nats",
        f"{sum(accepted)}/{len(accepted)} accepted",
    ]
    while len(parts) > 1 and len(" · ".join(parts)) > width:
        parts.pop()
    return " · ".join(parts)[:width]
