"""Training data: rows of JSONL to prompts and answers in token ids.

A row is {"messages": […]}, of which the last must be the assistant's, or {"prompt",
"completion"}, as mlx-lm reads them. Only that answer is supervised; what comes before
is the prompt, rendered as for generating, so training and use see the same ids.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, DGemmaError
from ..text.chat import ROLES, chat_ids
from ..text.template import REASONING
from ..text.tokenizer import Tokenizer

FILES = {"train": "train.jsonl", "valid": "valid.jsonl", "test": "test.jsonl"}
MARK = "\u2063answer\u2063"  # stands for the answer while its template is rendered


@dataclass(frozen=True)
class Example:
    """A prompt, an answer with its end, and what fills the answer's last canvas.

    fill    id behind the end of the answer; None for an answer that was cut, which
            then is whole canvases and has no end
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    fill: int | None

    def canvases(self, length: int) -> int:
        """How many canvases of that length the answer takes."""
        return -(-len(self.response) // length)

    def cut(self, length: int, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The answer before canvas `index`, and that canvas, filled up."""
        start = index * length
        canvas = self.response[start : start + length]
        if self.fill is not None:
            canvas += (self.fill,) * (length - len(canvas))
        assert len(canvas) == length
        return self.response[:start], canvas


@dataclass(frozen=True)
class Dataset:
    """The examples of one file, and what was left out of it."""

    examples: tuple[Example, ...]
    bad: tuple[str, ...] = ()  # file:line: reason

    @property
    def truncated(self) -> int:
        """How many answers were cut."""
        return sum(example.fill is None for example in self.examples)

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its answer."""
        return max(len(one.prompt) + len(one.response) for one in self.examples)

    @property
    def digest(self) -> str:
        """Tells one dataset from another: a hash of all its ids."""
        found = hashlib.sha256()
        for example in self.examples:
            fill = -3 if example.fill is None else example.fill
            row = (*example.prompt, -1, *example.response, -2, fill)
            found.update(np.array(row, dtype=np.int32).tobytes())
        return found.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.examples)


class ExampleReader:
    """Turns rows into examples for one model.

    length      of a canvas, in tokens
    ends        ids that end an answer: the checkpoint's eos tokens
    longest     most tokens of prompt and answer together; a longer answer is cut to
                whole canvases
    """

    def __init__(
        self, tokenizer: Tokenizer, length: int, ends: frozenset[int], longest: int
    ):
        self.tokenizer, self.length = tokenizer, length
        self.ends, self.longest = ends, longest
        self.fill = _fill_token(tokenizer, ends)

    def read(self, path: Path, *, skip_bad: bool = False) -> Dataset:
        """All rows of a file.

        Raises DataError naming file, line and reason of the first row that cannot be
        used; skip_bad lists them in the result instead.
        """
        examples, bad = [], []
        for number, line in _lines(path):
            try:
                examples.append(self.example(line))
            except DGemmaError as error:
                reason = f"{path}:{number}: {error}"
                if not skip_bad:
                    raise DataError(f"{reason}; mend it or add --skip-bad") from None
                bad.append(reason)
        if not examples:
            raise DataError(f"{path}: has no usable rows")
        return Dataset(tuple(examples), tuple(bad))

    def example(self, line: str | bytes) -> Example:
        """The example in a line of JSON. Raises DataError, a reason without a place."""
        messages, tools = _messages(_object(line))
        *before, last = messages
        answer = _answer(last)
        try:
            prompt, response = self._encode(before, answer, tools)
        except RecursionError:
            raise DataError("is nested too deeply") from None
        room = (self.longest - len(prompt)) // self.length * self.length
        if room <= 0:
            raise DataError(
                f"its prompt of {len(prompt)} tokens leaves no canvas of {self.length} "
                f"within --max-seq-length {self.longest}"
            )
        cut = len(response) > room
        return Example(prompt, response[:room], None if cut else self.fill)

    def _encode(
        self, before: list[dict], answer: str, tools: list[dict] | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the prompt, and of the answer up to its end."""
        tokenizer = self.tokenizer
        if self.ends & set(tokenizer.encode(answer)):
            raise DataError("the answer holds a token that ends it; remove it")
        if tokenizer.chat_template is None:
            if len(before) != 1 or tools:
                raise DataError("the tokenizer has no chat template: one prompt only")
            prompt = chat_ids(tokenizer, before[0]["content"])
            return tuple(prompt), (*tokenizer.encode(answer), self.fill)
        rendered = tokenizer.apply_chat_template(
            before, tools=tools, add_generation_prompt=True, tokenize=False
        )
        # what the template writes behind an answer, found with a mark in its place
        marked = [*before, {"role": "assistant", "content": MARK}]
        whole = tokenizer.apply_chat_template(marked, tools=tools, tokenize=False)
        assert isinstance(rendered, str) and isinstance(whole, str)
        _, found, behind = whole.rpartition(MARK)
        if not found:
            raise DataError("the chat template leaves the answer out")
        response = tokenizer.encode(answer + behind)
        end = next((i for i, t in enumerate(response) if t in self.ends), None)
        if end is not None:
            response = response[: end + 1]
        else:
            response = [*tokenizer.encode(answer), self.fill]
        return tuple(tokenizer.encode(rendered)), tuple(response)


def _fill_token(tokenizer: Tokenizer, ends: frozenset[int]) -> int:
    """The id behind the end of an answer: <eos>, or else the named end of text."""
    for token in (tokenizer.token_id("<eos>"), tokenizer.eos_token_id):
        if token is not None and token in ends:
            return token
    raise DataError(
        "the tokenizer names no eos token that ends an answer; "
        "add eos_token_id to generation_config.json"
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _object(line: str | bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise DataError(f"holds {constant}, which is not a JSON number")

    try:
        text = line if isinstance(line, str) else line.decode("utf-8-sig")
        row = json.loads(text, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason})") from None
    except ValueError as error:
        raise DataError(f"broken JSON ({error})") from None
    except RecursionError:
        raise DataError("is nested too deeply") from None
    if not isinstance(row, dict):
        raise DataError(f"is {type(row).__name__}, not an object")
    return row


def _messages(row: dict[str, Any]) -> tuple[list[dict], list[dict] | None]:
    """The conversation of a row, its answer last, and its tools."""
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools is {type(tools).__name__}, not a list")
    if "messages" in row:
        messages = _conversation(row["messages"], "messages")
    elif "prompt" in row and "completion" in row:
        messages = _turns(row["prompt"], "prompt", "user")
        messages += _turns(row["completion"], "completion", "assistant")
    else:
        raise DataError("has neither messages nor prompt and completion")
    if len(messages) < 2:
        raise DataError("has nothing before the answer")
    return messages, tools


def _turns(value: Any, name: str, role: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _conversation(value, name)


def _conversation(value: Any, name: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} is not a list of messages")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{name}[{index}] is no message with role and content")
        if message["role"] not in (*ROLES, "model"):
            raise DataError(
                f"{name}[{index}]: role is {message['role']!r}; "
                f"it must be one of {', '.join(ROLES)}"
            )
        content = _text(message.get("content"), f"{name}[{index}]")
        if content is None and not message.get("tool_calls"):
            raise DataError(f"{name}[{index}]: has no content")
        messages.append({**message, "content": content})
    return messages


def _text(content: Any, where: str) -> Any:
    """Text parts as one text; None stays, for messages that only call tools."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: content is {type(content).__name__}, not text")
    parts = []
    for part in content:
        known = isinstance(part, Mapping) and part.get("type", "text") == "text"
        if not known or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: only text can be trained on")
        parts.append(part["text"])
    return "".join(parts)


def _answer(message: dict[str, Any]) -> str:
    """The text of the last message, which must be an answer of words alone."""
    if message["role"] not in ("assistant", "model"):
        raise DataError(
            f"the last message is the {message['role']}'s; an answer must be"
        )
    for key in ("tool_calls", *REASONING):
        if message.get(key):
            raise DataError(f"the answer holds {key}; write it into content as text")
    answer = message["content"]
    if not isinstance(answer, str) or not answer.strip():
        raise DataError("the answer is empty")
    return answer.strip()
