"""The loop of a chat: read a line, print an answer or run a command, and again.

stdout gets what the model says and nothing else; all other words go to stderr.
"""

import os
import traceback
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field

import click

from ..diffusion.conversation import Conversation
from ..diffusion.events import Commit, Step
from ..diffusion.report import Report
from ..errors import SettingsError
from ..text.replies import Answer, Call, Malformed, Part, Thought
from . import chat_commands as commands
from .chat_input import PipeInput, TerminalInput, without_echo
from .common import (
    FAILURES,
    catch_interrupt,
    explain,
    print_error,
    printable,
)
from .render import AnswerView


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

    def run(self) -> bool:
        """Chat until the input ends or /quit; return whether Ctrl-C ended it."""
        while True:
            try:
                typed = self.lines.read(len(self.pictures))
                command, argument = commands.parse(typed)
                if command == "quit":
                    return False
                if command:
                    self._run_command(command, argument)
                elif argument.strip():
                    interrupted = self._answer(argument)
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
                    click.echo(printable(traceback.format_exc()), err=True)
                print_error(explain(error))

    def _run_command(self, name: str, argument: str) -> None:
        conversation = self.conversation
        match name:
            case "image" if argument:
                path = commands.read_path(argument)
                if not os.path.isfile(path):
                    raise SettingsError(f"{path}: no such picture")
                self.pictures.append(path)
            case "image":
                self.pictures.clear()
                note("no pictures")
            case "system":
                conversation.system = argument or None
                note("system turn set" if argument else "no system turn")
                note("the conversation goes on under it; /reset begins another")
            case "think":
                conversation.thinking = commands.read_switch(name, argument)
                note(f"thinking {argument}")
            case "seed" if argument == "off":
                self.seed = None
                note("another seed each time")
            case "seed":
                self.seed = commands.read_number(name, argument, 0)
                note(f"seed {self.seed}")
            case "save":
                path = commands.read_path(argument)
                commands.save_transcript(path, conversation.transcript())
                note(f"saved in {path}")
            case "rewind":
                turns = commands.read_number(name, argument or "1", 1)
                conversation.rewind(turns)
                note(f"took back {turns} question{'s' * (turns > 1)}")
            case "reset":
                conversation.reset()
                self.pictures.clear()
                note("a new conversation")
            case "stats":
                note(self.stats)
            case "help":
                note(commands.HELP)

    def _answer(self, text: str) -> bool:
        """Ask, and print the answer as it becomes final; return whether Ctrl-C came.

        What is refused leaves the conversation and the pictures as they were.
        """
        conversation = self.conversation
        report, before = Report(), len(conversation.messages)
        with (
            catch_interrupt() as interrupted,
            without_echo(self.interactive),
            AnswerView(conversation.tokenizer, self.interactive and self.show) as view,
        ):
            view.status("encoding …")
            # files get answers alone
            printer = ReplyPrinter(view, self.interactive and view.to_terminal)
            events = conversation.ask(text, images=self.pictures, seed=self.seed)
            with closing(events):
                for event in events:
                    report.add(event)
                    if isinstance(event, Commit):
                        printer.print(event.parts)
                    else:
                        view.show(event)
                    # after the last step of a canvas its commit comes at no cost
                    last = isinstance(event, Step) and event.last
                    if interrupted.is_set() and not last:
                        break
            kept = conversation.messages[before:]
            stopped = interrupted.is_set() and report.finish_reason is None
            if stopped and kept:
                printer.print_rest(kept[-1])
        if kept:
            self.pictures = []
        self.stats = report.line()
        if (prompt := conversation.stats) is not None:
            self.stats += f"\nof the prompt {prompt.reused} tokens were reused, "
            self.stats += f"{prompt.encoded} encoded"
        if stopped:
            note("(stopped)" if kept else "(stopped before anything was said)")
        elif report.finish_reason == "length":
            note("(cut: --max-tokens is reached)")
        elif not printer.parts:
            note("(an empty answer; --min-tokens 1 rules these out)")
        if self.interactive:
            click.echo(err=True)
        return interrupted.is_set()


class ReplyPrinter:
    """Print the parts of a reply: thoughts dim, in a paragraph; a call in one line."""

    def __init__(self, view: AnswerView, thoughts: bool):
        self.view, self.thoughts = view, thoughts
        self.parts: list[Part] = []  # all so far, thoughts too that are not printed
        self._last: type[Part] | None = None
        self._line_open = False

    def print(self, parts: Iterable[Part]) -> None:
        for part in parts:
            self.parts.append(part)
            match part:
                case Thought(text):
                    if self.thoughts:
                        self._print(text, part, paragraph=True)
                case Answer(text):
                    self._print(text, part, paragraph=True)
                case Call(name, arguments):
                    text = commands.call_line(name, arguments)
                    self._print(f"→ {' '.join(text.split())}\n", part)
                case Malformed(text, why):
                    text = f"{text} (cannot be read: {why})"
                    self._print(f"→ {' '.join(text.split())}\n", part)

    def print_rest(self, kept: dict) -> None:
        """Print what the message of a stopped reply keeps beyond its commits.

        The end of a commit may wait for the next one to tell what it is.
        """
        thought = "".join(p.text for p in self.parts if isinstance(p, Thought))
        answer = "".join(
            p.text for p in self.parts if isinstance(p, Answer | Malformed)
        )
        thought = (kept.get("reasoning_content") or "").removeprefix(thought)
        answer = (kept["content"] or "").removeprefix(answer)
        self.print([Thought(thought)] if thought else [])
        self.print([Answer(answer)] if answer else [])

    def _print(self, text: str, part: Part, *, paragraph: bool = False) -> None:
        if not paragraph or type(part) is not self._last:
            text = text.lstrip("\n")  # a paragraph begins with its text
            if not text:
                return
            if self._line_open:
                self.view.write("\n", dim=self._last is Thought)
            if paragraph and self._last is not None:
                self.view.write("\n")
        self.view.write(text, dim=isinstance(part, Thought))
        self._last, self._line_open = type(part), not text.endswith("\n")


def note(text: str) -> None:
    """Print words to the person, on stderr."""
    click.echo(printable(text), err=True)
