"""`mlx_dgemma.chat`: its commands, its files, and as a person and a pipe run it."""

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import scripted
from click.testing import CliRunner
from scripted import HOSTILE, SCRIPTS, Scripted
from terminal import ROOT, environment, python, run_in_terminal
from typist import Typist, plain

from mlx_dgemma import load
from mlx_dgemma.cli import keyboard, slash, transcript
from mlx_dgemma.cli.chat import MAX_TOKENS, main
from mlx_dgemma.diffusion import generation
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.text.replies import Answer, Call, Malformed, Thought

SCRIPT = str(Path(scripted.__file__))


def run(typed, *args):
    return CliRunner().invoke(main, ["--model", "m", *map(str, args)], input=typed)


@pytest.fixture
def play(monkeypatch):
    """`play("parts")`: chat with this script; the conversation is `play.chat()`."""

    def start(script="plain", **changes):
        monkeypatch.setattr(Scripted, "made", [])
        scripted.install(script, patch=monkeypatch.setattr)
        for name, value in changes.items():
            monkeypatch.setattr(Scripted, name, value)

    start.chat = lambda: Scripted.made[0]
    return start


def scripted_chat(script, *args, pause=0.0):
    return python(SCRIPT, script, str(pause), *args)


# ---------------------------------------------------------------- what a line means


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("hello", slash.Message("hello")),
        ("", slash.Message("")),
        ("  /help", slash.Message("  /help")),
        ("a /help", slash.Message("a /help")),
        ("a\n/help", slash.Message("a\n/help")),
        ("//help", slash.Message("/help")),
        ("//", slash.Message("/")),
        ("///a", slash.Message("//a")),
        ("/help", slash.Command("help", "")),
        ("/ help", slash.Command("help", "")),
        ("/HELP ", slash.Command("help", "")),
        ("/quit", slash.Command("quit", "")),
        ("/image", slash.Command("image", "")),
        ("/image  a b.png ", slash.Command("image", "a b.png")),
        ("/system be\nkind", slash.Command("system", "be\nkind")),
        ("/system\tkind", slash.Command("system", "kind")),
        ("/think on", slash.Command("think", "on")),
        ("/rewind", slash.Command("rewind", "")),
        ("/rewind 2", slash.Command("rewind", "2")),
    ],
)
def test_what_a_line_means(typed, meant):
    assert slash.parse(typed) == meant


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("/", "/ is no command; did you mean /"),
        ("/hlep", "/hlep is no command; did you mean /help? /help lists all"),
        ("/exit", "did you mean /quit?"),
        ("/Sav x.md", "did you mean /save?"),
        ("/imagex", "did you mean /image?"),
        ("/" + "x" * 10_000, "/" + "x" * 40 + " is no command"),
        ("/home/me/picture.png what is it?", "// begins a message with /"),
        ("/quit now", "/quit takes nothing behind it"),
        ("/reset x", "/reset takes nothing behind it"),
        ("a\udcff", "what was typed is not UTF-8"),
    ],
)
def test_what_means_nothing_is_one_line(typed, told):
    with pytest.raises(SettingsError, match=re.escape(told)) as refused:
        slash.parse(typed)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("argument", ["", "x", "-1", "1.5", "²", "٣", "1" * 19, "0"])
def test_a_number_is_a_whole_one(argument):
    with pytest.raises(SettingsError, match=r"^/rewind (needs|is)"):
        slash.number("rewind", argument, 1)
    assert slash.number("rewind", "12", 1) == 12


def test_every_command_has_help_and_a_test():
    assert len(slash.NAMES) == len(set(slash.NAMES)) == 10
    lines = slash.help_lines()
    assert max(map(len, lines)) < 80
    for name in slash.NAMES:
        assert any(line.startswith(f"/{name}") for line in lines)


def test_a_path_may_be_quoted_dragged_or_at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    found = {
        "a.png": "a.png",
        "a b.png": "a b.png",
        "'a b.png'": "a b.png",
        r"a\ b.png": "a b.png",
        "it's.png": "it's.png",
    }
    for typed, name in found.items():
        assert slash.path_of(typed) == str(tmp_path / name)
    assert slash.path_of("~/x.md") == "/home/me/x.md"
    (tmp_path / r"a\ b.png").touch()
    assert slash.path_of(r"a\ b.png") == str(tmp_path / r"a\ b.png")


