"""Text and pictures in, text out: from a prompt to ids, a request, and its text."""

import secrets
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

import mlx.core as mx
import numpy as np

from ..errors import SettingsError
from ..model.language import DiffusionGemma
from ..settings import MAX_SEED, Settings, SettingsOverrides, check_int
from ..text.chat import Prompt, encode_chat, insert_image_tokens, is_rendered
from ..text.replies import Answer, Malformed, Part, ReplyParser, merged
from ..text.tokenizer import Tokenizer
from .engine import PREFILL_STEP, Engine, PromptProgress, check_request
from .events import Commit, Event
from .prefix import ImageSpan, Prefix
from .report import Report

if TYPE_CHECKING:
    from ..media.images import Picture, Source

ImageSource: TypeAlias = "Source | Picture"


class GenerateOptions(SettingsOverrides, total=False):
    """Keywords of `stream_generate`, for functions that pass them on."""

    images: Sequence[ImageSource]
    videos: Sequence[str | Path]
    system: str | None
    thinking: bool
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool
    allow_special: bool
    stop: str | Sequence[str]
    seed: int | None
    prefill_step_size: int
    prompt_progress_callback: PromptProgress
    settings: Settings | None


def stream_generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt | mx.array | np.ndarray,
    *,
    images: Sequence[ImageSource] = (),
    videos: Sequence[str | Path] = (),
    system: str | None = None,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    allow_special: bool = False,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    prefill_step_size: int = PREFILL_STEP,
    prompt_progress_callback: PromptProgress = lambda done, total: None,
    settings: Settings | None = None,
    **overrides: Unpack[SettingsOverrides],
) -> Iterator[Event]:
    """Denoise the answer to `prompt`, yielding Prefilled, Step and Commit events.

    prompt              text, which the chat template renders unless it is rendered
                        already; token ids; or a list of chat messages
    images, videos      in front of a text prompt: paths, bytes, data: URLs or Pillow's
                        images; paths of videos, seen a frame a second (extra "video")
    system, thinking    a system turn; whether the model thinks first
    tools               functions the model may call, as OpenAI's JSON
    chat_template_kwargs     other variables of the chat template
    continue_final_message   go on with the last message, the assistant's
    allow_special       let a text of a message spell special tokens
    stop                a string, or several, that end the text and are left out
    seed                same seed, same machine, same text; chosen when None
    prefill_step_size   prompt tokens encoded at a time
    prompt_progress_callback   called after each with the tokens done, and all
    settings            in place of the checkpoint's, `model.settings`
    overrides           single settings, which win over both; see `Settings`

    Every event has `text`, the final text it adds; a Commit's `parts` hold thoughts and
    calls too. Closing the iterator ends the request. Raises, at once, SettingsError for
    an unknown or impossible setting, MediaError for a picture.
    """
    request = Request(
        model,
        tokenizer,
        prompt,
        (settings or model.settings).replace(**overrides),
        stop=stop,
        seed=seed,
        prefill_step_size=prefill_step_size,
        images=images,
        videos=videos,
        system=system,
        thinking=thinking,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
        continue_final_message=continue_final_message,
        allow_special=allow_special,
    )
    return request.run(Engine(model), None, prompt_progress_callback)


def generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt | mx.array | np.ndarray,
    verbose: bool = False,
    **options: Unpack[GenerateOptions],
) -> str:
    """Return the answer to `prompt`.

    verbose    print the text while it is committed, then counts and speeds
    options    keywords of `stream_generate`, which also says what is raised
    """
    events = stream_generate(model, tokenizer, prompt, **options)
    if not verbose:
        return "".join(event.text for event in events)
    report, text = Report(), ""
    print("=" * 10)
    for event in events:
        report.add(event)
        text += event.text
        print(event.text, end="", flush=True)
    print(f"\n{'=' * 10}\n{report.summary()}")
    return text


