"""Sudoku as a task: drawing puzzles and scoring answers."""

from collections import Counter

import pytest
from plain import digits, is_solved, solutions

from mlx_dgemma.errors import DataError, SettingsError
from mlx_dgemma.evaluation import grids
from mlx_dgemma.evaluation.sudoku import Score, draw, score

# Drawing


@pytest.mark.parametrize(
    ("size", "givens"),
    [
        *((4, (4, 8)), (4, (4, 4)), (4, (16, 16))),
        *((6, (14, 24)), (6, (9, 11)), (6, (13, 15))),
        *((9, (36, 46)), (9, (27, 29)), (9, (33, 39)), (9, (81, 81))),
    ],
)
def test_every_puzzle_has_the_one_solution_it_is_given(size, givens):
    pairs = draw(12, size, givens)
    assert len({puzzle for puzzle, _ in pairs}) == 12
    for puzzle, solution in pairs:
        for text in (puzzle, solution):
            assert [len(line) for line in text.split("\n")] == [size] * size
        cells = digits(puzzle)
        assert solutions(cells) == [digits(solution)]
        assert is_solved(digits(solution))
        assert givens[0] <= sum(map(bool, cells)) <= givens[1]


def test_every_4x4_grid_is_drawn():
    pairs = draw(288, 4, (16, 16))
    assert len({puzzle for puzzle, _ in pairs}) == 288
    assert all(puzzle == solution for puzzle, solution in pairs)
    with pytest.raises(SettingsError, match="only 288 different 4x4 puzzles of 16"):
        draw(289, 4, (16, 16))


def test_each_number_of_givens_is_as_likely():
    drawn = Counter(sum(map(bool, digits(p))) for p, _ in draw(3000, 6, (14, 18)))
    assert sorted(drawn) == [14, 15, 16, 17, 18]
    assert all(500 < number < 700 for number in drawn.values())  # 5 sigma


def test_the_same_seed_gives_the_same_puzzles_and_more_begin_with_fewer():
    many = draw(600, 4, (6, 9), seed=3)
    assert draw(600, 4, (6, 9), seed=3) == many
    assert draw(7, 4, (6, 9), seed=3) == many[:7]
    assert not {p for p, _ in draw(20, 9, seed=4)} & {p for p, _ in draw(20, 9)}
    assert draw(0) == []


def test_puzzles_not_wanted_are_left_out():
    first = [puzzle for puzzle, _ in draw(100, 6, (20, 20))]
    others = [p for p, _ in draw(100, 6, (20, 20), but_not=first[:50])]
    assert not {*others} & {*first[:50]}
    assert others[:50] == first[50:]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"size": 5}, "size is 5; it must be 4, 6 or 9"),
        ({"size": 16}, "size is 16"),
        ({"givens": (16, 40)}, "givens of a 9x9 puzzle is 16; .* from 17 to 81"),
        ({"givens": (40, 82)}, "givens of a 9x9 puzzle is 82"),
        ({"givens": (40, 36)}, "givens 40-36 is no range"),
        ({"size": 4, "givens": (3, 8)}, "from 4 to 16"),
        ({"size": 6, "givens": (7, 8)}, "from 8 to 36"),
        ({"givens": (36.0, 40)}, "givens of a 9x9 puzzle is 36.0"),
        ({"count": -1}, "count is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_is_impossible_is_refused(asked, told):
    with pytest.raises(SettingsError, match=told):
        draw(**{"count": 1} | asked)


def test_givens_that_are_not_found_are_given_up(monkeypatch):
    monkeypatch.setattr(grids, "TRIES", 1)
    with pytest.raises(SettingsError, match=r"no 9x9 puzzle of 17 givens found in 256"):
        draw(1, 9, (17, 17))


# Scores

PUZZLE = "4000\n0310\n0430\n0000"
SOLUTION = "4123\n2314\n1432\n3241"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (SOLUTION, Score(True, 1, 1)),
        (f"\n {SOLUTION}\n", Score(True, 1, 1)),
        (SOLUTION.replace("\n", ""), Score(False, 1, 1)),
        (f"It is:\n{SOLUTION}!", Score(False, 1, 1)),
        (PUZZLE, Score(False, 0, 1)),
        ("4123\n2314\n1432\n3242", Score(False, 10 / 11, 1)),  # the last cell wrong
        ("1123\n2314\n1432\n3241", Score(False, 1, 4 / 5)),  # a given overwritten
        ("4000\n0000\n0430\n0000", Score(False, 0, 3 / 5)),
        ("4123\n2314\n1432\n324", Score(False, 0, 0)),  # short by one
        (f"{SOLUTION}1", Score(False, 0, 0)),
        (f"1. {SOLUTION}", Score(False, 0, 0)),
        ("", Score(False, 0, 0)),
        ("4" * 16, Score(False, 2 / 11, 2 / 5)),
    ],
)
def test_an_answer_is_scored_by_cells_and_givens(answer, expected):
    assert score(PUZZLE, answer, SOLUTION) == expected


def test_words_before_the_puzzle_and_bars_between_cells_do_not_matter():
    asked = f"Solve this 4x4, 0 marks an empty cell:\n{'|'.join(PUZZLE)}"
    wrong = "4,1,2,3; 2,3,1,4; 1,4,3,2; 3,2,4,4"
    assert score(asked, wrong, SOLUTION) == Score(False, 10 / 11, 1)


def test_size_and_marks_come_from_the_solution():
    for size, givens in ((6, (20, 20)), (9, (40, 40))):
        ((puzzle, solution),) = draw(1, size, givens)
        table = str.maketrans("0123456789", "_abcdefghi")
        puzzle, solution = puzzle.translate(table), solution.translate(table)
        assert score(puzzle, solution, solution) == Score(True, 1, 1)
        assert score(puzzle, puzzle, solution) == Score(False, 0, 1)


def test_a_puzzle_without_empty_cells_is_all_givens():
    assert score(SOLUTION, SOLUTION, SOLUTION) == Score(True, 1, 1)
    assert score(SOLUTION, "1" * 16, SOLUTION) == Score(False, 1, 1 / 4)


@pytest.mark.parametrize(
    ("puzzle", "solution", "told"),
    [
        (PUZZLE, "yes", "the answer has 3 cells; a Sudoku has 16, 36 or 81"),
        (PUZZLE, "", "the answer has 0 cells"),
        (PUZZLE, "12" * 12 + "3", "the answer has 25 cells"),
        (PUZZLE, SOLUTION[:-1] + "2", "the answer is no solved 4x4 Sudoku"),
        (PUZZLE, SOLUTION[:-1] + "5", "the answer is no solved 4x4 Sudoku"),
        (PUZZLE[:-1], SOLUTION, "the prompt does not end with a 4x4 Sudoku"),
        (f"{PUZZLE}\nAnswer:", SOLUTION, "the prompt does not end with a 4x4"),
        (f"3{PUZZLE[1:]}", SOLUTION, "the answer contradicts the puzzle"),
    ],
)
def test_what_is_no_puzzle_with_its_solution_is_refused(puzzle, solution, told):
    with pytest.raises(DataError, match=told):
        score(puzzle, solution, solution)
