"""Prompts of every shape to token ids and the sources of their images."""

import json
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self

from ..errors import SettingsError
from .tools import check_tools, link_tool_results, require

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {"developer": "system", "model": "assistant"}
# noncharacters of Unicode, which hardly any text holds
MARKS = [chr(code) for code in range(0xFDD0, 0xFDEF)]
PLACE = chr(0xFDEF)  # stands around the place of a WrittenText
TURN = "<|turn>"  # starts a turn in Gemma's template
# Template variables that have arguments of their own.
RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")
RESERVED += ("enable_thinking", "tokenize")


class WrittenText(str):
    """A text that a model wrote, and the ids it wrote: encoding gives others."""

    ids: tuple[int, ...]

    def __new__(cls, text: str, ids: Sequence[int]) -> Self:
        written = super().__new__(cls, text)
        written.ids = tuple(ids)
        return written

    def __reduce__(self) -> tuple[Any, ...]:
        return WrittenText, (str(self), self.ids)


def chat_ids(tokenizer: "Tokenizer", prompt: Prompt, **options: Any) -> list[int]:
    """Return the ids of a prompt without images; options as of `encode_chat`."""
    ids, sources = encode_chat(tokenizer, prompt, **options)
    if sources:
        raise SettingsError("the prompt holds images; only text can be used here")
    return ids


def encode_chat(
    tokenizer: "Tokenizer",
    prompt: Prompt,
    *,
    system: str | None = None,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    allow_special: bool = False,
) -> tuple[list[int], list[Any]]:
    """Return the ids of a prompt, and the sources of its images in order.

    prompt      text, one user message unless it is rendered or there is no chat
                template: then it is encoded as it is, behind BOS; token ids, used as
                they are; or messages {"role", "content"}, content being text or parts
                {"type": "text", "text": …} and images, see `image_source`
    system      a system message in front of a text or of messages without one
    tools       what the model may call, as OpenAI's JSON; see `text.tools`
    chat_template_kwargs    further variables of the chat template
    continue_final_message  continue the last message, the assistant's
    allow_special           let a text of a message spell special tokens; unlike
                            transformers, it is otherwise encoded in ordinary tokens

    Raises SettingsError naming what is wrong, TokenizerError of the chat template.
    """
    unused = _why_no_template(tokenizer, prompt)
    if unused is not None:
        for name, given in (
            ("system", system is not None),
            ("thinking", thinking),
            ("tools", tools),
            ("chat_template_kwargs", chat_template_kwargs),
            ("continue_final_message", continue_final_message),
        ):
            require(not given, f"{name} cannot be used: {unused}")
        return _encode_plain(tokenizer, prompt), []
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = check_messages(chat, system)
    wrong = "continue_final_message needs messages that end with the assistant's"
    last = messages[-1]["role"]
    require(not continue_final_message or last == "assistant", wrong)
    sources = take_images(messages)
    options = {
        "thinking": thinking,
        "tools": tools,
        "chat_template_kwargs": chat_template_kwargs,
        "allow_special": allow_special,
        "add_generation_prompt": not continue_final_message,
        "continue_final_message": continue_final_message,
    }
    return _rendered_ids(tokenizer, messages, options), sources


def _rendered_ids(
    tokenizer: "Tokenizer", messages: list[dict[str, Any]], options: Any
) -> list[int]:
    """Return the ids of a chat; a WrittenText shown unchanged keeps its own."""
    text, mark = render_chat(tokenizer, messages, **options)
    written: dict[str, WrittenText] = {}
    places = list(messages)
    for number, message in enumerate(messages):
        if isinstance(content := message.get("content"), WrittenText):
            place = f"{PLACE}{number}{PLACE}"
            written[place], places[number] = content, message | {"content": place}
    if written:
        other, other_mark = render_chat(tokenizer, places, **options)
        parts = re.split(f"({PLACE}[0-9]+{PLACE})", other)
        shown = "".join(written.get(part, part) for part in parts)
        if shown.replace(other_mark or PLACE, "") == text.replace(mark or PLACE, ""):
            encode = tokenizer.encode_rendered
            found = (
                written[part].ids if part in written else encode(part, other_mark)
                for part in parts
            )
            return [token for ids in found for token in ids]
    return tokenizer.encode_rendered(text, mark)


