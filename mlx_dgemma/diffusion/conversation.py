"""Turns of talk: the whole history is the prompt, only what is new is encoded."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from ..errors import SettingsError
from ..model.language import DiffusionGemma
from ..settings import check_int
from ..text.chat import image_sources, is_image
from ..text.replies import Part, ReplyParser, merged, reply_message
from ..text.tokenizer import Tokenizer
from .engine import PREFILL_STEP, Engine, check_ids
from .events import Commit, Event, Prefilled
from .generation import Changes
from .prefix import Prefix
from .prompt import EncodedPrompt, encode_prompt, look_up
from .prompt_cache import load_prefix, save_prefix
from .stop import StopFilter, stops

Message = dict[str, Any]
Content = str | Sequence[Mapping[str, Any]]  # text, or parts of text and pictures


class Conversation:
    """A conversation with a model, and what of it the model has encoded.

    system, thinking    a system turn; whether the model thinks before it answers
    tools               what the model may call, as OpenAI's JSON
    prefill_step_size   prompt tokens encoded at a time
    changes             sampler settings; what is not given, the checkpoint says

    A turn's text is that of `stream_generate` with the same messages and seed: reuse
    only saves time. Without a chat template the prompt is the messages' text in a row.
    Raises SettingsError for an unknown or impossible setting.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prefill_step_size: int = PREFILL_STEP,
        **changes: Unpack[Changes],
    ):
        check_int("prefill_step_size", prefill_step_size, 1)
        self.tokenizer, self.system, self.thinking = tokenizer, system, thinking
        self.tools = tools
        self.settings = model.settings.replace(**changes)
        self.prefix = Prefix(model)
        self.stats: Prefilled | None = None  # how the last turn's prompt was encoded
        self._chunk = prefill_step_size
        self._engine = Engine(model)
        self._messages: list[Message] = []  # replaced, never changed

    @property
    def messages(self) -> list[Message]:
        """A copy of all turns so far, {"role", "content"}; the system turn is apart.

        Pictures are there as `Picture`, whatever they came from.
        """
        return [_copy(message) for message in self._messages]

    def ask(
        self,
        content: Content | None = None,
        *,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Event]:
        """Say something and denoise the answer, yielding events as `stream_generate`.

        content     what to say; None to have the messages answered as they are, after
                    `edit` or `add`
        seed, stop  as of `stream_generate`

        The messages change when the first event is taken; the answer joins them when
        it is finished. Closing the iterator before that keeps what was committed, and
        if nothing was, it is as if nothing had been asked.

        Raises, at once, SettingsError for what cannot be asked, MediaError for a
        picture.
        """
        self._check_idle()
        before = messages = self._messages
        if content is not None:
            messages = [*before, self._kept(_said("user", content))]
        elif not before or before[-1]["role"] == "assistant":
            raise SettingsError("there is no question to answer; give one to ask()")
        several = stops(stop)
        if seed is None:
            seed = secrets.randbelow(2**32)
        check_int("seed", seed, 0)
        ready = self._ready(messages)
        check_ids(ready.ids, self.settings, self.prefix.model.config.vocab_size)
        writer = StopFilter(ReplyParser(self.tokenizer, ready.ids), several)
        return self._answer(before, messages, ready, seed, writer)

    def add(self, message: Mapping[str, Any]) -> None:
        """Put a message behind the others, such as what a tool returned.

        `ask()` has it answered.
        """
        self._check_idle()
        self._messages = [*self._messages, self._kept(message)]

    def edit(self, index: int, content: Content) -> None:
        """Put other words into a message; those after it are dropped.

        `ask()` has an edited question answered. Raises SettingsError for an index that
        no message has.
        """
        self._check_idle()
        if not 0 <= index < len(self._messages):
            raise SettingsError(
                f"message {index} is not there; there are {len(self._messages)}, from 0"
            )
        edited = self._kept(_said(self._messages[index]["role"], content))
        self._messages = [*self._messages[:index], edited]

    def rewind(self, turns: int = 1) -> None:
        """Take back the last questions and all that followed them.

        Raises SettingsError when there are fewer.
        """
        self._check_idle()
        asked = [i for i, m in enumerate(self._messages) if m["role"] == "user"]
        check_int("turns", turns, 0)
        if turns > len(asked):
            raise SettingsError(
                f"turns is {turns}; the conversation has {len(asked)} to take back"
            )
        if turns:
            self._messages = self._messages[: asked[-turns]]

    def reset(self) -> None:
        """Take everything back. What is encoded of the system turn still serves."""
        self._check_idle()
        self._messages = []

    def instruct(self, system: str | None) -> None:
        """Set the system turn of what is asked from now on; None for none."""
        self._check_idle()
        self.system = system

    def think(self, on: bool) -> None:
        """Whether the model thinks before it answers, from now on."""
        self._check_idle()
        self.thinking = on

    def save(self, path: str | Path) -> None:
        """Write what is encoded, not the messages, to a file; see `save_prefix`."""
        save_prefix(path, self.prefix)

    def load(self, path: str | Path) -> None:
        """Have what a file says was encoded; see `load_prefix`."""
        self._check_idle()
        self.prefix = load_prefix(path, self.prefix.model)

    def _check_idle(self) -> None:
        if self._engine.running:
            raise SettingsError("an answer is being written; close its iterator first")

    def _kept(self, message: Mapping[str, Any]) -> Message:
        """A copy whose pictures are read now: later they may be gone, or others."""
        kept, model = _copy(message), self.prefix.model
        sources = image_sources([kept])
        if not sources or model.vision is None:
            return kept  # where there are no eyes, the prompt is refused
        read = iter(look_up(model, sources))
        kept["content"] = [
            {"type": "image", "image": next(read)} if is_image(part) else part
            for part in kept["content"]
        ]
        return kept

    def _ready(self, messages: list[Message]) -> EncodedPrompt:
        prompt: Any = messages
        if self.tokenizer.chat_template is None:
            texts = [message["content"] or "" for message in messages]
            if not all(isinstance(text, str) for text in texts):
                raise SettingsError("without a chat template, content must be text")
            prompt = "".join(texts)
        return encode_prompt(
            self.prefix.model,
            self.tokenizer,
            prompt,
            system=self.system,
            thinking=self.thinking,
            tools=self.tools,
        )

    def _answer(
        self,
        before: list[Message],
        messages: list[Message],
        ready: EncodedPrompt,
        seed: int,
        writer: StopFilter,
    ) -> Iterator[Event]:
        self._check_idle()
        if self._messages is not before:
            raise SettingsError("the messages have changed since ask(); ask again")
        self._messages = messages
        given = ready.ids, self.settings, seed, self._chunk
        parts: list[Part] = []
        said, reason = False, None
        try:
            self.stats = self._engine.admit(
                *given, prefix=self.prefix, image_spans=ready.image_spans
            )
            yield self.stats
            for event in self._engine.run():
                if isinstance(event, Commit):
                    event = writer.write(event)
                    parts += event.parts
                    said, reason = True, event.finish_reason
                yield event
                if reason is not None:
                    return
        finally:
            for canvas in self._engine.running:
                self._engine.cancel(canvas.request)
            if said and reason is None:
                parts += writer.rest()
            if said:
                self._messages = [*messages, reply_message(merged(parts))]
            else:
                self._messages = before


def _said(role: str, content: Content) -> Message:
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list | tuple):
        kind = type(content).__name__
        raise SettingsError(f"content is {kind}; it must be text or a list of parts")
    return _copy({"role": role, "content": content})


def _copy(message: Mapping[str, Any]) -> Message:
    """The message, its parts copied too; what pictures are made of is shared."""
    copied = dict(message)
    if isinstance(parts := copied.get("content"), list | tuple):
        copied["content"] = [
            dict(part) if isinstance(part, Mapping) else part for part in parts
        ]
    return copied
