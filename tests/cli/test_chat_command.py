"""`mlx_dgemma.chat`: its commands, its files, and how a pipe runs it."""

import errno
import json
import os
import re
import stat

import pytest
import scripted
from click.testing import CliRunner
from scripted import HOSTILE, ScriptedConversation

from mlx_dgemma import generate, load
from mlx_dgemma.cli import chat_commands as commands
from mlx_dgemma.cli import chat_input
from mlx_dgemma.cli.chat import MAX_TOKENS, main
from mlx_dgemma.errors import SettingsError


def run(typed, *args):
    return CliRunner().invoke(main, ["--model", "m", *map(str, args)], input=typed)


@pytest.fixture
def play(monkeypatch):
    """`play("parts")`: chat with this script."""

    def start(script="plain", **changes):
        scripted.install(script, monkeypatch.setattr, **changes)

    return start


def last():
    return ScriptedConversation.last


@pytest.mark.parametrize(
    ("typed", "meaning"),
    [
        ("hello", ("", "hello")),
        ("", ("", "")),
        ("  /help", ("", "  /help")),
        ("a\n/help", ("", "a\n/help")),
        ("//help", ("", "/help")),
        ("///a", ("", "//a")),
        ("/ help", ("help", "")),
        ("/HELP ", ("help", "")),
        ("/image  a b.png ", ("image", "a b.png")),
        ("/system be\nkind", ("system", "be\nkind")),
        ("/system\tkind", ("system", "kind")),
    ],
)
def test_a_line_is_a_message_or_a_command(typed, meaning):
    assert commands.parse(typed) == meaning


@pytest.mark.parametrize(
    ("typed", "error"),
    [
        ("/", "/ is no command; did you mean /"),
        ("/hlep", "/hlep is no command; did you mean /help? /help lists all"),
        ("/exit", "did you mean /quit?"),
        ("/Sav x.md", "did you mean /save?"),
        ("/" + "x" * 10_000, "/" + "x" * 40 + " is no command"),
        ("/home/me/picture.png what is it?", "// begins a message with /"),
        ("/quit now", "/quit takes nothing behind it"),
    ],
)
def test_unknown_command_names_the_nearest(typed, error):
    with pytest.raises(SettingsError, match=re.escape(error)) as refused:
        commands.parse(typed)
    assert "\n" not in str(refused.value)


def test_numbers_and_help_lines():
    for argument in ["", "x", "-1", "1.5", "²", "٣", "1" * 19, "0"]:
        with pytest.raises(SettingsError, match=r"^/rewind (needs|is)"):
            commands.read_number("rewind", argument, 1)
    assert commands.read_number("rewind", "12", 1) == 12
    assert max(map(len, commands.HELP.splitlines())) < 80
    assert len(commands.NAMES) == 10 and {"image", "quit"} <= set(commands.NAMES)


def test_paths_may_be_quoted_dragged_or_at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    typed = {"'a b.png'": "a b.png", r"a\ b.png": "a b.png", "it's.png": "it's.png"}
    for argument, name in {**typed, "a b.png": "a b.png"}.items():
        assert commands.read_path(argument) == str(tmp_path / name)
    assert commands.read_path("~/x.md") == "/home/me/x.md"
    (tmp_path / r"a\ b.png").touch()
    assert commands.read_path(r"a\ b.png") == str(tmp_path / r"a\ b.png")


def test_tab_completes_commands_and_paths(tmp_path, monkeypatch):
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    def completed(before):
        found = chat_input.CommandCompleter().get_completions(
            Document(before), CompleteEvent()
        )
        return {before[: len(before) + one.start_position] + one.text for one in found}

    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "cat 2.png", "bad\x1b[2J.png", "cats/one.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert completed("/") == {f"/{name} " for name in commands.NAMES}
    assert completed("/re") == {"/rewind ", "/reset "}
    paths = ("cat.png", "cat 2.png", "cats/")
    assert completed("/image ca") == {f"/image {path}" for path in paths}
    assert completed("/save cats/") == {"/save cats/one.png"}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert completed("/image ~/cats/o") == {"/image ~/cats/one.png"}
    for nothing in ("", "ca", "/think o", "/image nowhere/x", "/image bad", "x\n/re"):
        assert not completed(nothing)


# ------------------------------------------------------------------------ histories


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_history_is_readable_by_its_user_alone(home, monkeypatch):
    path = home / ".local/state/mlx-dgemma/history"
    path.parent.parent.mkdir(parents=True)
    for mode in (0o600, 0o644):
        assert chat_input.history_file() == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.write_text("\n+kept\n")
        path.chmod(mode)
    assert path.read_text() == "\n+kept\n"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # to be ignored
    assert chat_input.history_file() == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    assert chat_input.history_file() == home / "state/mlx-dgemma/history"


