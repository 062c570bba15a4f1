"""Text in, text out: the engine with one canvas, and the words around it."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from ..checkpoint import hub
from ..checkpoint.config import read_config
from ..errors import SettingsError
from ..model.language import DiffusionGemma
from ..model.loading import join_products, load_model
from ..text.chat import Prompt, encode_prompt
from ..text.tokenizer import Detokenizer, Tokenizer
from .engine import PREFILL_STEP, Engine, check_ids
from .events import Commit, Event
from .settings import Settings, whole


class Changes(TypedDict, total=False):
    """Sampler settings a call may change; see `diffusion.settings.Settings`."""

    max_tokens: int | None
    canvas_length: int | None
    steps: int | None
    entropy_bound: float | None
    t_max: float | None
    t_min: float | None
    stability: int | None
    confidence: float | None
    eos: frozenset[int] | None
    pinned: Mapping[int, int] | None
    sampler: str | None
    min_probability: float | None
    trim_eos: bool | None
    freeze: bool | None
    signal_top_k: int | None


def load(
    path_or_id: str | Path,
    adapter_path: str | Path | None = None,
    *,
    revision: str | None = None,
) -> tuple[DiffusionGemma, Tokenizer]:
    """A model and its tokenizer from a folder, a hub id or a built-in name.

    adapter_path    a folder written by `mlx_dgemma.lora`: its adapter is put beside
                    the weights

    Every weight is in memory when this returns, so the model may be used from any
    thread. Raises DGemmaError with one line that says what is wrong.
    """
    model, tokenizer = load_as_stored(path_or_id, adapter_path, revision=revision)
    join_products(model)
    return model, tokenizer


def load_as_stored(
    path_or_id: str | Path,
    adapter_path: str | Path | None = None,
    *,
    revision: str | None = None,
) -> tuple[DiffusionGemma, Tokenizer]:
    """`load` for training: every layer by its name on disk, on every device."""
    folder = hub.resolve(path_or_id, revision)
    config = read_config(folder)
    tokenizer = Tokenizer.from_dir(folder)
    model = load_model(folder, config)
    if adapter_path is not None:
        from ..training import adapters  # who has no adapter needs none of it

        adapters.load(model, adapter_path)
    return model, tokenizer


def stream_generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system: str | None = None,
    thinking: bool = False,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    prefill_step_size: int = PREFILL_STEP,
    **changes: Unpack[Changes],
) -> Iterator[Event]:
    """Denoise the answer to `prompt`, yielding Prefilled, Step and Commit events.

    prompt              text, token ids, or a list of chat messages
    system, thinking    for a text prompt: a system turn; whether the model thinks
    stop                a string, or several, that end the text and are left out
    seed                same seed, same machine, same text; chosen when None and
                        reported by the Prefilled event
    prefill_step_size   prompt tokens encoded at a time
    changes             sampler settings; what is not given, the checkpoint says

    A Commit's `text` is what it adds to the answer. Closing the iterator ends the
    request. Raises SettingsError, at once, for an unknown or impossible setting.
    """
    settings = model.config.settings.but(**changes)
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, Sequence) or not all(
        isinstance(s, str) and s for s in stop
    ):
        raise SettingsError(f"stop is {stop!r}; it must be strings that are not empty")
    whole("prefill_step_size", prefill_step_size, 1)
    if seed is None:
        seed = secrets.randbelow(2**32)
    whole("seed", seed, 0)
    ids = encode_prompt(tokenizer, prompt, system=system, thinking=thinking)
    check_ids(ids, settings, model.config.vocab_size)
    writer = Writer(tokenizer.detokenizer(), stop)
    return _stream(Engine(model), writer, ids, settings, seed, prefill_step_size)


def _stream(
    engine: Engine,
    writer: "Writer",
    ids: Sequence[int],
    settings: Settings,
    seed: int,
    prefill_step_size: int,
) -> Iterator[Event]:
    yield engine.admit(ids, settings, seed, prefill_step_size)
    for event in engine.run():
        if not isinstance(event, Commit):
            yield event
            continue
        commit = writer.write(event)
        yield commit
        if commit.finish_reason is not None:
            return


def generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system: str | None = None,
    thinking: bool = False,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    prefill_step_size: int = PREFILL_STEP,
    **changes: Unpack[Changes],
) -> str:
    """The answer to `prompt`; arguments as of `stream_generate`."""
    events = stream_generate(
        model,
        tokenizer,
        prompt,
        system=system,
        thinking=thinking,
        stop=stop,
        seed=seed,
        prefill_step_size=prefill_step_size,
        **changes,
    )
    return "".join(event.text for event in events if isinstance(event, Commit))


class Writer:
    """Puts text into commits, and ends it at the first stop string.

    Text that may be the beginning of a stop string is held back until the next
    commit decides.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()):
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""

    def write(self, commit: Commit) -> Commit:
        """The commit with its text, cut and finished where a stop string begins."""
        text = self._held
        begins = []  # where the text of each token begins
        for token in commit.tokens:
            begins.append(len(text))
            text += self._detokenizer.add([token])
        if commit.finish_reason is not None:
            text += self._detokenizer.finish()
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            end = min(found)
            tokens = commit.tokens[: sum(begin < end for begin in begins)]
            return replace(commit, tokens=tokens, text=text[:end], finish_reason="stop")
        keep = len(text)
        if commit.finish_reason is None:
            keep -= max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[keep:]
        return replace(commit, text=text[:keep])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
