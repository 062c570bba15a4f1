"""The chat as a person at a terminal uses it: keys, Ctrl-C, and what tmux shows."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from shlex import join

import pytest
import scripted
from scripted import WIDE
from terminal import CODES, PATIENCE, ROOT, Terminal, environment, python

pytestmark = pytest.mark.slow
tmux = pytest.mark.skipif(not shutil.which("tmux"), reason="no tmux here")

COUNT = count()  # of servers: one that ends keeps its name for a moment
SHELL = "shell$"
NUMBERS = re.compile(r"^step \d+/\d+", re.MULTILINE)


def scripted_chat(script, *args, pause=0.0):
    return python(scripted.__file__, script, str(pause), *args)


def plain(sent):
    """What was sent without its codes."""
    return CODES.sub("", sent)


@pytest.fixture
def chat(tmp_path):
    """`chat("plain", pause=0.1)`: a terminal in which a scripted chat runs."""
    started = []

    def start(script, *args, pause=0.0, **more):
        command = scripted_chat(script, *args, pause=pause)
        started.append(Terminal(command, tmp_path, **more))
        return started[-1]

    yield start
    for terminal in started:
        terminal.leave()


def piped(command):
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment(), **streams)


def test_what_is_typed_during_an_answer_waits_for_the_prompt(chat):
    chat = chat("parts", pause=0.06).prompted()
    chat.type("hello\r").until("step 1/3 · entropy").type("/quit\r")
    assert chat.until("Done.").code == 0
    assert "\x1b[2mLet me think.\x1b[0m\r\n" in chat.sent
    assert "\x1b[2mYes.\x1b[0m\r\n\r\nFirst line.\r\n" in chat.sent
    assert '→ look({"at": "the \\u001b[2Jsky"})' in chat.sent
    assert "NOT TO BE SHOWN" not in chat.sent
    drawn = plain(chat.sent)
    assert drawn.index("/quit") > drawn.rindex("Done."), "it was not echoed before"


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(chat, tmp_path):
    path = tmp_path / "talk.jsonl"
    chat = chat("long", pause=0.02).prompted()
    chat.type("hello\r").until("canvas 1\r\n").type("\x03").until("(stopped)")
    kept = re.findall(r"canvas \d+(?=\r?\n)", plain(chat.sent))
    chat.prompted().type(f"/save {path}\r").until("saved in").prompted()
    _, reply = map(json.loads, path.read_text().splitlines())
    assert reply["content"].splitlines() == kept
    assert len(kept) >= 2
    chat.type("refuse\r").until("error: refused␛[2J").prompted()
    chat.type("fail\r").until("error: RuntimeError: [malloc]").prompted()
    assert chat.type("/quit\r").code == 0
    assert "^C" not in chat.sent


def test_second_ctrl_c_leaves_at_once(chat, tmp_path):
    chat = chat("long", pause=60).prompted().type("hello\r")
    while not (tmp_path / "asleep").exists():
        assert time.monotonic() < chat.deadline
        time.sleep(0.01)
    chat.type("\x03")
    time.sleep(1)  # two at once would be one signal
    chat.type("\x03")
    assert chat.code == 130
    assert plain(chat.sent).endswith("interrupted\r\n")
    assert chat.echoes()


def test_ctrl_c_before_anything_is_committed_takes_the_question_back(chat, tmp_path):
    (tmp_path / "a.png").touch()
    chat = chat("long", pause=0.9).prompted()
    chat.type(f"/image {tmp_path / 'a.png'}\r").prompted("[1 image] > ")
    chat.type("hello\r").until("encoding").type("\x03")
    chat.until("(stopped before anything was said)").prompted("[1 image] > ")
    chat.type("/save a.md\r").until("nothing to save yet").prompted("[1 image] > ")
    assert chat.type("\x04").code == 0


def test_ctrl_c_at_the_prompt_clears_the_line_and_a_second_leaves(chat):
    chat = chat("plain", "--no-show").prompted()
    chat.type("some text").until("some text").type("\x03/stats\r")
    chat.until("no answer yet").prompted()
    chat.type("hello\r").until("one\r\ntwo\r\n\r\n").prompted()
    chat.type("\x03").until("(Ctrl-C again, or Ctrl-D, leaves)").prompted()
    assert chat.type("\x03").code == 0
    assert chat.echoes()
    assert "step" not in chat.sent, "--no-show draws no canvas"


def test_several_lines_are_one_message(chat, tmp_path):
    path = tmp_path / "talk.jsonl"
    chat = chat("plain").prompted()
    chat.type("one\\\rtwo\x1b\rthree\r").until("one\r\ntwo").prompted()
    chat.type("\x1b[200~a\r\nb\n/quit\x1b[201~\r").until("one\r\ntwo").prompted()
    chat.type(f"/sa\t{path.parent}/talk.j\t").type("sonl\r").until("saved")
    assert chat.prompted().type("\x04").code == 0
    said = [json.loads(line) for line in path.read_text().splitlines()]
    questions = [m["content"] for m in said if m["role"] == "user"]
    assert questions == ["one\ntwo\nthree", "a\nb\n/quit"]


def test_dumb_terminal_gets_no_codes(chat):
    chat = chat("parts", term="dumb").until("> ")
    chat.type("hello\r").until("Done.").until("> ").type("/nope\r").until("> ")
    assert chat.type("\x04").code == 0
    assert "\x1b" not in chat.sent and "step" not in chat.sent
    assert "Let me think.\r\nYes.\r\n\r\nFirst line." in chat.sent


def test_file_gets_answers_alone_while_a_person_types(chat, tmp_path):
    chat = chat("parts", stdout=tmp_path / "out").prompted()
    chat.type("hello\r").until("step").prompted().type("/stats\r").until("seed 7")
    assert chat.prompted().type("\x04").code == 0
    assert chat.stdout.decode().startswith("First line.\n→ look(")
    assert "Done." not in plain(chat.sent).replace("Done. draft", "")


def test_terminal_gets_no_codes_when_stdin_is_a_pipe(chat, tmp_path):
    shell = f"echo hello | {join(scripted_chat('hostile'))}"
    ended = Terminal(["sh", "-c", shell], tmp_path, keyboard=False)
    assert ended.code == 0
    assert "\x1b" not in ended.sent and "\x9b" not in ended.sent
    assert "␛]52;c;aGk=␇␛[2J" in ended.sent and "step" not in ended.sent


def test_ctrl_c_in_a_pipe_ends_it_and_keeps_what_is_committed():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests/cli')!r})\n"
        "import scripted; from mlx_dgemma.cli.chat import main\n"
        "scripted.install('held', pause=0.01, held=1)\n"
        "main(['--model', 'm'])\n"
    )
    process = piped(python("-c", code))
    process.stdin.write(b"hello\nnever asked\n")
    process.stdin.flush()
    written = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    more, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, b"(stopped)\n")
    assert re.fullmatch(rb"a b*\n", written + more)


@pytest.mark.parametrize("command", ["chat", "generate --prompt -"])
def test_closed_stdin_is_refused(command):
    shell = f'exec "{sys.executable}" -m mlx_dgemma.{command} --model x <&-'
    result = subprocess.run(
        ["sh", "-c", shell], env=environment(), capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch("error: stdin is closed; give .*\n", result.stderr)


# ----------------------------------------------------------------------------- tmux


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


CHAT = python("-m", "mlx_dgemma", "chat")
NEVER_DONE = ["--model", "sudoku4", "--steps", "100000", "--confidence", "0"]


@tmux
@pytest.mark.parametrize("columns", [80, 40])
def test_a_canvas_while_it_is_denoised(pane, columns):
    pane = pane(columns)
    start(pane, *CHAT, *NEVER_DONE, "--seed", "0")
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


@tmux
def test_nothing_a_model_says_reaches_the_terminal(pane):
    pane = pane(80)
    before = pane.says("pane_title"), pane.says("mouse_any_flag")
    start(pane, *scripted_chat("hostile", pause=0.06))
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


@tmux
@pytest.mark.parametrize("columns", [80, 40])
def test_wide_characters_do_not_break_a_frame(pane, columns):
    pane = pane(columns)
    start(pane, *scripted_chat("wide", pause=0.1))
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
