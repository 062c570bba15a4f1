"""A `tokenizer.json`, read by the `tokenizers` package."""

import re
from typing import TYPE_CHECKING, Any, cast

from ..errors import DataError, TokenizerError
from ..files.json import parse_object

if TYPE_CHECKING:
    from tokenizers.decoders import Decoder


# a prefix that is not empty, or a key that may be written in escapes
PREFIX = re.compile(r'"continuing_subword_prefix"\s*:\s*"[^"]|\\u00[2-7]')


class RustErrors:
    """Turns what `tokenizers` raises inside into TokenizerError.

    That is an Exception of no class of its own, and a panic, which is no Exception.
    """

    def __init__(self, where: str):
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        known = (Exception, ValueError, TypeError)
        if kind in known or (kind and kind.__name__ == "PanicException"):
            reason = " ".join(str(error).split())
            raise TokenizerError(f"{self._where}: broken ({reason})") from None


class JsonTokenizer:
    """tokenizer.json, through `tokenizers`. Raises TokenizerError for broken data."""

    def __init__(self, text: str, where: str):
        from tokenizers import Tokenizer as Fast
        from tokenizers.models import WordLevel, WordPiece

        self._errors = RustErrors(where)
        if PREFIX.search(text):
            _check_merges(text, where)
        with self._errors:
            self._fast = Fast.from_str(text)
        self._ordinary: Fast | None = None  # made when a text spells a special token
        self.piece, self.token_id = self._fast.id_to_token, self._fast.token_to_id
        model = self._fast.model
        by_words = isinstance(model, WordLevel | WordPiece)
        if by_words and self.token_id(model.unk_token) is None:
            # encoding would fail at the first unknown word
            lacks = f"{model.unk_token!r}, which the vocabulary lacks; add it"
            raise TokenizerError(f"{where}: model.unk_token is {lacks}")
        self._fast.no_truncation()
        self._fast.no_padding()
        self._decoder = self._fast.decoder
        self.rewrites_text = self._decoder is not None and _rewrites_text(self._decoder)
        added = self._fast.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.size = self._fast.get_vocab_size()
        self.named: dict[str, str] = {}  # of "bos_token" and the like: never here

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with self._errors:
            return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Return ids that are no special token, whatever the text spells."""
        with self._errors:
            if self._ordinary is None:
                self._ordinary = type(self._fast).from_str(self._fast.to_str())
                self._ordinary.encode_special_tokens = True
            return self._ordinary.encode(text, add_special_tokens=False).ids

    def join(self, pieces: list[str]) -> str:
        if self._decoder is None:
            return " ".join(pieces)
        with self._errors:
            return self._decoder.decode(pieces)


def _check_merges(text: str, where: str) -> None:
    """Refuse merges without the model's prefix: `tokenizers` ends the process."""
    try:
        model = parse_object(text).get("model")
    except DataError as error:
        raise TokenizerError(f"{where}: broken ({error})") from None
    model = model if isinstance(model, dict) else {}
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if model.get("type", "BPE") != "BPE" or not isinstance(prefix, str):
        return
    for number, merge in enumerate(merges if isinstance(merges, list) else []):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        last = pair[-1] if isinstance(pair, list) and pair else None
        if isinstance(last, str) and not last.startswith(prefix):
            wrong = "does not begin with continuing_subword_prefix"
            raise TokenizerError(f"{where}: model.merges[{number}]: {last!r} {wrong}")


def _rewrites_text(decoder: "Decoder") -> bool:
    """Whether later pieces can change earlier text.

    They can where a decoder joins all pieces by Fuse and then edits the joined text,
    other than by stripping its start.
    """
    state = cast(bytes, decoder.__getstate__()).decode()
    _, _, edits = state.partition('{"type":"Fuse"}')
    return '"type"' in re.sub(r'{"type":"Strip",[^{}]*"stop":0}', "", edits)
