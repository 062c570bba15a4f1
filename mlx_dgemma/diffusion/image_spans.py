"""Where pictures stand in a prompt, as the engine and its prefixes see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..media.images import Picture

WORD = 2**60  # of a digest, enough to tell pictures apart


@dataclass(frozen=True)
class ImageSpan:
    """A picture whose soft tokens take the ids from `start` on."""

    start: int
    picture: "Picture"

    @property
    def end(self) -> int:
        return self.start + self.picture.soft_tokens

    @property
    def span(self) -> tuple[int, int]:
        """What must be encoded in one piece: first to last + 1."""
        return self.start, self.end


def keys_of(ids: Sequence[int], image_spans: Sequence[ImageSpan]) -> list[int]:
    """What is encoded, one number for each token: its id, or a number below 0 that
    stands for a picture and the place in it."""
    keys = list(ids)
    for place in image_spans:
        first = int(place.picture.digest[:15], 16) * WORD
        count = place.end - place.start
        keys[place.start : place.end] = [-1 - first - i for i in range(count)]
    return keys
