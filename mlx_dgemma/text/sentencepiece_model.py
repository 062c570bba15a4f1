"""A sentencepiece `tokenizer.model`, for checkpoints without tokenizer.json."""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any


class SentencePieceModel:
    """tokenizer.model, through `sentencepiece`; used as `tokenizer.JsonTokenizer` is.

    data    bytes of tokenizer.model
    config  tokenizer_config.json: add_bos_token, add_eos_token and which user-defined
            pieces count as special

    Raises RuntimeError for broken data.
    """

    rewrites_text = False

    def __init__(self, data: bytes, config: Mapping[str, Any]):
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor()
        self._model.LoadFromSerializedProto(data)
        self.size = self._model.GetPieceSize()
        self._ids = {self._model.IdToPiece(i): i for i in range(self.size)}
        self._control = {p: i for p, i in self._ids.items() if self._model.IsControl(i)}
        # user-defined pieces are special where the configuration flags them
        added = config.get("added_tokens_decoder")
        tokens = list(added.values()) if isinstance(added, dict) else []
        tokens = [t for t in tokens if isinstance(t, dict) and t.get("special") is True]
        flagged = {self._ids.get(str(token.get("content"))) for token in tokens}
        known = {i for i in flagged if i is not None}
        self.special_ids = frozenset(known | set(self._control.values()))
        ids = {"bos_token": self._model.bos_id(), "pad_token": self._model.pad_id()}
        # sentencepiece says -1 where there is none
        self.named = {key: self._model.IdToPiece(i) for key, i in ids.items() if i >= 0}
        self._add_bos = config.get("add_bos_token", True) is True
        self._add_eos = config.get("add_eos_token", False) is True
        # sentencepiece finds user-defined pieces itself, but never control pieces
        self._controls = _any_of(self._control)
        self._specials = _any_of(map(self._model.IdToPiece, self.special_ids))

    def piece(self, token: int) -> str | None:
        return self._model.IdToPiece(token) if token < self.size else None

    def token_id(self, piece: str) -> int | None:
        return self._ids.get(piece)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for part in self._controls.split(text):
            if part in self._control:
                ids.append(self._control[part])
            else:
                ids.extend(self._model.EncodeAsIds(part))
        if not add_special_tokens:
            return ids
        bos, eos = self._model.bos_id(), self._model.eos_id()
        first = [bos] if self._add_bos and bos >= 0 else []
        return first + ids + ([eos] if self._add_eos and eos >= 0 else [])

    def encode_ordinary(self, text: str) -> list[int]:
        """Return ids that are no special token, whatever the text spells."""
        ids: list[int] = []
        for part in self._specials.split(text):
            halves = part[:1], part[1:]  # sentencepiece would find a user-defined piece
            pieces = halves if self._specials.fullmatch(part) else (part,)
            ids += [i for piece in pieces for i in self._model.EncodeAsIds(piece)]
        return ids

    def join(self, pieces: list[str]) -> str:
        runs = groupby(pieces, key=self._control.__contains__)
        return "".join(
            "".join(run) if control else self._model.DecodePieces(list(run))
            for control, run in runs
        )


def _any_of(pieces: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of one group that is any of the pieces, the longest first."""
    longest = sorted(pieces, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")
