"""Ids to text as they come: only what no later id can change is handed out."""

import codecs
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

REPLACEMENT = "\ufffd"
ANCHOR = "a"  # a piece that every supported decoder shows as it is
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

Join = Callable[[list[str]], str]


class Stream(Protocol):
    """Pieces in, final text out."""

    def add(self, pieces: list[str]) -> str: ...

    def finish(self) -> str: ...


class ByteStream:
    """For byte-level BPE: every character of a piece stands for one byte."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, pieces: list[str]) -> str:
        return self._decoder.decode(b"".join(piece_bytes(p) for p in pieces))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class SegmentStream:
    """For decoders that work piece by piece, apart from the beginning of the text.

    join    all pieces of a text -> the text
    open    whether the piece may change with the ones that follow: a run of byte
            pieces is read as a whole, so it is held until it ends
    """

    def __init__(self, join: Join, is_open: Callable[[str], bool]):
        self._join = join
        self._is_open = is_open
        self._held: list[str] = []
        self._begun = False

    def add(self, pieces: list[str]) -> str:
        cut = len(pieces)
        while cut and self._is_open(pieces[cut - 1]):
            cut -= 1
        if not cut:
            self._held.extend(pieces)
            return ""
        ready = [*self._held, *pieces[:cut]]
        self._held = pieces[cut:]
        return self._text(ready)

    def finish(self) -> str:
        ready, self._held = self._held, []
        return self._text(ready) if ready else ""

    def _text(self, pieces: list[str]) -> str:
        if self._begun:  # behind the anchor no rule for the beginning applies
            return self._join([ANCHOR, *pieces])[len(ANCHOR) :]
        text = self._join(pieces)
        self._begun = text != ""
        if not self._begun:  # a leading space was dropped: the beginning goes on
            self._held = [*pieces, *self._held]
        return text


class Detokenizer:
    """Incremental `Tokenizer.decode`, special tokens hidden.

    What `add` and `finish` return, joined, is `decode` of all the ids, however they
    were split. Time is linear in the number of ids.
    """

    def __init__(self, pieces: Callable[[Sequence[int]], list[str]], stream: Stream):
        self._pieces = pieces
        self._stream = stream

    def add(self, ids: Sequence[int]) -> str:
        """The text that `ids` make final; never a part of a character."""
        return self._stream.add(self._pieces(ids))

    def finish(self) -> str:
        """The text held back so far, bytes that make no character as U+FFFD."""
        return self._stream.finish()


def segments(join: Join, is_open: Callable[[str], bool]) -> Stream:
    """A stream by segments where the anchor works, else one that holds everything."""
    if join([ANCHOR]) == ANCHOR and join([ANCHOR, ANCHOR]).startswith(ANCHOR):
        return SegmentStream(join, is_open)
    return whole(join)


def whole(join: Join) -> Stream:
    """A stream that speaks at the end: right for every decoder."""
    return SegmentStream(join, lambda piece: True)


def is_byte(piece: str) -> bool:
    """Whether a piece is the fallback for one byte, such as `<0xF0>`."""
    return BYTE_PIECE.fullmatch(piece) is not None


@cache
def byte_of_char() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable bytes are themselves, others moved up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(moved)}


def piece_bytes(piece: str) -> bytes:
    """Bytes of a byte-level piece; of one outside the alphabet, its own UTF-8."""
    table = byte_of_char()
    try:
        return bytes([table[char] for char in piece])
    except KeyError:
        return piece.encode("utf-8")
