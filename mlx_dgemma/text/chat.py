"""Prompts of every shape to token ids, and the images among them.

Knows nothing of pixels: the source of an image is handed on as the caller gave it.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from .tools import check_tools, link_tool_results

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
TURN = "<|turn>"  # starts a turn in Gemma's template
# Template variables that have arguments of their own.
RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")
RESERVED += ("enable_thinking", "tokenize")


def chat_ids(
    tokenizer: "Tokenizer",
    prompt: Prompt,
    *,
    system: str | None = None,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
) -> list[int]:
    """Return the ids of a prompt without images; otherwise as `encode_chat`."""
    ids, sources = encode_chat(
        tokenizer,
        prompt,
        system=system,
        thinking=thinking,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
        continue_final_message=continue_final_message,
    )
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
) -> tuple[list[int], list[Any]]:
    """Return the ids of a prompt, and the sources of its images in order.

    prompt      text, token ids or messages. Text is one user message; where it is
                rendered already (see `is_rendered`), and where the tokenizer has no
                chat template, it is encoded as it is, behind BOS. Token ids are used
                as they are. Messages are {"role", "content"}; content is text or a
                list of parts: {"type": "text", "text": …} and images, see
                `image_source`. An image is one image token of the template, for
                `insert_image_tokens` to make room.
    system      a system message in front of a text or of messages without one
    thinking    whether the template asks the model to think first
    tools       what the model may call, as OpenAI's JSON; see `text.tools`
    chat_template_kwargs    further variables of the chat template
    continue_final_message  have the model continue the last message, which is the
                            assistant's, instead of answering it

    Raises SettingsError naming the argument, the message or the tool, TokenizerError
    when the chat template refuses the messages or is missing.
    """
    if system is not None and not isinstance(system, str):
        raise SettingsError(f"system must be text, not {type(system).__name__}")
    functions = [] if tools is None else check_tools(tools)
    variables = _check_variables(chat_template_kwargs)
    unused = _why_no_template(tokenizer, prompt)
    if unused is not None:
        given = {"system": system is not None, "thinking": thinking, "tools": functions}
        given["chat_template_kwargs"] = variables
        given["continue_final_message"] = continue_final_message
        for name in given:
            if given[name]:
                raise SettingsError(f"{name} cannot be used: {unused}")
        if isinstance(prompt, str):
            return _with_bos(tokenizer, tokenizer.encode(prompt)), []
        return [_check_id(value, i) for i, value in enumerate(prompt)], []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = link_tool_results(_check_message(m, i) for i, m in enumerate(prompt))
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise SettingsError(
            "continue_final_message needs messages that end with the assistant's"
        )
    if system is not None:
        roles = [message["role"] for message in messages]
        if "system" in roles:
            raise SettingsError(
                f"system is given and message {roles.index('system')} is a system "
                "message; leave one out"
            )
        messages.insert(0, {"role": "system", "content": system})
    ids = tokenizer.apply_chat_template(
        [_without_sources(message) for message in messages],
        tools=functions or None,
        add_generation_prompt=not continue_final_message,
        continue_final_message=continue_final_message,
        enable_thinking=thinking,
        **variables,
    )
    assert isinstance(ids, list)
    return ids, image_sources(messages)


def is_rendered(tokenizer: "Tokenizer", prompt: str) -> bool:
    """Whether a chat template wrote this text: it begins with BOS or a turn."""
    starts = (tokenizer.bos_token, TURN)
    return prompt.startswith(
        tuple(s for s in starts if s and tokenizer.token_id(s) is not None)
    )


def is_image(part: Any) -> bool:
    """Whether a content part is an image in one of the spellings."""
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def image_source(part: Mapping[str, Any]) -> Any:
    """Return the source of an image part.

    {"type": "image", "image": source}, or {"type": "image_url", "image_url": {"url":
    source}} as in OpenAI's API. Raises SettingsError, a reason without a place.
    """
    if part.get("type") == "image":
        source = part.get("image")
        if source is None or source == "":
            raise SettingsError('an image part must be {"type", "image": its source}')
        return source
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, Mapping) else None
    if not isinstance(url, str) or not url:
        raise SettingsError(
            'an image_url part must be {"type", "image_url": {"url": text}}'
        )
    return url


def image_sources(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the sources of all images in the order of the prompt."""
    return [
        image_source(part)
        for message in messages
        if isinstance(parts := message.get("content"), list | tuple)
        for part in parts
        if is_image(part)
    ]


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
    if found != len(counts):
        raise SettingsError(
            f"the prompt holds {found} image tokens and {len(counts)} pictures; each "
            "picture needs one, and no text may spell one"
        )
    result: list[int] = []
    left = iter(counts)
    for token in ids:
        if token == image_token:
            result += [begin, *[image_token] * next(left), end]
        else:
            result.append(token)
    return result


def _check_variables(variables: Any) -> dict[str, Any]:
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        kind = type(variables).__name__
        raise SettingsError(f"chat_template_kwargs is {kind}; it must be an object")
    for name in variables:
        if not isinstance(name, str):
            raise SettingsError(f"chat_template_kwargs: {name!r:.60} is not a name")
        if name in RESERVED:
            own = "; use thinking" if name == "enable_thinking" else ""
            raise SettingsError(f"chat_template_kwargs cannot set {name}{own}")
    return dict(variables)


def _why_no_template(tokenizer: "Tokenizer", prompt: Any) -> str | None:
    """Why a prompt is not rendered by the chat template; None if it is."""
    if isinstance(prompt, str):
        if tokenizer.chat_template is None:
            return "the tokenizer has no chat template"
        return (
            "the prompt is rendered already" if is_rendered(tokenizer, prompt) else None
        )
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise SettingsError(
            f"prompt is {type(prompt).__name__}; it must be text, a list of token "
            "ids or a list of messages"
        )
    if not len(prompt):
        raise SettingsError("prompt is empty; give text, token ids or messages")
    messages = isinstance(prompt[0], Mapping | str)
    return None if messages else "the prompt is token ids"


def _with_bos(tokenizer: "Tokenizer", ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if not ids:
        raise SettingsError("prompt is empty; give it some text")
    return ids


def _check_id(value: Any, index: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise SettingsError(
            f"prompt[{index}] is {value!r}; a list prompt holds token ids or messages"
        )
    return int(value)


def _check_message(message: Any, index: int) -> dict[str, Any]:
    """A message whose shape is known, its content left as it is."""
    where = f"message {index}"
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise SettingsError(f'{where}: is {kind}; it must be {{"role", "content"}}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise SettingsError(
            f"{where}: role is {role!r}; it must be one of {', '.join(ROLES)}"
        )
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return dict(message)  # a call of tools needs no words
    if not isinstance(content, list | tuple):
        kind = type(content).__name__
        raise SettingsError(
            f"{where}: content is {kind}; it must be text or a list of parts"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if is_image(part):
            try:
                image_source(part)
            except SettingsError as error:
                raise SettingsError(f"{where}: {error}") from None
        elif isinstance(kind, str) and kind != "text":
            raise SettingsError(
                f"{where}: holds a part of type {kind!r}; this version reads text and "
                "images only"
            )
        elif not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise SettingsError(
                f'{where}: a content part must be {{"type": "text", "text": ...}}'
            )
    return dict(message)


def _without_sources(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as templates see it: an image is {"type": "image"} and no more."""
    parts = message.get("content")
    if not isinstance(parts, list | tuple):
        return dict(message)
    parts = [{"type": "image"} if is_image(part) else part for part in parts]
    return {**message, "content": parts}
