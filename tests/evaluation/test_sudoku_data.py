"""Data sets of puzzles: what is in the files, what is refused, the command."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from plain import digits, solutions

from mlx_dgemma.errors import DGemmaError, SettingsError
from mlx_dgemma.evaluation import sudoku
from mlx_dgemma.evaluation.sudoku import Score, score, write_data

SPLITS = ["train", "valid", "test"]


def write(folder, **asked):
    usual = {"size": 6, "givens": (14, 24), "train": 40, "valid": 10, "test": 15}
    return write_data(folder, **usual | asked)


def rows_of(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def puzzles_of(file):
    return [row["messages"][0]["content"] for row in rows_of(file)]


def test_a_data_set_is_three_files_without_a_puzzle_in_two(tmp_path):
    folder = tmp_path / "new" / "data"
    told = write(folder)
    assert told == {"train.jsonl": 40, "valid.jsonl": 10, "test.jsonl": 15}
    assert sorted(f.name for f in folder.iterdir()) == sorted(told)
    puzzles = [puzzle for name in told for puzzle in puzzles_of(folder / name)]
    assert len(puzzles) == len({*puzzles}) == 65
    for row in rows_of(folder / "train.jsonl"):
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert solutions(digits(question["content"])) == [digits(answer["content"])]


def test_splits_are_disjoint_where_puzzles_are_few(tmp_path):
    write(tmp_path, size=4, givens=(15, 16), train=3000, valid=100, test=100)
    splits = [{*puzzles_of(tmp_path / f"{name}.jsonl")} for name in SPLITS]
    assert [len(split) for split in splits] == [3000, 100, 100]
    assert not any(a & b for a, b in pairwise([*splits, splits[0]]))


def test_the_test_puzzles_do_not_depend_on_the_others(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", train=3, valid=0)
    write(tmp_path / "c", seed=1)
    a, b, c = ((tmp_path / name / "test.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    assert not (tmp_path / "b" / "valid.jsonl").exists()


def test_other_words_and_marks_say_the_same_puzzles(tmp_path):
    write(tmp_path / "a")
    form = {"prompt": "Löse {{das}}: {puzzle}", "digits": "ABCDEF", "empty": "."}
    write(tmp_path / "b", **form, row=" | ")
    table = str.maketrans("0123456\n", ".ABCDEF/")
    pairs = [rows_of(tmp_path / name / "train.jsonl") for name in "ab"]
    for plain, worded in zip(*pairs, strict=True):
        texts = [m["content"].translate(table) for m in plain["messages"]]
        question, answer = (m["content"] for m in worded["messages"])
        assert question == "Löse {das}: " + texts[0].replace("/", " | ")
        assert answer == texts[1].replace("/", " | ")
        assert score(question, answer, answer) == Score(True, 1.0, 1.0)


def test_files_that_exist_are_kept_unless_told(tmp_path):
    write(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(SettingsError, match=r"test\.jsonl: exists; .* --overwrite"):
        write(tmp_path, seed=1)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(SettingsError, match=r"valid\.jsonl: exists"):
        write(tmp_path, seed=1)
    assert not (tmp_path / "test.jsonl").exists()
    write(tmp_path, seed=1, valid=0, overwrite=True)
    after = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert sorted(after) == ["test.jsonl", "train.jsonl"]
    assert not set(before.values()) & set(after.values())


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    write(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    synced = []

    def full(handle):
        synced.append(sorted(f.name for f in tmp_path.iterdir()))
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, seed=1, overwrite=True)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    assert any(name.startswith(".") for name in synced[1])


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"digits": "ABCDE"}, "digits is 'ABCDE'; it must be 6 different"),
        ({"digits": "ABCDEE"}, "6 different characters"),
        ({"digits": "ABC EF"}, "without whitespace"),
        ({"digits": "ABC|EF"}, "without whitespace"),
        ({"digits": "ABCDE0"}, "empty is '0'"),
        ({"empty": "12"}, "empty is '12'"),
        ({"empty": ""}, "empty is ''"),
        ({"empty": " "}, "empty is ' '"),
        ({"empty": "3"}, "empty is '3'"),
        ({"row": "-"}, "row is '-'; it must be of whitespace and"),
        ({"prompt": "Solve"}, "prompt is 'Solve'; it must hold {puzzle}"),
        ({"prompt": "{puzzle} {"}, "other braces twice"),
        ({"prompt": "{} {puzzle}"}, "other braces twice"),
        ({"prompt": "{other} {puzzle}"}, "other braces twice"),
        ({"prompt": "{puzzle.nothing}"}, "other braces twice"),
        ({"prompt": "{puzzle[a]}"}, "other braces twice"),
        ({"prompt": "{puzzle:d}"}, "other braces twice"),
        ({"prompt": "\udcff{puzzle}"}, "prompt is"),
        ({"train": -1}, "train is -1"),
        ({"size": 5}, "size is 5"),
    ],
)
def test_what_could_not_be_told_apart_is_refused(tmp_path, form, told):
    with pytest.raises(SettingsError, match=told):
        write(tmp_path / "data", **form)
    assert not (tmp_path / "data").exists()


# The command


def run(*args):
    return CliRunner().invoke(sudoku.main, [str(a) for a in args])


def test_the_command_writes_what_the_function_writes(tmp_path):
    write(tmp_path / "a", seed=5, digits="ABCDEF", row="", prompt="? {puzzle}")
    asked = ["--size", 6, "--givens", "14-24", "--train", 40, "--valid", 10]
    asked += ["--test", 15, "--seed", 5, "--digits", "ABCDEF", "--row", ""]
    result = run(*asked, "--prompt", "? {puzzle}", "--out", tmp_path / "b")
    assert (result.exit_code, result.stderr) == (0, "")
    counts = "train.jsonl 40, valid.jsonl 10, test.jsonl 15"
    assert result.stdout == f"{tmp_path / 'b'}: {counts}\n"
    for name in SPLITS:
        a, b = (tmp_path / folder / f"{name}.jsonl" for folder in "ab")
        assert a.read_bytes() == b.read_bytes()
    result = run(*asked, "--out", tmp_path / "b")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "exists" in result.stderr
    assert run(*asked, "--out", tmp_path / "b", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    "givens", ["some", "36-", "-46", "36-46-50", "", "٣٦", "9" * 9]
)
def test_givens_that_cannot_be_read_are_refused(tmp_path, givens):
    result = run(f"--givens={givens}", "--out", tmp_path / "data")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --givens is") and "write it like 36-46" in line
    debug = run(f"--givens={givens}", "--out", tmp_path / "data", "--debug")
    assert isinstance(debug.exception, DGemmaError)


def test_one_number_of_givens_is_a_range():
    assert sudoku.parse_givens("40") == (40, 40)
    assert sudoku.parse_givens(" 36 - 46 ") == (36, 46)


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "mlx_dgemma.evaluation.sudoku"]
    command += ["--size", "4", "--givens", "5-8", "--train", "3", "--valid", "1"]
    ended = subprocess.run(
        [*command, "--test", "2", "--out", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(ended.stdout.splitlines()) == 1
    assert len(rows_of(tmp_path / "test.jsonl")) == 2
