"""Sudoku data and scores, against a plain search that tries everything."""

import json
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

SUDOKU = Path(__file__).parents[2] / "examples" / "sudoku"
DATA = runpy.run_path(str(SUDOKU / "data.py"))
SCORE = runpy.run_path(str(SUDOKU / "score.py"))
draw, score, check = DATA["draw"], SCORE["score"], SCORE["check"]
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
PUZZLE = "4000\n0310\n0430\n0000"
SOLUTION = "4123\n2314\n1432\n3241"


def peers(size, cell):
    """The cells that may not hold the same digit as `cell`."""
    high, wide = BOXES[size]
    row, column = divmod(cell, size)
    for other in range(size * size):
        r, c = divmod(other, size)
        same_box = r // high == row // high and c // wide == column // wide
        if other != cell and (r == row or c == column or same_box):
            yield other


def solutions(cells):
    """Up to two solutions of a list of digits, by trying everything."""
    size = round(len(cells) ** 0.5)
    beside = [list(peers(size, cell)) for cell in range(len(cells))]
    if any(d and d in (cells[p] for p in beside[at]) for at, d in enumerate(cells)):
        return []
    found = []

    def search(cells):
        options = {
            at: {*range(1, size + 1)} - {cells[p] for p in beside[at]}
            for at, digit in enumerate(cells)
            if digit == 0
        }
        if not options:
            found.append(cells)
            return
        at = min(options, key=lambda cell: len(options[cell]))
        for digit in options[at]:
            if len(found) < 2:
                search([*cells[:at], digit, *cells[at + 1 :]])

    search(list(cells))
    return found


def digits(text):
    return [int(character) for character in text if character != "\n"]


@pytest.mark.parametrize(
    ("size", "givens"),
    [
        *((4, (4, 8)), (4, (4, 4)), (4, (16, 16)), (6, (14, 24)), (9, (36, 46))),
        pytest.param(6, (9, 11), marks=pytest.mark.slow),
        pytest.param(9, (27, 29), marks=pytest.mark.slow),
    ],
)
def test_every_puzzle_has_the_one_solution_it_is_given(size, givens):
    pairs = draw(8, size, givens)
    assert len(dict(pairs)) == 8
    for puzzle, solution in pairs:
        assert [len(line) for line in puzzle.split("\n")] == [size] * size
        assert solutions(digits(puzzle)) == [digits(solution)]
        assert givens[0] <= sum(map(bool, digits(puzzle))) <= givens[1]


