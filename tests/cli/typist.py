"""Somebody at the keyboard of a terminal in which a command runs."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from terminal import CODES, environment

PATIENCE = 20  # seconds until something is there, on a in_use machine
BRACKETED_PASTE = "\x1b[?2004h"  # the terminal is told that a prompt begins


def plain(sent: str) -> str:
    """What was sent without its codes."""
    return CODES.sub("", sent)


class Typist:
    """Starts a command in a terminal of its own, types, and reads along.

    home    where the command may keep files
    stdout  a file that gets it; None: the terminal
    """

    def __init__(
        self,
        command: Sequence[str],
        home: Path,
        *,
        columns: int = 80,
        term: str = "xterm-256color",
        stdout: Path | None = None,
    ):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        out = theirs if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT)
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=out,
            stderr=theirs,
            env=environment() | {"TERM": term, "HOME": str(home)},
            cwd=home,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        for handle in {out, theirs}:
            os.close(handle)
        self._sent = b""
        self._seen = 0  # of what was sent
        self.deadline = time.monotonic() + PATIENCE

    @property
    def sent(self) -> str:
        """All that reached the terminal."""
        return self._sent.decode("utf-8", "replace")

    def until(self, text: str) -> Self:
        """Wait until a text is sent, behind the one that was last waited for."""
        while (at := self.sent.find(text, self._seen)) < 0:
            assert self._read(), f"no {text!r} behind {self.sent[self._seen :]!r}"
        self._seen = at + len(text)
        return self

    def prompted(self, prompt: str = "> ") -> Self:
        """Wait until something can be typed."""
        # the last blank is sent as a move
        return self.until(BRACKETED_PASTE).until(prompt.rstrip())

    def until_there_is(self, path: Path) -> Self:
        """Wait until a file is there."""
        while not path.exists():
            assert time.monotonic() < self.deadline, f"no {path}"
            time.sleep(0.01)
        return self

    def type(self, text: str) -> Self:
        os.write(self.ours, text.encode())
        return self

    def press_again_and_again(self, key: str) -> Self:
        """Press a key twice; more often only if the command does not end by that."""
        for pause in (0.2, 3, 3, 3):
            self.type(key)
            end = time.monotonic() + pause
            while self._read(end):
                pass
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
                break
        return self

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        return self.process.wait(PATIENCE)

    def echoes(self) -> bool:
        """Whether what is typed is echoed by the terminal."""
        return bool(termios.tcgetattr(self.ours)[3] & termios.ECHO)

    def leave(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)

    def _read(self, until: float = float("inf")) -> bytes:
        left = min(self.deadline, until) - time.monotonic()
        if not select.select([self.ours], [], [], max(0, left))[0]:
            return b""
        try:
            more = os.read(self.ours, 65536)
        except OSError:  # Linux: nobody holds the other end
            return b""
        self._sent += more
        return more
