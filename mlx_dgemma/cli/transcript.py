"""A conversation as a file: for people as Markdown, for programs as JSON lines."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import SettingsError

HEADINGS = {"system": "System", "user": "You", "assistant": "Model", "tool": "Tool"}

Message = Mapping[str, Any]


def save(path: str, messages: Sequence[Message]) -> None:
    """Write messages to a file whose suffix says how; it is the old one or the new.

    Raises SettingsError for another suffix, OSError when it cannot be written.
    """
    writers = {".md": markdown, ".jsonl": json_lines}
    write = writers.get(Path(path).suffix.lower())
    if write is None:
        raise SettingsError(f"{path}: name it *.md or *.jsonl, which says the format")
    # half a surrogate pair, which a call may hold, becomes what JSON writes for it
    replace(Path(path), write(messages).encode("utf-8", "backslashreplace"))


def json_lines(messages: Iterable[Message]) -> str:
    """One message a line, as it is kept."""
    return "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in messages)


def markdown(messages: Iterable[Message]) -> str:
    """A heading and the text for each message; thoughts are quoted."""
    parts: list[str] = []
    for message in messages:
        parts.append(f"## {HEADINGS[message['role']]}")
        thoughts = message.get("reasoning_content")
        if thoughts:
            parts.append("\n".join(f"> {line}" for line in thoughts.split("\n")))
        parts += _content(message.get("content"))
        for call in message.get("tool_calls", ()):
            function = call["function"]
            parts.append(f"    → {shown_call(function['name'], function['arguments'])}")
    return "\n\n".join(parts) + "\n"


def shown_call(name: str, arguments: Any) -> str:
    """A call of a tool in one line."""
    return f"{name}({json.dumps(arguments, ensure_ascii=False)})"


def _content(content: Any) -> list[str]:
    if isinstance(content, str) or content is None:
        return [content] if content else []
    return [
        part["text"] if part["type"] == "text" else f"![picture](<{part['image']}>)"
        for part in content
    ]


def replace(path: Path, data: bytes) -> None:
    """Put a file in place of `path`, whole or not at all.

    Raises OSError naming `path`.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    partial = target.with_name(f".partial-{target.name}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, partial)
        partial.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            partial.unlink()
