"""The loop of a chat: read a line, print an answer or run a command, and again.

stdout gets what the model says and nothing else; all other words go to stderr.
"""

import json
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ..diffusion.conversation import Conversation
from ..diffusion.events import Commit
from ..diffusion.report import Report
from ..errors import SettingsError
from ..files.atomic import write_atomically
from ..text.replies import Answer, Call, Malformed, Part, Thought
from .chat_input import HELP, PipeInput, TerminalInput, parse, read_path, without_echo
from .common import FAILURES, explain, print_error, printable
from .render import AnswerView

HEADINGS = {"system": "System", "user": "You", "assistant": "Model", "tool": "Tool"}


@dataclass
class Chat:
    """A chat in progress."""

    conversation: Conversation
    lines: PipeInput | TerminalInput
    seed: int | None  # of every answer; None: another each time
    interactive: bool  # a person types: an error is printed, else it ends the chat
    show: bool  # draw the canvas while it is denoised
    debug: bool  # print the traceback of an error
    pictures: list[str] = field(default_factory=list)  # of the next message, as paths
    stats: str = "no answer yet"
    saved: set[str] = field(default_factory=set[str])  # files that may be replaced

    def run(self) -> bool:
        """Chat until the input ends or /quit; return whether Ctrl-C ended it."""
        while True:
            try:
                name, text = parse(self.lines.read(len(self.pictures)))
                if name == "quit":
                    return False
                if name:
                    self._run_command(name, text)
                elif text.strip():
                    interrupted = self._answer(text)
                    if interrupted and not self.interactive:
                        return True
            except EOFError:
                return False
            except BrokenPipeError:
                raise
            except FAILURES as error:
                if not self.interactive:
                    raise
                if self.debug:
                    note(traceback.format_exc())
                print_error(explain(error))

    def _run_command(self, name: str, argument: str) -> None:
        conversation = self.conversation
        match name, argument:
            case "image", "":
                self.pictures.clear()
                note("no pictures")
            case "image", _:
                path = read_path(argument)
                if not os.path.isfile(path):
                    raise SettingsError(f"{path}: no such picture")
                self.pictures.append(path)
            case "system", _:
                conversation.system = argument or None
                note("system turn set" if argument else "no system turn")
                note("the conversation goes on under it; /reset begins another")
            case "think", ("on" | "off"):
                conversation.thinking = argument == "on"
                note(f"thinking {argument}")
            case "think", _:
                raise SettingsError(f"/think needs on or off, not {argument[:40]!r}")
            case "seed", "off":
                self.seed = None
                note("another seed each time")
            case "seed", _:
                self.seed = read_number(name, argument, 0)
                note(f"seed {self.seed}")
            case "save", "":
                raise SettingsError("/save needs the name of a file")
            case "save", _:
                over = argument.startswith("--overwrite ")
                path = read_path(argument.removeprefix("--overwrite ").strip())
                if os.path.lexists(path) and not over and path not in self.saved:
                    why = "is there already; /save --overwrite FILE replaces it"
                    raise SettingsError(f"{path}: {why}")
                save_transcript(path, conversation.transcript())
                self.saved.add(path)
                note(f"saved in {path}")
            case "rewind", _:
                turns = read_number(name, argument or "1", 1)
                conversation.rewind(turns)
                note(f"took back {turns} question{'s' * (turns > 1)}")
            case "reset", _:
                conversation.reset()
                self.pictures.clear()
                note("a new conversation")
            case "stats", _:
                note(self.stats)
            case "help", _:
                note(HELP)

    def _answer(self, text: str) -> bool:
        """Ask, and print the answer as it becomes final; return whether Ctrl-C came.

        What is refused leaves the conversation and the pictures as they were.
        """
        conversation, report = self.conversation, Report()
        before = len(conversation.messages)
        show = self.interactive and self.show
        with (
            without_echo(self.interactive),
            AnswerView(conversation.tokenizer, show) as view,
        ):
            if self.interactive:
                view.status("encoding …")
            # files get answers alone
            printer = ReplyPrinter(view, self.interactive and view.to_terminal)
            events = conversation.ask(
                text,
                images=self.pictures,
                seed=self.seed,
                prompt_progress_callback=view.prefilled,
            )
            with closing(events), ending_prefill(view):
                for event in view.follow(events):
                    report.add(event)
                    if isinstance(event, Commit):
                        printer.print(event.parts)
            new = conversation.messages[before:]
            stopped = view.interrupted and report.finish_reason is None
            if stopped and new:
                printer.print_rest(new[-1])
        if new:
            self.pictures = []
        self.stats = report.line()
        if (prompt := conversation.stats) is not None:
            self.stats += f"\nof the prompt {prompt.reused} tokens were reused, "
            self.stats += f"{prompt.encoded} encoded"
        if stopped:
            note("(stopped)" if new else "(stopped before anything was said)")
        elif report.finish_reason == "length":
            note("(cut: --max-tokens is reached)")
        elif printer.empty:
            note("(an empty answer; --min-tokens 1 rules these out)")
        if self.interactive:
            click.echo(err=True)
        return view.interrupted


