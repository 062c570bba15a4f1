"""`mlx_dgemma.chat`: its commands, its files, and how a pipe runs it."""

import errno
import json
import os
import re
import stat

import pytest
import scripted
from click.testing import CliRunner
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from scripted import HOSTILE, ScriptedConversation

from mlx_dgemma import generate, load
from mlx_dgemma.cli import chat_input, chat_loop
from mlx_dgemma.cli.chat import MAX_TOKENS, main


def run(typed, *args):
    return CliRunner().invoke(
        main, ["--model", "sudoku4", *map(str, args)], input=typed
    )


@pytest.fixture
def play(monkeypatch):
    """`play("parts")`: chat with this script."""

    def start(script="plain", **changes):
        scripted.install(script, monkeypatch.setattr, **changes)

    return start


def last():
    return ScriptedConversation.last


# --------------------------------------------------------------------------- typing


def test_line_is_a_message_or_a_command():
    for typed, meaning in {
        "hello": ("", "hello"),
        "  /help": ("", "  /help"),
        "a\n/help": ("", "a\n/help"),
        "//help": ("", "/help"),
        "/ help": ("help", ""),
        "/HELP ": ("help", ""),
        "/image  a b.png ": ("image", "a b.png"),
        "/system be\nkind": ("system", "be\nkind"),
    }.items():
        assert chat_input.parse(typed) == meaning
    assert len(chat_input.NAMES) == 10
    assert max(map(len, chat_input.HELP.splitlines())) < 80


def test_paths_may_be_quoted_dragged_or_at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    typed = {"'a b.png'": "a b.png", r"a\ b.png": "a b.png", "it's.png": "it's.png"}
    for argument, name in {**typed, "a b.png": "a b.png"}.items():
        assert chat_input.read_path(argument) == str(tmp_path / name)
    assert chat_input.read_path("~/x.md") == "/home/me/x.md"
    (tmp_path / r"a\ b.png").touch()
    assert chat_input.read_path(r"a\ b.png") == str(tmp_path / r"a\ b.png")


def test_tab_completes_commands_and_paths(tmp_path, monkeypatch):
    def completed(before):
        completer, event = chat_input.CommandCompleter(), CompleteEvent()
        found = completer.get_completions(Document(before), event)
        return {before[: len(before) + one.start_position] + one.text for one in found}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("cat.png", "cat 2.png", "bad\x1b[2J.png", "cats/one.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert completed("/") == {f"/{name} " for name in chat_input.NAMES}
    assert completed("/re") == {"/rewind ", "/reset "}
    paths = ("cat.png", "cat 2.png", "cats/")
    assert completed("/image ca") == {f"/image {path}" for path in paths}
    assert completed("/save cats/") == {"/save cats/one.png"}
    assert completed("/image ~/cats/o") == {"/image ~/cats/one.png"}
    for nothing in ("", "ca", "/think o", "/image nowhere/x", "/image bad", "x\n/re"):
        assert not completed(nothing)


def test_history_is_private_and_falls_back_to_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # to be ignored
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".local/state/mlx-dgemma/history"
    path.parent.parent.mkdir(parents=True)
    history = chat_input.open_history()
    history.append_string("one\ntwo")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    assert [*chat_input.open_history().load_history_strings()] == ["one\ntwo"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()
    path.mkdir()  # it can no longer be written
    history.append_string("three")
    assert history.get_strings() == ["one\ntwo", "three"]
    for state in (tmp_path / ".local/state", "/proc/nowhere", "/dev/null"):
        monkeypatch.setenv("XDG_STATE_HOME", str(state))
        chat_input.open_history().append_string("four")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    chat_input.open_history()
    assert (tmp_path / "state/mlx-dgemma/history").is_file()


# ---------------------------------------------------------------------- transcripts

PICTURE = {"type": "image", "image": "/a b.png"}
CALL = {"name": "look", "arguments": {"at": "ж"}}
TRANSCRIPT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": [PICTURE, {"type": "text", "text": "What?\nAnd 漢?"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.\nLook.",
        "tool_calls": [{"id": "call_0", "type": "function", "function": CALL}],
    },
    {"role": "tool", "content": "a letter"},
    {"role": "assistant", "content": "A letter."},
]
MARKDOWN = """\
## System

be kind

## You

![picture](</a b.png>)

What?\nAnd 漢?

## Model

> Hm.\n> Look.

    → look({"at": "ж"})

## Tool

a letter

## Model

A letter.
"""


