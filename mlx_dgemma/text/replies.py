"""What a reply says: its thoughts, its answer, and its calls of tools.

Knows how the model marks them, not how a prompt is written. Markers are tokens:

    <|channel>thought\\n…<channel|>  answer  <|tool_call>call:name{…}<tool_call|>

Characters that look like a marker, written as ordinary tokens, are text; so is
everything where the vocabulary has no such tokens. No marker is ever part of a text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .calls import QUOTE, BrokenCallError, read_call, shown

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
STRING = '<|"|>'
RESPONSE = "<|tool_response>"
MARKERS = (CHANNEL, CHANNEL_END, CALL, CALL_END, STRING, RESPONSE)


@dataclass(frozen=True)
class Thought:
    """Text the model wrote for itself."""

    text: str


@dataclass(frozen=True)
class Answer:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Call:
    """A tool to be called. `id` counts within the reply: call_0, call_1, …"""

    name: str
    arguments: dict[str, Any]
    id: str


@dataclass(frozen=True)
class Malformed:
    """A call that cannot be read: as it was written, its quotes as ", and why."""

    text: str
    why: str


Part = Thought | Answer | Call | Malformed

# A channel's name, in a line of its own, says for whom the text is.
CHANNELS: dict[str, type[Thought] | type[Answer]] = {
    "thought": Thought,
    "final": Answer,
}


class _Answer:
    """Outside of all markers."""

    def add(self, text: str) -> list[Part]:
        return [Answer(text)]

    def end(self) -> list[Part]:
        return []


class _Unread:
    """Behind the end of the reply."""

    def add(self, text: str) -> list[Part]:
        return []

    def end(self) -> list[Part]:
        return []


class _Channel:
    """Inside a channel: its name is left out, and so is a line break at its end.

    A channel that begins with no known name is a thought.
    """

    def __init__(self) -> None:
        self._held = ""  # a name not yet whole, or a line break that may be the last
        self._kind: type[Thought] | type[Answer] | None = None

    def add(self, text: str) -> list[Part]:
        text, self._held = self._held + text, ""
        if self._kind is None:
            if any(f"{name}\n".startswith(text) for name in CHANNELS):
                self._held = text
                return []
            name, _, rest = text.partition("\n")
            self._kind = CHANNELS.get(name, Thought)
            text = rest if name in CHANNELS else text
        if self._kind is Thought and text.endswith("\n"):
            text, self._held = text[:-1], "\n"
        return [self._kind(text)]

    def end(self) -> list[Part]:
        name = self._held.removesuffix("\n")
        return [] if name in CHANNELS else [Thought(name)]


class _Body:
    """Inside a call."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def add(self, text: str) -> list[Part]:
        self._texts.append(text)
        return []

    def end(self, call_id: str, closed: bool) -> Call | Malformed:
        body = "".join(self._texts)
        try:
            if not closed:
                raise BrokenCallError("it does not end")
            return Call(*read_call(body), call_id)
        except BrokenCallError as error:
            return Malformed(shown(body), str(error))


_Span = _Answer | _Unread | _Channel | _Body
OPENS: dict[str, type[_Channel] | type[_Body] | type[_Unread]] = {
    CHANNEL: _Channel,
    CALL: _Body,
    RESPONSE: _Unread,
}
ENDS: dict[str, type[_Channel] | type[_Body]] = {CHANNEL_END: _Channel, CALL_END: _Body}


class ReplyParser:
    """Reads one reply, canvas by canvas.

    prompt  ids the reply continues: a thought or a call left open there goes on

    What `add` and `finish` return, `merged`, does not depend on where the canvases
    end. The texts of an answer that no marker interrupts, joined, are
    `Tokenizer.decode` of its tokens. The beginning of a call or of another channel
    ends what is open, be it a thought or a call; what follows `<|tool_response>` is
    for the tool to say and is left out.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        found = {tokenizer.token_id(marker): marker for marker in MARKERS}
        self._markers = {i: marker for i, marker in found.items() if i is not None}
        self._run = tokenizer.detokenizer()
        self._span: _Span = _Answer()
        self._calls = 0
        self.add(self._left_open(prompt))

    def add(self, ids: Sequence[int]) -> list[Part]:
        """The parts that these tokens make final."""
        parts: list[Part] = []
        begin = 0
        for i, token in enumerate(ids):
            marker = self._markers.get(token)
            if marker is not None:
                parts += self._span.add(self._run.add(ids[begin:i]))
                parts += self._mark(marker)
                begin = i + 1
        parts += self._span.add(self._run.add(ids[begin:]))
        return merged(parts)

    def finish(self) -> list[Part]:
        """What was held back so far. A call without its end is malformed."""
        return merged([*self._end_run(), *self._end_span(closed=False)])

    def _left_open(self, prompt: Sequence[int]) -> Sequence[int]:
        """The prompt from a thought or a call on that it does not close."""
        known = self._tokenizer.special_ids | self._markers.keys()
        for i in reversed(range(len(prompt))):
            marker = self._markers.get(prompt[i])
            if marker in (CHANNEL, CALL):
                return prompt[i:]
            if prompt[i] in known and marker != STRING:
                break
        return ()

    def _mark(self, marker: str) -> list[Part]:
        """Pass a marker; one that says nothing here is left out."""
        parts = self._end_run()
        if isinstance(self._span, _Unread):
            return parts
        if marker in OPENS:
            parts += self._end_span(closed=False)
            self._span = OPENS[marker]()
        elif marker == STRING and isinstance(self._span, _Body):
            parts += self._span.add(QUOTE)
        elif ENDS.get(marker) is type(self._span):
            parts += self._end_span(closed=True)
        return parts

    def _end_run(self) -> list[Part]:
        """The rest of a run of ordinary tokens; each is decoded by itself."""
        rest, self._run = self._run.finish(), self._tokenizer.detokenizer()
        return self._span.add(rest)

    def _end_span(self, *, closed: bool) -> list[Part]:
        span, self._span = self._span, _Answer()
        if not isinstance(span, _Body):
            return span.end()
        part = span.end(f"call_{self._calls}", closed)
        self._calls += isinstance(part, Call)
        return [part]


def merged(parts: Iterable[Part]) -> list[Part]:
    """The same parts, texts of one kind in one piece and empty ones left out."""
    said = (p for p in parts if not isinstance(p, Thought | Answer) or p.text)
    result: list[Part] = []
    for kind, run in groupby(said, type):
        if kind is Thought or kind is Answer:
            texts = [part.text for part in run if isinstance(part, kind)]
            result.append(kind("".join(texts)))
        else:
            result += run
    return result


def message(parts: Iterable[Part]) -> dict[str, Any]:
    """The parts of a whole reply as the assistant's message, for the history.

    "content" is the answer, with malformed calls as text; None beside calls alone.
    """
    parts = list(parts)
    content = "".join(p.text for p in parts if isinstance(p, Answer | Malformed))
    thoughts = "".join(p.text for p in parts if isinstance(p, Thought))
    calls = [
        {
            "id": part.id,
            "type": "function",
            "function": {"name": part.name, "arguments": part.arguments},
        }
        for part in parts
        if isinstance(part, Call)
    ]
    result: dict[str, Any] = {"role": "assistant", "content": content}
    if calls and not content:
        result["content"] = None
    if thoughts:
        result["reasoning_content"] = thoughts
    if calls:
        result["tool_calls"] = calls
    return result