@contextmanager
def ending_prefill(view: AnswerView) -> Iterator[None]:
    """Go on after the KeyboardInterrupt with which a first Ctrl-C ends a prefill."""
    try:
        yield
    except KeyboardInterrupt:
        if not view.stopped_prefill:
            raise


class ReplyPrinter:
    """Print the parts of a reply: thoughts dim, in a paragraph; a call in one line."""

    def __init__(self, view: AnswerView, thoughts: bool):
        self.view, self.thoughts = view, thoughts
        self.empty = True
        self._thought = self._answer = ""  # all so far, printed or not
        self._last: type[Part] | None = None  # printed
        self._line_open = False

    def print(self, parts: Iterable[Part]) -> None:
        for part in parts:
            self.empty = False
            match part:
                case Thought(text):
                    self._thought += text
                    if self.thoughts:
                        self._print(text, part)
                case Answer(text):
                    self._answer += text
                    self._print(text, part)
                case Call(name, arguments):
                    self._print(call_text(name, arguments), part)
                case Malformed(text, why):
                    self._answer += text
                    self._print(f"{text} (cannot be read: {why})", part)

    def print_rest(self, message: dict) -> None:
        """Print what the message of a stopped reply has beyond its commits.

        A commit holds its end back while it may begin a stop string or a marker.
        """
        thought = (message.get("reasoning_content") or "").removeprefix(self._thought)
        answer = (message["content"] or "").removeprefix(self._answer)
        self.print([Thought(thought), Answer(answer)])

    def _print(self, text: str, part: Part) -> None:
        paragraph = isinstance(part, Thought | Answer)
        begins = not paragraph or type(part) is not self._last
        if not paragraph:
            text = f"→ {' '.join(text.split())}\n"
        elif begins:
            text = text.lstrip("\n")
        if not text:
            return
        if begins and self._line_open:
            self.view.write("\n", dim=self._last is Thought)
        if begins and paragraph and self._last is not None:
            self.view.write("\n")
        self.view.write(text, dim=isinstance(part, Thought))
        self._last, self._line_open = type(part), not text.endswith("\n")


def save_transcript(path: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Write messages as Markdown or JSON lines, atomically.

    Raises SettingsError for another suffix, OSError when it cannot be written.
    """
    if not any(message["role"] == "user" for message in messages):
        raise SettingsError("nothing to save yet; say something first")
    match Path(path).suffix.lower():
        case ".md":
            text = "\n".join(map(markdown, messages))
        case ".jsonl":
            lines = [json.dumps(m, ensure_ascii=False) + "\n" for m in messages]
            text = "".join(lines)
        case _:
            raise SettingsError(
                f"{path}: name it *.md or *.jsonl, which says the format"
            )
    # half a surrogate pair, which a call may hold, becomes what JSON writes for it
    data = text.encode("utf-8", "backslashreplace")
    write_atomically(Path(path), lambda partial: partial.write_bytes(data))


def markdown(message: Mapping[str, Any]) -> str:
    """Return a heading and the text; thoughts are quoted."""
    parts = [f"## {HEADINGS[message['role']]}"]
    if thoughts := message.get("reasoning_content"):
        parts.append("\n".join(f"> {line}" for line in thoughts.split("\n")))
    content = message.get("content") or []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for part in content:
        text = part["type"] == "text"
        parts.append(part["text"] if text else f"![picture](<{part['image']}>)")
    for call in message.get("tool_calls", ()):
        parts.append(f"    → {call_text(**call['function'])}")
    return "\n\n".join(parts) + "\n"


def call_text(name: str, arguments: Any) -> str:
    return f"{name}({json.dumps(arguments, ensure_ascii=False)})"


def read_number(name: str, argument: str, minimum: int) -> int:
    """Return the argument as an integer. Raises SettingsError."""
    # not isdigit: "²" is one, and int() refuses it
    digits = argument.isascii() and argument.isdecimal() and len(argument) <= 18
    if not digits or int(argument) < minimum:
        raise SettingsError(
            f"/{name} needs a whole number from {minimum} up, not {argument[:40]!r}"
        )
    return int(argument)


def note(text: str) -> None:
    """Print words to the person, on stderr."""
    click.echo(printable(text), err=True)
