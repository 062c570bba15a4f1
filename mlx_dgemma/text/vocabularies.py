"""The two kinds of tokenizer files behind one protocol."""

import json
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import TokenizerError
from .detokenizer import ByteStream, Stream, is_byte, segments, whole

if TYPE_CHECKING:
    import tokenizers

# Decoders that look at one piece at a time, the first piece apart.
PIECEWISE = frozenset(["Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip"])


class Backend(Protocol):
    """What the two kinds of tokenizer files have in common."""

    size: int
    special_ids: frozenset[int]
    named: dict[str, str]  # "bos_token" and the like, as far as the file tells

    def piece(self, token: int) -> str | None: ...

    def token_id(self, piece: str) -> int | None: ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def join(self, pieces: list[str]) -> str: ...

    def stream(self) -> Stream: ...


class JsonBackend:
    """tokenizer.json, through `tokenizers`."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Fast

        data = read_bytes(path)
        try:
            # Unlike from_file, from_buffer raises ValueError and not Exception.
            self._fast = Fast.from_buffer(data)
        except ValueError as error:
            why = one_line(error).removeprefix("Cannot instantiate Tokenizer from ")
            raise TokenizerError(f"{path}: broken ({why})") from None
        _refuse_no_unknown(self._fast, path)
        self._fast.no_truncation()
        self._fast.no_padding()
        self._decoder = self._fast.decoder
        added = self._fast.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.size = self._fast.get_vocab_size()
        self.named = {}

    def piece(self, token: int) -> str | None:
        return self._fast.id_to_token(token)

    def token_id(self, piece: str) -> int | None:
        return self._fast.token_to_id(piece)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def join(self, pieces: list[str]) -> str:
        return self._decoder.decode(pieces) if self._decoder else " ".join(pieces)

    def stream(self) -> Stream:
        if self._decoder is None:
            return segments(self.join, lambda piece: False)
        # Pickling is the decoder's only public view of its parts.
        steps = _steps(json.loads(self._decoder.__getstate__()))
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return ByteStream()
        if "Fuse" in kinds:
            fuse = kinds.index("Fuse")
            after = steps[fuse + 1 :]
            if any(s["type"] != "Strip" or s["stop"] for s in after):
                return whole(self.join)
            kinds = kinds[:fuse]
        if not PIECEWISE.issuperset(kinds):
            return whole(self.join)
        bytewise = "ByteFallback" in kinds
        return segments(self.join, is_byte if bytewise else lambda piece: False)


class SentencePieceBackend:
    """tokenizer.model, through sentencepiece."""

    def __init__(self, path: Path, config: Mapping[str, Any]):
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(read_bytes(path))
        except RuntimeError as error:
            raise TokenizerError(f"{path}: broken ({one_line(error)})") from None
        self.size = self._model.GetPieceSize()
        self._ids = {self._model.IdToPiece(i): i for i in range(self.size)}
        self._control = {p: i for p, i in self._ids.items() if self._model.IsControl(i)}
        flagged = (self._ids.get(name) for name in _flagged_special(config))
        special = {i for i in flagged if i is not None}
        self.special_ids = frozenset(special | set(self._control.values()))
        ids = {"bos_token": self._model.bos_id(), "pad_token": self._model.pad_id()}
        # sentencepiece says -1 where there is none
        self.named = {key: self._model.IdToPiece(i) for key, i in ids.items() if i >= 0}
        self._add_bos = config.get("add_bos_token", True) is True
        self._add_eos = config.get("add_eos_token", False) is True
        longest = sorted(self._control, key=len, reverse=True)
        # sentencepiece finds user-defined pieces itself, but never control pieces.
        self._split = re.compile("(" + "|".join(map(re.escape, longest)) + ")")

    def piece(self, token: int) -> str | None:
        return self._model.IdToPiece(token) if token < self.size else None

    def token_id(self, piece: str) -> int | None:
        return self._ids.get(piece)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        parts = self._split.split(text) if self._control else [text]
        ids: list[int] = []
        for part in filter(None, parts):
            if part in self._control:
                ids.append(self._control[part])
            else:
                ids.extend(self._model.EncodeAsIds(part))
        if not add_special_tokens:
            return ids
        bos, eos = self._model.bos_id(), self._model.eos_id()
        first = [bos] if self._add_bos and bos >= 0 else []
        return first + ids + ([eos] if self._add_eos and eos >= 0 else [])

    def join(self, pieces: list[str]) -> str:
        runs = groupby(pieces, key=self._control.__contains__)
        return "".join(
            "".join(run) if control else self._model.DecodePieces(list(run))
            for control, run in runs
        )

    def stream(self) -> Stream:
        return segments(self.join, is_byte)


def one_line(error: Exception) -> str:
    """An error's message without its line breaks; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder's parts in order, nested sequences laid flat."""
    if state["type"] != "Sequence":
        return [state]
    return [step for part in state["decoders"] for step in _steps(part)]


def _refuse_no_unknown(fast: "tokenizers.Tokenizer", path: Path) -> None:
    """Refuse a word vocabulary that would fail on the first unknown word."""
    from tokenizers.models import WordLevel, WordPiece

    model = fast.model
    if not isinstance(model, WordLevel | WordPiece):
        return
    if fast.token_to_id(model.unk_token) is None:
        raise TokenizerError(
            f"{path}: model.unk_token is {model.unk_token!r}, which the vocabulary "
            "lacks; add it"
        )


def _flagged_special(config: Mapping[str, Any]) -> list[str]:
    """Pieces that tokenizer_config.json's added_tokens_decoder flags as special."""
    added = config.get("added_tokens_decoder")
    tokens = added.values() if isinstance(added, dict) else []
    return [
        token["content"]
        for token in tokens
        if isinstance(token, dict)
        and token.get("special") is True
        and isinstance(token.get("content"), str)
    ]


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises TokenizerError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from None
