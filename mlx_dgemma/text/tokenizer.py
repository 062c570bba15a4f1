"""Text to ids and back, from tokenizer.json or else a sentencepiece model."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, SettingsError, TokenizerError
from ..files.json import read_json
from ..files.opening import read_regular
from .template import ChatTemplate, one_line

if TYPE_CHECKING:
    from .json_tokenizer import JsonTokenizer
    from .sentencepiece_model import SentencePieceModel

MAX_FILE = 2**28  # bytes of a tokenizer or a template
MAX_ID = 2**31  # ids are int32 everywhere else
REPLACEMENT = "\ufffd"
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # the fallback for one byte
CONTEXT = 4  # pieces; more bytes than an unfinished UTF-8 character has


class Detokenizer:
    """Incremental `Tokenizer.decode`, special tokens hidden.

    What `add` and `finish` return, joined, is `decode` of all the ids, however they
    are split. Time is linear in the number of ids. With `rewrites_text`, later pieces
    can change earlier text, and `finish` returns all of it.
    """

    def __init__(
        self,
        pieces: Callable[[Sequence[int]], list[str]],
        join: Callable[[list[str]], str],
        rewrites_text: bool = False,
    ):
        self._pieces, self._join = pieces, join
        self._rewrites_text = rewrites_text
        # New pieces are joined behind the first ones, to which the rules for the
        # beginning of a text apply, and the last few, with which they may combine.
        self._first: list[str] = []
        self._last: list[str] = []
        self._returned = 0  # characters of first + last that were returned
        self._run: list[str] = []  # pieces that are decoded as a whole, such as bytes

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that `ids` make final; never a part of a character."""
        pieces = self._pieces(ids)
        end = len(pieces)
        while end and (self._rewrites_text or BYTE_PIECE.fullmatch(pieces[end - 1])):
            end -= 1
        if not end:
            self._run += pieces
            return ""
        new, self._run = [*self._last, *self._run, *pieces[:end]], pieces[end:]
        text = self._join([*self._first, *new])
        if not self._first:
            sizes = range(1, len(new) + 1)
            size = next((n for n in sizes if self._join(new[:n])), 0)
            self._first, new = new[:size], new[size:]
        self._last = new[-CONTEXT:] if self._first else new
        context = self._join([*self._first, *self._last])
        pending = context.endswith(REPLACEMENT)  # perhaps of an unfinished character
        begin, self._returned = self._returned, len(context) - pending
        return text[begin : len(text) - pending]

    def finish(self) -> str:
        """Return the rest of the text, bytes that make no character as U+FFFD."""
        text = self._join([*self._first, *self._last, *self._run])[self._returned :]
        self._first, self._last, self._run, self._returned = [], [], [], 0
        return text


