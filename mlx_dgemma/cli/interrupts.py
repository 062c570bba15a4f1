"""Ctrl-C, also while MLX computes and Python cannot run its handlers.

SIGTERM and SIGHUP end a command as SIGINT does.
"""

import os
import signal
import socket
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

INTERRUPTED = 130  # the exit code
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 1.0  # seconds that a second Ctrl-C leaves the main thread to end by itself


def as_sigint(number: int, frame: Any) -> None:
    """Do for another signal what the handler of SIGINT does now."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(number, frame)


def install() -> None:
    """Have the signals that end a process raise KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, as_sigint)


@contextmanager
def watching(say: Callable[[], None]) -> Iterator[None]:
    """Call `say`, in a thread, at the first Ctrl-C; the second one always leaves.

    A handler of Python's waits until the running call of MLX returns, which may take as
    long as a chunk of the prompt.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ended = Event()
    terminal = None
    with suppress(OSError, ValueError, AttributeError, termios.error):
        terminal = sys.stdin.fileno(), termios.tcgetattr(sys.stdin.fileno())

    def watch() -> None:
        count = 0
        with ours:
            while data := ours.recv(16):
                count += sum(number in ENDING for number in data)
                if count:
                    say()
                if count > 1 and not ended.wait(GRACE):
                    if terminal is not None:
                        termios.tcsetattr(terminal[0], termios.TCSANOW, terminal[1])
                    os.write(2, b"\r\x1b[Kinterrupted\n" if os.isatty(2) else b"")
                    os._exit(INTERRUPTED)

    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        theirs.close()
