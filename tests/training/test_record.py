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


@pytest.fixture
def path(tmp_path) -> Path:
    """The log of a run that was killed after iteration 30, its last line torn."""
    path = tmp_path / "run" / "log.jsonl"
    log = Log(path, 0, writes=True)
    for event in (validated(0), trained(10), trained(20), validated(20), trained(30)):
        log.add(event)
    with path.open("a") as file:
        file.write('{"kind": "train", "iterat')
    return path


def kinds(rows) -> list[tuple[str, int]]:
    return [(row["kind"], row["iteration"]) for row in rows]


def test_every_event_is_a_line_of_json_with_all_it_says(tmp_path):
    path = tmp_path / "new" / "folder" / "log.jsonl"
    log = Log(path, 0, writes=True)
    events = [validated(0), trained(1, 0.1 + 0.2), trained(2)]
    assert [log.add(event) for event in events] == events  # handed on
    lines = path.read_text().splitlines()
    names = ["valid", "train", "train"]
    for line, name, event in zip(lines, names, events, strict=True):
        assert json.loads(line) == {"kind": name, **asdict(event)}
    assert read(path) == [json.loads(line) for line in lines]


def test_a_line_is_there_as_soon_as_it_was_added(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0, writes=True)
    assert read(tmp_path / "log.jsonl") == []
    log.add(trained(1))
    assert kinds(read(tmp_path / "log.jsonl")) == [("train", 1)]


def test_a_torn_last_line_is_left_out(path):
    whole = [("valid", 0), ("train", 10), ("train", 20), ("valid", 20), ("train", 30)]
    assert kinds(read(path)) == whole


def test_a_line_is_torn_until_its_end_is_written(path):
    text = path.read_text()
    path.write_text(text[: text.rindex("\n")])  # a whole object, but not a whole line
    assert kinds(read(path))[-1] == ("valid", 20)


@pytest.mark.parametrize(("done", "left"), [(20, 4), (25, 4), (30, 5), (10, 2), (9, 1)])
def test_a_resumed_log_keeps_what_came_before(path, done, left):
    before = read(path)
    log = Log(path, done, writes=True)
    assert read(path) == before[:left]
    log.add(trained(40))
    assert kinds(read(path)) == [*kinds(before)[:left], ("train", 40)]
    assert path.read_text().count("\n") == left + 1  # the torn line is gone
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


def test_a_run_from_the_beginning_begins_its_log_anew(path):
    Log(path, 0, writes=True)
    assert path.read_text() == ""


def test_a_resumed_run_without_a_log_begins_one(tmp_path):
    log = Log(tmp_path / "log.jsonl", 20, writes=True)
    log.add(trained(30))
    assert kinds(read(tmp_path / "log.jsonl")) == [("train", 30)]


def test_only_the_rank_that_writes_touches_the_file(path):
    text = path.read_text()
    other = Log(path, 10, writes=False)
    assert other.add(trained(40)) == trained(40)
    assert path.read_text() == text
    Log(path.parent / "none" / "log.jsonl", 0, writes=False).add(trained(1))
    assert not (path.parent / "none").exists()


@pytest.mark.parametrize("line", ["nonsense", '{"kind": "train"', "[1]", "7", "{}"])
def test_a_broken_line_in_the_middle_is_named(path, line):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], line + "\n", *lines[2:]]))
    with pytest.raises(TrainingError) as caught:
        Log(path, 20, writes=True)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert path.read_text().count("\n") == 6  # and the log stays as it is


def test_losses_that_are_no_number_can_be_read_again(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0, writes=True)
    log.add(trained(1, math.nan))
    assert math.isnan(read(tmp_path / "log.jsonl")[0]["denoising"])


def test_without_matplotlib_nothing_is_drawn(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    picture = path.with_name("loss.png")
    assert draw(path, picture) is False
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


def test_a_log_becomes_a_picture(path):
    pytest.importorskip("matplotlib")
    picture = path.with_name("loss.png")
    assert draw(path, picture) is True
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {p.name for p in path.parent.iterdir()} == {"log.jsonl", "loss.png"}


def test_drawing_replaces_an_older_picture(path):
    pytest.importorskip("matplotlib")
    picture = path.with_name("loss.png")
    picture.write_bytes(b"old")
    assert draw(path, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "events",
    [
        [],
        [trained(10)],
        [validated(0)],
        [trained(10, math.nan), trained(20, 0.0), trained(30, math.inf)],
    ],
    ids=["nothing", "training", "validation", "no positive number"],
)
def test_any_log_can_be_drawn_without_a_warning(tmp_path, events):
    pytest.importorskip("matplotlib")
    log = Log(tmp_path / "log.jsonl", 0, writes=True)
    for event in events:
        log.add(event)
    assert draw(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
