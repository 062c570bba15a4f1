"""README's Python runs and prints what README shows; what it names exists."""

import contextlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_print_what_is_shown():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), {})
    assert printed.getvalue() == "".join(blocks("text"))


def test_the_first_two_commands_are_one_line_each():
    first, second = blocks("bash")[:2]
    assert first.count("\n") == 1 and "--model sudoku4" in first
    assert second.count("\n") == 1 and "-m pytest" in second


def test_every_path_named_exists():
    linked = re.findall(r"\]\(([\w/.]+)\)", README)
    named = re.findall(
        r"`(?:python )?((?:convert|examples|mlx_dgemma|tests)/[\w/.]+)", README
    )
    assert len(named) > 10
    assert [path for path in linked + named if not (ROOT / path).exists()] == []


def test_every_flag_named_exists():
    """In blocks of commands, each flag stands in the source of its command."""
    commands = re.findall(r"mlx_dgemma\.(\w+) (.*)", "".join(blocks("bash")))
    shared = (ROOT / "mlx_dgemma" / "cli" / "common.py").read_text()
    for command, arguments in commands:
        source = (ROOT / "mlx_dgemma" / "cli" / f"{command}.py").read_text() + shared
        for flag in re.findall(r"(--[\w-]+)", arguments):
            assert f'"{flag}' in source, (command, flag)


def test_the_table_of_tensors_is_the_generated_one(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "convert"), *sys.path])
    from list_tensors import read_config, read_layout, table

    folder = ROOT / "mlx_dgemma" / "assets" / "sudoku4"
    text = (ROOT / "convert" / "README.md").read_text()
    assert table(read_layout(folder, read_config(folder))) in text