def test_draws_are_even_and_repeatable():
    many = draw(2000, 4, (6, 9), seed=3)
    drawn = Counter(sum(map(bool, digits(puzzle))) for puzzle, _ in many)
    assert sorted(drawn) == [6, 7, 8, 9]
    assert all(400 < number < 600 for number in drawn.values())  # 5 sigma
    assert draw(7, 4, (6, 9), seed=3) == many[:7]
    assert draw(7, 4, (6, 9), seed=4) != many[:7]
    assert len(dict(draw(288, 4, (16, 16)))) == 288  # every grid there is
    for asked, message in (
        ((289, 4, (16, 16)), "only 288 different 4x4 puzzles of 16"),
        ((1, 5), "size is 5; it must be 4, 6 or 9"),
        ((1, 9, (16, 40)), "must be a range within 17-81"),
        ((1, 9, (40, 36)), "givens of a 9x9 puzzle are 40-36"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(*asked)


@pytest.mark.parametrize(("size", "shown"), [(4, 5), (6, 14)])
def test_unique_is_what_a_plain_search_says(size, shown):
    board, chance = DATA["board"](size), np.random.default_rng(2)
    grids = DATA["fill"](board, 40, chance)
    rows = [[int(mask).bit_length() for mask in grid] for grid in grids.T]
    for number, row in enumerate(rows):
        for cell in chance.permutation(size * size)[shown:]:
            row[cell] = 0
        if number % 4 == 0:  # a given that may contradict the others
            at = next(i for i, digit in enumerate(row) if digit)
            row[at] = row[at] % size + 1
    expected = [len(solutions(row)) == 1 for row in rows]
    assert 0 < sum(expected) < len(rows)
    masks = np.array([[1 << d >> 1 for d in row] for row in rows], dtype=np.uint16).T
    assert DATA["unique"](board, masks).tolist() == expected


# The command


def run(*args):
    return CliRunner().invoke(DATA["main"], [str(a) for a in args])


def rows_of(file):
    lines = file.read_text("utf-8").splitlines()
    return [[m["content"] for m in json.loads(line)["messages"]] for line in lines]


def test_files_share_no_puzzle_and_say_it_in_other_marks(tmp_path):
    sizes = ["--size", 6, "--givens", "14-24", "--valid", 3, "--test", 5]
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    result = run(*sizes, "--train", 20, "--out", plain)
    assert result.output == f"{plain}: train.jsonl 20, valid.jsonl 3, test.jsonl 5\n"
    rows = [row for f in plain.iterdir() for row in rows_of(f)]
    assert len(rows) == len({puzzle for puzzle, _ in rows}) == 28
    assert all(solutions(digits(p)) == [digits(a)] for p, a in rows)
    marks = ["--digits", "ABCDEF", "--empty", ".", "--row", " | "]
    run(*sizes, "--train", 0, *marks, "--prompt", "Löse: {puzzle}", "--out", marked)
    assert not (marked / "train.jsonl").exists()
    table = str.maketrans("0123456", ".ABCDEF") | {ord("\n"): " | "}
    files = [rows_of(folder / "test.jsonl") for folder in (plain, marked)]
    for (puzzle, solution), (question, answer) in zip(*files, strict=True):
        assert question == f"Löse: {puzzle.translate(table)}"
        assert answer == solution.translate(table)
        assert score(question, answer, answer) == {"cells": 1, "givens kept": 1}


def test_the_command_refuses_in_one_line(tmp_path):
    out = tmp_path / "data"
    small = ["--size", 6, "--givens", "20", "--train", 1, "--out", out]
    for args, message in (
        (["--givens", "some"], "--givens is 'some'; write it like 36-46"),
        (["--givens", "40-36"], "givens of a 6x6 puzzle are 40-36"),
        (["--digits", "ABCDE"], "digits is 'ABCDE'"),
        (["--digits", "ABC|EF"], "without whitespace"),
        (["--empty", "3"], "empty is '3'"),
        (["--row", "-"], "row is '-'; it must be of whitespace and"),
        (["--prompt", "Solve"], "prompt is 'Solve'; it must hold {puzzle}"),
    ):
        result = run(*small, *args)
        assert result.exit_code == 1 and message in result.stderr
        assert len(result.stderr.splitlines()) == 1 and not out.exists()
    assert run(*small).exit_code == 0
    assert "exists; choose another --out" in run(*small).stderr
    assert run(*small, "--train", 0, "--overwrite").exit_code == 0
    assert not (out / "train.jsonl").exists()


# Scores


@pytest.mark.parametrize(
    ("answer", "cells", "givens"),
    [
        (SOLUTION, 1, 1),
        (f"It is:\n{SOLUTION}!", 1, 1),
        (PUZZLE, 0, 1),
        ("4,1,2,3; 2,3,1,4; 1,4,3,2; 3,2,4,4", 10 / 11, 1),  # the last cell wrong
        ("1123\n2314\n1432\n3241", 1, 4 / 5),  # a given overwritten
        ("4000\n0000\n0430\n0000", 0, 3 / 5),
        ("4123\n2314\n1432\n324", 0, 0),  # short by one
        (f"1. {SOLUTION}", 0, 0),
        ("", 0, 0),
    ],
)
def test_answer_is_scored_by_cells_and_givens(answer, cells, givens):
    asked = f"Solve this 4x4, 0 marks an empty cell:\n{'|'.join(PUZZLE)}"
    assert score(asked, answer, SOLUTION) == {"cells": cells, "givens kept": givens}
    full = {"cells": 1, "givens kept": 1 / 4}  # of a puzzle without empty cells
    assert score(SOLUTION, "1" * 16, SOLUTION) == full


def test_rows_without_a_puzzle_and_its_solution_are_refused():
    for puzzle, solution, message in (
        (PUZZLE, "yes", "the answer has 3 cells; a Sudoku has 16, 36 or 81"),
        (PUZZLE, SOLUTION[:-1] + "2", "the answer is no solved 4x4 Sudoku"),
        (PUZZLE, SOLUTION[:-1] + "5", "the answer is no solved 4x4 Sudoku"),
        (PUZZLE[:-1], SOLUTION, "the prompt does not end with a 4x4 Sudoku"),
        (f"{PUZZLE}\nAnswer:", SOLUTION, "the prompt does not end with a 4x4"),
        (f"3{PUZZLE[1:]}", SOLUTION, "the answer contradicts the puzzle"),
    ):
        with pytest.raises(ValueError, match=message):
            check(puzzle, solution)
