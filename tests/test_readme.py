"""The README's Python runs and prints what the README says it prints."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_and_print_what_is_shown():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), {})
    assert printed.getvalue() == "".join(blocks("text"))


def test_the_first_two_commands_are_one_line_each():
    first, second = blocks("sh")[:2]
    assert first.count("\n") == 1 and "--model sudoku4" in first
    assert second.count("\n") == 1 and "-m pytest" in second


def test_every_path_named_exists():
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (root / path).exists(), path