# ------------------------------------------------------------------ what Tab offers


def completed(before):
    return {
        before[: len(before) + start] + t for start, t in keyboard.completions(before)
    }


def test_tab_completes_commands_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "cat 2.png", ".hidden", "bad\x1b[2J.png"):
        (tmp_path / name).touch()
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "one.png").touch()
    assert completed("/") == {f"/{name} " for name in slash.NAMES}
    assert completed("/re") == {"/rewind ", "/reset "}
    assert completed("/image ca") == {
        f"/image {n}" for n in ("cat.png", "cat 2.png", "cats/")
    }
    assert completed("/save cats/") == {"/save cats/one.png"}
    assert completed("/image .h") == {"/image .hidden"}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert completed("/image ~/cats/o") == {"/image ~/cats/one.png"}
    for nothing in (
        "",
        "ca",
        "/think o",
        "/image nowhere/x",
        "/image a\0",
        "/image bad",
    ):
        assert not completed(nothing)


# ------------------------------------------------------------------------ histories


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_history_is_the_users_alone(home):
    path = home / ".local/state/mlx-dgemma/history"
    before = os.umask(0)
    try:
        assert keyboard.history_file() == path
    finally:
        os.umask(before)
    assert mode(path) == 0o600 and mode(path.parent) == 0o700
    path.write_text("\n+kept\n")
    path.chmod(0o644)
    assert keyboard.history_file() == path
    assert mode(path) == 0o600 and path.read_text() == "\n+kept\n"


def test_the_history_lies_where_the_desktop_says(home, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    assert keyboard.history_file() == home / "state/mlx-dgemma/history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # to be ignored
    assert keyboard.history_file() == home / ".local/state/mlx-dgemma/history"


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null", "\0"])
def test_no_home_no_history(home, monkeypatch, place):
    expand = lambda path: path.replace("~", place)  # noqa: E731
    monkeypatch.setattr(keyboard.os.path, "expanduser", expand)
    assert keyboard.history_file() is None
    monkeypatch.setattr(keyboard.os.path, "expanduser", lambda path: path)
    assert keyboard.history_file() is None


def test_a_history_that_is_a_folder_is_none(home):
    (home / ".local/state/mlx-dgemma/history").mkdir(parents=True)
    assert keyboard.history_file() is None


def test_a_history_that_cannot_be_written_is_kept_in_memory(home, monkeypatch):
    history = keyboard.history()
    history.append_string("one\ntwo")
    path = keyboard.history_file()
    path.unlink()
    path.mkdir()
    history.append_string("three")
    assert history.get_strings() == ["one\ntwo", "three"]
    assert list(keyboard.history().load_history_strings()) == []


# ---------------------------------------------------------------------- transcripts

TALK = [
    {"role": "system", "content": "be kind"},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": "/a b.png"},
            {"type": "text", "text": "What is ж?\nAnd 漢?"},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.\nLook.",
        "tool_calls": [
            {
                "id": "call_0",
                "type": "function",
                "function": {"name": "look", "arguments": {"at": "ж"}},
            }
        ],
    },
    {"role": "tool", "content": "a letter"},
    {"role": "assistant", "content": "A letter."},
]
MARKDOWN = """\
## System

be kind

## You

![picture](</a b.png>)

What is ж?
And 漢?

## Model

> Hm.
> Look.

    → look({"at": "ж"})

## Tool

a letter

## Model

A letter.
"""


def test_a_transcript_says_all_that_was_said(tmp_path):
    transcript.save(str(tmp_path / "a.md"), TALK)
    assert (tmp_path / "a.md").read_text("utf-8") == MARKDOWN
    transcript.save(str(tmp_path / "a.JSONL"), TALK)
    lines = (tmp_path / "a.JSONL").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == TALK
    assert "ж" in lines[1]


def test_half_a_character_in_a_call_can_be_saved(tmp_path):
    call = {"name": "look", "arguments": {"at": "\ud83d"}}
    said = [{"role": "assistant", "content": None, "tool_calls": [{"function": call}]}]
    transcript.save(str(tmp_path / "a.jsonl"), said)
    assert json.loads((tmp_path / "a.jsonl").read_text("utf-8")) == said[0]
    transcript.save(str(tmp_path / "a.md"), said)


