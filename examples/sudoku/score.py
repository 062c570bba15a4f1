"""Score Sudoku answers: `mlx_dgemma.evaluate --scorer examples/sudoku/score.py:score`.

A cell is any character but whitespace and |,; - the solution tells size and digits,
and the one other mark in the puzzle stands for an empty cell.
"""

import math

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box
SEPARATORS = "|,;"  # may stand between cells, as whitespace may


def score(prompt: str, answer: str, expected: str) -> dict[str, float]:
    """Return the shares of empty cells filled right and of given cells kept.

    Only characters of the puzzle count as cells of the answer; unless there are as
    many as the puzzle has, no cell is right. A share of no cells is 1. Raises
    ValueError where `check` does.
    """
    puzzle, solution = check(prompt, expected), cells_of(expected)
    answered = [mark for mark in answer if mark in {*puzzle, *solution}]
    if len(answered) != len(puzzle):
        return {"cells": 0.0, "givens kept": 0.0}
    right: dict[bool, list[bool]] = {True: [], False: []}  # by: is the cell given?
    for given, wanted, found in zip(puzzle, solution, answered, strict=True):
        right[given == wanted].append(found == wanted)
    filled, kept = right[False], right[True]
    return {
        "cells": sum(filled) / len(filled) if filled else 1.0,
        "givens kept": sum(kept) / len(kept) if kept else 1.0,
    }


def check(prompt: str, expected: str) -> list[str]:
    """Return the cells of the puzzle that a prompt ends with.

    Raises ValueError unless `expected` is its solution.
    """
    solution = cells_of(expected)
    size = math.isqrt(len(solution))
    if size not in BOXES or size * size != len(solution):
        raise ValueError(
            f"the answer has {len(solution)} cells; a Sudoku has 16, 36 or 81"
        )
    if not is_solved(solution, size):
        raise ValueError(f"the answer is no solved {size}x{size} Sudoku")
    puzzle = cells_of(prompt)[-size * size :]
    if len(puzzle) != len(solution) or len({*puzzle} - {*solution}) > 1:
        raise ValueError(f"the prompt does not end with a {size}x{size} Sudoku")
    if any(a != b and a in solution for a, b in zip(puzzle, solution, strict=True)):
        raise ValueError("the answer contradicts the puzzle the prompt ends with")
    return puzzle


def is_solved(cells: list[str], size: int) -> bool:
    """Return whether every row, column and box holds each of `size` digits once."""
    high, wide = BOXES[size]
    units: dict[tuple[str, int], set[str]] = {}
    for at, digit in enumerate(cells):
        row, column = divmod(at, size)
        box = row // high * (size // wide) + column // wide
        for unit in (("row", row), ("column", column), ("box", box)):
            units.setdefault(unit, set()).add(digit)
    alike = all(len(digits) == size for digits in units.values())
    return alike and len(set(cells)) == size


def cells_of(text: str) -> list[str]:
    """Return the characters of a text that may be cells."""
    return [c for c in text if not c.isspace() and c not in SEPARATORS]