def test_history_that_cannot_be_written_is_in_memory(home, monkeypatch):
    history = chat_input.open_history()
    history.append_string("one\ntwo")
    path = chat_input.history_file()
    path.unlink()
    path.mkdir()
    history.append_string("three")
    assert history.get_strings() == ["one\ntwo", "three"]
    assert chat_input.history_file() is None
    for place in ("/proc/nowhere", "/dev/null", "\0", "~"):
        expand = lambda path, place=place: path.replace("~", place)  # noqa: E731
        monkeypatch.setattr(chat_input.os.path, "expanduser", expand)
        assert chat_input.history_file() is None


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
MARKDOWN = [
    "## System",
    "be kind",
    "## You",
    "![picture](</a b.png>)",
    "What?\nAnd 漢?",
    "## Model",
    "> Hm.\n> Look.",
    '    → look({"at": "ж"})',
    "## Tool",
    "a letter",
    "## Model",
    "A letter.\n",
]


def test_transcript_holds_all_that_was_said(tmp_path):
    commands.save_transcript(str(tmp_path / "a.md"), TRANSCRIPT)
    assert (tmp_path / "a.md").read_text("utf-8") == "\n\n".join(MARKDOWN)
    call = {"name": "look", "arguments": {"at": "\ud83d"}}  # half a character
    torn = {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}
    for messages in (TRANSCRIPT, [*TRANSCRIPT, torn]):
        commands.save_transcript(str(tmp_path / "a.JSONL"), messages)
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
    result = run(f"hi\n/save {path}\n")
    assert result.exit_code == 1
    assert result.stderr == f"error: {path}: No space left on device\n"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.md"]


# --------------------------------------------------------------------------- a pipe


def test_each_line_is_a_message_and_answers_go_to_stdout(play):
    play()
    result = run("hello\n\n   \n//x\r\nla\\\nst\nend\\")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "one\ntwo\n" * 4
    assert [text for text, *_ in last().asked] == ["hello", "/x", "la\nst", "end"]
    assert (run("").exit_code, run("").output, last().asked) == (0, "", [])


def test_pipe_gets_answers_and_calls_but_no_thoughts_and_no_codes(play):
    play("parts")
    result = run("hello\n")
    assert result.stdout == (
        'First line.\n→ look({"at": "the \\u001b[2Jsky"})\n'
        "→ x{ (cannot be read: torn)\n\nDone.\n"
    )
    assert result.stderr == ""


def test_file_gets_the_model_s_bytes_and_stderr_none_of_them(play):
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
    chat = last()
    paths = [str(picture) for picture in pictures]
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


@pytest.mark.parametrize(
    ("typed", "error"),
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
        (b"/reset\n/save a.md\n", "nothing to save yet; say something first"),
        (b"a\xffb\n", "line 2 of stdin is not UTF-8 at byte 1; convert it first"),
        (b"refuse\n", "refused␛[2J, as was asked for"),
        (b"fail\n", "RuntimeError: [malloc] no room; --debug shows where"),
    ],
)
def test_first_error_in_a_pipe_ends_it_in_one_line(play, typed, error):
    play()
    result = run(b"hello\n" + typed + b"never asked\n", "--system", "be kind")
    assert (result.exit_code, result.stdout) == (1, "one\ntwo\n")
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ") and error in line
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
    assert {name for name, value in unset.items() if value is not None} == {
        "max_tokens", "prefill_step_size"
    }  # fmt: skip
    assert (unset["max_tokens"], unset["prefill_step_size"]) == (MAX_TOKENS, 2048)
    given = ["--max-tokens", 7, "--steps", 3, "--thinking", "--seed", 9]
    template = ["--chat-template-args", '{"a": [1]}']
    assert run("hello\n", *given, *template).exit_code == 0
    changed = {"max_tokens": 7, "steps": 3, "chat_template_kwargs": {"a": [1]}}
    assert last().options == unset | changed
    assert last().thinking and last().asked == [("hello", [], 9)]


def test_wrong_usage_exits_2_and_refusals_1(tiny):
    for args, named in (["--steps", 0], "--steps"), (["--seed", -1], "--seed"):
        result = run("", *args)
        assert result.exit_code == 2 and named in result.stderr
    for args, error in (
        (["--model", "no/where/at/all"], "error: no/where/at/all: no such folder"),
        (["--model", tiny, "--t-min", "3"], "error: t_min is 3.0, above t_max 0.8"),
    ):
        result = run("hello\n", *args)
        assert result.exit_code == 1 and result.stderr.startswith(error)


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
    assert first.exit_code == second.exit_code == 0
    count = re.search(r"(\d+) prompt tokens", first.stderr)[1]
    assert f"prompt 0 tokens were reused, {count} encoded" in first.stderr
    assert f"prompt {count} tokens were reused, 0 encoded" in second.stderr
