"""A conversation: the whole history is the prompt, only what is new is encoded."""

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias, Unpack

from ..errors import SettingsError
from ..model.language import DiffusionGemma
from ..settings import Settings, SettingsOverrides, check_int
from ..text.chat import WrittenText, image_sources, is_image
from ..text.replies import Part, merged, reply_message
from ..text.tokenizer import Tokenizer
from .engine import PREFILL_STEP, Engine, PromptProgress
from .events import Commit, Event, Prefilled
from .generation import ImageSource, Request, read_images
from .prefix import Prefix, load_prefix, save_prefix

BUSY = "an answer is being written; close its iterator first"
Message: TypeAlias = dict[str, Any]
Content: TypeAlias = str | Sequence[Mapping[str, Any]]  # text, or text and pictures


class Conversation:
    """A conversation with a model, and the prefix the model has encoded of it.

    Arguments as of `stream_generate`. `system`, a system turn, and `thinking` may be
    set at any time, for the next `ask`. `stats` is the Prefilled event of the last
    answer.

    The text of an answer is that of `stream_generate` with the same messages and seed:
    reuse only saves time. Without a chat template the prompt is the messages' text in a
    row. Raises SettingsError for an unknown or impossible setting.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special: bool = False,
        prefill_step_size: int = PREFILL_STEP,
        settings: Settings | None = None,
        **overrides: Unpack[SettingsOverrides],
    ):
        check_int("prefill_step_size", prefill_step_size, 1)
        self.tokenizer, self.tools = tokenizer, tools
        self.chat_template_kwargs = chat_template_kwargs
        self.allow_special = allow_special
        self.settings = (settings or model.settings).replace(**overrides)
        self.prefix = Prefix(model)
        self.stats: Prefilled | None = None
        self.system, self.thinking = system, thinking
        self._prefill_step_size = prefill_step_size
        self._engine = Engine(model)
        self._answering = Lock()
        self._messages: list[Message] = []  # replaced, never changed in place

    @property
    def messages(self) -> list[Message]:
        """A copy of all turns so far, {"role", "content"}, without the system turn.

        Pictures are `Picture` objects, whatever they were read from.
        """
        return [_copy(message) for message in self._messages]

    def transcript(self) -> list[Message]:
        """Return all turns, the system turn first, as plain JSON.

        A picture is the path it was read from; None if it did not come from a file.
        """
        turns = self.messages
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        for turn in turns:
            if isinstance(content := turn.get("content"), list):
                for part in filter(is_image, content):
                    part["image"] = part["image"].source
        return turns

    def ask(
        self,
        content: Content | None = None,
        *,
        images: Sequence[ImageSource] = (),
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        continue_final_message: bool = False,
        prompt_progress_callback: PromptProgress = lambda done, total: None,
    ) -> Generator[Event]:
        """Say something and denoise the answer, yielding events as `stream_generate`.

        content   what to say; None: answer the messages as `edit` or `add` left them

        The messages change when the first event is taken; the answer joins them when
        it is finished. Closing the iterator before that keeps what was committed; if
        nothing was, the messages are as before. Raises, at once, SettingsError for what
        cannot be asked, MediaError for a picture.
        """
        self._check_idle()
        before = messages = self._messages
        if images:
            if not isinstance(content, str):
                raise SettingsError("images go with a text; put them into its parts")
            pictures = [{"type": "image", "image": image} for image in images]
            content = [*pictures, {"type": "text", "text": content}]
        if content is not None:
            messages = [*before, self._new_message("user", content)]
        last = messages[-1]["role"] if messages else "assistant"
        if not messages or (last == "assistant" and not continue_final_message):
            raise SettingsError("there is no question to answer; give one to ask()")
        template = self.tokenizer.chat_template is not None
        request = Request(
            self.prefix.model,
            self.tokenizer,
            messages if template else _joined(messages),
            self.settings,
            stop=stop,
            seed=seed,
            prefill_step_size=self._prefill_step_size,
            system=self.system,
            thinking=self.thinking,
            tools=self.tools,
            chat_template_kwargs=self.chat_template_kwargs,
            allow_special=self.allow_special,
            continue_final_message=continue_final_message and template,
        )
        events = request.run(self._engine, self.prefix, prompt_progress_callback)
        return self._answer(before, messages, request, events, continue_final_message)

    def add(self, message: Mapping[str, Any]) -> None:
        """Append a message, such as the result of a tool; `ask()` has it answered."""
        self._check_idle()
        self._messages = [*self._messages, self._with_pictures(message)]

    def edit(self, index: int, content: Content) -> None:
        """Replace the content of a message, drop those after it; then `ask()`.

        Raises SettingsError for an index that no message has.
        """
        self._check_idle()
        count = len(self._messages)
        if not 0 <= index < count:
            wrong = f"message {index} is not there; there are {count}, from 0"
            raise SettingsError(wrong)
        edited = self._new_message(self._messages[index]["role"], content)
        self._messages = [*self._messages[:index], edited]

    def rewind(self, turns: int = 1) -> None:
        """Take back the last questions, of which there must be so many, and replies."""
        self._check_idle()
        asked = [i for i, m in enumerate(self._messages) if m["role"] == "user"]
        check_int("turns", turns, 0)
        if turns > (count := len(asked)):
            wrong = f"turns is {turns}; the conversation has {count} to take back"
            raise SettingsError(wrong)
        if turns:
            self._messages = self._messages[: asked[-turns]]

    def reset(self) -> None:
        """Take everything back; the encoded system turn stays in the prefix."""
        self._check_idle()
        self._messages = []

    def save(self, path: str | Path) -> None:
        """Write the encoded prefix, not the messages, to a file; see `save_prefix`."""
        save_prefix(path, self.prefix)

    def load(self, path: str | Path) -> None:
        """Read an encoded prefix from a file; see `load_prefix`."""
        self._check_idle()
        self.prefix = load_prefix(path, self.prefix.model)

    def _check_idle(self) -> None:
        if self._answering.locked():
            raise SettingsError(BUSY)

    def _new_message(self, role: str, content: Content) -> Message:
        if not isinstance(content, str | list | tuple):
            wrong = f"content is {type(content).__name__}"
            raise SettingsError(f"{wrong}; it must be text or a list of parts")
        return self._with_pictures({"role": role, "content": content})

    def _with_pictures(self, message: Mapping[str, Any]) -> Message:
        """Return a copy whose pictures are read: files may change or go away later."""
        copied = _copy(message)
        if not (sources := image_sources([copied])):
            return copied
        pictures = iter(read_images(self.prefix.model, sources))
        copied["content"] = [
            {"type": "image", "image": next(pictures)} if is_image(part) else part
            for part in copied["content"]
        ]
        return copied

    def _answer(
        self,
        before: list[Message],
        messages: list[Message],
        request: Request,
        events: Generator[Event],
        continued: bool,
    ) -> Generator[Event]:
        if not self._answering.acquire(blocking=False):
            raise SettingsError(BUSY)
        commits: list[Commit] = []
        try:
            if self._messages is not before:
                raise SettingsError("the messages have changed since ask(); ask again")
            self._messages = messages
            for event in events:
                if isinstance(event, Prefilled):
                    self.stats = event
                elif isinstance(event, Commit):
                    commits.append(event)
                yield event
        finally:
            events.close()
            if self._messages is messages:
                self._messages = before
            if commits:
                parts: list[Part] = [part for c in commits for part in c.parts]
                if commits[-1].finish_reason is None:
                    parts += request.filter.rest()
                answer = reply_message(merged(parts))
                answer["content"] = self._written(answer["content"], commits)
                if continued:
                    *messages, begun = messages
                    content: Any = begun["content"]
                    new: Any = answer["content"] or ""
                    if not isinstance(content, str):
                        content, new = [*content], [{"type": "text", "text": new}]
                    answer = begun | answer | {"content": content + new}
                self._messages = [*messages, answer]
            self._answering.release()

    def _written(self, content: str | None, commits: Sequence[Commit]) -> str | None:
        """Return the text of a reply, with its ids if they are this text alone."""
        ids = [token for commit in commits for token in commit.tokens]
        special = not self.tokenizer.special_ids.isdisjoint(ids)
        if not content or special or self.tokenizer.decode(ids) != content:
            return content
        return WrittenText(content, ids)


def _joined(messages: list[Message]) -> str:
    texts = [message["content"] or "" for message in messages]
    if not all(isinstance(text, str) for text in texts):
        raise SettingsError("without a chat template, content must be text")
    return "".join(texts)


def _copy(message: Mapping[str, Any]) -> Message:
    """Return a copy of a message and its parts; pictures are shared."""
    copied = dict(message)
    if isinstance(parts := copied.get("content"), list | tuple):
        copied["content"] = [
            dict(part) if isinstance(part, Mapping) else part for part in parts
        ]
    return copied
