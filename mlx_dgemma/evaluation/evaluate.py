"""How many answers are right: rows of JSONL, denoised together and compared."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..diffusion.engine import Engine
from ..diffusion.events import Commit
from ..errors import DataError, SettingsError, TokenizerError
from ..model.language import DiffusionGemma
from ..settings import Settings, check_int
from ..text.chat import chat_ids
from ..text.tokenizer import Tokenizer
from . import sudoku

TASKS = ("exact", "sudoku")
BATCH_SIZE = 50
# steps allowed, answers done, answers in all
Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Row:
    """A prompt and the answer that is right."""

    prompt: str | list[dict[str, Any]]  # one user's text, or messages
    answer: str
    tools: list[dict[str, Any]] | None = None
    where: str = "a row"  # file:line, for messages

    @property
    def question(self) -> str:
        """The text of the prompt, of its last message if there are several."""
        prompt = self.prompt
        return prompt if isinstance(prompt, str) else prompt[-1]["content"] or ""


@dataclass(frozen=True)
class Result:
    """What came of all rows at one step cap. Shares are 0 … 1, means over rows."""

    steps: int  # most denoising steps per canvas
    count: int  # rows
    exact: float  # share of answers that are the right text
    cells: float | None  # Sudoku: share of empty cells filled right
    givens: float | None  # Sudoku: share of given cells kept
    mean_steps: float  # denoising steps per answer, of all its canvases
    seconds: float


def evaluate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    task: str = "exact",
    steps: Sequence[int | None] = (None,),
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Result]:
    """Answer all rows at each step cap; None is the checkpoint's own.

    Row number n is denoised with seed + n, so its answer does not depend on how many
    rows there are. An answer is right if it is the row's, whitespace around both left
    aside.

    Raises SettingsError for impossible settings, DataError for a row that is no
    Sudoku where one is asked for, both before anything is denoised.
    """
    if task not in TASKS:
        raise SettingsError(f"task is {task!r}; supported: {', '.join(TASKS)}")
    if not rows or not steps:
        raise SettingsError("nothing to evaluate; give rows and step caps")
    check_int("batch_size", batch_size, 1)
    check_int("seed", seed, 0)
    caps = [model.settings.replace(steps=most) for most in steps]
    if task == "sudoku":
        check_sudoku(rows)
    prompts = [_encode(tokenizer, row) for row in rows]
    results = []
    for settings in caps:
        started = time.perf_counter()
        texts, taken = [], 0
        for start in range(0, len(rows), batch_size):
            batch = prompts[start : start + batch_size]
            for tokens, spent in _answers(model, batch, settings, seed + start):
                texts.append(tokenizer.decode(tokens).strip())
                taken += spent
            if progress is not None:
                progress(settings.steps, len(texts), len(rows))
        seconds = time.perf_counter() - started
        exact, cells, givens = _shares(rows, texts, task)
        results.append(
            Result(
                steps=settings.steps,
                count=len(rows),
                exact=exact,
                cells=cells,
                givens=givens,
                mean_steps=taken / len(rows),
                seconds=seconds,
            )
        )
    return results


def check_sudoku(rows: Sequence[Row]) -> None:
    """Raise DataError naming the first row that holds no puzzle and its solution."""
    for row in rows:
        try:
            sudoku.read(row.question, row.answer)
        except DataError as error:
            raise DataError(f"{row.where}: {error}; task 'exact' needs none") from None


def _encode(tokenizer: Tokenizer, row: Row) -> list[int]:
    """Ids of a row's prompt. Raises DataError naming the row."""
    try:
        if row.tools is None:
            return chat_ids(tokenizer, row.prompt)
        messages = row.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        ids = tokenizer.apply_chat_template(
            messages, tools=row.tools, add_generation_prompt=True
        )
        assert isinstance(ids, list)
        return ids
    except (SettingsError, TokenizerError) as error:
        raise DataError(f"{row.where}: {error}") from None


