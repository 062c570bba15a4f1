"""An encoded prefix that outlives its request: the next encodes only what is new.

Rounding depends on where chunks end, and where they end depends on the tokens alone.
So a prefix that is reused is, bit for bit, the one of a prompt encoded from the start.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..model.language import DiffusionGemma

if TYPE_CHECKING:
    from ..media.images import Picture

MIN_SHARE = 16  # a chunk may end early once it has 1/16 of its maximum
DIGEST_PART = 2**60  # of a picture's digest, enough to distinguish pictures


@dataclass(frozen=True)
class ImageSpan:
    """A picture whose soft tokens stand at the ids start … end-1 of a prompt."""

    start: int
    picture: "Picture"

    @property
    def end(self) -> int:
        return self.start + self.picture.soft_tokens


def prefix_keys(ids: Sequence[int], image_spans: Sequence[ImageSpan]) -> list[int]:
    """Return a number per token that identifies what is encoded there.

    Its id, or for a soft token a negative number made of the picture's digest and the
    place in it.
    """
    keys = list(ids)
    for span in image_spans:
        first = -1 - int(span.picture.digest[:15], 16) * DIGEST_PART
        keys[span.start : span.end] = [first - i for i in range(span.end - span.start)]
    return keys


def chunk_ends(
    tokens: Sequence[int],
    eos: Set[int],
    maximum: int,
    image_spans: Sequence[ImageSpan] = (),
) -> list[int]:
    """Return where the chunks that a prompt is encoded in end; the last ends with it.

    eos           ids a chunk may end behind, unless it is small: the end of a turn
    maximum       tokens of a chunk
    image_spans   pictures, which are encoded in one chunk, however long it gets

    The tokens behind an end never move it.
    """
    inside = {end for span in image_spans for end in range(span.start + 1, span.end)}
    minimum = -(-maximum // MIN_SHARE)
    ends, start = [], 0
    for end in range(1, len(tokens)):
        size = end - start
        if size < minimum or end in inside:
            continue
        if size >= maximum or tokens[end - 1] in eos:
            ends.append(end)
            start = end
    return [*ends, len(tokens)]


class Prefix:
    """The encoded prefix of one model, reused from one request to the next.

    keys     what is encoded, see `prefix_keys`
    ends     of the chunks it was encoded in

    A running request claims it, so that no other writes behind them.
    """

    def __init__(self, model: DiffusionGemma):
        self.model = model
        self.cache = model.make_cache()
        self.keys: list[int] = []
        self.ends: list[int] = []
        self._claimed = Lock()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def in_use(self) -> bool:
        """Whether a running request writes behind it."""
        return self._claimed.locked()

    def claim(self) -> None:
        """Take the prefix for one request; any thread may `release` it.

        Raises SettingsError while another request has it.
        """
        if not self._claimed.acquire(blocking=False):
            raise SettingsError(
                "a running request writes to this prefix; let it end or cancel it first"
            )

    def release(self) -> None:
        self._claimed.release()

    def match_prefix(self, keys: Sequence[int], ends: Sequence[int]) -> int:
        """Forget everything that a prompt of these keys and chunks does not begin with.

        Returns how many tokens are left.
        """
        shared = [0]
        for mine, other in zip(self.ends, ends, strict=False):
            chunk = slice(shared[-1], mine)
            if mine != other or self.keys[chunk] != list(keys[chunk]):
                break
            shared.append(mine)
        return self._rewind(shared)

    def trim(self) -> int:
        """Forget what is not a whole chunk of a prompt; return how much is left.

        The canvases of a reply are not: the next prompt repeats them in its own
        chunks, and often in other tokens.
        """
        return self._rewind([0, *self.ends])

    def extend(self, keys: Sequence[int], *, last: bool) -> None:
        """Record a chunk that was encoded; `last`: it ends the prompt."""
        self.keys += keys
        self.ends.append(len(self.keys))
        if not last:  # a later prompt rarely shares the very end of this one
            self.cache.save_snapshot()

    def _rewind(self, ends: Sequence[int]) -> int:
        """Rewind to the last of these ends that the cache still reaches."""
        length = max(end for end in ends if self.cache.can_rewind_to(end))
        self.cache.rewind(length)
        self.ends = [end for end in self.ends if end <= length]
        del self.keys[length:]
        return length
