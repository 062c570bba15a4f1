"""How many answers are right: rows of JSONL, denoised in batches and compared."""

import runpy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .diffusion.engine import Engine
from .diffusion.events import Commit
from .errors import DataError, SettingsError, TokenizerError
from .files.json import read_jsonl
from .files.opening import open_regular, user_path
from .model.language import DiffusionGemma
from .settings import MAX_SEED, Settings, check_int
from .text.chat import chat_ids
from .text.tokenizer import Tokenizer
from .training.data import conversation, options_of

BATCH_SIZE = 50
Progress = Callable[[int, int, int], None]  # steps allowed, answers done, answers
Scorer = Callable[[str, str, str], Mapping[str, float]]  # prompt, answer, expected


@dataclass(frozen=True)
class Row:
    """A prompt and the right answer.

    prompt    one user's text, or chat messages
    answer    the text that is right
    tools     functions the model may call, as OpenAI's JSON
    options   of the prompt's rendering besides, as of `stream_generate`
    where     file:line, for error messages
    """

    prompt: str | list[dict[str, Any]]
    answer: str
    tools: list[dict[str, Any]] | None = None
    where: str = "a row"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def question(self) -> str:
        """The text of the prompt, or of its last message."""
        prompt = self.prompt
        return prompt if isinstance(prompt, str) else prompt[-1]["content"] or ""


@dataclass(frozen=True)
class Result:
    """All rows at one step cap. Shares are from 0 to 1, means over the rows.

    steps         most denoising steps per canvas
    count         rows
    exact         share of answers that equal the right text
    scores        what the scorer found, by name
    mean_steps    denoising steps per answer, of all its canvases
    seconds       wall time
    """

    steps: int
    count: int
    exact: float
    scores: dict[str, float]
    mean_steps: float
    seconds: float


def evaluate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    scorer: Scorer | None = None,
    steps: Sequence[int | None] = (None,),
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: Progress = lambda steps, done, count: None,
) -> list[Result]:
    """Answer all rows at each step cap and return one result per cap.

    rows          from `read_rows`, or made by hand
    scorer        called with (prompt, answer, expected) for each row; returns named
                  shares, whose means become `Result.scores`
    steps         most denoising steps per canvas; None: the checkpoint's own
    batch_size    rows denoised together
    seed          row number n is denoised with seed + n, so its answer does not
                  depend on how many rows there are
    progress      called at first and with each answer: (steps, answers done, answers)

    An answer is exact if it equals the row's, apart from whitespace around both.

    Raises SettingsError for impossible settings and DataError, naming the row, for
    a prompt that cannot be encoded, both before anything is denoised. A ValueError
    of the scorer becomes a DataError that names the row.
    """
    if not rows or not steps:
        raise SettingsError("nothing to evaluate; give rows and step caps")
    check_int("batch_size", batch_size, 1)
    check_int("seed", seed, 0, MAX_SEED)
    settings_per_cap = [model.settings.replace(steps=cap) for cap in steps]
    prompts = [_encode(tokenizer, row) for row in rows]
    results = []
    for settings in settings_per_cap:
        started = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in rows]
        done = taken = 0
        progress(settings.steps, done, len(rows))
        for row, commit in _denoise(model, prompts, settings, seed, batch_size):
            tokens[row] += commit.tokens
            taken += commit.steps
            if commit.finish_reason is not None:
                done += 1
                progress(settings.steps, done, len(rows))
        answers = [tokenizer.decode(ids).strip() for ids in tokens]
        pairs = list(zip(rows, answers, strict=True))
        results.append(
            Result(
                steps=settings.steps,
                count=len(rows),
                exact=sum(a == row.answer.strip() for row, a in pairs) / len(rows),
                scores={} if scorer is None else _mean_scores(scorer, pairs),
                mean_steps=taken / len(rows),
                seconds=time.perf_counter() - started,
            )
        )
    return results


def _encode(tokenizer: Tokenizer, row: Row) -> list[int]:
    try:
        return chat_ids(tokenizer, row.prompt, tools=row.tools, **row.options)
    except (SettingsError, TokenizerError) as error:
        raise DataError(f"{row.where}: {error}") from None


