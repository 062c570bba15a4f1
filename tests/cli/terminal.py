"""A terminal in which a command runs: what it sends, and what a person sees of it."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import pyte
from rich.cells import cell_len

ROOT = Path(__file__).parents[2]
TOKEN = re.compile(r"\x1b\[(\??\d*(?:;\d+)*)([A-Za-z])|([^\x1b])", re.DOTALL)
CODES = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")
PATIENCE = 60  # seconds until something is there, on a busy machine
BRACKETED_PASTE = "\x1b[?2004h"  # a prompt begins


class Screen:
    """What a person sees of what was sent to a terminal."""

    def __init__(self, columns: int = 80):
        self._screen = pyte.Screen(columns, 1000)
        self._stream = pyte.Stream(self._screen)

    def feed(self, text: str) -> "Screen":
        # the kernel makes carriage returns of line feeds where a terminal is attached
        self._stream.feed(text.replace("\r\n", "\n").replace("\n", "\r\n"))
        return self

    def lines(self) -> list[str]:
        """What is on it, without blanks at the ends and empty lines at the bottom."""
        lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def cursor(self) -> tuple[int, int]:
        """Row and column."""
        return self._screen.cursor.y, self._screen.cursor.x

    @property
    def widest(self) -> int:
        return max(map(cell_len, self.lines()), default=0)


def environment() -> dict[str, str]:
    """Ours, with this package and without what changes colours or sizes."""
    unwanted = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
    inherited = {k: v for k, v in os.environ.items() if k not in unwanted}
    return inherited | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}


def python(*args: str) -> list[str]:
    return [sys.executable, *args]


class Terminal:
    """A terminal in which a command runs; `type` is a person at its keyboard.

    home      working folder and home of the command
    stdout    a file that gets it; None: the terminal
    keyboard  whether stdin is the terminal too
    """

    def __init__(
        self,
        command: Sequence[str],
        home: Path | None = None,
        *,
        columns: int = 80,
        term: str = "xterm-256color",
        stdout: Path | None = None,
        keyboard: bool = True,
    ):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        out = theirs if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT)
        self.file = stdout
        self.process = subprocess.Popen(
            command,
            stdin=theirs if keyboard else subprocess.DEVNULL,
            stdout=out,
            stderr=theirs,
            env=environment() | {"TERM": term} | ({"HOME": str(home)} if home else {}),
            cwd=home or ROOT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(2, termios.TIOCSCTTY, 0),
        )
        for handle in {out, theirs}:
            os.close(handle)
        self.bytes = b""
        self.found = 0  # end of the text that `until` found last
        self.deadline = time.monotonic() + PATIENCE

    @property
    def sent(self) -> str:
        """All that reached the terminal."""
        return self.bytes.decode("utf-8", "replace")

    @property
    def stdout(self) -> bytes:
        return self.file.read_bytes()

    @property
    def code(self) -> int:
        """The exit code, once everything is read."""
        while self.ours >= 0 and self.read():
            pass
        return self.process.wait(PATIENCE)

    def until(self, text: str) -> Self:
        """Wait for a text behind the one that was last waited for."""
        while (at := self.sent.find(text, self.found)) < 0:
            assert self.read(), f"no {text!r} behind {self.sent[self.found :]!r}"
        self.found = at + len(text)
        return self

    def prompted(self, prompt: str = "> ") -> Self:
        """Wait until something can be typed; the last blank is sent as a move."""
        return self.until(BRACKETED_PASTE).until(prompt.rstrip())

    def type(self, text: str) -> Self:
        os.write(self.ours, text.encode())
        return self

    def echoes(self) -> bool:
        """Whether what is typed is echoed by the terminal."""
        return bool(termios.tcgetattr(self.ours)[3] & termios.ECHO)

    def screen(self, columns: int = 80) -> Screen:
        return Screen(columns).feed(self.sent)

    def leave(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        self.ours = -1

    def read(self) -> bytes:
        left = max(0, self.deadline - time.monotonic())
        if not select.select([self.ours], [], [], left)[0]:
            return b""
        with suppress(OSError):  # Linux at the end; macOS reads nothing
            more = os.read(self.ours, 65536)
            self.bytes += more
            return more
        return b""


def run_in_terminal(
    command: Sequence[str],
    *,
    columns: int = 80,
    stdout: Path | None = None,
    watch: Callable[[str, subprocess.Popen], None] = lambda sent, process: None,
) -> Terminal:
    """Run a command whose stderr, and stdout if no file is given, is a terminal.

    `watch` sees all that was sent so far whenever something is.
    """
    terminal = Terminal(command, columns=columns, stdout=stdout, keyboard=False)
    while terminal.read():
        watch(terminal.sent, terminal.process)
    terminal.process.wait(PATIENCE)
    terminal.leave()
    return terminal