class Request:
    """A prompt to answer, encoded and checked before it runs.

    options   as of `encode_prompt`; the others, and what is raised, `stream_generate`
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: Tokenizer,
        prompt: Prompt | mx.array | np.ndarray,
        settings: Settings,
        *,
        stop: str | Sequence[str],
        seed: int | None,
        prefill_step_size: int,
        **options: Any,
    ):
        ids, self._image_spans = encode_prompt(model, tokenizer, prompt, **options)
        check_int("prefill_step_size", prefill_step_size, 1)
        seed = secrets.randbelow(2**32) if seed is None else seed
        check_int("seed", seed, 0, MAX_SEED)
        check_request(ids, settings, model.config)
        self._arguments = ids, settings, seed, prefill_step_size  # of `admit`
        self.filter = StopFilter(ReplyParser(tokenizer, ids), stop)

    def run(
        self, engine: Engine, prefix: Prefix | None, callback: PromptProgress
    ) -> Generator[Event]:
        """Yield the events of the request; closing the generator cancels it."""
        prefilled = engine.admit(
            *self._arguments,
            prefix=prefix,
            image_spans=self._image_spans,
            prompt_progress_callback=callback,
        )
        try:
            yield prefilled
            for event in engine.run():
                if isinstance(event, Commit):
                    event = self.filter.write(event)
                yield event
                if isinstance(event, Commit) and event.finish_reason is not None:
                    return
        finally:
            engine.cancel(prefilled.request)


class StopFilter:
    """Adds text and parts to commits, and ends the reply at the first stop string.

    Text is the answer alone: thoughts and calls are not searched for stop strings. What
    may be the beginning of a stop string is held back until the next commit decides.
    """

    def __init__(self, parser: ReplyParser, stop: str | Sequence[str]):
        self._stop = (stop,) if isinstance(stop, str) else stop
        listed = isinstance(self._stop, Sequence)
        if not listed or not all(isinstance(s, str) and s for s in self._stop):
            wrong = f"stop is {stop!r}; it must be strings that are not empty"
            raise SettingsError(wrong)
        self._parser, self._held = parser, list[Part]()

    def write(self, commit: Commit) -> Commit:
        """Return the commit with its text, cut and finished at a stop string."""
        parts, starts = self._held, []  # where the text of each token starts
        length = len(_text(parts))
        for token in commit.tokens:
            starts.append(length)
            new = self._parser.add([token])
            length += len(_text(new))
            parts += new
        if commit.finish_reason is not None:
            parts += self._parser.finish()
        text = _text(parts)
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        end = min(found, default=len(text))
        if found:
            tokens = commit.tokens[: sum(start < end for start in starts)]
            commit = replace(commit, tokens=tokens, finish_reason="stop")
        elif commit.finish_reason is None:
            end -= max((_overlap(text, s) for s in self._stop), default=0)
        ready, held = _split(parts, end)
        self._held = [] if found else held
        parts, pending = tuple(merged(ready)), _text(self._held)
        return replace(commit, text=_text(parts), parts=parts, pending_text=pending)

    def rest(self) -> list[Part]:
        """Return what is held back when no other commit will follow."""
        held, self._held = [*self._held, *self._parser.finish()], []
        return merged(held)


def _text(parts: Iterable[Part]) -> str:
    """Return what parts add to the answer."""
    return "".join(p.text for p in parts if isinstance(p, Answer | Malformed))


def _split(parts: Sequence[Part], length: int) -> tuple[list[Part], list[Part]]:
    """Return the parts up to so many characters of the answer, and those behind."""
    for index, part in enumerate(parts):
        size = len(_text([part]))
        if isinstance(part, Answer | Malformed) and size > length:
            head = replace(part, text=part.text[:length])
            tail = replace(part, text=part.text[length:])
            return [*parts[:index], head], [tail, *parts[index + 1 :]]
        length -= size
    return list(parts), []


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop` that `text` ends with."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def encode_prompt(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt | mx.array | np.ndarray,
    *,
    images: Sequence[ImageSource] = (),
    videos: Sequence[str | Path] = (),
    **options: Any,
) -> tuple[list[int], list[ImageSpan]]:
    """Return the ids of a prompt, and where its pictures stand among them.

    options   as of `encode_chat`; all others as of `stream_generate`
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
        parts += [part for video in videos for part in frame_parts(model, video)]
        parts.append({"type": "text", "text": prompt})
        chat = [{"role": "user", "content": parts}]
    ids, sources = encode_chat(tokenizer, chat, **options)
    pictures = read_images(model, sources) if sources else []
    image_spans, start = list[ImageSpan](), 0
    if model.vision is not None:
        tokens = model.vision.tokens
        counts = [picture.soft_tokens for picture in pictures]
        ids = insert_image_tokens(ids, tokens.image, tokens.begin, tokens.end, counts)
        for picture in pictures:
            image_spans.append(ImageSpan(ids.index(tokens.image, start), picture))
            start = image_spans[-1].end
    return ids, image_spans


def frame_parts(model: DiffusionGemma, video: str | Path) -> list[dict[str, Any]]:
    """Return a video as parts of a message, as transformers' processor writes it.

    Each frame stands behind its minute and second, and is cut as the checkpoint's
    pictures are. Raises MediaError.
    """
    from ..media.videos import FRAME, read_frames  # PyAV is an extra

    budget, parts = FRAME, list[dict[str, Any]]()
    if model.vision is not None:
        pictures = FRAME.from_checkpoint(model.vision.folder)
        budget = replace(pictures, soft_tokens=FRAME.soft_tokens)
    for seconds, picture in read_frames(video, budget):
        minute, second = divmod(int(seconds), 60)
        clock = f"{' ' * bool(parts)}{minute:02}:{second:02} "
        parts += [{"type": "text", "text": clock}, {"type": "image", "image": picture}]
    return parts


def read_images(
    model: DiffusionGemma, sources: Sequence[ImageSource]
) -> "list[Picture]":
    """Return the pictures of these sources; a source may be one already.

    Raises SettingsError for a model without vision, MediaError naming the picture.
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