def check_messages(
    messages: Sequence[Any], system: str | None = None
) -> list[dict[str, Any]]:
    """Return copies of messages as chat templates want them, `system` in front.

    Results of tools are linked to their calls, arguments are objects, and the role
    "developer" is "system". Raises SettingsError naming the message.
    """
    wrong = f"system must be text, not {type(system).__name__}"
    require(isinstance(system, str | None), wrong)
    checked = link_tool_results(
        _check_message(message, f"message {i}") for i, message in enumerate(messages)
    )
    if system is not None:
        wrong = "system is given and a message is a system message; leave one out"
        require(all(message["role"] != "system" for message in checked), wrong)
        checked.insert(0, {"role": "system", "content": system})
    return checked


def render_chat(
    tokenizer: "Tokenizer",
    messages: Sequence[dict[str, Any]],
    *,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_special: bool = False,
    **how: bool,
) -> tuple[str, str | None]:
    """Return checked messages as text, and what to encode it with.

    The one place where messages become text, for prompts and training rows alike; the
    pair goes to `Tokenizer.encode_rendered`. how: `add_generation_prompt` or
    `continue_final_message`. Raises SettingsError and TokenizerError.
    """
    functions = [] if tools is None else check_tools(tools)
    variables = _check_variables(chat_template_kwargs)
    known = tokenizer.template_for(functions).variables
    require("tools" in known or not functions, "the chat template shows no tools")
    can_think = "enable_thinking" in known or not thinking
    require(can_think, "the chat template has no switch for thinking")
    mark, chat = None, list(messages)
    if not allow_special:
        (chat, functions), mark = mark_special(tokenizer, [chat, functions])
    text = tokenizer.apply_chat_template(
        chat,
        tools=functions or None,
        enable_thinking=thinking,
        tokenize=False,
        **how,
        **variables,
    )
    assert isinstance(text, str)
    return text, mark


def mark_special(tokenizer: "Tokenizer", value: Any) -> tuple[Any, str | None]:
    """Return a JSON value with a mark in each special token it spells, and the mark.

    None in place of the mark: it spells none. The mark is a character that no text of
    the value holds.
    """
    try:
        written = json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
        mark = next(one for one in MARKS if one not in written)
        marked = tokenizer.mark_special(value, mark)
    except (RecursionError, ValueError):  # ValueError: a value that holds itself
        raise SettingsError("the messages are nested too deeply") from None
    return (value, None) if marked == value else (marked, mark)


def is_rendered(tokenizer: "Tokenizer", prompt: str) -> bool:
    """Whether a chat template wrote this text: it begins with BOS or a turn."""
    starts = (tokenizer.bos_token, TURN)
    return prompt.startswith(
        tuple(s for s in starts if s and tokenizer.token_id(s) is not None)
    )


def is_image(part: Any) -> bool:
    """Whether a content part is an image in one of the spellings."""
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def image_source(part: Mapping[str, Any], where: str) -> Any:
    """Return the source of an image part of the message `where`.

    {"type": "image", "image": source}, or {"type": "image_url", "image_url": {"url":
    source}} as in OpenAI's API. Raises SettingsError.
    """
    if part.get("type") == "image":
        source = part.get("image")
        given = source is not None and source != ""
        shape = 'an image part must be {"type", "image": its source}'
    else:
        value = part.get("image_url")
        source = value.get("url") if isinstance(value, Mapping) else None
        given = isinstance(source, str) and source != ""
        shape = 'an image_url part must be {"type", "image_url": {"url": text}}'
    require(given, f"{where}: {shape}")
    return source