class Tokenizer:
    """Text to ids and back, with the chat template of a checkpoint.

    Build it with `Tokenizer.from_dir`.
    """

    def __init__(
        self,
        backend: "JsonTokenizer | SentencePieceModel",
        where: str,
        config: Mapping[str, Any],
        template: ChatTemplate | None = None,
        tool_template: ChatTemplate | None = None,
    ):
        self._backend = backend
        self._where = where
        self._named = {**backend.named, **_named_tokens(config, where)}
        self.chat_template, self.tool_template = template, tool_template
        self.vocab_size = backend.size
        self.bos_token = self._named.get("bos_token")
        self.bos_token_id = self._named_id("bos_token")
        self.pad_token_id = self._named_id("pad_token")
        self.eos_token_id = self._named_id("eos_token")
        # named in tokenizer_config.json is special too, flagged or not
        named = (backend.token_id(piece) for piece in self._named.values())
        self.special_ids = backend.special_ids | {i for i in named if i is not None}
        pieces = sorted(map(self.token, self.special_ids), key=len)
        longest_first = map(re.escape, reversed(pieces))
        self._special = re.compile("|".join(longest_first) or r"(?!)")

    @classmethod
    def from_dir(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer files of a checkpoint folder.

        Raises TokenizerError, one line naming the file.
        """
        path = Path(path)
        config = _read_json(path / "special_tokens_map.json")  # of older checkpoints
        config |= _read_json(path / "tokenizer_config.json")
        file = path / "tokenizer.json"
        if not file.exists():
            file = path / "tokenizer.model"
        if not file.exists():
            raise TokenizerError(
                f"{path}: no tokenizer.json and no tokenizer.model; is this a "
                "complete model folder?"
            )
        if file.suffix == ".json":
            from .json_tokenizer import JsonTokenizer

            backend = JsonTokenizer(_read_text(file), str(file))
        else:
            from .sentencepiece_model import SentencePieceModel

            try:
                backend = SentencePieceModel(_read_bytes(file), config)
            except (RuntimeError, UnicodeDecodeError) as error:
                raise TokenizerError(f"{file}: broken ({one_line(error)})") from None
        where = str(path / "tokenizer_config.json")
        return cls(backend, where, config, *_read_templates(path, config))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`; special tokens written in it become their ids.

        Raises SettingsError for a lone surrogate, which has no UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SettingsError(
                f"text holds a lone surrogate at character {error.start}; remove it"
            ) from None
        return self._backend.encode(text, add_special_tokens)

    def encode_rendered(self, text: str, mark: str | None) -> list[int]:
        """Return the ids of a rendered chat.

        A special token that `mark_special` has put `mark` into is text from outside and
        is encoded in ordinary tokens.
        """
        if mark is None or mark not in text:
            return self.encode(text)
        ids: list[int] = []
        for part in re.split(f"({self._special.pattern})", text):
            if mark in part:
                ids += self._backend.encode_ordinary(part.replace(mark, ""))
            else:
                ids += self.encode(part)
        return ids

    def mark_special(self, value: Any, mark: str) -> Any:
        """Return a JSON value with `mark` in every special token that a text spells."""
        match value:
            case str():
                return self._special.sub(lambda m: m[0][0] + mark + m[0][1:], value)
            case Mapping():
                return {key: self.mark_special(v, mark) for key, v in value.items()}
            case list() | tuple():
                return [self.mark_special(item, mark) for item in value]
        return value

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; ids outside the vocabulary are U+FFFD."""
        return self._backend.join(self._pieces(ids, skip_special_tokens))

    def detokenizer(self) -> Detokenizer:
        """Return a fresh incremental decoder."""
        backend = self._backend
        return Detokenizer(self._pieces, backend.join, backend.rewrites_text)

    def token(self, token: int) -> str:
        """Return the piece with that id as the vocabulary writes it, else U+FFFD."""
        piece = self._backend.piece(token) if 0 <= token < MAX_ID else None
        return REPLACEMENT if piece is None else piece

    def token_id(self, name: str) -> int | None:
        """Return the id of a piece, None when the vocabulary lacks it."""
        return self._backend.token_id(name)

    def template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        """Return the chat template; one named "tool_use" is for chats with tools.

        Raises TokenizerError where there is none.
        """
        if self.chat_template is None:
            raise TokenizerError(
                f"{Path(self._where).parent}: no chat template; add "
                "chat_template.jinja or prompt with plain text"
            )
        return (self.tool_template if tools else None) or self.chat_template

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        enable_thinking: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> str | list[int]:
        """Return the prompt for a conversation: ids, or text without `tokenize`.

        tools                   what the model may call, as OpenAI's JSON
        add_generation_prompt   end with the start of the assistant's turn
        continue_final_message  leave the last message's turn open, so that the model
                                continues its text
        enable_thinking         whether the template asks the model to think first
        variables               further variables of the template

        Raises TokenizerError without a template or when it refuses the messages,
        SettingsError for arguments that exclude each other or are not plain JSON.
        """
        text = self.template_for(tools).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._named, **variables, "enable_thinking": enable_thinking},
        )
        return self.encode(text) if tokenize else text

    def _pieces(self, ids: Sequence[int], skip: bool = True) -> list[str]:
        hidden = self.special_ids if skip else frozenset()
        return [self.token(token) for token in ids if token not in hidden]

    def _named_id(self, key: str) -> int | None:
        name = self._named.get(key)
        token = None if name is None else self._backend.token_id(name)
        if name is not None and token is None:
            raise TokenizerError(
                f"{self._where}: {key} is {name!r}, which the vocabulary lacks"
            )
        return token


def _read_bytes(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_FILE)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from None


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 at byte {error.start}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty when there is no such file."""
    try:
        return read_json(path) if path.exists() else {}
    except ConfigError as error:
        raise TokenizerError(str(error)) from None


def _named_tokens(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """`bos_token` and the like -> piece, as chat templates see them."""
    extra = config.get("extra_special_tokens")
    named = [(k, v) for k, v in config.items() if k.endswith("_token")]
    named += extra.items() if isinstance(extra, dict) else []
    pieces = {}
    for key, value in named:
        piece = value.get("content") if isinstance(value, dict) else value
        if piece is None or key.startswith("add_"):  # add_bos_token is a switch
            continue
        if not isinstance(piece, str):
            raise TokenizerError(f"{where}: {key} must be text, not {piece!r}")
        pieces[key] = piece
    return pieces


def _read_templates(
    folder: Path, config: Mapping[str, Any]
) -> tuple[ChatTemplate | None, ChatTemplate | None]:
    """The chat template of a folder, and one for tools if they are named.

    A file of its own comes first.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        return ChatTemplate(_read_text(path), str(path)), None
    path = folder / "tokenizer_config.json"
    value = config.get("chat_template")
    if value is None:
        path = folder / "chat_template.json"
        value = _read_json(path).get("chat_template")
    named: dict[Any, Any] = {"default": value}
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        value = named.get("default") or value
    if not isinstance(value, str | None):
        raise TokenizerError(
            f"{path}: chat_template must be text, or a list of "
            '{"name", "template"} with one named "default"'
        )
    where = f"{path}: chat_template"
    tool_use = named.get("tool_use")
    return (
        None if value is None else ChatTemplate(value, where),
        ChatTemplate(tool_use, where) if isinstance(tool_use, str) else None,
    )
