"""Training data: rows of JSONL as prompts and answers in token ids.

A row is {"messages": […]}, of which the last must be the assistant's, or {"prompt",
"completion"}, as mlx-lm reads them. Only that answer is trained; what comes before it
is the prompt, rendered as for generating, so training and use see the same ids.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, DGemmaError
from ..files.json import parse_object, read_lines
from ..settings import MAX_TOKEN
from ..text.chat import ROLES, chat_ids
from ..text.template import REASONING
from ..text.tokenizer import Tokenizer

FILES = {"train": "train.jsonl", "valid": "valid.jsonl", "test": "test.jsonl"}
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
    vocab_size   of the model, which may know fewer tokens than the tokenizer

    Raises DataError if the tokenizer has no eos token that ends an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        length: int,
        ends: frozenset[int],
        longest: int,
        vocab_size: int = MAX_TOKEN,
    ):
        self.tokenizer, self.length = tokenizer, length
        self.ends, self.longest, self.vocab_size = ends, longest, vocab_size
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
        for key in ("tool_calls", *REASONING):
            if last.get(key):
                raise DataError(
                    f"the answer holds {key}; write it into content as text"
                )
        if not last["content"].strip():
            raise DataError("the answer is empty")
        try:
            answer = last["content"].strip()
            prompt, response = self._encode(before, answer, row.get("tools"))
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
        self, before: list[dict], answer: str, tools: list[dict] | None
    ) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt, and of the answer up to its end."""
        tokenizer = self.tokenizer
        ids = tokenizer.encode(answer)
        if self.ends & set(ids):
            raise DataError("the answer holds a token that ends it; remove it")
        if tokenizer.chat_template is None:
            if len(before) != 1 or tools:
                raise DataError("the tokenizer has no chat template: one prompt only")
            return chat_ids(tokenizer, before[0]["content"]), [*ids, self.fill]

        def render(messages: list[dict], *, prompt: bool) -> str:
            text = tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False
            )
            assert isinstance(text, str)
            return text

        # what the template writes behind an answer, found with a mark in its place
        marked = [*before, {"role": "assistant", "content": MARK}]
        _, found, behind = render(marked, prompt=False).rpartition(MARK)
        if not found:
            raise DataError("the chat template leaves the answer out")
        response = tokenizer.encode(answer + behind)
        end = next((i for i, token in enumerate(response) if token in self.ends), None)
        response = [*ids, self.fill] if end is None else response[: end + 1]
        return tokenizer.encode(render(before, prompt=True)), response


def conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a row, of which the last is the assistant's answer.

    Parts of text are joined. Raises DataError with a reason.
    """
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools is {type(tools).__name__}, not a list")
    if "messages" in row:
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
    if len(messages) < 2:
        raise DataError("has nothing before the answer")
    if (role := messages[-1]["role"]) not in ("assistant", "model"):
        raise DataError(f"the last message is the {role}'s; it must be the assistant's")
    return messages


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} is no message with role and content")
    if message["role"] not in (*ROLES, "model"):
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
