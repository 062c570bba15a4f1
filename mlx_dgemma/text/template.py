"""Chat templates, compiled and rendered in a sandbox.

A template is code that came with a download. It sees plain JSON values only and runs
in the limits of `sandbox`; nothing of it runs while it is compiled.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SettingsError, TokenizerError

# Keys under which a message's reasoning travels; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Marks where the final message ends; the same text as in transformers.
END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
# What a template's own code can raise beside jinja2's errors.
TEMPLATE_FAILURES = (TypeError, ValueError, LookupError, AttributeError)
TEMPLATE_FAILURES += (ArithmeticError, RuntimeError, MemoryError, SyntaxError)
TEMPLATE_FAILURES += (AssertionError, NameError)
MAX_MESSAGE = 400  # characters


class ChatTemplate:
    """A compiled chat template.

    source  jinja2 text
    where   its file, for messages

    Raises TokenizerError, one line with the template's line number, when it cannot
    be parsed.
    """

    def __init__(self, source: str, where: str):
        from jinja2 import TemplateError, TemplateSyntaxError
        from jinja2.meta import find_undeclared_variables

        from .sandbox import compile_template, sandbox

        self.source = source
        self._where = where
        try:
            # what it reads, which tells whether it can show tools and thinking
            self.variables = find_undeclared_variables(sandbox().parse(source))
            self._template = compile_template(source)
        except (TemplateError, *TEMPLATE_FAILURES) as error:
            is_syntax = isinstance(error, TemplateSyntaxError)
            line = f"line {error.lineno}: " if is_syntax else ""
            raise TokenizerError(f"{where}: {line}{one_line(error)}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation; see `Tokenizer.apply_chat_template`.

        `variables` is what else the template reads, such as `bos_token`.
        """
        from jinja2 import TemplateError

        from .sandbox import render

        if add_generation_prompt and continue_final_message:
            raise SettingsError(
                "add_generation_prompt and continue_final_message exclude each other; "
                "give one of them"
            )
        chat = [_aliased(_plain(m, f"message {i}")) for i, m in enumerate(messages)]
        final = _tag_final_text(chat) if continue_final_message else ""
        given = {
            "documents": None,
            **_plain(variables or {}, "a template variable"),
            "messages": chat,
            "tools": None if tools is None else _plain(list(tools), "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = render(self._template, given)
        except (TemplateError, *TEMPLATE_FAILURES) as error:
            raise TokenizerError(
                f"{self._where}: refused the messages: {one_line(error)}"
            ) from None
        if not continue_final_message:
            return text
        end = text.rfind(END_TAG.strip())
        if end < 0 or final.strip() not in text:
            raise TokenizerError(
                f"{self._where}: changes the text of the final message, which "
                "therefore cannot be continued"
            )
        # a template that trims the message takes the tag's space away
        exact = text.startswith(END_TAG, end)
        return text[:end] if exact else text[:end].rstrip()


def one_line(error: Exception) -> str:
    """An error's message without line breaks; its type where the message is empty."""
    return " ".join(str(error)[:MAX_MESSAGE].split()) or type(error).__name__


def _tag_final_text(chat: list[dict[str, Any]]) -> str:
    """Put END_TAG behind the last text of the last message; return that text."""
    last = chat[-1] if chat else {}
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + END_TAG
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(text := part.get("text"), str):
            part["text"] = text + END_TAG
            return text
    raise SettingsError("continue_final_message: the last message has no text")


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON types alone: templates get no live objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of an enumeration, its text alone
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    raise SettingsError(
        f"{where} holds a {type(value).__name__}; only text, numbers, lists and "
        "objects can be put into a prompt"
    )


def _aliased(message: Any) -> dict[str, Any]:
    """Return the message without empty keys, its reasoning under every usual key."""
    if not isinstance(message, dict):
        raise SettingsError('a message must be {"role", "content"}')
    message = {key: value for key, value in message.items() if value is not None}
    found = [message[name] for name in REASONING if name in message]
    if found:
        message = {"thinking": found[0], **message, "reasoning_content": found[0]}
    return message
