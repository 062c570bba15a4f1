"""Text to ids and back, from tokenizer.json or else a sentencepiece model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, SettingsError, TokenizerError
from ..files.json import read_json
from .detokenizer import REPLACEMENT, Detokenizer
from .vocabularies import Backend, JsonBackend, SentencePieceBackend, read_bytes

if TYPE_CHECKING:
    from .chat import ChatTemplate

MAX_ID = 2**31  # ids are int32 everywhere else


class Tokenizer:
    """Text to ids and back, with the chat template of a checkpoint.

    Build it with `Tokenizer.from_dir`.
    """

    def __init__(
        self,
        backend: Backend,
        where: str,
        config: Mapping[str, Any],
        template: "ChatTemplate | None" = None,
    ):
        self._backend = backend
        self._where = where
        self._named = {**backend.named, **_named_tokens(config, where)}
        self.chat_template = template
        self.vocab_size = backend.size
        self.bos_token_id = self._named_id("bos_token")
        self.pad_token_id = self._named_id("pad_token")
        self.eos_token_id = self._named_id("eos_token")
        # named in tokenizer_config.json is special too, flagged or not
        named = {self._backend.token_id(piece) for piece in self._named.values()}
        self.special_ids = backend.special_ids | (named - {None})

    @classmethod
    def from_dir(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer files of a checkpoint folder.

        Raises TokenizerError, one line naming the file.
        """
        from .chat import ChatTemplate

        path = Path(path)
        older = _read(path / "special_tokens_map.json") or {}
        config = {**older, **(_read(path / "tokenizer_config.json") or {})}
        if (path / "tokenizer.json").exists():
            backend: Backend = JsonBackend(path / "tokenizer.json")
        elif (path / "tokenizer.model").exists():
            backend = SentencePieceBackend(path / "tokenizer.model", config)
        else:
            raise TokenizerError(
                f"{path}: no tokenizer.json and no tokenizer.model; is this a "
                "complete model folder?"
            )
        source = _find_template(path, config)
        template = ChatTemplate(*source) if source is not None else None
        where = str(path / "tokenizer_config.json")
        return cls(backend, where, config, template)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; special tokens written in it become their ids.

        Raises SettingsError for a lone surrogate, which has no UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SettingsError(
                f"text holds a lone surrogate at character {error.start}; remove it"
            ) from None
        return self._backend.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; an id outside the vocabulary is shown as U+FFFD."""
        return self._backend.join(self._pieces(ids, skip_special_tokens))

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder."""
        return Detokenizer(self._pieces, self._backend.stream())

    def token(self, token: int) -> str:
        """The piece with that id as the vocabulary writes it; else U+FFFD."""
        piece = self._backend.piece(token) if 0 <= token < MAX_ID else None
        return REPLACEMENT if piece is None else piece

    def token_id(self, name: str) -> int | None:
        """The id of a piece, None when the vocabulary lacks it."""
        return self._backend.token_id(name)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool = False,
        tokenize: bool = False,
    ) -> str | list[int]:
        """The prompt for a conversation: text, or ids with `tokenize`.

        Raises TokenizerError without a template or when it refuses the messages.
        """
        if self.chat_template is None:
            raise TokenizerError(
                f"{Path(self._where).parent}: no chat template; add "
                "chat_template.jinja or prompt with plain text"
            )
        text = self.chat_template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
            named_tokens=self._named,
        )
        return self.encode(text) if tokenize else text

    def _pieces(self, ids: Sequence[int], skip: bool = True) -> list[str]:
        hidden = self.special_ids if skip else frozenset()
        return [self.token(token) for token in ids if token not in hidden]

    def _named_id(self, key: str) -> int | None:
        name = self._named.get(key)
        if name is None:
            return None
        token = self._backend.token_id(name)
        if token is None:
            raise TokenizerError(
                f"{self._where}: {key} is {name!r}, which the vocabulary lacks"
            )
        return token


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file that may be absent."""
    if not path.exists():
        return None
    try:
        return read_json(path)
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


def _find_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Source and origin of the chat template: a file of its own comes first."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return read_bytes(path).decode("utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}: not UTF-8 at byte {error.start}") from None
    beside = folder / "chat_template.json"
    image_spans = [(folder / "tokenizer_config.json", config)]
    image_spans += [(beside, _read(beside) or {})]
    for path, values in image_spans:
        value = values.get("chat_template")
        if isinstance(value, list):
            value = _default_template(value, path)
        if isinstance(value, str):
            return value, f"{path}: chat_template"
        if value is not None:
            raise TokenizerError(f"{path}: chat_template must be text")
    return None


def _default_template(entries: list[Any], path: Path) -> str:
    """The template named "default" among several."""
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("template"), str):
            raise TokenizerError(
                f"{path}: chat_template must be text or a list of name and template"
            )
        if entry.get("name") == "default":
            return entry["template"]
    raise TokenizerError(f'{path}: chat_template has none named "default"; add one')
