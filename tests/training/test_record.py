"""The log of a run, what a resumed run keeps of it, and its picture."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from mlx_dgemma.errors import TrainingError
from mlx_dgemma.training.record import Log, Trained, Validated, draw, read


def trained(iteration: int, denoising: float = 2.5) -> Trained:
    return Trained(
        iteration=iteration,
        denoising=denoising,
        encoding=3.0,
        norm=0.5,
        learning_rate=1e-4,
        iterations_per_second=2.0,
        tokens_per_second=100.0,
        trained_tokens=10 * iteration,
        peak_memory=2**31,
    )


def validated(iteration: int) -> Validated:
    return Validated(iteration, denoising=2.0, encoding=2.75)


def kinds(path: Path) -> list[tuple[str, int]]:
    return [(row["kind"], row["iteration"]) for row in read(path)]


EVENTS = validated(0), trained(10), trained(20), validated(20), trained(30)
ROWS = [("valid", 0), ("train", 10), ("train", 20), ("valid", 20), ("train", 30)]


@pytest.fixture
def path(tmp_path) -> Path:
    """The log of a run that was killed after iteration 30, its last line torn."""
    path = tmp_path / "run" / "log.jsonl"
    log = Log(path, 0, writes=True)
    for event in EVENTS:
        assert log.add(event) is event
    with path.open("a") as file:
        file.write('{"kind": "train", "iterat')
    return path


def test_every_event_is_a_line_of_json(path):
    lines = path.read_text().splitlines()[:-1]
    for line, (kind, _), event in zip(lines, ROWS, EVENTS, strict=True):
        assert json.loads(line) == {"kind": kind, **asdict(event)}


@pytest.mark.parametrize(("done", "left"), [(0, 0), (9, 1), (10, 2), (25, 4), (30, 5)])
def test_a_resumed_log_keeps_what_came_before(path, done, left):
    """Without the torn line, and only on the rank that writes."""
    assert kinds(path) == ROWS
    text = path.read_text()
    path.write_text(text[: text.rindex("\n")])  # a whole object, but not a whole line
    assert kinds(path) == ROWS[:-1]
    path.write_text(text)
    assert Log(path, done, writes=False).add(trained(40)) == trained(40)
    assert path.read_text() == text
    Log(path, done, writes=True).add(trained(40, math.nan))
    assert kinds(path) == [*ROWS[:left], ("train", 40)]
    assert math.isnan(read(path)[-1]["denoising"])
    assert path.read_text().count("\n") == left + 1
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("line", ["nonsense", '{"kind": "train"', "[1]", "{}"])
def test_a_broken_line_in_the_middle_is_named(path, line):
    lines = path.read_text().splitlines(keepends=True)
    before = "".join([*lines[:2], line + "\n", *lines[2:]])
    path.write_text(before)
    with pytest.raises(TrainingError) as caught:
        Log(path, 20, writes=True)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert path.read_text() == before


def test_without_matplotlib_nothing_is_drawn(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw(path, path.with_name("loss.png")) is False
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    "events",
    [EVENTS, [], [trained(10, math.nan), trained(20, 0.0), trained(30, math.inf)]],
    ids=["usual", "empty", "no positive number"],
)
def test_any_log_can_be_drawn_without_a_warning(tmp_path, events):
    pytest.importorskip("matplotlib")
    log, picture = Log(tmp_path / "log.jsonl", 0, writes=True), tmp_path / "loss.png"
    for event in events:
        log.add(event)
    picture.write_bytes(b"old")
    assert draw(log.path, picture)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl", "loss.png"}
