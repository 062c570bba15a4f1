"""Show an answer: its canvas while it is denoised, on stderr, its text on stdout.

Control characters of the model's text never reach a terminal.
"""

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Self

import click
from rich.console import Console
from rich.text import Text

from ..diffusion.events import Event, Step
from ..text.tokenizer import Tokenizer
from .common import is_dumb, is_terminal, printable
from .interrupts import watching

SECONDS_PER_FRAME = 1 / 20
SECONDS_PER_STATUS = 1.0  # where no canvas is drawn
SPECIAL = "·"
UP, ERASE_LINE, ERASE_BELOW = "\x1b[{}A", "\x1b[K", "\x1b[J"
WRAP_OFF, WRAP_ON = "\x1b[?7l", "\x1b[?7h"


class AnswerView:
    """One answer: committed text on stdout and, if live, the canvas below it.

    show    draw the canvas, where stderr is a terminal that can

    The first Ctrl-C sets `interrupted`, a second raises KeyboardInterrupt. The canvas
    is drawn over the last one without blanking it first, so nothing flickers, and no
    mode of the terminal outlives a frame.
    """

    def __init__(self, tokenizer: Tokenizer, show: bool):
        self.tokenizer = tokenizer
        self.draws = is_terminal(sys.stderr) and not is_dumb()
        self.live = show and self.draws  # the canvas, not only numbers
        self.to_terminal = is_terminal(sys.stdout)
        self.interrupted = False
        self._console = Console(stderr=True, highlight=False)
        self._line_open = False  # whether stdout ends within a line
        self._lines = ""  # lines that the next frame moves above the canvas
        self._line = ""  # the last line of the text, not ended yet
        self._line_dim = False
        self._frame_time = 0.0 if self.live else time.monotonic()
        self._widths: list[int] = []  # of the lines drawn
        self._prefilling = True
        self.stopped_prefill = False

    def __enter__(self) -> Self:
        def interrupt(*signal: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        def warn_above_canvas(*warning) -> None:
            self._erase()
            self._show_warning(*warning)

        self._resources = ExitStack()
        self._resources.enter_context(watching(self._say_stopping))
        self._on_interrupt = signal.signal(signal.SIGINT, interrupt)
        self._show_warning = warnings.showwarning
        warnings.showwarning = warn_above_canvas
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._on_interrupt)
        self._resources.close()
        warnings.showwarning = self._show_warning
        self._erase()
        if self.live and self.to_terminal:
            self._print(self._lines + self._styled(self._line, self._line_dim))
        if self._line_open:
            self._print("\n")

    def status(self, text: str) -> None:
        """Show what happens before there is a canvas."""
        if self.draws:
            self._draw([Text(text[: self._size()[0] - 1], style="dim")])

    def prefilled(self, done: int, total: int) -> None:
        """Show how much of the prompt is encoded. Raises KeyboardInterrupt if asked."""
        if self.interrupted:
            self.stopped_prefill = True
            raise KeyboardInterrupt
        self._prefilling = done < total
        if done < total:
            self.status(f"encoding {done:,} of {total:,} tokens")

    def _say_stopping(self) -> None:
        """Answer the first Ctrl-C at once, while MLX computes."""
        if self.draws and self._prefilling:
            self._send("\r" + ERASE_LINE + "stopping after this chunk")

    def follow(self, events: Iterable[Event]) -> Iterator[Event]:
        """Yield events until Ctrl-C and draw the steps among them."""
        for event in events:
            if isinstance(event, Step):
                self.show(event)
            yield event
            # after the last step of a canvas its commit comes at no cost
            if self.interrupted and not (isinstance(event, Step) and event.last):
                break

    def show(self, step: Step) -> None:
        """Draw a step, or its numbers alone, unless one was drawn just now."""
        now = time.monotonic()
        wait = SECONDS_PER_FRAME if self.live else SECONDS_PER_STATUS
        if now - self._frame_time < wait:
            return
        self._frame_time = now
        if self.live:
            self._draw_canvas(step)
        elif not (self.to_terminal and self._line_open):  # beside no text
            self.status(numbers(step, 80))

    def write(self, text: str, *, dim: bool = False) -> None:
        """Write text that is final; no line of it is dim in part."""
        if not self.live:
            self._erase()
        if not (self.live and self.to_terminal):
            self._print(self._styled(text, dim))
        if self.live:
            # a line is printed when it has ended: until then it is drawn
            ended, newline, self._line = (self._line + text).rpartition("\n")
            self._lines += self._styled(ended + newline, dim)
            self._line_dim = dim

    def _styled(self, text: str, dim: bool) -> str:
        """Return the text as stdout may get it: a file gets it unchanged."""
        if not self.to_terminal:
            return text
        text = printable(text)
        if dim and not is_dumb():
            # line by line: what is drawn between two of them is not dim
            lines = (line and click.style(line, dim=True) for line in text.split("\n"))
            text = "\n".join(lines)
        return text

    def _print(self, text: str) -> None:
        if text:
            # as bytes, which no locale changes and click strips no codes from
            click.echo(text.encode("utf-8", "replace"), nl=False)
            self._line_open = not text.endswith("\n")

    def _draw_canvas(self, step: Step) -> None:
        if self._lines and self.to_terminal:
            self._erase()
            self._print(self._lines)
        self._lines = ""
        columns, rows = self._size()
        width = max(2, columns - 1)  # terminals disagree about a full last column
        text = canvas_text(self.tokenizer, step, self._line[-columns * rows :])
        lines = list(text.wrap(self._console, width, overflow="fold"))
        height = max(1, rows - 2)
        if len(lines) > height:  # then its end is shown
            lines = [Text("…", style="dim"), *lines[len(lines) - height + 1 :]]
        self._draw([*lines, Text(numbers(step, width), style="cyan")])

    def _draw(self, lines: list[Text]) -> None:
        """Put lines, each narrower than the terminal, in place of the last ones."""
        with self._console.capture() as captured:
            self._console.print(Text("\n").join(lines), soft_wrap=True, end="")
        drawn = captured.get().replace("\n", f"{ERASE_LINE}\n")
        # unwrapped: a terminal may think a character wider than rich does
        self._send(f"{self._to_top()}{WRAP_OFF}{drawn}{ERASE_BELOW}{WRAP_ON}")
        self._widths = [line.cell_len for line in lines]

    def _erase(self) -> None:
        """Leave the terminal as if nothing had been drawn."""
        if self._widths:
            # line by line: tmux moves a screen erased at once into its history
            blank = "\n".join([ERASE_LINE] * self._rows())
            self._send(f"{self._to_top()}{blank}{ERASE_BELOW}{self._to_top()}")
            self._widths = []

    def _to_top(self) -> str:
        rows = self._rows()
        return "\r" + UP.format(rows - 1) * (rows > 1)

    def _rows(self) -> int:
        """Return how many rows the drawn lines take, as far as they can be reached."""
        columns, rows = self._size()
        # a terminal made narrower has broken the lines that no longer fit
        return min(rows, sum(max(1, -(-width // columns)) for width in self._widths))

    def _size(self) -> tuple[int, int]:
        """Return columns and rows now: the window may have been resized."""
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
        return columns or 80, rows or 24

    def _send(self, codes: str) -> None:
        sys.stderr.write(codes)
        sys.stderr.flush()


def canvas_text(tokenizer: Tokenizer, step: Step, before: str = "") -> Text:
    """Return the draft: accepted tokens bold, others dim.

    Special tokens are dots, those at the end left out; `before` is committed text
    that the canvas continues.
    """
    tokens: list[int] = step.draft.tolist()  # type: ignore[assignment]
    accepted: list[bool] = step.accepted.tolist()  # type: ignore[assignment]
    text = Text().append(printable(before), style="bold")
    while tokens and tokens[-1] in tokenizer.special_ids:
        tokens.pop()
    pieces = tokenizer.detokenizer()
    for token, is_accepted in zip(tokens, accepted, strict=False):
        special = token in tokenizer.special_ids
        piece = SPECIAL if special else pieces.add([token])
        text.append(printable(piece), style="bold" if is_accepted else "dim")
    text.append(printable(pieces.finish()), style="dim")
    return text


def numbers(step: Step, width: int) -> str:
    """Return one line about a step, without what does not fit into `width`."""
    accepted: list[bool] = step.accepted.tolist()  # type: ignore[assignment]
    parts = [
        f"step {step.step + 1}/{step.steps}",
        f"entropy {step.mean_entropy:.3f} nats",
        f"{sum(accepted)}/{len(accepted)} accepted",
    ]
    while len(parts) > 1 and len(" · ".join(parts)) > width:
        parts.pop()
    return " · ".join(parts)[:width]
