"""What a typed line means: a message, or a command that begins with a slash."""

import os
import shlex
from dataclasses import dataclass
from difflib import SequenceMatcher

from ..errors import SettingsError

HELP = {
    "/image PATH": "put a picture into the next message; no PATH: take them out",
    "/system TEXT": "set the system turn, the conversation stays; no TEXT: remove it",
    "/think on|off": "whether the model thinks before it answers",
    "/seed N|off": "the seed of the next answers; off: another each time",
    "/save FILE": "write the conversation to FILE.md or FILE.jsonl",
    "/rewind [N]": "take back the last question, or N, and what followed",
    "/reset": "begin a new conversation; the system turn stays",
    "/stats": "numbers of the last answer",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}
NAMES = [usage.split()[0].removeprefix("/") for usage in HELP]


@dataclass(frozen=True)
class Message:
    """Something to say to the model."""

    text: str


@dataclass(frozen=True)
class Command:
    """Something to do; its name is one of NAMES."""

    name: str
    argument: str


def parse(typed: str) -> Message | Command:
    """What was typed; two slashes begin a message with one.

    Raises SettingsError for a command that is none and for text that has no UTF-8.
    """
    try:
        typed.encode("utf-8")
    except UnicodeEncodeError:
        raise SettingsError("what was typed is not UTF-8; type it again") from None
    if not typed.startswith("/"):
        return Message(typed)
    if typed.startswith("//"):
        return Message(typed[1:])
    name, *rest = typed.removeprefix("/").split(maxsplit=1) or [""]
    name = name.lower()
    if name not in NAMES:
        raise SettingsError(
            f"/{name[:40]} is no command; did you mean /{nearest(name)}? /help lists "
            "all, and // begins a message with /"
        )
    argument = rest[0].strip() if rest else ""
    if argument and f"/{name}" in HELP:  # with nothing behind it
        raise SettingsError(f"/{name} takes nothing behind it")
    return Command(name, argument)


def help_lines() -> list[str]:
    """What there is, for a person."""
    return [
        *(f"{usage:<14}{does}" for usage, does in HELP.items()),
        "//text        say something that begins with a slash",
        "Alt-Enter, or \\ at the end of a line, continues it; Ctrl-C stops an answer",
    ]


def nearest(name: str) -> str:
    """The command that looks most like `name`."""
    return max(NAMES, key=lambda known: SequenceMatcher(None, name, known).ratio())


def number(name: str, argument: str, least: int) -> int:
    """The whole number behind a command. Raises SettingsError for anything else."""
    # not isdigit: "²" is one, and int() refuses it
    if not (argument.isascii() and argument.isdecimal() and len(argument) <= 18):
        raise SettingsError(
            f"/{name} needs a whole number from {least} up, not {argument[:40]!r}"
        )
    if int(argument) < least:
        raise SettingsError(f"/{name} is {argument}; it must be from {least} up")
    return int(argument)


def switch(name: str, argument: str) -> bool:
    """Whether a command is followed by on, or by off."""
    if argument not in ("on", "off"):
        raise SettingsError(f"/{name} needs on or off, not {argument[:40]!r}")
    return argument == "on"


def path_of(argument: str) -> str:
    """The absolute path that was typed, or dragged into the terminal.

    Quotes and backslashes are a shell's, unless a file of just that name is there.
    Raises SettingsError for what no path can be.
    """
    if "\0" in argument:
        raise SettingsError("a path cannot hold a zero byte")
    try:
        words = shlex.split(argument)
    except ValueError:  # a quote of which there is no second
        words = []
    if len(words) == 1 and not os.path.exists(os.path.expanduser(argument)):
        argument = words[0]
    return os.path.abspath(os.path.expanduser(argument))
