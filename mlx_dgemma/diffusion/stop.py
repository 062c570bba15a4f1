"""What the commits of a reply add to its text, and where a stop string ends it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import SettingsError
from ..text.replies import Answer, Malformed, Part, ReplyParser, merged
from .events import Commit


def stops(stop: str | Sequence[str]) -> Sequence[str]:
    """Stop strings as a sequence. Raises SettingsError for what cannot be found."""
    several = (stop,) if isinstance(stop, str) else stop
    if not isinstance(several, Sequence) or not all(
        isinstance(one, str) and one for one in several
    ):
        raise SettingsError(f"stop is {stop!r}; it must be strings that are not empty")
    return several


class StopFilter:
    """Puts text and parts into commits, and ends the reply at the first stop string.

    The text of a commit is its answer; thoughts and calls are parts of it alone, and
    stop strings are not looked for in them. Text that may be the beginning of a stop
    string is held back until the next commit decides.
    """

    def __init__(self, reader: ReplyParser, stop: Sequence[str] = ()):
        self._reader = reader
        self._stop = stop
        self._held: list[Part] = []

    def write(self, commit: Commit) -> Commit:
        """The commit with its text, cut and finished where a stop string begins."""
        parts, begins = self._held, []  # where the text of each token begins
        length = len(_text(parts))
        for token in commit.tokens:
            begins.append(length)
            new = self._reader.add([token])
            length += len(_text(new))
            parts = [*parts, *new]
        if commit.finish_reason is not None:
            parts = [*parts, *self._reader.finish()]
        text = _text(parts)
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            end = min(found)
            tokens = commit.tokens[: sum(begin < end for begin in begins)]
            ready, self._held = _split(parts, end)[0], []
            commit = replace(commit, tokens=tokens, finish_reason="stop")
        else:
            keep = len(text)
            if commit.finish_reason is None:
                keep -= max((_overlap(text, s) for s in self._stop), default=0)
            ready, self._held = _split(parts, keep)
        return replace(
            commit,
            text=_text(ready),
            parts=tuple(merged(ready)),
            held=_text(self._held),
        )

    def rest(self) -> list[Part]:
        """What is held back, if no commit will come that says more."""
        held, self._held = [*self._held, *self._reader.finish()], []
        return merged(held)


def _text(parts: Iterable[Part]) -> str:
    """What parts add to the answer."""
    return "".join(p.text for p in parts if isinstance(p, Answer | Malformed))


def _split(parts: Sequence[Part], length: int) -> tuple[list[Part], list[Part]]:
    """The parts up to so many characters of the answer, and those behind."""
    for index, part in enumerate(parts):
        if not isinstance(part, Answer | Malformed):
            continue
        if len(part.text) > length:
            head, tail = part.text[:length], part.text[length:]
            before = [*parts[:index], replace(part, text=head)]
            return before, [replace(part, text=tail), *parts[index + 1 :]]
        length -= len(part.text)
    return list(parts), []


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
