"""A terminal of our own: what a command sends to it, and what a person sees."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len

ROOT = Path(__file__).parents[2]
TOKEN = re.compile(r"\x1b\[(\??\d*(?:;\d+)*)([A-Za-z])|([^\x1b])", re.DOTALL)
CODES = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Screen:
    """As much of a terminal as the commands use; anything else is an error."""

    def __init__(self, columns: int = 80):
        self.columns = columns
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self.wraps = True
        self.widest = 0

    def feed(self, text: str) -> "Screen":
        end = 0
        for match in TOKEN.finditer(text):
            assert match.start() == end, f"unknown code at {text[end : end + 9]!r}"
            end = match.end()
            argument, code, character = match.groups()
            self._code(argument, code) if code else self._put(character)
        assert end == len(text), f"unknown code at {text[end:]!r}"
        return self

    def lines(self) -> list[str]:
        """What is on it, without blanks at the ends and empty lines at the bottom."""
        lines = ["".join(row).rstrip() for row in self.rows]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def narrow(self, columns: int) -> None:
        """Made narrower by a person: lines that no longer fit are broken."""
        rows: list[list[str]] = []
        for index, row in enumerate(self.rows):
            pieces = [row[i : i + columns] for i in range(0, len(row), columns)] or [[]]
            rows += pieces
            if index == self.row:
                self.row, self.column = len(rows) - 1, len(pieces[-1])
        self.rows, self.columns = rows, columns

    def _code(self, argument: str, code: str) -> None:
        row = self.rows[self.row]
        match argument, code:
            case "?7", ("l" | "h"):
                self.wraps = code == "h"
            case _, "A":
                assert int(argument) <= self.row, "moved above the top"
                self.row -= int(argument)
            case "", "K":
                del row[self.column :]
            case "", "J":
                del row[self.column :], self.rows[self.row + 1 :]
            case _, "m":
                pass
            case _:
                raise AssertionError(f"unknown code {argument}{code}")

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._feed_line()
        else:
            assert character.isprintable() or character in "\u200c\u200d", character
            width = cell_len(character)
            if self.column + width > self.columns:
                if not self.wraps:
                    return
                self._feed_line()
            row = self.rows[self.row]
            row += [" "] * (self.column - len(row))
            row[self.column : self.column + width] = [character, ""][:width]
            self.column += width
            self.widest = max(self.widest, self.column)

    def _feed_line(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append([])


@dataclass(frozen=True)
class Ended:
    """A command that ran in a terminal."""

    code: int
    sent: str  # everything that reached the terminal
    stdout: bytes  # where stdout was a file

    def screen(self, columns: int = 80) -> Screen:
        return Screen(columns).feed(self.sent)


def environment() -> dict[str, str]:
    """Ours, with this package and without what changes colours or sizes."""
    unwanted = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "PYTHONWARNINGS")
    inherited = {k: v for k, v in os.environ.items() if k not in unwanted}
    return inherited | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}


def python(*args: str) -> list[str]:
    return [sys.executable, *args]


def run_in_terminal(
    command: Sequence[str],
    *,
    columns: int = 80,
    stdout: Path | None = None,
    watch: Callable[[str, subprocess.Popen], None] = lambda sent, process: None,
) -> Ended:
    """Run a command whose stderr, and stdout if no file is given, is a terminal.

    `watch` sees all that was sent so far whenever something is.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    out = theirs if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=theirs, env=environment()
    )
    for handle in {out, theirs}:
        os.close(handle)
    sent = b""
    while chunk := _read(ours):
        sent += chunk
        watch(sent.decode("utf-8", "ignore"), process)
    os.close(ours)
    written = b"" if stdout is None else stdout.read_bytes()
    return Ended(process.wait(60), sent.decode("utf-8"), written)


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 65536)
    except OSError:  # Linux says so, macOS by an empty read: nobody holds the other end
        return b""
