"""Every example runs, prints what it promises, and stays short."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


TRAINING = {"06_finetune": "tuned '", "07_sudoku_story": "| 24 | 0.0%"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", TRAINING)
def test_training_example_runs(name, capsys, monkeypatch, tmp_path):
    """A few iterations: what it learns is not judged here."""
    path, picture = EXAMPLES[0].with_name(f"{name}.py"), tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [str(path), "2", str(picture)])
    runpy.run_path(str(path), run_name="__main__")
    assert TRAINING[name] in capsys.readouterr().out
    if "story" in name:
        assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "path", [p for p in EXAMPLES if p.stem not in TRAINING], ids=lambda p: p.stem
)
def test_example_runs(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.strip()
    last = [word for word in printed.split() if re.fullmatch(r"\W*[1-4]{4}\W*", word)]
    grid = [re.sub(r"\W", "", row) for row in last[-4:]]
    for line in (*grid, *map("".join, zip(*grid, strict=True))):
        assert sorted(line) == ["1", "2", "3", "4"], grid


def test_examples_are_numbered_without_gaps():
    numbers = [int(path.name.split("_")[0]) for path in EXAMPLES]
    assert numbers == list(range(1, len(EXAMPLES) + 1))