def test_a_transcript_takes_the_place_of_an_old_one_and_its_mode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    path.chmod(0o640)
    (tmp_path / "link.jsonl").symlink_to(path)
    transcript.save(str(tmp_path / "link.jsonl"), TALK[:1])
    assert json.loads(path.read_text()) == TALK[0]
    assert mode(path) == 0o640 and (tmp_path / "link.jsonl").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "link.jsonl"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_old_transcript(tmp_path, monkeypatch, play, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.md"
    path.write_text("old")
    play()
    if call == "fsync":
        monkeypatch.setattr(transcript.os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    result = run(f"hi\n/save {path}\n")
    assert result.exit_code == 1
    assert result.stderr == f"error: {path}: No space left on device\n"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.md"]


# --------------------------------------------------------------------------- a pipe


def test_each_line_is_a_message_and_answers_go_to_stdout(play):
    play()
    result = run("hello\n\n   \n//x\r\nla\\\nst")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "one\ntwo\n" * 3
    assert [text for text, _ in play.chat().asked] == ["hello", "/x", "la\nst"]


def test_nothing_typed_is_no_error(play):
    play()
    assert (run("").exit_code, run("").output) == (0, "")
    assert play.chat().asked == []


def test_a_backslash_at_the_very_end_continues_nothing(play):
    play()
    assert run("hello\\\n").exit_code == 0
    assert play.chat().asked == [("hello", None)]


def test_a_pipe_gets_answers_and_calls_but_no_thoughts_and_no_codes(play):
    play("parts")
    result = run("hello\n")
    assert result.stdout == (
        'First line.\n→ look({"at": "the \\u001b[2Jsky"})\n'
        "→ x{ (cannot be read: torn)\n\nDone.\n"
    )
    assert result.stderr == ""


def test_a_file_gets_the_model_s_bytes_and_stderr_none_of_them(play):
    play("hostile")
    result = run(f"hello\n/save {HOSTILE}\n")
    assert HOSTILE.encode() in result.stdout_bytes
    assert result.exit_code == 1
    assert "\x1b" not in result.stderr and "\x9b" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_commands_reach_the_conversation(play, tmp_path):
    play()
    pictures = [tmp_path / name for name in ("a.png", "b c.png")]
    for picture in pictures:
        picture.touch()
    result = run(
        "/think on\n/system be kind\n/seed 5\none\n"
        f"/image {pictures[0]}\n/image {pictures[1]}\ntwo\n"
        "/seed off\nthree\n/rewind 2\n/image\n/system\n/think off\nfour\n"
        "/stats\n/reset\n/stats\n/help\n/quit\nfive\n"
    )
    assert result.exit_code == 0
    chat = play.chat()
    parts = [{"type": "image", "image": str(picture)} for picture in pictures]
    parts.append({"type": "text", "text": "two"})
    assert chat.asked == [("one", 5), (parts, 5), ("three", None), ("four", None)]
    assert (chat.thinking, chat.system, chat.messages) == (False, None, [])
    told = result.stderr.splitlines()
    assert told[:4] == [
        "thinking on",
        "system turn set",
        "the conversation goes on under it; /reset begins another",
        "seed 5",
    ]
    assert "took back 2 questions" in told and "a new conversation" in told
    numbers = (
        r"5 prompt tokens · 2 committed tokens · 2 canvases \(3 \+ 3 steps\) · "
        r"0.33 tokens per forward · [\d.]+ tok/s wall · peak memory .* · seed 7"
    )
    assert sum(bool(re.fullmatch(numbers, line)) for line in told) == 2
    assert told.count("of the prompt 3 tokens were reused, 2 encoded") == 2
    assert "/quit         leave, as Ctrl-D does" in told


def test_what_is_saved_is_what_was_said(play, tmp_path):
    play("parts")
    path = tmp_path / "talk.jsonl"
    result = run(f"hello\n/save {path}\n", "--system", "be kind")
    assert result.stderr == f"saved in {path}\n"
    system, said, reply = map(json.loads, path.read_text().splitlines())
    assert system == {"role": "system", "content": "be kind"}
    assert said == {"role": "user", "content": "hello"}
    assert reply["reasoning_content"] == "Let me think.\nYes."
    assert reply["content"] == "\n\nFirst line.\nx{\nDone."
    assert reply["tool_calls"][0]["function"]["name"] == "look"


def test_pictures_are_saved_by_their_paths(play, tmp_path):
    play()
    (tmp_path / "a.png").touch()
    run(f"/image {tmp_path / 'a.png'}\nwhat?\n/save {tmp_path / 'a.jsonl'}\n")
    said = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert said["content"] == [
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "text", "text": "what?"},
    ]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (b"/hlep\n", "/hlep is no command; did you mean /help?"),
        (b"/image nowhere.png\n", "nowhere.png: no such picture"),
        (b"/image .\n", "no such picture"),
        (b"/save a\0b.md\n", "a path cannot hold a zero byte"),
        (b"/think\n", "/think needs on or off, not ''"),
        (b"/seed -1\n", "/seed needs a whole number from 0 up, not '-1'"),
        (b"/rewind 9\n", "there are not so many to take back"),
        (b"/rewind 0\n", "/rewind is 0; it must be from 1 up"),
        (b"/save\n", "/save needs the name of a file"),
        (b"/save a.txt\n", "a.txt: name it *.md or *.jsonl"),
        (b"/save nowhere/a.md\n", "nowhere/a.md: No such file or directory"),
        (b"a\xffb\n", "line 2 of stdin is not UTF-8 at byte 1; convert it first"),
        (b"refuse\n", "refused␛[2J, as was asked for"),
        (b"fail\n", "RuntimeError: [malloc] no room; --debug shows where"),
    ],
)
def test_what_fails_in_a_pipe_ends_it_in_one_line(play, typed, told):
    play()
    result = run(b"hello\n" + typed + b"never asked\n")
    assert (result.exit_code, result.stdout) == (1, "one\ntwo\n")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and told in line
    assert [text for text, _ in play.chat().asked] == ["hello"]


