"""Conversations to prompts: the checkpoint's chat template, in a sandbox.

Templates are code that came with a download. They see plain JSON values only and
run in jinja2's immutable sandbox, set up as transformers sets it up.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from numbers import Integral
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import SettingsError, TokenizerError
from .pictures import is_picture, picture_sources, source_of, without_sources
from .tools import declared, linked
from .vocabularies import one_line

if TYPE_CHECKING:
    import jinja2

    from .tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
# Names under which a message's reasoning travels; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")
# What a template's own code can raise beside jinja2's errors.
TEMPLATE_FAILURES = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    SyntaxError,
)


class ChatTemplate:
    """A compiled chat template.

    source  jinja2 text
    where   its file, for messages

    Raises TokenizerError, one line with the template's line number, when it cannot
    be parsed.
    """

    def __init__(self, source: str, where: str):
        from jinja2 import TemplateError, TemplateSyntaxError

        self.source = source
        self._where = where
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"{where}: line {error.lineno}: {one_line(error)}"
            ) from None
        except (TemplateError, *TEMPLATE_FAILURES) as error:
            raise TokenizerError(f"{where}: {one_line(error)}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool = False,
        named_tokens: Mapping[str, str] | None = None,
    ) -> str:
        """The text of a conversation.

        named_tokens    variables such as `bos_token`

        Raises TokenizerError when the template refuses or fails, SettingsError for
        values that are not plain JSON.
        """
        from jinja2 import TemplateError

        variables = {
            **(named_tokens or {}),
            "messages": [
                _aliased(_plain(m, f"message {i}")) for i, m in enumerate(messages)
            ],
            "tools": None if tools is None else _plain(list(tools), "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": enable_thinking,
        }
        try:
            return self._template.render(variables)
        except (TemplateError, *TEMPLATE_FAILURES) as error:
            raise TokenizerError(
                f"{self._where}: refused the messages: {one_line(error)}"
            ) from None


def chat_ids(
    tokenizer: "Tokenizer",
    prompt: Prompt,
    *,
    system: str | None = None,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Ids of a prompt of text alone.

    prompt      text (one user message, or raw text behind BOS where the tokenizer
                has no chat template), token ids taken as they are, or messages
                {"role", "content"} with text content
    system      a system message in front of a text or of messages without one
    thinking    whether the template asks the model to think first
    tools       what the model may call, as OpenAI's JSON; see `text.tools`

    Raises SettingsError naming the argument, the message or the tool.
    """
    ids, _ = _encode(tokenizer, prompt, system, thinking, tools, pictures=False)
    return ids


def encode_chat(
    tokenizer: "Tokenizer",
    prompt: Prompt,
    *,
    system: str | None = None,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[int], list[Any]]:
    """Ids of a prompt that may hold pictures, and the pictures' sources in order.

    Arguments as of `chat_ids`; content may hold image parts too, see
    `text.pictures`. Each puts the template's image token into the ids once, for
    `pictures.expand` to make room.
    """
    return _encode(tokenizer, prompt, system, thinking, tools, pictures=True)


def _encode(
    tokenizer: "Tokenizer",
    prompt: Prompt,
    system: str | None,
    thinking: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    pictures: bool,
) -> tuple[list[int], list[Any]]:
    if system is not None and not isinstance(system, str):
        raise SettingsError(f"system must be text, not {type(system).__name__}")
    functions = [] if tools is None else declared(tools)
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        why = "the tokenizer has no chat template"
        _refuse(why, system=system, thinking=thinking, tools=functions)
        return _with_bos(tokenizer, tokenizer.encode(prompt)), []
    if isinstance(prompt, str):
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    elif _is_ids(prompt):
        why = "the prompt is token ids"
        _refuse(why, system=system, thinking=thinking, tools=functions)
        return [_id(value, i) for i, value in enumerate(prompt)], []
    else:
        messages = linked([_message(m, i, pictures) for i, m in enumerate(prompt)])
    if system is not None:
        roles = [message["role"] for message in messages]
        if "system" in roles:
            raise SettingsError(
                f"system is given and message {roles.index('system')} is a system "
                "message; leave one out"
            )
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(
        [without_sources(message) for message in messages],
        tools=functions or None,
        enable_thinking=thinking,
    )
    assert isinstance(text, str)
    # the template writes BOS itself
    return tokenizer.encode(text), picture_sources(messages)


def _with_bos(tokenizer: "Tokenizer", ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if not ids:
        raise SettingsError("prompt is empty; give it some text")
    return ids


def _refuse(why: str, **given: Any) -> None:
    """Refuse what only a chat template can express."""
    for name, value in given.items():
        if value is not None and value is not False and value != []:
            raise SettingsError(f"{name} cannot be used: {why}")


def _is_ids(prompt: Any) -> bool:
    """Whether a prompt is token ids rather than messages."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise SettingsError(
            f"prompt is {type(prompt).__name__}; it must be text, a list of token "
            "ids or a list of messages"
        )
    if not len(prompt):
        raise SettingsError("prompt is empty; give text, token ids or messages")
    return not isinstance(prompt[0], Mapping | str)


def _id(value: Any, index: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise SettingsError(
            f"prompt[{index}] is {value!r}; a list prompt holds token ids or messages"
        )
    return int(value)


def _message(message: Any, index: int, pictures: bool) -> dict[str, Any]:
    """A message whose shape is known, its content left as it is."""

    def refuse(why: str) -> NoReturn:
        raise SettingsError(f"message {index}: {why}")

    if not isinstance(message, Mapping):
        refuse(f'is {type(message).__name__}; it must be {{"role", "content"}}')
    role = message.get("role")
    if role not in ROLES:
        refuse(f"role is {role!r}; it must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return dict(message)  # a call of tools needs no words
    if not isinstance(content, list | tuple):
        refuse(f"content is {type(content).__name__}; it must be text or text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if pictures and is_picture(part):
            try:
                source_of(part)
            except SettingsError as error:
                refuse(str(error))
            continue
        if isinstance(kind, str) and kind != "text":
            reads = "text and pictures" if pictures else "text"
            refuse(f"holds a part of type {kind!r}; this version reads {reads} only")
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            refuse('a content part must be {"type": "text", "text": ...}')
    return dict(message)


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON types alone: templates are not handed live objects."""
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


def _aliased(message: Any) -> Any:
    """The message without empty keys, its reasoning under every usual name."""
    if not isinstance(message, dict):
        raise SettingsError('a message must be {"role", "content"}')
    message = {key: value for key, value in message.items() if value is not None}
    found = [message[name] for name in REASONING if name in message]
    if found:
        message = {"thinking": found[0], **message, "reasoning_content": found[0]}
    return message


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@cache
def _environment() -> "jinja2.Environment":
    """The sandbox every template is compiled in."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks a trained span; its body is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 reads a plain set

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block keeps variables set inside from leaking out.
            call = self.call_method("render_body")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def render_body(self, caller: Any) -> str:
            return caller()

    class PlainNamespace(Namespace):
        """A namespace no underscored name can be put into."""

        def __init__(*args: Any, **values: Any):
            self, *rest = args  # so that a value may be called "self"
            Namespace.__init__(self)
            for name, value in dict(*rest, **values).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}; rename it")
            super().__setitem__(name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = PlainNamespace
    return environment