def _answers(
    model: DiffusionGemma, prompts: Sequence[list[int]], settings: Settings, seed: int
) -> list[tuple[list[int], int]]:
    """The answer's tokens and the steps it took for each of a batch of prompts."""
    engine = Engine(model)
    tokens: dict[int, list[int]] = {}
    taken: dict[int, int] = {}
    for number, prompt in enumerate(prompts):
        request = engine.admit(prompt, settings, seed + number).request
        tokens[request], taken[request] = [], 0
    for event in engine.run():
        if isinstance(event, Commit):
            tokens[event.request] += event.tokens
            taken[event.request] += event.steps
    return [(tokens[request], taken[request]) for request in tokens]


def _shares(
    rows: Sequence[Row], texts: list[str], task: str
) -> tuple[float, float | None, float | None]:
    """Shares of exact answers and, for Sudoku, of right cells and of kept givens."""
    pairs, count = list(zip(rows, texts, strict=True)), len(rows)
    exact = sum(text == row.answer.strip() for row, text in pairs) / count
    if task != "sudoku":
        return exact, None, None
    scores = [sudoku.score(row.question, text, row.answer) for row, text in pairs]
    cells = sum(score.cells for score in scores) / count
    return exact, cells, sum(score.givens for score in scores) / count


def table(results: Mapping[str, Sequence[Result]]) -> list[str]:
    """Markdown: a line per step cap, the columns of each label side by side.

    The labels' results must be of the same step caps. A single label is left out of
    the headings.
    """
    heading = ["steps allowed"]
    for label, found in results.items():
        names = ["exact", "mean steps", "seconds"]
        if any(result.cells is not None for result in found):
            names[1:1] = ["cells", "givens kept"]
        heading += names if len(results) == 1 else [f"{label}: {n}" for n in names]
    lines = [heading, ["---"] * len(heading)]
    for beside in zip(*results.values(), strict=True):
        if len({result.steps for result in beside}) != 1:
            raise SettingsError("results of different step caps make no table")
        lines.append([str(beside[0].steps)])
        for result in beside:
            shares = [result.exact]
            if result.cells is not None and result.givens is not None:
                shares += [result.cells, result.givens]
            lines[-1] += [f"{share:.1%}" for share in shares]
            lines[-1] += [f"{result.mean_steps:.2f}", f"{result.seconds:.1f}"]
    return [f"| {' | '.join(line)} |" for line in lines]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a .jsonl file, or of test.jsonl in a folder.

    A row is {"messages"}, the last of them the assistant's, or {"prompt",
    "completion"}, each text or messages; both may have "tools".

    Raises DataError "file:line: reason" for the first that is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "test.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give a .jsonl") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                rows.append(_row(line, where))
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _row(line: bytes, where: str) -> Row:
    """Raises DataError, a reason without a place."""
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # lone surrogates
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}; convert it") from None
    except UnicodeEncodeError:
        raise DataError("holds a lone surrogate; remove it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"broken JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"is {type(row).__name__}; it must be an object")
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools is {type(tools).__name__}; it must be a list")
    if "messages" in row:
        *before, last = _messages(row["messages"], "messages")
    elif "prompt" in row and "completion" in row:
        before = _turns(row["prompt"], "prompt", "user")
        *more, last = _turns(row["completion"], "completion", "assistant")
        before += more
    else:
        raise DataError("has neither messages nor prompt and completion")
    if not before:
        raise DataError("has nothing before the answer; add the user's message")
    if last["role"] not in ("assistant", "model"):
        raise DataError(
            f"its last message is the {last['role']}'s; it must be the assistant's"
        )
    if not (last["content"] or "").strip():
        raise DataError("its answer is empty")
    alone = len(before) == 1 and before[0]["role"] == "user"
    prompt = before[0]["content"] if alone else before
    return Row(prompt, last["content"], tools, where)


def _turns(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value, name)


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Messages with their text parts joined."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} must be a list of messages, not {_brief(value)}")
    messages = []
    for index, message in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{where} is {_brief(message)}, not {{"role", "content"}}')
        content = message.get("content")
        if isinstance(content, list) and all(map(_is_text_part, content)):
            content = "".join(part["text"] for part in content)
        needless = content is None and message.get("tool_calls")
        if not isinstance(content, str) and not needless:
            raise DataError(f"{where}: content is {_brief(content)}; it must be text")
        messages.append({**message, "content": content})
    return messages


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
