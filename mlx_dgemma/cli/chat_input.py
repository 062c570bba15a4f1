"""Where a chat's lines come from, a person or a pipe, and what a line means.

Enter sends; a backslash at the end of a line, or Alt-Enter, continues it instead.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import (
    Completer,
    Completion,
    PathCompleter,
    WordCompleter,
)
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from ..errors import SettingsError
from .common import is_dumb, is_terminal

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
NO_ARGUMENT = ("reset", "stats", "help", "quit")
PROMPT, CONTINUED = "> ", "  "


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
        meant = [f"did you mean /{n}? " for n in get_close_matches(name, NAMES, 1, 0.5)]
        raise SettingsError(
            f"/{name[:40]} is no command; {''.join(meant)}/help lists all, and // "
            "begins a message with /"
        )
    argument = rest[0].strip() if rest else ""
    if argument and name in NO_ARGUMENT:
        raise SettingsError(f"/{name} takes no argument")
    return name, argument


def read_path(argument: str) -> str:
    """Return the absolute path that was typed, or dragged into the terminal.

    Quotes and backslashes are a shell's, unless a file of just that name exists.
    """
    if "\0" in argument:
        raise SettingsError("a path cannot hold a zero byte")
    try:
        words = shlex.split(argument)
    except ValueError:  # a quote is not closed
        words = []
    if len(words) == 1 and not os.path.exists(os.path.expanduser(argument)):
        argument = words[0]
    return os.path.abspath(os.path.expanduser(argument))


def open_input() -> "tuple[PipeInput | TerminalInput, bool]":
    """Return where lines come from, and whether a person types and sees them."""
    if sys.stdin is None:
        raise SettingsError("stdin is closed; give it some lines, or a terminal")
    seen = is_terminal(sys.stdout) or is_terminal(sys.stderr)
    interactive = is_terminal(sys.stdin) and seen
    if interactive and not is_dumb():
        return TerminalInput(), True
    return PipeInput(sys.stdin.buffer, show_prompt=interactive), interactive


def prompt_for(pictures: int) -> str:
    """Return the prompt; it shows how many pictures go with what is typed."""
    return f"[{pictures} image{'s' * (pictures > 1)}] {PROMPT}" if pictures else PROMPT


class PipeInput:
    """Lines of a file, or of a terminal without codes, where a prompt is shown."""

    def __init__(self, file: BinaryIO, *, show_prompt: bool = False):
        self.file = file
        self.show_prompt = show_prompt
        self.count = 0

    def read(self, pictures: int) -> str:
        """Return the next message; `pictures` go with it. Raises EOFError."""
        lines = [self._line(prompt_for(pictures))]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line(CONTINUED))
            except EOFError:
                break
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.show_prompt:
            click.echo(prompt, nl=False, err=True)
        line = self.file.readline()
        self.count += 1
        if not line:
            raise EOFError
        try:
            encoding = "utf-8-sig" if self.count == 1 else "utf-8"
            return line.decode(encoding).removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise SettingsError(
                f"line {self.count} of stdin is not UTF-8 at byte {error.start}; "
                "convert it first"
            ) from None


class TerminalInput:
    """Lines edited in a terminal, with a history and completion by Tab."""

    def __init__(self) -> None:
        output = create_output(always_prefer_tty=True)
        if isinstance(output, Vt100_Output):
            # the terminal's answer where the cursor is would be read as typed text
            output.enable_cpr = False
        self.session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation=CONTINUED,
            history=open_history(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # a menu would take eight rows
            key_bindings=line_keys(),
            enable_suspend=True,
            output=output,
        )

    def read(self, pictures: int) -> str:
        """Return the next message; `pictures` go with it. Raises EOFError.

        Ctrl-C drops what is typed; a second one in a row leaves.
        """
        interrupted = False
        while True:
            try:
                return self.session.prompt([("bold", prompt_for(pictures))])
            except KeyboardInterrupt:
                if not self.session.default_buffer.text:
                    if interrupted:
                        raise EOFError from None
                    click.echo("(Ctrl-C again, or Ctrl-D, leaves)", err=True)
                interrupted = True


def line_keys() -> KeyBindings:
    """Return the bindings of Enter and Alt-Enter; searching the history has its own."""
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def send(event) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def continue_line(event) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class CommandCompleter(Completer):
    """What Tab offers: names of commands, then paths where a command takes one."""

    names = WordCompleter([f"/{name} " for name in NAMES], sentence=True)
    paths = PathCompleter(file_filter=str.isprintable, expanduser=True)

    def get_completions(self, document, complete_event) -> Iterator[Completion]:
        command, space, typed = document.text_before_cursor.partition(" ")
        if command.startswith("/") and not space:
            yield from self.names.get_completions(document, complete_event)
        elif command in ("/image", "/save"):
            path = Document(typed.lstrip())
            for found in self.paths.get_completions(path, complete_event):
                slash = "/" * found.display_text.endswith("/")
                yield Completion(found.text + slash)


class TolerantHistory(FileHistory):
    """A history file; what cannot be written is remembered in memory alone."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def open_history() -> History:
    """Return what was typed, of earlier chats too where a file can be written.

    The file is readable by the user alone.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.expanduser("~/.local/state")
    path = Path(state, "mlx-dgemma", "history")
    if not path.is_absolute():  # no home
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.fchmod(handle, 0o600)
        os.close(handle)
    except OSError:
        return InMemoryHistory()
    return TolerantHistory(path)


@contextmanager
def without_echo(interactive: bool) -> Iterator[None]:
    """Do not draw what is typed in this block; the next prompt gets it."""
    if not interactive:
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    local_modes = before[3] & ~termios.ECHO
    quiet = [*before[:3], local_modes, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
