"""Every example runs, prints what it promises, and stays short."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SOLVED = ["4132", "2341", "1423", "3214"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.strip()
    assert len(path.read_text().splitlines()) <= 60
    for row in printed.split():
        if len(row) == 4 and set(row) <= set("1234"):
            assert len(set(row)) == 4  # a row of a solved grid


def test_examples_are_numbered_without_gaps():
    numbers = [int(path.name.split("_")[0]) for path in EXAMPLES]
    assert numbers == list(range(1, len(EXAMPLES) + 1))
