"""What a run tells of itself: events, the log of them, and its picture."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import TrainingError


@dataclass(frozen=True)
class Trained:
    """Means since the last report; losses in nats a token, memory in bytes."""

    iteration: int
    denoising: float
    encoding: float
    norm: float  # of the gradients, before they were shortened
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


E = TypeVar("E", Trained, Validated)
KINDS = {"train": Trained, "valid": Validated}


class Log:
    """One JSON object a line; of a resumed run only what came before is kept."""

    def __init__(self, path: Path, done: int, *, writes: bool):
        self.path, self.writes = path, writes
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = (
                [row for row in read(path) if row["iteration"] <= done] if done else []
            )
            partial = path.with_name(f".partial-{path.name}")
            partial.write_text("".join(map(_line, kept)), encoding="utf-8")
            partial.replace(path)

    def add(self, event: E) -> E:
        """Write an event down, and hand it on."""
        if self.writes:
            kind = next(kind for kind, of in KINDS.items() if isinstance(event, of))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"kind": kind, **asdict(event)}))
        return event


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a torn last line, of a killed run, is left out."""
    return list(_rows(path)) if path.exists() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "iteration" not in row:
            raise TrainingError(f"{path}:{number}: is no line of a log")
        yield row


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def draw(log: Path, picture: Path) -> bool:
    """Losses over iterations as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = read(log)
    for part, colour in (("denoising", "C0"), ("encoding", "C1")):
        for kind, style in (("train", "-"), ("valid", "o")):
            chosen = [row for row in rows if row["kind"] == kind]
            x = [row["iteration"] for row in chosen]
            y = [row[part] for row in chosen]
            if x:
                axes.plot(x, y, style, color=colour, label=f"{part}, {kind}")
    axes.set(xlabel="iteration", ylabel="nats a token", yscale="log")
    axes.grid(alpha=0.3)
    if rows:  # matplotlib warns of an empty legend
        axes.legend()
    partial = picture.with_name(f".partial-{picture.name}")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(picture)
    return True