def test_nothing_said_is_nothing_to_save(play, tmp_path):
    play()
    result = run(f"/save {tmp_path / 'a.md'}\n", "--system", "be kind")
    assert result.stderr == "error: nothing to save yet; say something first\n"
    assert not os.listdir(tmp_path)


def test_an_answer_that_was_cut_or_empty_says_so(play):
    play(reason="length")
    assert run("hello\n").stderr == "(cut: --max-tokens is reached)\n"
    play("silent", reason="stop")
    assert "(an empty answer; --min-tokens 1" in run("hello\n").stderr


def test_options_arrive_and_what_is_not_given_the_checkpoint_says(play):
    play()
    assert run("").exit_code == 0
    unset = play.chat().options
    assert unset.pop("max_tokens") == MAX_TOKENS
    assert unset.pop("prefill_step_size") == generation.PREFILL_STEP
    assert set(unset.values()) == {None}
    assert {"steps", "entropy_bound", "sampler", "freeze", "min_tokens"} < set(unset)
    play()
    given = ["--max-tokens", 7, "--steps", 3, "--freeze", "--thinking", "--seed", 9]
    assert run("hello\n", *given).exit_code == 0
    chat = play.chat()
    assert chat.options == {
        **unset, "max_tokens": 7, "steps": 3, "freeze": True, "prefill_step_size": 2048
    }  # fmt: skip
    assert chat.thinking and chat.asked == [("hello", 9)]


def test_the_prompt_cache_is_read_if_it_is_there_and_kept(play, tmp_path):
    path = tmp_path / "cache.safetensors"
    play()
    run("hello\n", "--prompt-cache-file", path)
    assert play.chat().files == [("save", str(path))]
    path.touch()
    play()
    run("", "--prompt-cache-file", path)
    assert play.chat().files == [("load", str(path))]


@pytest.mark.parametrize(
    ("args", "named"),
    [(["--steps", "0"], "--steps"), (["--seed", "-1"], "--seed"), (["x"], "(x)")],
)
def test_wrong_usage_exits_2(args, named):
    result = run("", *args)
    assert result.exit_code == 2 and named in result.stderr
    assert "--model" in CliRunner().invoke(main, []).stderr


def test_a_model_that_is_not_there_is_one_line():
    result = CliRunner().invoke(main, ["--model", "no/where/at/all"], input="hello\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no/where/at/all: no such folder")