def test_transcript_holds_all_that_was_said(tmp_path):
    chat_loop.save_transcript(str(tmp_path / "a.md"), TRANSCRIPT)
    assert (tmp_path / "a.md").read_text("utf-8") == MARKDOWN
    call = {"name": "look", "arguments": {"at": "\ud83d"}}  # half a character
    torn = {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}
    for messages in (TRANSCRIPT, [*TRANSCRIPT, torn]):
        chat_loop.save_transcript(str(tmp_path / "a.JSONL"), messages)
        lines = (tmp_path / "a.JSONL").read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == messages
        assert "漢" in lines[1]


def test_full_disk_leaves_the_old_transcript(tmp_path, monkeypatch, play):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.md"
    path.write_text("old")
    play()
    monkeypatch.setattr(os, "fsync", full)
    result = run(f"hi\n/save --overwrite {path}\n")
    assert result.exit_code == 1
    assert result.stderr == f"error: {path}: No space left on device\n"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.md"]


# --------------------------------------------------------------------------- a pipe


def test_a_file_of_before_is_replaced_only_if_asked(play, tmp_path):
    path = tmp_path / "a.md"
    path.write_text("mine")
    play()
    result = run(f"hi\n/save {path}\n")
    assert result.exit_code == 1 and path.read_text() == "mine"
    assert "is there already; /save --overwrite FILE replaces it" in result.stderr
    result = run(f"hi\n/save --overwrite {path}\nho\n/save {path}\n")
    assert result.exit_code == 0 and path.read_text().count("## You") == 2


def test_each_line_is_a_message_and_answers_go_to_stdout(play):
    play()
    result = run("hello\n\n   \n//x\r\nla\\\nst\nend\\")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "one\ntwo\n" * 4
    assert [text for text, *_ in last().asked] == ["hello", "/x", "la\nst", "end"]
    assert (run("").exit_code, run("").output, last().asked) == (0, "", [])


def test_a_byte_order_mark_is_no_part_of_the_first_line(play):
    play()
    assert run(b"\xef\xbb\xbf/stats\nhello\n").exit_code == 0
    assert [text for text, *_ in last().asked] == ["hello"]


def test_pipe_gets_answers_and_calls_unchanged_and_no_thoughts(play):
    play("parts")
    result = run("hello\n")
    assert result.stdout == (
        'First line.\n→ look({"at": "the \\u001b[2Jsky"})\n'
        "→ x{ (cannot be read: torn)\n\nDone.\n"
    )
    assert result.stderr == ""
    play("hostile")
    result = run(f"hello\n/save {HOSTILE}\n")
    assert HOSTILE.encode() in result.stdout_bytes
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr and "\x9b" not in result.stderr


def test_commands_reach_the_conversation(play, tmp_path):
    play()
    paths = [str(tmp_path / name) for name in ("a.png", "b c.png")]
    for path in paths:
        open(path, "x").close()
    result = run(
        "/think on\n/system be kind\n/seed 5\none\n"
        f"/image {paths[0]}\n/image {paths[1]}\ntwo\n"
        "/seed off\nthree\n/rewind 2\n/image\n/system\n/think off\nfour\n"
        "/stats\n/reset\n/stats\n/help\n/quit\nfive\n"
    )
    assert result.exit_code == 0
    chat = last()
    assert chat.asked == [
        ("one", [], 5), ("two", paths, 5), ("three", [], None), ("four", [], None)
    ]  # fmt: skip
    assert (chat.thinking, chat.system, chat.messages) == (False, None, [])
    lines = result.stderr.splitlines()
    assert lines[:4] == [
        "thinking on",
        "system turn set",
        "the conversation goes on under it; /reset begins another",
        "seed 5",
    ]
    assert "took back 2 questions" in lines and "a new conversation" in lines
    numbers = (
        r"5 prompt tokens · 2 committed tokens · 2 canvases \(3 \+ 3 steps\) · "
        r"0.33 tokens per forward · [\d.]+ tok/s wall · peak memory .* · seed 7"
    )
    assert sum(bool(re.fullmatch(numbers, line)) for line in lines) == 2
    assert lines.count("of the prompt 3 tokens were reused, 2 encoded") == 2
    assert "/quit          leave, as Ctrl-D does" in lines


