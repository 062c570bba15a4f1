"""What a reply says: its thoughts, its answer, and its calls of tools.

The model marks them with tokens:

    <|channel>thought\\n…<channel|>  answer  <|tool_call>call:name{…}<tool_call|>

Characters that look like a marker, written as ordinary tokens, are text; so is
everything where the vocabulary has no such tokens. No marker is ever part of a text.
An answer that begins with <think>…</think> in ordinary tokens begins with that thought.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .calls import QUOTE, BrokenCallError, read_call

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
STRING = '<|"|>'
RESPONSE = "<|tool_response>"
THINK, THINK_END = "<think>", "</think>"
MARKERS = (CHANNEL, CHANNEL_END, CALL, CALL_END, STRING, RESPONSE)
ENDS = {CHANNEL: CHANNEL_END, CALL: CALL_END}


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
    """A call that cannot be read: its text, with quote tokens as ", and why."""

    text: str
    why: str


Part = Thought | Answer | Call | Malformed

# The first line of a channel names it; a channel without a known name is a thought.
Text = type[Thought] | type[Answer]
CHANNELS: dict[str, Text] = {"thought": Thought, "final": Answer}


class ReplyParser:
    """Reads one reply, a few tokens at a time.

    prompt  ids the reply continues: a thought or a call left open there goes on

    What `add` and `finish` return, `merged`, does not depend on how the tokens are
    split. The texts of an answer that no marker interrupts, joined, are
    `Tokenizer.decode` of its tokens. The beginning of a call or of another channel
    ends what is open, be it a thought or a call. What follows `<|tool_response>` is
    for the tool to say and is left out.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        found = {tokenizer.token_id(marker): marker for marker in MARKERS}
        self._markers = {i: marker for i, marker in found.items() if i is not None}
        self._decoder = tokenizer.detokenizer()
        self._open: str | None = None  # the marker whose span is being read
        self._kind: Text | None = None  # of a channel, once its name is read
        self._undecided = ""  # perhaps a channel's name, or its last line break
        self._body: list[str] = []  # of a call
        self._calls = 0
        self._think: str | None = ""  # what may begin <think>, or a thought's end
        self._thinking = False
        self._blank_start = False  # whether line breaks are left out
        self.add(self._left_open(prompt))

    def add(self, ids: Sequence[int]) -> list[Part]:
        """Return the parts that these tokens make final."""
        parts: list[Part] = []
        begin = 0
        for i, token in enumerate(ids):
            if (marker := self._markers.get(token)) is not None:
                parts += self._read(self._decoder.add(ids[begin:i]))
                parts += self._read(self._decoder.finish())
                parts += self._pass(marker)
                begin = i + 1
        parts += self._read(self._decoder.add(ids[begin:]))
        return merged(parts)

    def finish(self) -> list[Part]:
        """Return what was held back so far. A call without its end is malformed."""
        parts = [*self._read(self._decoder.finish()), *self._end(None)]
        return merged([*parts, *self._end_answer()])

    def _left_open(self, prompt: Sequence[int]) -> Sequence[int]:
        """Return the prompt from the thought or call on that it does not close."""
        known = self._tokenizer.special_ids | self._markers.keys()
        for i in reversed(range(len(prompt))):
            marker = self._markers.get(prompt[i])
            if marker in ENDS:
                return prompt[i:]
            if prompt[i] in known and marker != STRING:
                break
        return ()

    def _read(self, text: str) -> list[Part]:
        """Return the parts that `text` makes final in the open span."""
        if self._open is None:
            return self._read_answer(text)
        if self._open == CALL:
            self._body.append(text)
        if self._open != CHANNEL:
            return []
        text, self._undecided = self._undecided + text, ""
        if self._kind is None:
            if any(f"{name}\n".startswith(text) for name in CHANNELS):
                self._undecided = text
                return []
            name, _, rest = text.partition("\n")
            self._kind = CHANNELS.get(name, Thought)
            text = rest if name in CHANNELS else text
        if self._kind is Thought and text.endswith("\n"):
            text, self._undecided = text[:-1], "\n"
        return [self._kind(text)]

    def _read_answer(self, text: str) -> list[Part]:
        """Return the parts of an answer, of which a first <think> is a thought."""
        if self._think is None:
            return [Answer(self._without_blank_start(text))]
        text, self._think = self._think + text, ""
        if not self._thinking:
            begun = text.lstrip()
            if THINK.startswith(begun[: len(THINK)]) and len(begun) < len(THINK):
                self._think = text
                return []
            if not begun.startswith(THINK):
                self._think = None
                return [Answer(text)]
            self._thinking, self._blank_start = True, True
            text = begun.removeprefix(THINK)
        text = self._without_blank_start(text)
        thought, end, rest = text.partition(THINK_END)
        if end:
            self._think, self._thinking, self._blank_start = None, False, True
            rest = self._without_blank_start(rest)
            return [Thought(thought.rstrip("\n")), Answer(rest)]
        held = next(n for n in range(len(text) + 1) if _may_end(text[n:]))
        self._think = text[held:]
        return [Thought(text[:held])]

    def _without_blank_start(self, text: str) -> str:
        """Return a text without the line breaks behind <think> or </think>."""
        if self._blank_start:
            text = text.lstrip("\n")
            self._blank_start = not text
        return text

    def _end_answer(self) -> list[Part]:
        """Return what waited to be told from <think> or its end."""
        waiting, thinking = self._think or "", self._thinking
        self._think, self._thinking = None, False
        return [Thought(waiting.rstrip("\n")) if thinking else Answer(waiting)]

    def _pass(self, marker: str) -> list[Part]:
        """Return the parts that a marker ends; one without meaning here is left out."""
        if self._open == RESPONSE:
            return []
        if marker == STRING and self._open == CALL:
            return self._read(QUOTE)
        begins = marker in (CHANNEL, CALL, RESPONSE)
        parts = self._end_answer() if begins else list[Part]()
        if begins or marker == ENDS.get(self._open or ""):
            parts += self._end(marker)
        if begins:
            self._open = marker
        return parts

    def _end(self, marker: str | None) -> list[Part]:
        """End the open span; a call is whole if its own marker ends it."""
        opened, self._open = self._open, None
        if opened == CHANNEL:
            text = self._undecided.removesuffix("\n")
            self._kind, self._undecided = None, ""
            return [] if text in CHANNELS else [Thought(text)]
        if opened != CALL:
            return []
        body, self._body = "".join(self._body), []
        try:
            if marker != CALL_END:
                raise BrokenCallError("it does not end")
            call = Call(*read_call(body), f"call_{self._calls}")
        except BrokenCallError as error:
            return [Malformed(body.replace(QUOTE, '"'), str(error))]
        self._calls += 1
        return [call]


def _may_end(text: str) -> bool:
    """Whether a thought that goes on with `text` may be about to end."""
    return THINK_END.startswith(text.lstrip("\n"))


def merged(parts: Iterable[Part]) -> list[Part]:
    """Return the parts, adjacent texts of one kind joined and empty ones left out."""
    result: list[Part] = []
    parts = (p for p in parts if not isinstance(p, Thought | Answer) or p.text)
    for kind, run in groupby(parts, type):
        if kind is Thought or kind is Answer:
            run = [kind("".join(part.text for part in run if isinstance(part, kind)))]
        result += run
    return result


def reply_message(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the parts of a whole reply as the assistant's message, for the history.

    "content" is the answer, with malformed calls as text; None beside calls alone.
    """
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
    message: dict[str, Any] = {"role": "assistant"}
    message["content"] = content or (None if calls else "")
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return message
