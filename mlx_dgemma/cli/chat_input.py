"""Where a chat's lines come from: a person who types them, or a pipe.

Enter sends; a backslash at the end of a line, or Alt-Enter, continues it instead.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from .chat_commands import NAMES
from .common import is_terminal
from .render import is_dumb

PROMPT, CONTINUED = "> ", "  "


def open_input() -> "tuple[PipeInput | TerminalInput, bool]":
    """Return where lines come from, and whether a person types and sees them."""
    if sys.stdin is None:
        raise SettingsError("stdin is closed; give it some lines, or a terminal")
    seen = is_terminal(sys.stdout) or is_terminal(sys.stderr)
    interactive = is_terminal(sys.stdin) and seen
    if interactive and not is_dumb():
        return TerminalInput(), True
    return PipeInput(sys.stdin.buffer, show_prompt=interactive), interactive


class PipeInput:
    """Lines of a file, or of a terminal that knows no codes: it needs a prompt."""

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
            return line.decode("utf-8").removesuffix("\n").removesuffix("\r")
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
            key_bindings=self._key_bindings(),
            enable_suspend=True,
            output=output,
        )

    def read(self, pictures: int) -> str:
        """Return the next message; `pictures` go with it. Raises EOFError."""
        self.interrupted = False  # by Ctrl-C, since the last message
        while True:
            try:
                return self.session.prompt([("bold", prompt_for(pictures))])
            except KeyboardInterrupt:
                click.echo("(Ctrl-C again, or Ctrl-D, leaves)", err=True)

    def _key_bindings(self) -> KeyBindings:
        keys = KeyBindings()
        typing = has_focus(DEFAULT_BUFFER)  # and not searching the history

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

        @keys.add("c-c", filter=typing)
        @keys.add("<sigint>")
        def clear_or_leave(event) -> None:
            leave = self.interrupted and not event.current_buffer.text
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=EOFError if leave else KeyboardInterrupt)
            self.interrupted = True

        return keys


def prompt_for(pictures: int) -> str:
    """Return the prompt; it shows how many pictures go with what is typed."""
    if not pictures:
        return PROMPT
    return f"[{pictures} image{'s' * (pictures > 1)}] {PROMPT}"


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


def history_file() -> Path | None:
    """Return a file for what is typed, readable by the user alone, if possible."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.join(os.path.expanduser("~"), ".local", "state")
    if not os.path.isabs(state):  # no home
        return None
    path = Path(state, "mlx-dgemma", "history")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.fchmod(handle, 0o600)
        os.close(handle)
    except (OSError, ValueError):
        return None
    return path


class TolerantHistory(FileHistory):
    """A history file; what cannot be written is remembered in memory alone."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, ValueError):
            super().store_string(string)


def open_history() -> History:
    """Return the history of this chat and, where it can be written, earlier ones."""
    path = history_file()
    return InMemoryHistory() if path is None else TolerantHistory(path)


@contextmanager
def without_echo(interactive: bool) -> Iterator[None]:
    """Do not draw what is typed in this block; the next prompt gets it."""
    if not interactive:
        yield
        return
    import termios

    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(handle, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSANOW, before)
