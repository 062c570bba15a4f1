"""The README's Python runs and prints what the README says it prints."""

import contextlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_and_print_what_is_shown():
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
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path


def test_steps_shown_are_those_of_the_example(capsys):
    import runpy

    runpy.run_path(str(ROOT / "examples" / "02_watch_canvas.py"), run_name="__main__")
    printed = capsys.readouterr().out
    shown = re.findall(r"^step \d: .*$", README, re.MULTILINE)
    assert len(shown) == 5
    assert all(line in printed for line in shown)


def test_the_table_of_tensors_is_the_generated_one(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "convert"), *sys.path])
    from list_tensors import read_config, read_layout, table

    folder = ROOT / "mlx_dgemma" / "assets" / "sudoku4"
    text = (ROOT / "convert" / "README.md").read_text()
    config = read_config(folder)
    assert table(read_layout(folder, config)) in text
