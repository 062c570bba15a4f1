"""The real commands, given broken folders and flags: one line, and nothing left."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint.malformed import CONVERT, FOLDERS, GENERATE, TALKS, Break
from click.testing import CliRunner, Result

from mlx_dgemma.cli import convert, generate


def whole(folder: Path) -> None:
    """Leave the folder as it is."""


ASKED: list[tuple[str, Break, str, str, bytes]] = []
for breaks, says in FOLDERS:
    ASKED += [("convert", breaks, "", says, b""), ("generate", breaks, "", says, b"")]
ASKED += [("generate", breaks, "", says, b"") for breaks, says in TALKS]
for flags, says, *more in CONVERT:
    ASKED.append(("convert", more[0] if more else whole, flags, says, b""))
for flags, says, *more in GENERATE:
    ASKED.append(("generate", whole, flags, says, more[0] if more else b""))


def run(command: str, model: Path, flags: str = "", stdin: bytes = b"") -> Result:
    """Run a command; a flag given twice counts the last time."""
    out = model.with_name("out")
    mains: dict[str, tuple[Any, list[str]]] = {
        "convert": (convert.main, ["--hf-path", str(model), "--mlx-path", str(out)]),
        "generate": (
            generate.main,
            ["--model", str(model), "-p", "abc", "--steps", "1", "-m", "4"],
        ),
    }
    main, usual = mains[command]
    given = flags.replace("MODEL", str(model)).replace("OUT", str(out))
    return CliRunner().invoke(
        main, usual + (given.split(" ") if given else []), input=stdin
    )


@pytest.mark.parametrize(
    ("command", "breaks", "flags", "says", "stdin"),
    ASKED,
    ids=[f"{command} {flags}: {says}" for command, _, flags, says, _ in ASKED],
)
def test_a_malformed_input_is_answered_in_one_line(
    tiny, tmp_path, command, breaks, flags, says, stdin
):
    model = shutil.copytree(tiny, tmp_path / "model")
    breaks(model)
    before = sorted(os.listdir(tmp_path))
    result = run(command, model, flags, stdin)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert sorted(os.listdir(tmp_path)) == before
    lines = result.stderr.splitlines()
    if result.exit_code == 2:  # click shows how to use the command first
        assert lines[0].startswith("Usage: ")
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    else:
        assert result.exit_code == len(lines) == 1
        assert lines[0].startswith("error: ")
    for part in says.split(" … "):
        assert part in lines[-1].replace(str(tmp_path), "")


@pytest.mark.parametrize("command", ["convert", "generate"])
def test_what_is_not_broken_is_not_refused(tiny, tmp_path, command):
    model = shutil.copytree(tiny, tmp_path / "model")
    assert run(command, model).exit_code == 0
    left = ["model", "out"] if command == "convert" else ["model"]
    assert sorted(os.listdir(tmp_path)) == left