def test_help_needs_neither_a_model_nor_a_keyboard():
    code = (
        "import sys; from mlx_dgemma.cli.chat import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as left: assert left.code == 0\n"
        "assert not {'mlx', 'prompt_toolkit', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run(python("-c", code), env=environment(), check=True)


def test_stdin_that_is_closed_is_refused():
    shell = f'exec "{sys.executable}" -m mlx_dgemma.chat --model x <&-'
    result = subprocess.run(
        ["sh", "-c", shell], env=environment(), capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "error: stdin is closed; give it some lines, or a terminal\n"
    )


def test_with_stdin_from_a_pipe_a_terminal_gets_harmless_text_and_no_codes():
    ended = run_in_terminal(["sh", "-c", f"echo hello | {quoted('hostile')}"])
    assert ended.code == 0
    assert "\x1b" not in ended.sent and "\x9b" not in ended.sent
    assert "␛]52;c;aGk=␇␛[2J" in ended.sent and "step" not in ended.sent


def quoted(script):
    return " ".join(f"'{part}'" for part in scripted_chat(script))


def test_ctrl_c_in_a_pipe_ends_it_and_keeps_what_is_committed():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests/cli')!r})\n"
        "import scripted; from mlx_dgemma.cli.chat import main\n"
        f"scripted.install('held', pause=0.01); scripted.Scripted.held = 1\n"
        "main(['--model', 'm'])\n"
    )
    process = subprocess.Popen(
        python("-c", code),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    process.stdin.write(b"hello\nnever asked\n")
    process.stdin.flush()
    written = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    more, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == b"(stopped)\n"
    assert re.fullmatch(rb"a b*\n", written + more)


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        scripted_chat("long"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    process.stdout.close()
    process.stdin.write(b"hello\n")
    process.stdin.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), stderr) == (141, b"")


# ----------------------------------------------------------------------- a terminal


@pytest.fixture
def typist(tmp_path):
    """`typist("plain", pause=0.1)`: somebody at a chat's keyboard."""
    started = []

    def start(script, *args, pause=0.0, **more):
        started.append(
            Typist(scripted_chat(script, *args, pause=pause), tmp_path, **more)
        )
        return started[-1]

    yield start
    for person in started:
        person.leave()


def test_an_answer_in_a_terminal_and_what_is_typed_meanwhile(typist):
    person = typist("parts", pause=0.06).prompted()
    person.type("hello\r").until("step 1/3 · entropy").type("/quit\r")
    assert person.until("Done.").end() == 0
    assert "\x1b[2mLet me think.\x1b[0m\r\n" in person.sent
    assert "\x1b[2mYes.\x1b[0m\r\n\r\nFirst line.\r\n" in person.sent
    assert '→ look({"at": "the \\u001b[2Jsky"})' in person.sent
    assert "NOT TO BE SHOWN" not in person.sent
    drawn = plain(person.sent)
    assert drawn.index("/quit") > drawn.rindex("Done."), "nothing was echoed before"


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(typist, tmp_path):
    path = tmp_path / "talk.jsonl"
    person = typist("long", pause=0.02).prompted()
    person.type("hello\r").until("canvas 1\r\n").type("\x03").until("(stopped)")
    kept = re.findall(r"canvas \d+(?=\r?\n)", plain(person.sent))
    person.prompted().type(f"/save {path}\r").until("saved in").prompted()
    _, reply = map(json.loads, path.read_text().splitlines())
    assert reply["content"].splitlines() == kept
    assert len(kept) >= 2
    person.type("refuse\r").until("error: refused␛[2J").prompted()
    person.type("fail\r").until("error: RuntimeError: [malloc]").prompted()
    assert person.type("/quit\r").end() == 0
    assert "^C" not in person.sent


def test_a_second_ctrl_c_leaves_at_once(typist, tmp_path):
    person = typist("long", pause=60).prompted()
    person.type("hello\r").until_there_is(tmp_path / "asleep")
    assert person.press_again_and_again("\x03").end() == 130
    assert plain(person.sent).endswith("interrupted\r\n")
    assert person.echoes(), "the terminal is as it was"


def test_nothing_committed_takes_the_question_back(typist, tmp_path):
    (tmp_path / "a.png").touch()
    person = typist("long", pause=0.3).prompted()
    person.type(f"/image {tmp_path / 'a.png'}\r").prompted("[1 image] > ")
    person.type("hello\r").until("encoding").type("\x03")
    person.until("(stopped before anything was said)").prompted("[1 image] > ")
    person.type("/save a.md\r").until("nothing to save yet").prompted("[1 image] > ")
    assert person.type("\x04").end() == 0