def image_sources(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the sources of all images in the order of the prompt."""
    return [
        image_source(part, f"message {index}")
        for index, message in enumerate(messages)
        if isinstance(parts := message.get("content"), list | tuple)
        for part in parts
        if is_image(part)
    ]


def take_images(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the sources of all images, and leave {"type": "image"} to the template."""
    sources = image_sources(messages)
    for message in messages:
        if isinstance(parts := message.get("content"), list | tuple):
            images = [{"type": "image"} if is_image(part) else part for part in parts]
            message["content"] = images
    return sources


def insert_image_tokens(
    ids: Sequence[int], image_token: int, begin: int, end: int, counts: Sequence[int]
) -> list[int]:
    """Return the prompt with room for its images.

    ids     with one `image_token` for each image
    counts  soft tokens of each image, which go between `begin` and `end`

    Raises SettingsError when there are more or fewer image tokens than images:
    a text that spells the token cannot make room for an image of its own.
    """
    found = sum(token == image_token for token in ids)
    require(
        found == len(counts),
        f"the prompt holds {found} image tokens and {len(counts)} pictures; each "
        "picture needs one, and no text may spell one",
    )
    result: list[int] = []
    remaining = iter(counts)
    for token in ids:
        if token == image_token:
            result += [begin, *[image_token] * next(remaining), end]
        else:
            result.append(token)
    return result


def _check_variables(variables: Any) -> dict[str, Any]:
    variables = {} if variables is None else variables
    wrong = f"chat_template_kwargs is {type(variables).__name__}; it must be an object"
    require(isinstance(variables, Mapping), wrong)
    for name in variables:
        if not isinstance(name, str):
            raise SettingsError(f"chat_template_kwargs: {name!r:.60} is not a name")
        fix = "; use thinking" if name == "enable_thinking" else ""
        wrong = f"chat_template_kwargs cannot set {name}{fix}"
        require(name not in RESERVED, wrong)
    return dict(variables)


def _why_no_template(tokenizer: "Tokenizer", prompt: Any) -> str | None:
    """Why a prompt is not rendered by the chat template; None if it is."""
    if isinstance(prompt, str):
        if tokenizer.chat_template is None:
            return "the tokenizer has no chat template"
        require(bool(prompt.strip()), "prompt is empty; give some text")
        rendered = is_rendered(tokenizer, prompt)
        return "the prompt is rendered already" if rendered else None
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise SettingsError(
            f"prompt is {type(prompt).__name__}; it must be text, a list of token "
            "ids or a list of messages"
        )
    require(len(prompt) > 0, "prompt is empty; give text, token ids or messages")
    messages = isinstance(prompt[0], Mapping | str)
    return None if messages else "the prompt is token ids"


def _encode_plain(tokenizer: "Tokenizer", prompt: str | Sequence[Any]) -> list[int]:
    """Return the ids of a text behind BOS, or checked ids."""
    if not isinstance(prompt, str):
        for index, value in enumerate(prompt):
            is_id = isinstance(value, Integral) and not isinstance(value, bool)
            if not is_id or int(value) < 0:
                what = f"prompt[{index}] is {value!r}"
                raise SettingsError(
                    f"{what}; a list prompt holds token ids or messages"
                )
        return [int(value) for value in prompt]
    ids = tokenizer.encode(prompt)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    require(bool(ids), "prompt is empty; give it some text")
    return ids


def _check_message(message: Any, where: str) -> dict[str, Any]:
    """Return a copy of a message of a known role whose content can be rendered."""
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise SettingsError(f'{where}: is {kind}; it must be {{"role", "content"}}')
    role, content = message.get("role"), message.get("content")
    role = ALIASES.get(role, role) if isinstance(role, str) else role
    wrong = f"{where}: role is {role!r:.60}; it must be one of {', '.join(ROLES)}"
    require(role in ROLES, wrong)
    if content is None and message.get("tool_calls"):
        content = ""  # calls of tools need no words
    wrong = f"content is {type(content).__name__}; it must be text or a list of parts"
    require(isinstance(content, str | list | tuple), f"{where}: {wrong}")
    for part in content if isinstance(content, list | tuple) else []:
        if is_image(part):
            image_source(part, where)
            continue
        part = part if isinstance(part, Mapping) else {}
        kind = part.get("type")
        other = (
            f"holds a part of type {kind!r}; this version reads text and images only"
        )
        require(not isinstance(kind, str) or kind == "text", f"{where}: {other}")
        shape = 'a content part must be {"type": "text", "text": ...}'
        require(isinstance(part.get("text"), str), f"{where}: {shape}")
    return {**message, "role": role}
