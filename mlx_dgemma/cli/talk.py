"""The chat's loop: a line is read, an answer drawn or a command done, and again.

stdout gets what the model says and nothing else; all other words go to stderr.
"""

import os
import sys
import traceback
from contextlib import closing

import click

from ..diffusion.events import Commit, Prefilled, Step
from ..diffusion.report import Report
from ..errors import DGemmaError, SettingsError
from . import slash, transcript
from .common import complain, explain, harmless, is_terminal
from .interrupt import interruptible
from .keyboard import Source, unechoed
from .partner import Partner
from .render import screen
from .speaker import Speaker, rest

# What a turn may fail with and leave the conversation as it was.
FAILURES = (DGemmaError, ImportError, MemoryError, OSError, RuntimeError)


class Talk:
    """A chat.

    seed     of every answer; None: another each time
    watched  whether a person sits at a terminal: what fails is told and the chat goes
             on; else it ends
    show     whether the canvas is drawn while it is denoised
    debug    whether the traceback of what fails is told
    """

    def __init__(
        self,
        partner: Partner,
        source: Source,
        *,
        seed: int | None,
        watched: bool,
        show: bool,
        debug: bool,
    ):
        self.partner, self.source, self.seed = partner, source, seed
        self.watched, self.show, self.debug = watched, watched and show, debug
        self.pictures: list[str] = []  # that go with the next message
        self.stats = ["no answer yet"]

    def run(self) -> bool:
        """Talk until the source ends or /quit; returns whether Ctrl-C ended it."""
        while True:
            try:
                typed = self.source.read(len(self.pictures))
            except EOFError:
                return False
            try:
                match slash.parse(typed):
                    case slash.Message(text) if text.strip():
                        interrupted = self._answer(text)
                        if interrupted and not self.watched:
                            return True
                    case slash.Command("quit"):
                        return False
                    case slash.Command(name, argument):
                        self._do(name, argument)
            except BrokenPipeError:
                raise
            except FAILURES as error:
                if not self.watched:
                    raise
                if self.debug:
                    click.echo(harmless(traceback.format_exc()), err=True)
                complain(explain(error))

    def _do(self, name: str, argument: str) -> None:
        """Do a command and say what was done."""
        match name:
            case "image":
                self._add_picture(argument)
            case "system":
                self.partner.instruct(argument)
                tell("system turn set" if argument else "no system turn")
                tell("the conversation goes on under it; /reset begins another")
            case "think":
                on = slash.switch(name, argument)
                self.partner.think(on)
                tell(f"thinking {argument}")
            case "seed":
                off = argument == "off"
                self.seed = None if off else slash.number(name, argument, 0)
                tell("another seed each time" if off else f"seed {self.seed}")
            case "save":
                self._save(argument)
            case "rewind":
                turns = slash.number(name, argument or "1", 1)
                self.partner.rewind(turns)
                tell(f"took back {turns} question{'s' * (turns > 1)}")
            case "reset":
                self.partner.reset()
                self.pictures.clear()
                tell("a new conversation")
            case "stats":
                for line in self.stats:
                    tell(line)
            case "help":
                for line in slash.help_lines():
                    tell(line)

    def _add_picture(self, argument: str) -> None:
        if not argument:
            self.pictures.clear()
            tell("no pictures")
            return
        path = slash.path_of(argument)
        if not os.path.isfile(path):
            raise SettingsError(f"{path}: no such picture")
        self.pictures.append(path)

    def _save(self, argument: str) -> None:
        if not argument:
            raise SettingsError("/save needs the name of a file")
        path, messages = slash.path_of(argument), self.partner.messages
        if not any(message["role"] == "user" for message in messages):
            raise SettingsError("nothing to save yet; say something first")
        transcript.save(path, messages)
        tell(f"saved in {path}")

    def _answer(self, text: str) -> bool:
        """Ask, and draw the reply as it becomes final; returns whether Ctrl-C came.

        What is refused leaves the conversation and the pictures as they were.
        """
        report, before = Report(), len(self.partner.messages)
        thoughts = self.watched and is_terminal(sys.stdout)  # files get answers alone
        prefilled: Prefilled | None = None
        with (
            interruptible() as asked,
            unechoed(self.watched),
            screen(self.partner.tokenizer, self.show) as view,
        ):
            view.wait("encoding …")
            speaker = Speaker(view, thoughts=thoughts)
            with closing(self.partner.ask(text, self.pictures, self.seed)) as events:
                for event in events:
                    report.add(event)
                    match event:
                        case Prefilled():
                            prefilled = event
                        case Step():
                            view.show(event)
                        case Commit():
                            speaker.say(event.parts)
                    # a canvas that is done is waited for: its commit costs no step
                    if asked and not (isinstance(event, Step) and event.last):
                        break
            kept = self.partner.messages[before:]
            stopped = bool(asked) and report.finish_reason is None
            if stopped and kept:
                speaker.say(rest(kept[-1], speaker.said))
        if kept:
            self.pictures.clear()
        if prefilled is not None:
            self.stats = _numbers(report, prefilled)
        if stopped:
            tell("(stopped)" if kept else "(stopped before anything was said)")
        elif report.finish_reason == "length":
            tell("(cut: --max-tokens is reached)")
        elif not speaker.said:
            tell("(an empty answer; --min-tokens 1 rules these out)")
        if self.watched:
            click.echo(err=True)
        return bool(asked)


def tell(line: str) -> None:
    """One line for the person, harmless."""
    click.echo(harmless(line).replace("\n", " "), err=True)


def _numbers(report: Report, prefilled: Prefilled) -> list[str]:
    return [
        report.line(),
        f"of the prompt {prefilled.reused} tokens were reused, "
        f"{prefilled.encoded} encoded",
    ]
