"""Pictures among messages: where they come from, and the tokens they take.

Knows nothing of pixels: a source is handed on as the caller gave it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SettingsError

KINDS = ("image", "image_url")


def is_picture(part: Any) -> bool:
    """Whether a content part is a picture in one of the spellings."""
    return isinstance(part, Mapping) and part.get("type") in KINDS


def source_of(part: Mapping[str, Any]) -> Any:
    """The source of a picture: {"type": "image", "image": source} in this package's
    words, {"type": "image_url", "image_url": {"url": source}} in OpenAI's.

    Raises SettingsError, a reason without a place.
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


def picture_sources(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Sources of all pictures, in the order in which they stand in the prompt."""
    return [
        source_of(part)
        for message in messages
        if isinstance(parts := message.get("content"), list | tuple)
        for part in parts
        if is_picture(part)
    ]


def without_sources(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as templates see it: a picture is {"type": "image"} and no more."""
    parts = message.get("content")
    if not isinstance(parts, list | tuple):
        return dict(message)
    shown = [{"type": "image"} if is_picture(part) else part for part in parts]
    return {**message, "content": shown}


def expand(
    ids: Sequence[int], image_token: int, begin: int, end: int, counts: Sequence[int]
) -> list[int]:
    """The prompt with room for its pictures.

    ids         with one `image_token` for each picture
    counts      tokens each picture takes, between `begin` and `end`

    Raises SettingsError when there are more or fewer image tokens than pictures:
    a text that spells the token cannot make room for a picture of its own.
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