def _denoise(
    model: DiffusionGemma,
    prompts: Sequence[list[int]],
    settings: Settings,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[int, Commit]]:
    """Yield each canvas behind the number of its prompt."""
    for start in range(0, len(prompts), batch_size):
        engine = Engine(model)
        rows: dict[int, int] = {}
        for row, prompt in enumerate(prompts[start : start + batch_size], start):
            rows[engine.admit(prompt, settings, seed + row).request] = row
        for event in engine.run():
            if isinstance(event, Commit):
                yield rows[event.request], event


def _mean_scores(scorer: Scorer, pairs: Sequence[tuple[Row, str]]) -> dict[str, float]:
    scores = []
    for row, answer in pairs:
        try:
            scores.append(scorer(row.question, answer, row.answer))
        except ValueError as error:
            raise DataError(f"{row.where}: {error}") from None
        if scores[-1].keys() != scores[0].keys():
            raise SettingsError(
                f"{row.where}: the scorer returned {', '.join(scores[-1])} after "
                f"{', '.join(scores[0])}; it must return the same names for every row"
            )
    return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}


def load_scorer(text: str, rows: Sequence[Row]) -> Scorer:
    """Return the function that "FILE.py:function" names.

    Raises SettingsError for a file or a function that is not there, and DataError
    naming the first row for which the file's `check` raises ValueError.
    """
    path, _, name = text.rpartition(":")
    if not path or not name.isidentifier():
        raise SettingsError(f"scorer is {text!r}; write it like FILE.py:function")
    file = user_path(path)
    try:
        open_regular(file).close()  # a pipe would block
        names = runpy.run_path(str(file))
    except OSError as error:
        raise SettingsError(f"scorer {path}: {error.strerror}") from None
    except SyntaxError as error:
        raise SettingsError(f"scorer {path}:{error.lineno}: {error.msg}") from None
    except ValueError as error:  # of a NUL in the source too
        raise SettingsError(f"scorer {path}: {error}") from None
    if not callable(names.get(name)):
        raise SettingsError(f"scorer {path}: has no function {name!r}")
    for row in rows if "check" in names else ():
        try:
            names["check"](row.question, row.answer)
        except ValueError as error:
            raise DataError(f"{row.where}: {error}") from None
    return names[name]


def table(results: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return Markdown: a line per step cap, the columns of each label side by side.

    All labels must have the same step caps. A single label is left out of the
    headings.
    """
    heading = ["steps allowed"]
    for label, found in results.items():
        names = ["exact", *found[0].scores, "mean steps", "seconds"]
        heading += names if len(results) == 1 else [f"{label}: {n}" for n in names]
    lines = [heading, ["---"] * len(heading)]
    for beside in zip(*results.values(), strict=True):
        if len({result.steps for result in beside}) != 1:
            raise SettingsError("results of different step caps make no table")
        lines.append([str(beside[0].steps)])
        for result in beside:
            shares = [result.exact, *result.scores.values()]
            lines[-1] += [f"{share:.1%}" for share in shares]
            lines[-1] += [f"{result.mean_steps:.2f}", f"{result.seconds:.1f}"]
    return [f"| {' | '.join(line)} |" for line in lines]


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of a .jsonl file, or of test.jsonl in a folder.

    A row is {"messages"}, the last of them the assistant's, or {"prompt",
    "completion"}, each text or messages. Both may have "tools".

    Raises DataError "file:line: reason" for the first broken row.
    """
    path = user_path(path)
    if path.is_dir():
        path = path / "test.jsonl"
    rows = []
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        try:
            rows.append(_row(row, where))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _row(row: dict[str, Any], where: str) -> Row:
    *before, last = conversation(row)
    if not (last["content"] or "").strip():
        raise DataError("the answer is empty")
    single = len(before) == 1 and before[0]["role"] == "user"
    prompt = before[0]["content"] if single else before
    options = {name: value for name, value in options_of(row).items() if value}
    return Row(prompt, last["content"], options.pop("tools", None), where, options)
