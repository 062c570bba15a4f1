"""Text in, text out: the engine with one canvas, and the words around it."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ..model.language import DiffusionGemma
from ..settings import Settings, check_int
from ..text.chat import Prompt
from ..text.replies import ReplyParser
from ..text.tokenizer import Tokenizer
from .engine import PREFILL_STEP, Engine, check_ids
from .events import Commit, Event
from .prompt import EncodedPrompt, encode_prompt
from .stop import StopFilter, stops


class Changes(TypedDict, total=False):
    """Sampler settings a call may change; see `diffusion.settings.Settings`."""

    max_tokens: int | None
    canvas_length: int | None
    steps: int | None
    entropy_bound: float | None
    t_max: float | None
    t_min: float | None
    stability: int | None
    confidence: float | None
    eos: frozenset[int] | None
    pinned: Mapping[int, int] | None
    sampler: str | None
    min_probability: float | None
    min_tokens: int | None


def stream_generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    images: Sequence[Any] = (),
    videos: Sequence[str | Path] = (),
    system: str | None = None,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    prefill_step_size: int = PREFILL_STEP,
    **changes: Unpack[Changes],
) -> Iterator[Event]:
    """Denoise the answer to `prompt`, yielding Prefilled, Step and Commit events.

    prompt              text, token ids, or a list of chat messages, whose content may
                        have parts {"type": "image", "image": source}
    images, videos      in front of a text prompt: pictures as paths, bytes of files,
                        data: URLs or Pillow's images; videos as paths, of which the
                        model sees a frame a second (extra "video")
    system, thinking    a system turn; whether the model thinks first
    tools               what the model may call, as OpenAI's JSON
    stop                a string, or several, that end the text and are left out
    seed                same seed, same machine, same text; chosen when None and
                        reported by the Prefilled event
    prefill_step_size   prompt tokens encoded at a time
    changes             sampler settings; what is not given, the checkpoint says

    A Commit's `text` is what it adds to the answer, its `parts` are that with thoughts
    and calls of tools apart. Closing the iterator ends the request. Raises, at once,
    SettingsError for an unknown or impossible setting, MediaError for a picture.
    """
    settings = model.settings.replace(**changes)
    several = stops(stop)
    check_int("prefill_step_size", prefill_step_size, 1)
    if seed is None:
        seed = secrets.randbelow(2**32)
    check_int("seed", seed, 0)
    ready = encode_prompt(
        model,
        tokenizer,
        prompt,
        images=images,
        videos=videos,
        system=system,
        thinking=thinking,
        tools=tools,
    )
    check_ids(ready.ids, settings, model.config.vocab_size)
    writer = StopFilter(ReplyParser(tokenizer, ready.ids), several)
    return _stream(Engine(model), writer, ready, settings, seed, prefill_step_size)


def _stream(
    engine: Engine,
    writer: StopFilter,
    ready: EncodedPrompt,
    settings: Settings,
    seed: int,
    prefill_step_size: int,
) -> Iterator[Event]:
    given = ready.ids, settings, seed, prefill_step_size
    yield engine.admit(*given, image_spans=ready.image_spans)
    for event in engine.run():
        if not isinstance(event, Commit):
            yield event
            continue
        commit = writer.write(event)
        yield commit
        if commit.finish_reason is not None:
            return


def generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    images: Sequence[Any] = (),
    videos: Sequence[str | Path] = (),
    system: str | None = None,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    prefill_step_size: int = PREFILL_STEP,
    **changes: Unpack[Changes],
) -> str:
    """The answer to `prompt`; arguments as of `stream_generate`."""
    events = stream_generate(
        model,
        tokenizer,
        prompt,
        images=images,
        videos=videos,
        system=system,
        thinking=thinking,
        tools=tools,
        stop=stop,
        seed=seed,
        prefill_step_size=prefill_step_size,
        **changes,
    )
    return "".join(event.text for event in events if isinstance(event, Commit))
