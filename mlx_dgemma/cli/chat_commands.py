"""What a typed line means, and the file that /save writes."""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..files.atomic import write_atomically

HELP = """\
/image PATH    put a picture into the next message; no PATH: take them out
/system TEXT   set the system turn, the conversation stays; no TEXT: remove it
/think on|off  whether the model thinks before it answers
/seed N|off    the seed of the next answers; off: another each time
/save FILE     write the conversation to FILE.md or FILE.jsonl
/rewind [N]    take back the last question, or N, and what followed
/reset         begin a new conversation; the system turn stays
/stats         numbers of the last answer
/help          this list
/quit          leave, as Ctrl-D does
//text         say something that begins with a slash
Alt-Enter, or \\ at the end of a line, continues it; Ctrl-C stops an answer"""
NAMES = re.findall("^/([a-z]+)", HELP, re.MULTILINE)
ALONE = ("reset", "stats", "help", "quit")  # commands without an argument
HEADINGS = {"system": "System", "user": "You", "assistant": "Model", "tool": "Tool"}

Message = Mapping[str, Any]


def parse(typed: str) -> tuple[str, str]:
    """Return the name of a command and its argument, or "" and a message.

    Two slashes begin a message with one. Raises SettingsError for an unknown command.
    """
    if not typed.startswith("/"):
        return "", typed
    if typed.startswith("//"):
        return "", typed[1:]
    name, *rest = typed.removeprefix("/").split(maxsplit=1) or [""]
    name = name.lower()
    if name not in NAMES:
        (nearest,) = get_close_matches(name, NAMES, 1, cutoff=0)
        raise SettingsError(
            f"/{name[:40]} is no command; did you mean /{nearest}? /help lists "
            "all, and // begins a message with /"
        )
    argument = rest[0].strip() if rest else ""
    if argument and name in ALONE:
        raise SettingsError(f"/{name} takes nothing behind it")
    return name, argument


def read_number(name: str, argument: str, minimum: int) -> int:
    """Return the whole number behind a command. Raises SettingsError."""
    # not isdigit: "²" is one, and int() refuses it
    if not (argument.isascii() and argument.isdecimal() and len(argument) <= 18):
        raise SettingsError(
            f"/{name} needs a whole number from {minimum} up, not {argument[:40]!r}"
        )
    if int(argument) < minimum:
        raise SettingsError(f"/{name} is {argument}; it must be from {minimum} up")
    return int(argument)


def read_switch(name: str, argument: str) -> bool:
    """Return whether a command is followed by on. Raises SettingsError."""
    if argument not in ("on", "off"):
        raise SettingsError(f"/{name} needs on or off, not {argument[:40]!r}")
    return argument == "on"


def read_path(argument: str) -> str:
    """Return the absolute path that was typed, or dragged into the terminal.

    Quotes and backslashes are a shell's, unless a file of just that name exists.
    Raises SettingsError for what is no path.
    """
    if not argument:
        raise SettingsError("/save needs the name of a file")
    if "\0" in argument:
        raise SettingsError("a path cannot hold a zero byte")
    try:
        words = shlex.split(argument)
    except ValueError:  # a quote is not closed
        words = []
    if len(words) == 1 and not os.path.exists(os.path.expanduser(argument)):
        argument = words[0]
    return os.path.abspath(os.path.expanduser(argument))


def save_transcript(path: str, messages: Sequence[Message]) -> None:
    """Write messages as Markdown or JSON lines, whole or not at all.

    Raises SettingsError for another suffix, OSError when it cannot be written.
    """
    if not any(message["role"] == "user" for message in messages):
        raise SettingsError("nothing to save yet; say something first")
    formats = {".md": _markdown, ".jsonl": _json_line}
    convert = formats.get(Path(path).suffix.lower())
    if convert is None:
        raise SettingsError(f"{path}: name it *.md or *.jsonl, which says the format")
    text = "".join(map(convert, messages))
    # half a surrogate pair, which a call may hold, becomes what JSON writes for it
    data = text.removeprefix("\n").encode("utf-8", "backslashreplace")
    write_atomically(Path(path), lambda partial: partial.write_bytes(data))


def _json_line(message: Message) -> str:
    return json.dumps(message, ensure_ascii=False) + "\n"


def _markdown(message: Message) -> str:
    """Return a heading and the text; thoughts are quoted."""
    parts = [f"\n## {HEADINGS[message['role']]}"]
    if thoughts := message.get("reasoning_content"):
        parts.append("\n".join(f"> {line}" for line in thoughts.split("\n")))
    content = message.get("content") or []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for part in content:
        text = part["type"] == "text"
        parts.append(part["text"] if text else f"![picture](<{part['image']}>)")
    for call in message.get("tool_calls", ()):
        parts.append(f"    → {call_line(**call['function'])}")
    return "\n\n".join(parts) + "\n"


def call_line(name: str, arguments: Any) -> str:
    """Return a call of a tool in one line."""
    return f"{name}({json.dumps(arguments, ensure_ascii=False)})"
