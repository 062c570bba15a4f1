"""Every example runs, prints what it promises, and stays short."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.strip()
    assert len(path.read_text().splitlines()) <= 60
    last = [word for word in printed.split() if re.fullmatch(r"\W*[1-4]{4}\W*", word)]
    grid = [re.sub(r"\W", "", row) for row in last[-4:]]
    for line in (*grid, *map("".join, zip(*grid, strict=True))):
        assert sorted(line) == ["1", "2", "3", "4"], grid


def test_examples_are_numbered_without_gaps():
    numbers = [int(path.name.split("_")[0]) for path in EXAMPLES]
    assert numbers == list(range(1, len(EXAMPLES) + 1))
