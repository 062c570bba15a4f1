"""One request with text around it: what its commits say, and where they stop."""

import secrets
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace

from ..errors import SettingsError
from ..model.language import DiffusionGemma
from ..settings import Settings, check_int
from ..text.replies import Answer, Malformed, Part, ReplyParser, merged
from ..text.tokenizer import Tokenizer
from .engine import Engine, PromptProgress, check_request
from .events import Commit, Event
from .prefix import Prefix
from .prompt import EncodedPrompt


class Request:
    """A prompt to answer, checked, and the filter its commits pass through.

    Raises SettingsError for a stop string, seed, chunk size or id that cannot be.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: Tokenizer,
        prompt: EncodedPrompt,
        settings: Settings,
        *,
        stop: str | Sequence[str],
        seed: int | None,
        prefill_step_size: int,
    ):
        check_int("prefill_step_size", prefill_step_size, 1)
        self.seed = secrets.randbelow(2**32) if seed is None else seed
        check_int("seed", self.seed, 0)
        check_request(prompt.ids, settings, model.config)
        self.prompt, self.settings, self.chunk = prompt, settings, prefill_step_size
        self.filter = StopFilter(ReplyParser(tokenizer, prompt.ids), stop)

    def run(
        self,
        engine: Engine,
        prefix: Prefix | None = None,
        prompt_progress_callback: PromptProgress | None = None,
    ) -> Generator[Event]:
        """Yield the events of the request; closing the generator cancels it."""
        prefilled = engine.admit(
            self.prompt.ids,
            self.settings,
            self.seed,
            self.chunk,
            prefix=prefix,
            image_spans=self.prompt.image_spans,
            prompt_progress_callback=prompt_progress_callback,
        )
        try:
            yield prefilled
            for event in engine.run():
                if isinstance(event, Commit):
                    event = self.filter.write(event)
                yield event
                if isinstance(event, Commit) and event.finish_reason is not None:
                    return
        finally:
            engine.cancel(prefilled.request)


class StopFilter:
    """Adds text and parts to commits, and ends the reply at the first stop string.

    The text of a commit is its answer; thoughts and calls are among its parts only, and
    not searched for stop strings. Text that may be the beginning of a stop string is
    held back until the next commit decides.
    """

    def __init__(self, parser: ReplyParser, stop: str | Sequence[str]):
        self._stop = (stop,) if isinstance(stop, str) else stop
        if not isinstance(self._stop, Sequence) or not all(
            isinstance(string, str) and string for string in self._stop
        ):
            raise SettingsError(
                f"stop is {stop!r}; it must be strings that are not empty"
            )
        self._parser, self._held = parser, list[Part]()

    def write(self, commit: Commit) -> Commit:
        """Return the commit with its text, cut and finished at a stop string."""
        parts, starts = self._held, []  # where the text of each token starts
        length = len(_text(parts))
        for token in commit.tokens:
            starts.append(length)
            new = self._parser.add([token])
            length += len(_text(new))
            parts = [*parts, *new]
        if commit.finish_reason is not None:
            parts = [*parts, *self._parser.finish()]
        text = _text(parts)
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            end = min(found)
            tokens = commit.tokens[: sum(start < end for start in starts)]
            ready, self._held = _split(parts, end)[0], []
            commit = replace(commit, tokens=tokens, finish_reason="stop")
        else:
            end = len(text)
            if commit.finish_reason is None:
                end -= max((_overlap(text, s) for s in self._stop), default=0)
            ready, self._held = _split(parts, end)
        ready = merged(ready)
        return replace(
            commit,
            text=_text(ready),
            parts=tuple(ready),
            pending_text=_text(self._held),
        )

    def rest(self) -> list[Part]:
        """Return what is held back when no other commit will follow."""
        held, self._held = [*self._held, *self._parser.finish()], []
        return merged(held)


def _text(parts: Iterable[Part]) -> str:
    """Return what parts add to the answer."""
    return "".join(p.text for p in parts if isinstance(p, Answer | Malformed))


def _split(parts: Sequence[Part], length: int) -> tuple[list[Part], list[Part]]:
    """Return the parts up to so many characters of the answer, and those behind."""
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
    """Return the length of the longest beginning of `stop` that `text` ends with."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