def test_ctrl_c_at_the_prompt_clears_the_line_and_a_second_leaves(typist):
    person = typist("plain", "--no-show").prompted()
    person.type("some text").until("some text").type("\x03/stats\r")
    person.until("no answer yet").prompted()
    person.type("hello\r").until("one\r\ntwo\r\n\r\n").prompted()
    person.type("\x03").until("(Ctrl-C again, or Ctrl-D, leaves)").prompted()
    assert person.type("\x03").end() == 0
    assert person.echoes()
    assert "step" not in person.sent, "no canvas was drawn"


def test_several_lines_are_one_message(typist, tmp_path, home):
    path = tmp_path / "talk.jsonl"
    person = typist("plain").prompted()
    person.type("one\\\rtwo\x1b\rthree\r").until("one\r\ntwo").prompted()
    person.type("\x1b[200~a\r\nb\n/quit\x1b[201~\r").until("one\r\ntwo").prompted()
    person.type(f"/sa\t{path.parent}/talk.j\t").type("sonl\r").until("saved")
    person.prompted()
    assert person.type("\x04").end() == 0
    said = [json.loads(line) for line in path.read_text().splitlines()]
    assert [m["content"] for m in said if m["role"] == "user"] == [
        "one\ntwo\nthree",
        "a\nb\n/quit",
    ]


def test_a_terminal_that_knows_no_codes(typist):
    person = typist("parts", term="dumb").until("> ")
    person.type("hello\r").until("Done.").until("> ").type("/nope\r").until("> ")
    assert person.type("\x04").end() == 0
    assert "\x1b" not in person.sent and "step" not in person.sent
    assert "Let me think.\r\nYes.\r\n\r\nFirst line." in person.sent


def test_answers_alone_go_to_a_file_while_a_person_types(typist, tmp_path):
    person = typist("parts", stdout=tmp_path / "out").prompted()
    person.type("hello\r").until("step").prompted().type("/stats\r").until("seed 7")
    assert person.prompted().type("\x04").end() == 0
    assert (tmp_path / "out").read_text().startswith("First line.\n→ look(")
    assert "Done." not in plain(person.sent).replace("Done. draft", "")


# ------------------------------------------------------------------ with real models


def turns(model, seed, *questions):
    """What a chat says, by asking each question with all that was said before."""
    messages, answers = [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        text = generation.generate(*model, messages, seed=seed, steps=4, max_tokens=40)
        messages.append({"role": "assistant", "content": text})
        answers.append(text)
    return answers


def test_a_real_conversation_is_a_row_of_prompts(endless):
    model = load(endless)
    args = ["--model", str(endless), "--steps", 4, "--max-tokens", 40, "--seed", 5]
    result = CliRunner().invoke(main, list(map(str, args)), input="12\n34\n/stats\n")
    assert result.exit_code == 0, result.output
    first, second = turns(model, 5, "12", "34")
    assert result.stdout == first.rstrip("\n") + "\n" + second.rstrip("\n") + "\n"
    assert "seed 5" in result.stderr and "reused" in result.stderr


def test_what_a_real_chat_encoded_serves_the_next(tiny, tmp_path):
    path = tmp_path / "cache.safetensors"
    args = ["--model", str(tiny), "--steps", "2", "--prompt-cache-file", str(path)]
    told = [CliRunner().invoke(main, args, input="123\n/stats\n") for _ in range(2)]
    assert [result.exit_code for result in told] == [0, 0]
    count = re.search(r"(\d+) prompt tokens", told[0].stderr)[1]
    assert f"prompt 0 tokens were reused, {count} encoded" in told[0].stderr
    assert f"prompt {count} tokens were reused, 0 encoded" in told[1].stderr


def test_a_real_model_refuses_in_one_line(tiny, tmp_path):
    arguments = ["--model", str(tiny), "--t-min", "3"]
    result = CliRunner().invoke(main, arguments, input="1\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: t_min is 3.0, above t_max 0.8")


def test_a_script_is_what_this_file_says_it_is():
    kinds = {type(part) for canvas in SCRIPTS["parts"] for part in canvas}
    assert kinds == {Thought, Answer, Call, Malformed}
