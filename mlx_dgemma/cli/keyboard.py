"""Where a chat's lines come from: a person who types them, or a pipe.

Enter sends; a backslash at the end of a line, or Alt-Enter, continues it instead.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import click

from ..errors import SettingsError
from .slash import NAMES

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import Output

PROMPT, CONTINUED = "> ", "  "
TAKES_PATH = ("/image ", "/save ")


class Source(Protocol):
    """What is typed, one message or command after the other."""

    def read(self, pictures: int) -> str:
        """The next one; `pictures` go with it. Raises EOFError at the end."""
        ...


class Lines:
    """Lines of a file.

    asks    whether a prompt is written to stderr before each: for a terminal that
            can do no more
    """

    def __init__(self, file: BinaryIO, *, asks: bool = False):
        self.file = file
        self.asks = asks
        self.count = 0

    def read(self, pictures: int) -> str:
        lines = [self._line(prompt_for(pictures))]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line(CONTINUED))
            except EOFError:
                break
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.asks:
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


class Keyboard:
    """Lines edited in a terminal, with a history and completion by Tab."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.shortcuts import CompleteStyle

        class Completed(Completer):
            def get_completions(self, document, complete_event):
                before = document.text_before_cursor
                for start, text in completions(before):
                    yield Completion(text, start_position=start)

        self.interrupted = False  # by Ctrl-C, since the last message
        self.session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation=CONTINUED,
            history=history(),
            completer=Completed(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # a menu would take eight rows
            key_bindings=_keys(self),
            enable_suspend=True,
            output=_output(),
        )

    def read(self, pictures: int) -> str:
        self.interrupted = False
        while True:
            try:
                return self.session.prompt([("bold", prompt_for(pictures))])
            except KeyboardInterrupt:
                click.echo("(Ctrl-C again, or Ctrl-D, leaves)", err=True)


def prompt_for(pictures: int) -> str:
    """The prompt; it shows how many pictures go with what is typed."""
    if not pictures:
        return PROMPT
    return f"[{pictures} image{'s' * (pictures > 1)}] {PROMPT}"


def completions(before: str) -> Iterator[tuple[int, str]]:
    """What could stand before the cursor: how far back it begins, and the text."""
    taker = next((t for t in TAKES_PATH if before.startswith(t)), None)
    if taker is not None:
        typed = before.removeprefix(taker).lstrip()
        for path in paths(typed):
            yield -len(typed), path
    elif before.startswith("/") and " " not in before:
        for name in NAMES:
            if name.startswith(before[1:]):
                yield -len(before), f"/{name} "


def paths(typed: str) -> list[str]:
    """Files and folders whose path begins with what was typed, as it was typed."""
    folder, name = os.path.split(typed)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            found = [(e.name, e.is_dir()) for e in entries if e.name.startswith(name)]
    except (OSError, ValueError):  # no such folder; a zero byte
        return []
    return sorted(
        os.path.join(folder, entry) + "/" * is_folder
        for entry, is_folder in found
        if entry.isprintable() and (name or not entry.startswith("."))
    )


def history_file() -> Path | None:
    """Where typed lines are kept, for the user alone; None where there is no place."""
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
    except OSError:
        return None
    return path


@contextmanager
def unechoed(watched: bool) -> Iterator[None]:
    """What is typed meanwhile waits for the next prompt, and is not drawn."""
    if not watched:
        yield
        return
    import termios

    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    quiet = list(before)
    quiet[3] &= ~termios.ECHO  # Ctrl-C still is one
    termios.tcsetattr(handle, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSANOW, before)


def history() -> "History":
    """What was typed in this chat and, where it can be kept, in those before."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        """A history that goes without a line that cannot be written."""

        def load_history_strings(self) -> Iterable[str]:
            with suppress(OSError):
                return list(super().load_history_strings())
            return []

        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(string)

    path = history_file()
    return InMemoryHistory() if path is None else Kept(path)


def _keys(keyboard: Keyboard) -> "KeyBindings":
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

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
    def go_on(event) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    @keys.add("<sigint>")
    def clear(event) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
            keyboard.interrupted = True
        else:
            leaves = keyboard.interrupted
            keyboard.interrupted = True
            event.app.exit(exception=EOFError if leaves else KeyboardInterrupt)

    return keys


def _output() -> "Output":
    """Where the prompt is drawn: the terminal, be it stdout's or stderr's."""
    from prompt_toolkit.output import create_output
    from prompt_toolkit.output.vt100 import Vt100_Output

    output = create_output(always_prefer_tty=True)
    if isinstance(output, Vt100_Output):
        # no menu needs to know where the cursor is, and the terminal's answer to that
        # question would be typed text for whoever reads next
        output.enable_cpr = False
    return output
