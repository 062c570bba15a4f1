"""Training data: rows of JSONL as prompts and answers in token ids.

A row is {"messages": […]}, of which the last must be the assistant's, or {"prompt",
"completion"}, as mlx-lm reads them. Only that answer is trained; what comes before it
is the prompt, rendered as for generating, so training and use see the same ids.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, DGemmaError
from ..files.json import parse_object, read_lines
from ..settings import MAX_TOKEN
from ..text.chat import (
    ALIASES,
    ROLES,
    chat_ids,
    check_messages,
    mark_special,
    render_chat,
)
from ..text.template import REASONING
from ..text.tokenizer import Tokenizer

FILES = {"train": "train.jsonl", "valid": "valid.jsonl", "test": "test.jsonl"}
COLUMNS = ("messages", "prompt", "completion", "system", "tools", "images")
COLUMNS += ("chat_template_kwargs",)
MARK = "\u2063answer\u2063"  # stands for the answer while its template is rendered


@dataclass(frozen=True)
class Example:
    """A prompt, an answer with its end, and what fills the answer's last canvas.

    fill   id behind the end of the answer; None for an answer that was cut, which is
           whole canvases without an end
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    fill: int | None

    def canvases(self, length: int) -> int:
        """Return how many canvases of `length` the answer takes."""
        return -(-len(self.response) // length)

    def cut(self, length: int, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the answer before canvas `index`, and that canvas, filled up."""
        start = index * length
        canvas = self.response[start : start + length]
        if self.fill is not None:
            canvas += (self.fill,) * (length - len(canvas))
        assert len(canvas) == length
        return self.response[:start], canvas


@dataclass(frozen=True)
class Dataset:
    """The examples of one file, and the rows that were left out."""

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
        """A hash of all ids, which tells one dataset from another."""
        digest = hashlib.sha256()
        for example in self.examples:
            fill = -3 if example.fill is None else example.fill
            row = (*example.prompt, -1, *example.response, -2, fill)
            digest.update(np.array(row, dtype=np.int32).tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.examples)


class ExampleReader:
    """Turns rows into examples for one model.

    length    of a canvas, in tokens
    ends      ids that end an answer: the checkpoint's eos tokens
    longest   most tokens of prompt and answer together; a longer answer is cut to
              whole canvases
    vocab_size      of the model, which may know fewer tokens than the tokenizer
    allow_special   let a text spell special tokens, as of `encode_chat`

    Raises DataError if the tokenizer has no eos token that ends an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        length: int,
        ends: frozenset[int],
        longest: int,
        vocab_size: int = MAX_TOKEN,
        allow_special: bool = False,
    ):
        self.tokenizer, self.length = tokenizer, length
        self.ends, self.longest, self.vocab_size = ends, longest, vocab_size
        self.allow_special = allow_special
        candidates = (tokenizer.token_id("<eos>"), tokenizer.eos_token_id)
        fills = [token for token in candidates if token in ends and token is not None]
        if not fills:
            raise DataError(
                "the tokenizer names no eos token that ends an answer; "
                "add eos_token_id to generation_config.json"
            )
        self.fill = fills[0]

    def read(self, path: Path, *, skip_bad: bool = False) -> Dataset:
        """Return all rows of a file.

        Raises DataError naming file, line and reason of the first row that cannot be
        used; skip_bad lists them in the result instead.
        """
        examples, bad = [], []
        for number, line in read_lines(path):
            try:
                examples.append(self.example(line))
            except DGemmaError as error:
                reason = f"{path}:{number}: {error}"
                if not skip_bad:
                    raise DataError(f"{reason}; fix it or add --skip-bad") from None
                bad.append(reason)
        if not examples:
            raise DataError(f"{path}: has no usable rows")
        return Dataset(tuple(examples), tuple(bad))

    def example(self, line: str | bytes) -> Example:
        """Return the example in a line of JSON. Raises DataError with a reason."""
        row = parse_object(line)
        *before, last = conversation(row)
        for key in REASONING:
            if last.get(key):
                why = "write it into content as text, or leave it out"
                raise DataError(f"the answer holds {key}; {why}")
        last["content"] = (last["content"] or "").strip()
        if not last["content"] and not last.get("tool_calls"):
            raise DataError("the answer is empty")
        try:
            prompt, response = self._encode(before, last, options_of(row))
        except RecursionError:
            raise DataError("is nested too deeply") from None
        if (largest := max([*prompt, *response, self.fill])) >= self.vocab_size:
            known = f"the model knows 0 to {self.vocab_size - 1}"
            raise DataError(f"the tokenizer makes id {largest}; {known}")
        room = (self.longest - len(prompt)) // self.length * self.length
        if room <= 0:
            raise DataError(
                f"its prompt of {len(prompt)} tokens leaves no canvas of {self.length} "
                f"within --max-seq-length {self.longest}"
            )
        cut = len(response) > room
        fill = None if cut else self.fill
        return Example(tuple(prompt), tuple(response[:room]), fill)

    def _encode(
        self, before: list[dict], last: dict, options: dict[str, Any]
    ) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt, and of the answer up to its end."""
        tokenizer, answer = self.tokenizer, last["content"]
        options = options | {"allow_special": self.allow_special}
        if tokenizer.chat_template is None:
            if len(before) != 1 or options["tools"] or last.get("tool_calls"):
                raise DataError("the tokenizer has no chat template: one prompt only")
            response = tokenizer.encode(answer)
            self._refuse_end(response)
            return chat_ids(tokenizer, before[0]["content"]), [*response, self.fill]
        prompt = chat_ids(tokenizer, before, **options)
        if last.get("tool_calls"):
            # what the template writes of the calls, behind what it is prompted with
            whole, mark = self._render([*before, last], options)
            ids = tokenizer.encode_rendered(whole, mark)
            pairs = enumerate(zip(ids, prompt, strict=False))
            shared = next((i for i, (a, b) in pairs if a != b), len(prompt))
            response = ids[shared:]
        else:
            # what the template writes behind an answer, found with a mark in its place
            marked = [*before, {"role": "assistant", "content": MARK}]
            text, _ = self._render(marked, options)
            _, found, behind = text.rpartition(MARK)
            if not found:
                raise DataError("the chat template leaves the answer out")
            mark = None
            if not self.allow_special:
                answer, mark = mark_special(tokenizer, answer)
            self._refuse_end(tokenizer.encode_rendered(answer, mark))
            response = tokenizer.encode_rendered(answer + behind, mark)
        end = next((i for i, token in enumerate(response) if token in self.ends), None)
        if end is not None:
            return prompt, response[: end + 1]
        if not last.get("tool_calls"):
            response = tokenizer.encode_rendered(answer, mark)
        return prompt, [*response, self.fill]

    def _render(
        self, messages: list[dict], options: dict[str, Any]
    ) -> tuple[str, str | None]:
        return render_chat(self.tokenizer, check_messages(messages), **options)

    def _refuse_end(self, answer: list[int]) -> None:
        if self.ends & set(answer):
            raise DataError("the answer holds a token that ends it; remove it")


def options_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a row is to be rendered: tools and variables of the chat template.

    Tools may be JSON text, as tables hold them. Raises DataError with a reason.
    """
    tools, variables = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise DataError("tools is text, but not JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools is {type(tools).__name__}, not a list")
    if variables is not None and not isinstance(variables, dict):
        raise DataError("chat_template_kwargs must be an object")
    variables = {k: v for k, v in (variables or {}).items() if v is not None}
    thinking = bool(variables.pop("enable_thinking", False))
    return {"tools": tools, "thinking": thinking, "chat_template_kwargs": variables}


def conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a row, of which the last is the assistant's answer.

    Parts of text are joined. Raises DataError with a reason, also for a column that is
    not used: what it says would be missing.
    """
    for name in row:
        if name not in COLUMNS and row[name] is not None:
            known = ", ".join(COLUMNS)
            raise DataError(f"has a column {name!r:.60}; known: {known}. Remove it")
    if row.get("images"):
        raise DataError("images: only text can be used; remove them")
    if row.get("messages") is not None:
        parts = [("messages", row["messages"])]
    elif "prompt" in row and "completion" in row:
        parts = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            value = row[name]
            text = isinstance(value, str)
            parts.append((name, [{"role": role, "content": value}] if text else value))
    else:
        raise DataError("has neither messages nor prompt and completion")
    messages = []
    for name, value in parts:
        if not isinstance(value, list) or not value:
            raise DataError(f"{name} is not a list of messages")
        messages += [_message(one, f"{name}[{n}]") for n, one in enumerate(value)]
    if (system := row.get("system")) is not None:
        if not isinstance(system, str):
            raise DataError(f"system is {type(system).__name__}, not text")
        if any(message["role"] in ("system", "developer") for message in messages):
            raise DataError("has system twice: as a column and as a message")
        messages.insert(0, {"role": "system", "content": system})
    if len(messages) < 2:
        raise DataError("has nothing before the answer")
    if (role := messages[-1]["role"]) not in ("assistant", "model"):
        raise DataError(f"the last message is the {role}'s; it must be the assistant's")
    return messages


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} is no message with role and content")
    if message["role"] not in (*ROLES, *ALIASES):
        raise DataError(
            f"{where}: role is {message['role']!r}; "
            f"it must be one of {', '.join(ROLES)}"
        )
    content = message.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        texts = [p.get("text") for p in parts if p.get("type", "text") == "text"]
        content = [text for text in texts if isinstance(text, str)]
        if len(content) < len(message["content"]):
            raise DataError(f"{where}: only text is supported")
        content = "".join(content)
    if content is None and not message.get("tool_calls"):
        raise DataError(f"{where}: has no content")
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}: content is {type(content).__name__}, not text")
    return {**message, "content": content}
