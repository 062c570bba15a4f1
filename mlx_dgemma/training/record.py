"""Events of a run, the log of them, and a picture of its losses."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import TrainingError
from ..files.atomic import write_atomically
from ..files.opening import read_regular

MAX_LOG = 2**28  # bytes


@dataclass(frozen=True)
class Trained:
    """Means since the last report; losses in nats per token, memory in bytes."""

    iteration: int
    denoising: float
    encoding: float
    norm: float  # of the gradients, before they were clipped
    learning_rate: float
    iterations_per_second: float
    tokens_per_second: float
    trained_tokens: int
    peak_memory: int


@dataclass(frozen=True)
class Validated:
    """Mean losses over the validation data before iteration `iteration` + 1."""

    iteration: int
    denoising: float
    encoding: float


@dataclass(frozen=True)
class Saved:
    """The adapter as it was after that iteration."""

    iteration: int
    path: Path


Event = Trained | Validated | Saved
E = TypeVar("E", Trained, Validated)


class Log:
    """One JSON object per line; a resumed run drops rows after iteration `done`."""

    def __init__(self, path: Path, done: int, *, writes: bool):
        self.path, self.writes = path, writes
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = read(path) if done else []
            rows = [row for row in before if row["iteration"] <= done]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))

    def add(self, event: E) -> E:
        """Write an event, and return it."""
        if self.writes:
            kind = "train" if isinstance(event, Trained) else "valid"
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **asdict(event)}) + "\n")
        return event


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, without the torn last line of a killed run."""
    try:
        data = read_regular(path, MAX_LOG) if path.exists() else b""
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line)  # losses may be NaN
        except (ValueError, RecursionError):
            row = None
        row = row if isinstance(row, dict) else {}
        numbers = [row.get(name) for name in ("iteration", "denoising", "encoding")]
        known = row.get("kind") in ("train", "valid")
        if not known or not all(type(n) in (int, float) for n in numbers):
            raise TrainingError(f"{path}:{number}: is not a line of a log")
        rows.append(row)
    return rows


def draw(log: Path, picture: Path) -> bool:
    """Draw losses over iterations as a PNG; return False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure, rows = Figure(figsize=(8, 4.5), layout="constrained"), read(log)
    axes = figure.add_subplot()
    for part, colour in (("denoising", "C0"), ("encoding", "C1")):
        for kind, style in (("train", "-"), ("valid", "o")):
            chosen = [row for row in rows if row["kind"] == kind]
            if chosen:
                x, y = zip(
                    *((row["iteration"], row[part]) for row in chosen), strict=True
                )
                axes.plot(x, y, style, color=colour, label=f"{part}, {kind}")
    axes.set(xlabel="iteration", ylabel="nats per token", yscale="log")
    axes.grid(alpha=0.3)
    if rows:  # matplotlib warns of an empty legend
        axes.legend()
    write_atomically(picture, lambda p: figure.savefig(p, format="png", dpi=120))
    return True
