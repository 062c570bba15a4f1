"""The chat as a person at a terminal uses it: keys, Ctrl-C, and what tmux shows."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from shlex import join

import pytest
import scripted
from terminal import CODES, PATIENCE, Terminal, environment, python

pytestmark = pytest.mark.slow

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
    assert reply["content"].splitlines() == kept and len(kept) >= 2
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


def test_keys_at_the_prompt(chat, tmp_path):
    chat = chat("plain", "--no-show").prompted()
    chat.type("some text").until("some text").type("\x03/stats\r")
    chat.until("no answer yet").prompted()
    chat.type("one\\\rtwo\x1b\rthree\r").until("one\r\ntwo\r\n\r\n").prompted()
    chat.type("\x1b[200~a\r\nb\n/quit\x1b[201~\r").until("one\r\ntwo").prompted()
    chat.type(f"/sa\t{tmp_path}/talk.j\t").type("sonl\r").until("saved").prompted()
    said = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    questions = [m["content"] for m in said if m["role"] == "user"]
    assert questions == ["one\ntwo\nthree", "a\nb\n/quit"]
    chat.type("\x03").until("(Ctrl-C again, or Ctrl-D, leaves)").prompted()
    assert chat.type("\x03").code == 0
    assert chat.echoes()
    assert "step" not in chat.sent, "--no-show draws no canvas"


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


def test_terminal_gets_no_codes_when_stdin_is_a_pipe(tmp_path):
    shell = f"echo hello | {join(scripted_chat('hostile'))}"
    ended = Terminal(["sh", "-c", shell], tmp_path, keyboard=False)
    assert ended.code == 0
    assert "\x1b" not in ended.sent and "\x9b" not in ended.sent
    assert "␛]52;c;aGk=␇␛[2J" in ended.sent and "step" not in ended.sent


def test_ctrl_c_in_a_pipe_ends_it_and_keeps_what_is_committed():
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = scripted_chat("held", pause=0.01)
    process = subprocess.Popen(command, env=environment(), **streams)
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
    """A tmux of its own, 80 columns wide, with one shell in it."""

    def __init__(self, home):
        self.server = ["tmux", "-S", str(home / "tmux"), "-f", "/dev/null"]
        self.deadline = time.monotonic() + PATIENCE
        shell = join(["env", f"HOME={home}", f"PS1={SHELL} ", "sh"])
        self.tmux("new-session", "-d", "-x", "80", "-y", "24", shell)
        self.until(lambda shown: shown.startswith(SHELL))

    def tmux(self, *command):
        command = [*self.server, *command]
        result = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=True
        )
        return result.stdout.rstrip("\n")

    def shown(self, *flags):
        """What is in the pane now, without blanks at the ends of lines."""
        lines = self.tmux("capture-pane", "-p", *flags).split("\n")
        return "\n".join(line.rstrip() for line in lines)

    def state(self):
        names = "cursor_flag alternate_on cursor_x pane_title mouse_any_flag".split()
        formats = " ".join(f"#{{{name}}}" for name in names)
        return self.tmux("display-message", "-p", formats)

    def until(self, seen):
        """Wait until the pane shows it; return what it shows then."""
        while not seen(shown := self.shown()):
            assert time.monotonic() < self.deadline, f"never seen; now:\n{shown}"
            time.sleep(0.02)
        return shown

    def type(self, text, key="Enter"):
        self.tmux("send-keys", "-l", text)
        self.tmux("send-keys", key)

    def resize(self, columns):
        self.tmux("resize-window", "-x", str(columns), "-y", "24")


@pytest.fixture
def pane(tmp_path):
    if not shutil.which("tmux"):
        pytest.skip("no tmux here")
    pane = Pane(tmp_path)
    before = pane.state()
    yield pane
    pane.type("/quit")
    pane.until(lambda shown: shown.endswith(f"\n{SHELL}"))
    assert pane.state() == before, "the terminal is as it was"
    assert pane.tmux("list-buffers") == "", "nothing is in the clipboard"
    pane.type("stty -a | grep -c ' echo '; echo left $?")
    pane.until(lambda shown: shown.endswith(f"\n1\nleft 0\n{SHELL}"))
    pane.tmux("kill-server")


def prompted(shown):
    """Whether the last line is an empty prompt of the chat."""
    return shown.endswith("\n>")


def live(shown):
    """Whether the last line is the numbers of a canvas."""
    return NUMBERS.match(shown.rpartition("\n")[2])


def test_canvas_is_redrawn_whatever_the_width(pane):
    never_done = ["--steps", "100000", "--confidence", "0", "--seed", "0"]
    command = python("-m", "mlx_dgemma", "chat", "--model", "sudoku4")
    pane.type(join([*command, *never_done]))
    pane.until(prompted)
    for line, key in ("4000\\", "Enter"), ("0310", "M-Enter"), ("0430\n0000", "Enter"):
        pane.type(line.replace("\n", "\\\r"), key)
    assert "\n> 4000\n  0310\n  0430\n  0000\n" in pane.until(live)
    for width in (40, 80):
        pane.resize(width)
        step = NUMBERS.search(pane.shown())[0]
        pane.until(lambda s, step=step: live(s) and step not in s)
        shown = pane.until(lambda s: live(s) and len(NUMBERS.findall(s)) == 1)
        assert max(map(len, shown.split("\n"))) <= width
    pane.type("", "C-c")
    shown = pane.until(prompted)
    assert "(stopped before anything was said)" in shown
    assert not NUMBERS.search(shown), "the canvas is gone"
    pane.type("/stats")
    pane.until(lambda s: "32 encoded" in s.replace("\n", "") and prompted(s))


def test_nothing_a_model_says_reaches_the_terminal(pane):
    pane.type(join(scripted_chat("hostile", pause=0.06)))
    pane.until(prompted)
    pane.type("hello")
    pane.until(live)
    shown = pane.until(prompted)
    assert "␛]0;owned␇␛]52;c;aGk=␇␛[2J␛[H␛[?25l␛[?1049h" in shown.replace("\n", "")
