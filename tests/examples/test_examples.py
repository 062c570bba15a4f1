"""Every example runs, prints what it promises, and stays short."""

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NUMBERED = sorted(FOLDER.glob("[0-9]*.py"))
TRAINING = {"06_finetune": "tuned '", "07_sudoku_story": "| 24 | 0.0%"}


def test_examples_are_short_and_numbered_without_gaps():
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
    numbers = [int(path.name.split("_")[0]) for path in NUMBERED]
    assert numbers == list(range(1, len(NUMBERED) + 1))


@pytest.mark.parametrize(
    "path", [p for p in NUMBERED if p.stem not in TRAINING], ids=lambda p: p.stem
)
def test_example_solves_its_puzzle(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    last = [word for word in printed.split() if re.fullmatch(r"\W*[1-4]{4}\W*", word)]
    grid = [re.sub(r"\W", "", row) for row in last[-4:]]
    for line in (*grid, *map("".join, zip(*grid, strict=True))):
        assert sorted(line) == ["1", "2", "3", "4"], grid


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_training_example_runs(name, capsys, monkeypatch, tmp_path):
    """A few iterations: what it learns is not judged here."""
    path, picture = FOLDER / f"{name}.py", tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [str(path), "2", str(picture)])
    runpy.run_path(str(path), run_name="__main__")
    assert TRAINING[name] in capsys.readouterr().out
    if "story" in name:
        assert picture.read_bytes()[:4] == b"\x89PNG"


def test_picture_of_the_canvas_is_the_one_that_is_drawn(monkeypatch, tmp_path):
    path, picture = FOLDER / "render_canvas.py", tmp_path / "canvas.svg"
    monkeypatch.setattr(sys, "argv", [str(path), str(picture)])
    runpy.run_path(str(path), run_name="__main__")
    assert picture.read_bytes() == (FOLDER / "canvas.svg").read_bytes()
