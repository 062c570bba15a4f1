"""An encoded prefix that outlives its request: the next encodes only what is new.

In other chunks the same tokens round differently. So where chunks end is decided by
the tokens alone: a prompt that continues an encoded one is cut where that one was,
and what it gets is, bit for bit, what it would get if all of it were encoded again.
"""

from collections.abc import Callable, Sequence, Set

from ..errors import SettingsError
from ..model.language import DiffusionGemma

EARLY = 16  # a chunk may end early once it has this part of its most tokens


def chunk_ends(
    tokens: Sequence[int],
    eos: Set[int],
    most: int,
    whole: Sequence[tuple[int, int]] = (),
) -> list[int]:
    """Where the chunks that a prompt is encoded in end; the last ends with it.

    eos    ids that a chunk may end behind, unless it is small: the end of a turn
    most   tokens of a chunk
    whole  spans, first to last + 1, that no chunk may end in, however long it gets

    What follows a cut never moves it.
    """
    inside = {end for first, last in whole for end in range(first + 1, last)}
    least = -(-most // EARLY)
    ends, start = [], 0
    for end in range(1, len(tokens)):
        size = end - start
        if size < least or end in inside:
            continue
        if size >= most or tokens[end - 1] in eos:
            ends.append(end)
            start = end
    return [*ends, len(tokens)]


class Prefix:
    """What one model has encoded, by token, kept from one request to the next.

    keys   what was encoded, one for each token: its id, or for what is no token, a
           number below 0 that stands for it and its place in it
    ends   of the chunks it was encoded in
    in_use   whether a running request writes behind them
    """

    def __init__(self, model: DiffusionGemma):
        self.model = model
        self.cache = model.make_cache()
        self.keys: list[int] = []
        self.ends: list[int] = []
        self.in_use = False

    def __len__(self) -> int:
        return len(self.keys)

    def check_free(self) -> None:
        """Raise SettingsError while a running request writes to the cache."""
        if self.in_use:
            raise SettingsError(
                "a running request writes to this prefix; let it end or cancel it first"
            )

    def match_prefix(self, keys: Sequence[int], ends: Sequence[int]) -> int:
        """Forget all that a prompt of these keys, in these chunks, does not begin with.

        Returns how many tokens are left.
        """
        shared = [0]
        for mine, wanted in zip(self.ends, ends, strict=False):
            chunk = slice(shared[-1], mine)
            if mine != wanted or self.keys[chunk] != list(keys[chunk]):
                break
            shared.append(mine)
        return self._back(shared)

    def trim(self) -> int:
        """Forget what is not a whole chunk of a prompt; how many tokens are left.

        The canvases of a reply are none: the next prompt says them in its own chunks,
        and often in other words.
        """
        return self._back([0, *self.ends])

    def fill(
        self,
        keys: Sequence[int],
        ends: Sequence[int],
        encode: Callable[[int, int], None],
    ) -> int:
        """Make these the keys; returns how many of them need not be encoded.

        encode(start, end) must append those tokens to the cache, evaluated. Should it
        fail, the chunks before stay.
        """
        known = self.match_prefix(keys, ends)
        for end in ends:
            if end <= known:
                continue
            encode(len(self), end)
            self.keys += keys[len(self) : end]
            self.ends.append(end)
            if end < len(keys):  # a prompt's own end is seldom come back to
                self.cache.save_snapshot()
        return known

    def _back(self, ends: Sequence[int]) -> int:
        """Rewind to the last of these ends that the cache still reaches."""
        length = max(end for end in ends if self.cache.can_rewind_to(end))
        self.cache.rewind(length)
        self.ends = [end for end in self.ends if end <= length]
        del self.keys[length:]
        return length
