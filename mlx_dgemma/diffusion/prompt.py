"""A prompt ready to be encoded: ids, and the pictures that stand among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from ..model.language import DiffusionGemma
from ..text.chat import Prompt, encode_chat, insert_image_tokens
from ..text.tokenizer import Tokenizer
from .image_spans import ImageSpan

if TYPE_CHECKING:
    from ..media.images import Picture


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids, one for each soft token of a picture too, and where pictures are."""

    ids: list[int]
    image_spans: tuple[ImageSpan, ...] = ()


def encode_prompt(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    images: Sequence[Any] = (),
    videos: Sequence[str | Path] = (),
    system: str | None = None,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> EncodedPrompt:
    """A prompt as the engine takes it; arguments as of `stream_generate`.

    Raises SettingsError for what cannot be a prompt, MediaError for a picture that
    cannot be read.
    """
    if images or videos:
        prompt = _illustrated(prompt, images, videos)
    ids, sources = encode_chat(
        tokenizer, prompt, system=system, thinking=thinking, tools=tools
    )
    if model.vision is None:
        if not sources:
            return EncodedPrompt(ids)
        raise SettingsError(
            "the prompt holds pictures, and this checkpoint reads text only; convert "
            "one with its vision tower"
        )
    tokens, pictures = model.vision.tokens, list["Picture"]()
    if sources:
        pictures = look_up(model, sources)
    counts = [picture.soft_tokens for picture in pictures]
    ids = insert_image_tokens(ids, tokens.image, tokens.begin, tokens.end, counts)
    image_spans, start = [], 0
    for picture in pictures:
        start = ids.index(tokens.image, start)
        image_spans.append(ImageSpan(start, picture))
        start = image_spans[-1].end
    return EncodedPrompt(ids, tuple(image_spans))


def _illustrated(
    prompt: Prompt, images: Sequence[Any], videos: Sequence[str | Path]
) -> Prompt:
    """A text behind its pictures, which is how the model was taught."""
    if not isinstance(prompt, str):
        raise SettingsError(
            "images go with a text prompt; put them into the messages otherwise"
        )
    parts: list[dict[str, Any]] = [{"type": "image", "image": one} for one in images]
    for video in videos:
        parts += frame_parts(video)
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def frame_parts(video: str | Path) -> list[dict[str, Any]]:
    """A video as parts of a message: each frame behind its minute and second.

    As transformers' processor writes it. Raises MediaError.
    """
    from ..media.videos import read_frames  # PyAV, where needed

    parts: list[dict[str, Any]] = []
    for seconds, picture in read_frames(video):
        minute, second = divmod(int(seconds), 60)
        clock = f"{' ' * bool(parts)}{minute:02}:{second:02} "
        parts.append({"type": "text", "text": clock})
        parts.append({"type": "image", "image": picture})
    return parts


def look_up(model: DiffusionGemma, sources: Sequence[Any]) -> "list[Picture]":
    """The pictures of these sources; a source may be one already.

    Raises MediaError, one line that counts pictures from 1.
    """
    from ..media.images import (
        ImageBudget,
        Picture,
        read_pictures,
    )  # pillow, where needed

    assert model.vision is not None
    unread = [source for source in sources if not isinstance(source, Picture)]
    if unread:
        unread = read_pictures(unread, ImageBudget.from_checkpoint(model.vision.folder))
    read = iter(unread)
    return [s if isinstance(s, Picture) else next(read) for s in sources]
