"""The model a person chats with: all that the chat asks of a conversation."""

import os
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..diffusion.events import Event

Message = dict[str, Any]


class Partner:
    """A loaded model and the conversation with it.

    cache_file  where the encoded prefix is read from, if it is there, and kept
    options     as of `Conversation`
    """

    def __init__(
        self,
        model: str,
        *,
        adapter_path: str | None,
        revision: str | None,
        cache_file: str | None,
        **options: Any,
    ):
        from ..diffusion.conversation import Conversation
        from ..loading import load

        loaded, self.tokenizer = load(model, adapter_path, revision=revision)
        self._conversation = Conversation(loaded, self.tokenizer, **options)
        self._cache_file = cache_file
        if cache_file is not None and os.path.exists(cache_file):
            self._conversation.load(cache_file)

    @property
    def messages(self) -> list[Message]:
        """All that was said, the system turn included; pictures by their paths."""
        said = [_named(message) for message in self._conversation.messages]
        system = self._conversation.system
        if system is None:
            return said
        return [{"role": "system", "content": system}, *said]

    def ask(
        self, text: str, pictures: Sequence[str], seed: int | None
    ) -> "Generator[Event]":
        """The events of an answer; closing it keeps what is committed."""
        content: str | list[dict[str, str]] = text
        if pictures:
            images = [{"type": "image", "image": path} for path in pictures]
            content = [*images, {"type": "text", "text": text}]
        yield from self._conversation.ask(content, seed=seed)

    def instruct(self, system: str) -> None:
        """Set the system turn; none if it is empty."""
        self._conversation.system = system or None

    def think(self, on: bool) -> None:
        self._conversation.thinking = on

    def rewind(self, turns: int) -> None:
        self._conversation.rewind(turns)

    def reset(self) -> None:
        self._conversation.reset()

    def keep(self) -> None:
        """Write what is encoded to the file it was to be read from."""
        if self._cache_file is not None and self._conversation.messages:
            self._conversation.save(self._cache_file)


def _named(message: Message) -> Message:
    """A message whose pictures are the paths they were read from."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [
        part | {"image": part["image"].source} if part["type"] == "image" else part
        for part in content
    ]
    return message | {"content": parts}
