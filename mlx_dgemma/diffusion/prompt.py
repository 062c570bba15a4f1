"""A prompt ready to be encoded: ids, and the pictures that stand among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

import mlx.core as mx
import numpy as np

from ..errors import SettingsError
from ..model.language import DiffusionGemma
from ..text.chat import Prompt, encode_chat, insert_image_tokens, is_rendered
from ..text.tokenizer import Tokenizer
from .prefix import ImageSpan

if TYPE_CHECKING:
    from ..media.images import Picture, Source

ImageSource: TypeAlias = "Source | Picture"


class ChatOptions(TypedDict, total=False):
    """How the chat template renders a prompt; see `stream_generate`."""

    system: str | None
    thinking: bool
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids, one for each soft token of a picture too, and where pictures are."""

    ids: list[int]
    image_spans: tuple[ImageSpan, ...] = ()


def encode_prompt(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt | mx.array | np.ndarray,
    *,
    images: Sequence[ImageSource] = (),
    videos: Sequence[str | Path] = (),
    **options: Unpack[ChatOptions],
) -> EncodedPrompt:
    """Return a prompt as the engine takes it; arguments as of `stream_generate`.

    Raises SettingsError for what cannot be a prompt, MediaError for a picture that
    cannot be read.
    """
    chat: Any = prompt
    if isinstance(prompt, mx.array | np.ndarray):
        chat = prompt.tolist()
    elif images or videos:
        # a text comes behind its pictures, as the model was trained
        if not isinstance(prompt, str) or is_rendered(tokenizer, prompt):
            raise SettingsError(
                "images and videos go with a text prompt that is not rendered yet; "
                "put them into the messages otherwise"
            )
        parts: list[dict[str, Any]] = [{"type": "image", "image": i} for i in images]
        for video in videos:
            parts += frame_parts(video)
        parts.append({"type": "text", "text": prompt})
        chat = [{"role": "user", "content": parts}]
    ids, sources = encode_chat(tokenizer, chat, **options)
    pictures = read_images(model, sources) if sources else []
    if model.vision is None:
        return EncodedPrompt(ids)
    tokens = model.vision.tokens
    counts = [picture.soft_tokens for picture in pictures]
    ids = insert_image_tokens(ids, tokens.image, tokens.begin, tokens.end, counts)
    image_spans, start = list[ImageSpan](), 0
    for picture in pictures:
        image_spans.append(ImageSpan(ids.index(tokens.image, start), picture))
        start = image_spans[-1].end
    return EncodedPrompt(ids, tuple(image_spans))


def frame_parts(video: str | Path) -> list[dict[str, Any]]:
    """Return a video as parts of a message: each frame behind its minute and second.

    As transformers' processor writes it. Raises MediaError.
    """
    from ..media.videos import read_frames  # PyAV is an extra

    parts: list[dict[str, Any]] = []
    for seconds, picture in read_frames(video):
        minute, second = divmod(int(seconds), 60)
        clock = f"{' ' * bool(parts)}{minute:02}:{second:02} "
        parts.append({"type": "text", "text": clock})
        parts.append({"type": "image", "image": picture})
    return parts


def read_images(
    model: DiffusionGemma, sources: Sequence[ImageSource]
) -> "list[Picture]":
    """Return the pictures of these sources; a source may be one already.

    Raises SettingsError for a model without vision, MediaError for a source that
    cannot be read, one line that counts pictures from 1.
    """
    from ..media.images import ImageBudget, Picture, read_pictures  # imports pillow

    if model.vision is None:
        raise SettingsError(
            "the prompt holds pictures, and this checkpoint reads text only; convert "
            "one with its vision tower"
        )
    unread = [source for source in sources if not isinstance(source, Picture)]
    budget = ImageBudget.from_checkpoint(model.vision.folder)
    read = iter(read_pictures(unread, budget) if unread else [])
    return [s if isinstance(s, Picture) else next(read) for s in sources]
