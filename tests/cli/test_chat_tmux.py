"""The chat as a person sees it: in tmux, at two widths, resized in the middle."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from shlex import join

import pytest
import scripted
from scripted import WIDE
from terminal import environment, python

pytestmark = pytest.mark.skipif(not shutil.which("tmux"), reason="no tmux here")

PATIENCE = 20  # seconds until something is to be seen, on a in_use machine
COUNT = count()  # of servers: one that ends keeps its name for a moment
SHELL = "shell$"
NUMBERS = re.compile(r"^step \d+/\d+", re.MULTILINE)


class Pane:
    """A tmux of its own with one shell in it."""

    def __init__(self, home: Path, columns: int):
        name = f"chat-{os.getpid()}-{next(COUNT)}"
        self.server = ["tmux", "-L", name, "-f", "/dev/null"]
        self.deadline = time.monotonic() + PATIENCE
        shell = ["env", f"HOME={home}", f"PS1={SHELL} ", "sh"]
        size = ["-x", str(columns), "-y", "24"]
        subprocess.run(
            [*self.server, "new-session", "-d", *size, join(shell)],
            env=environment(),
            check=True,
        )
        self.until(lambda shown: shown.startswith(SHELL))

    def tmux(self, *command: str) -> str:
        return subprocess.run(
            [*self.server, *command], capture_output=True, text=True, check=True
        ).stdout

    def shown(self, *flags: str) -> str:
        """What is in the pane now, without blanks and empty lines at the end."""
        lines = self.tmux("capture-pane", "-p", *flags).rstrip("\n").split("\n")
        return "\n".join(line.rstrip() for line in lines)

    def says(self, variable: str) -> str:
        return self.tmux("display-message", "-p", f"#{{{variable}}}").strip()

    def until(self, seen: Callable[[str], object]) -> str:
        """Wait until the pane shows it; what it shows then."""
        while not seen(shown := self.shown()):
            assert time.monotonic() < self.deadline, f"never seen; now:\n{shown}"
            time.sleep(0.02)
        return shown

    def type(self, text: str, *keys: str) -> None:
        self.tmux("send-keys", "-l", text)
        for key in keys:
            self.tmux("send-keys", key)

    def resize(self, columns: int, rows: int = 24) -> None:
        self.tmux("resize-window", "-x", str(columns), "-y", str(rows))


@pytest.fixture
def pane(tmp_path):
    """`pane(80)`: a pane of so many columns and 24 rows."""
    opened = []

    def start(columns):
        opened.append(Pane(tmp_path, columns))
        return opened[-1]

    yield start
    for one in opened:
        one.tmux("kill-server")


def prompted(shown):
    """Whether the last line is an empty prompt of the chat."""
    return shown.endswith("\n>")


def live(shown):
    """Whether the last line is the numbers of a canvas."""
    return NUMBERS.match(shown.rpartition("\n")[2])


def start(pane, *command):
    pane.type(join(command), "Enter")
    pane.until(prompted)


def leave(pane):
    """Type /quit; the shell must be as if nothing had been."""
    pane.type("/quit", "Enter")
    shown = pane.until(lambda shown: shown.endswith(f"\n{SHELL}"))
    assert pane.says("cursor_flag") == "1"
    assert pane.says("alternate_on") == "0"
    assert int(pane.says("cursor_x")) == len(SHELL) + 1
    pane.type("stty -a | grep -c ' echo '; echo left $?", "Enter")
    pane.until(lambda shown: shown.endswith(f"\n1\nleft 0\n{SHELL}"))
    return shown


def chat(*args):
    return python("-m", "mlx_dgemma.chat", *args)


NEVER_DONE = ["--model", "sudoku4", "--steps", "100000", "--confidence", "0"]


@pytest.mark.parametrize("columns", [80, 40])
def test_a_canvas_while_it_is_denoised(pane, columns):
    pane = pane(columns)
    start(pane, *chat(*NEVER_DONE, "--seed", "0"))
    pane.type("4000\\", "Enter")
    pane.type("0310", "M-Enter")
    pane.type("0430\\", "Enter")
    pane.type("0000", "Enter")
    first = pane.until(live)
    assert "\n> 4000\n  0310\n  0430\n  0000\n" in first
    for width in (120 - columns, columns):  # the other one, and back
        pane.resize(width)
        step = NUMBERS.search(pane.shown())
        shown = pane.until(lambda s, step=step: live(s) and NUMBERS.search(s) != step)
        pane.until(lambda s: live(s) and len(NUMBERS.findall(s)) == 1)
    assert max(map(len, shown.split("\n"))) <= columns
    pane.type("", "C-c")
    shown = pane.until(prompted)
    assert "(stopped before anything was said)" in shown
    assert not NUMBERS.search(shown), "the canvas is gone"
    pane.type("/stats", "Enter")
    pane.until(lambda s: "32 encoded" in s.replace("\n", "") and prompted(s))
    leave(pane)


def test_an_answer_of_a_real_model_stays(pane):
    pane = pane(80)
    start(pane, *chat("--model", "sudoku4", "--seed", "0"))
    pane.tmux("set-buffer", "4000\n0310\n0430\n0000")
    pane.tmux("paste-buffer", "-p")
    pane.until(lambda shown: shown.endswith("> 4000\n  0310\n  0430\n  0000"))
    pane.type("", "Enter")
    pane.until(prompted)
    shown = leave(pane)
    assert "  0000\n4123\n2314\n1432\n3241\n\n> /quit\n" in shown


def test_nothing_a_model_says_reaches_the_terminal(pane):
    pane = pane(80)
    before = pane.says("pane_title"), pane.says("mouse_any_flag")
    start(pane, *python(scripted.__file__, "hostile", "0.06"))
    pane.type("hello", "Enter")
    pane.until(live)
    shown = pane.until(prompted)
    assert "␛]0;owned␇␛]52;c;aGk=␇␛[2J␛[H␛[?25l␛[?1049h" in shown.replace("\n", "")
    pane.type("", "C-l")
    pane.until(lambda shown: shown == ">")
    leave(pane)
    assert (pane.says("pane_title"), pane.says("mouse_any_flag")) == before
    assert pane.tmux("list-buffers") == "", "nothing is in the clipboard"
    pane.type("echo plain letters", "Enter")
    pane.until(lambda shown: shown.endswith(f"\nplain letters\n{SHELL}"))


@pytest.mark.parametrize("columns", [80, 40])
def test_wide_characters_do_not_break_a_frame(pane, columns):
    pane = pane(columns)
    start(pane, *python(scripted.__file__, "wide", "0.1"))
    pane.type("漢字 🙂?", "Enter")
    shown = pane.until(live)
    drawn = shown.partition("🙂?\n")[2].split("\n")
    assert len(NUMBERS.findall(shown)) == 1
    pane.resize(120 - columns)
    pane.until(prompted)
    pane.resize(columns)
    pane.until(prompted)
    shown = pane.shown("-S", "-")  # what was scrolled away too
    assert len(drawn) > 2
    # made narrower, tmux itself scrolls away lines of the canvas that was there then
    assert not NUMBERS.search(shown)
    said = shown.partition("🙂?\n")[2].removesuffix("\n>")
    assert "".join(said.split()).endswith("".join((WIDE * 3).split()))
    leave(pane)
