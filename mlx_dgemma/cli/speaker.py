"""Saying a reply: thoughts dim and in a paragraph of their own, a call in one line."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..text.replies import Answer, Call, Malformed, Part, Thought, merged
from .render import View
from .transcript import shown_call

ARROW = "→ "


class Speaker:
    """Says the parts of one reply, in the order in which they become final.

    thoughts    whether thoughts are said too
    """

    def __init__(self, view: View, *, thoughts: bool):
        self.view, self.thoughts = view, thoughts
        self.said: list[Part] = []  # thoughts that nobody hears included
        self._last: type[Part] | None = None
        self._open = False  # whether the last line has no end yet

    def say(self, parts: Iterable[Part]) -> None:
        for part in parts:
            self.said.append(part)
            match part:
                case Thought(text):
                    if self.thoughts:
                        self._add(part, text, dim=True)
                case Answer(text):
                    self._add(part, text)
                case Call(name, arguments):
                    self._add_line(part, shown_call(name, arguments))
                case Malformed(text, why):
                    self._add_line(part, f"{text} (cannot be read: {why})")

    def _add(self, part: Part, text: str, *, dim: bool = False) -> None:
        if type(part) is not self._last:
            text = text.lstrip("\n")  # a paragraph begins with its text
            if not text:
                return
            self._end_line()
            if self._last is not None:
                self.view.say("\n")
        self._last = type(part)
        self._open = not text.endswith("\n")
        self.view.say(text, dim=dim)

    def _add_line(self, part: Part, text: str) -> None:
        self._end_line()
        self.view.say(ARROW + " ".join(text.split()) + "\n")
        self._last, self._open = type(part), False

    def _end_line(self) -> None:
        if self._open:
            self.view.say("\n", dim=self._last is Thought)
        self._open = False


def rest(message: Mapping[str, Any], said: Sequence[Part]) -> list[Part]:
    """What the message of a stopped reply keeps beyond the parts that were said.

    The end of a commit may wait for the next one to tell what it is.
    """
    thoughts = "".join(p.text for p in said if isinstance(p, Thought))
    answer = "".join(p.text for p in said if isinstance(p, Answer | Malformed))
    calls = message.get("tool_calls", [])[sum(isinstance(p, Call) for p in said) :]
    return merged(
        [
            Thought(_behind(thoughts, message.get("reasoning_content"))),
            Answer(_behind(answer, message["content"])),
            *(Call(**call["function"], id=call["id"]) for call in calls),
        ]
    )


def _behind(said: str, kept: str | None) -> str:
    """What of a text is not said yet; nothing if it was said in other words."""
    return kept[len(said) :] if kept and kept.startswith(said) else ""
