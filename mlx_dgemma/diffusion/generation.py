"""Text in, text out: one request on an engine of its own."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import mlx.core as mx
import numpy as np

from ..model.language import DiffusionGemma
from ..settings import Settings, SettingsOverrides
from ..text.chat import Prompt
from ..text.tokenizer import Tokenizer
from .engine import PREFILL_STEP, Engine, PromptProgress
from .events import Event
from .prompt import ChatOptions, ImageSource, encode_prompt
from .report import Report
from .request import Request


class GenerateOptions(ChatOptions, SettingsOverrides, total=False):
    """Keywords of `stream_generate`, for functions that pass them on."""

    images: Sequence[ImageSource]
    videos: Sequence[str | Path]
    stop: str | Sequence[str]
    seed: int | None
    prefill_step_size: int
    prompt_progress_callback: PromptProgress | None
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
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    prefill_step_size: int = PREFILL_STEP,
    prompt_progress_callback: PromptProgress | None = None,
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
    chat_template_kwargs   other variables of the chat template
    continue_final_message   go on with the last message, the assistant's
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
    encoded = encode_prompt(
        model,
        tokenizer,
        prompt,
        images=images,
        videos=videos,
        system=system,
        thinking=thinking,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
        continue_final_message=continue_final_message,
    )
    request = Request(
        model,
        tokenizer,
        encoded,
        (settings or model.settings).replace(**overrides),
        stop=stop,
        seed=seed,
        prefill_step_size=prefill_step_size,
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
    print("\n" + "=" * 10)
    print(report.summary())
    return text