ERRORS = {
    "/": "/ is no command; /help lists all",
    "/foo": "/foo is no command; /help lists all",
    "/hlep": "/hlep is no command; did you mean /help? /help lists all",
    "/exit": "did you mean /quit?",
    "/Sav x.md": "did you mean /save?",
    "/" + "x" * 10_000: "/" + "x" * 40 + " is no command",
    "/home/me/picture.png what is it?": "// begins a message with /",
    "/quit now": "/quit takes no argument",
    "/image nowhere.png": "nowhere.png: no such picture",
    "/image .": "no such picture",
    "/save a\0b.md": "a path cannot hold a zero byte",
    "/think": "/think needs on or off, not ''",
    "/seed -1": "/seed needs a whole number from 0 up, not '-1'",
    "/seed ²": "/seed needs a whole number",
    "/seed ٣": "/seed needs a whole number",
    "/seed " + "1" * 19: "/seed needs a whole number",
    "/rewind 9": "there are not so many to take back",
    "/rewind 0": "/rewind needs a whole number from 1 up, not '0'",
    "/save": "/save needs the name of a file",
    "/save a.txt": "a.txt: name it *.md or *.jsonl",
    "/save nowhere/a.md": "nowhere/a.md: No such file or directory",
    "/reset\n/save a.md": "nothing to save yet; say something first",
    "a\udcffb": "line 2 of stdin is not UTF-8 at byte 1; convert it first",
    "refuse": "refused␛[2J, as was asked for",
    "fail": "RuntimeError: [malloc] no room; --debug shows where",
}


@pytest.mark.parametrize("typed", ERRORS, ids=lambda typed: typed[:20])
def test_first_error_in_a_pipe_ends_it_in_one_line(play, typed):
    play()
    typed_bytes = f"hello\n{typed}\nnever asked\n".encode("utf-8", "surrogateescape")
    result = run(typed_bytes, "--system", "be kind")
    assert (result.exit_code, result.stdout) == (1, "one\ntwo\n")
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ") and ERRORS[typed] in line
    assert [text for text, *_ in last().asked] == ["hello"]


def test_cut_and_empty_answers_say_so(play):
    play(reason="length")
    assert run("hello\n").stderr == "(cut: --max-tokens is reached)\n"
    play("silent", reason="stop")
    assert "(an empty answer; --min-tokens 1" in run("hello\n").stderr


def test_options_arrive_and_the_rest_is_left_to_the_checkpoint(play):
    play()
    assert run("").exit_code == 0
    unset = last().options
    given = {name: value for name, value in unset.items() if value is not None}
    assert given == {
        "max_tokens": MAX_TOKENS,
        "prefill_step_size": 2048,
        "allow_special": False,
    }
    flags = ["--max-tokens", 7, "--steps", 3, "--thinking", "--seed", 9]
    template = ["--chat-template-args", '{"a": [1]}']
    assert run("hello\n", *flags, *template).exit_code == 0
    changed = {"max_tokens": 7, "steps": 3, "chat_template_kwargs": {"a": [1]}}
    assert last().options == unset | changed
    assert last().thinking and last().asked == [("hello", [], 9)]


# ------------------------------------------------------------------ with real models


def test_real_conversation_is_a_row_of_prompts(endless):
    model, messages, answers = load(endless), [], []
    for question in ("12", "34"):
        messages.append({"role": "user", "content": question})
        text = generate(*model, messages, seed=5, steps=4, max_tokens=40)
        messages.append({"role": "assistant", "content": text})
        answers.append(text.rstrip("\n") + "\n")
    args = ["--model", endless, "--steps", 4, "--max-tokens", 40, "--seed", 5]
    result = run("12\n34\n/stats\n", *args)
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(answers)
    assert "seed 5" in result.stderr and "reused" in result.stderr


def test_prompt_cache_of_a_real_chat_serves_the_next(tiny, tmp_path):
    path = tmp_path / "cache.safetensors"
    args = ["--model", tiny, "--steps", "2", "--prompt-cache-file", path]
    first, second = (run("123\n/stats\n", *args) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    count = re.search(r"(\d+) prompt tokens", first.stderr)[1]
    assert f"prompt 0 tokens were reused, {count} encoded" in first.stderr
    assert f"prompt {count} tokens were reused, 0 encoded" in second.stderr
