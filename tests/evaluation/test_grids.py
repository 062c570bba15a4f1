"""Solving, filling, mixing and digging many grids, judged one by one."""

import numpy as np
import pytest
from plain import is_solved, solutions

from mlx_dgemma.evaluation import grids


def masks(rows):
    """Grids of digits as masks, the grids last."""
    return np.array([[1 << d >> 1 for d in row] for row in rows], dtype=np.uint16).T


def columns(cells):
    """Masks back to a list of grids of digits."""
    return [[int(mask).bit_length() for mask in grid] for grid in cells.T]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_filled_grids_are_solved_and_differ(size):
    made = columns(grids.fill(grids.board(size), 20, rng()))
    assert all(is_solved(grid) for grid in made)
    assert len({tuple(grid) for grid in made}) > 10


@pytest.mark.parametrize("size", [4, 6, 9])
def test_a_symmetry_of_a_solved_grid_is_solved(size):
    board = grids.board(size)
    one = grids.fill(board, 1, rng())
    made = columns(grids.mixed(board, np.repeat(one, 200, axis=1), rng(1)))
    assert all(is_solved(grid) for grid in made)
    assert len({tuple(grid) for grid in made}) > (60 if size == 4 else 190)
    # every digit reaches every cell: nothing stays where it was
    assert all({*cell} == {*range(1, size + 1)} for cell in zip(*made, strict=True))


@pytest.mark.parametrize("size", [4, 6, 9])
def test_symmetries_move_bands_and_turn_square_boxes_alone(size):
    pair = np.zeros((size * size, 1000), dtype=np.uint16)
    pair[:2] = 1  # two cells of a row and a box
    made = grids.mixed(grids.board(size), pair, rng())
    assert (np.count_nonzero(made, axis=0) == 2).all()
    rows, columns = np.divmod(np.argwhere(made.T)[:, 1].reshape(1000, 2), size)
    assert {*rows.flat} == {*columns.flat} == {*range(size)}
    beside = (rows[:, 0] == rows[:, 1]).mean()
    assert beside == 1 if size == 6 else 0.4 < beside < 0.6


@pytest.mark.parametrize(("size", "shown"), [(4, 5), (6, 14), (9, 40)])
def test_unique_is_what_a_plain_search_says(size, shown):
    board, chance = grids.board(size), rng(2)
    rows = columns(grids.fill(board, 60, chance))
    for number, row in enumerate(rows):
        for cell in chance.permutation(size * size)[shown:]:
            row[cell] = 0
        if number % 4 == 0:  # a given that may contradict the others
            at = next(i for i, digit in enumerate(row) if digit)
            row[at] = row[at] % size + 1
    expected = [
        len([found for found in solutions(row) if is_solved(found)]) == 1
        for row in rows
    ]
    assert 0 < sum(expected) < len(rows)
    assert grids.unique(board, masks(rows)).tolist() == expected


def test_an_empty_grid_is_not_unique_and_is_refused_soon(monkeypatch):
    monkeypatch.setattr(grids, "WIDTH", 3)
    board = grids.board(9)
    assert grids.unique(board, np.zeros((81, 2), np.uint16)).tolist() == [False] * 2


def test_digging_stops_at_the_number_wanted_or_when_nothing_can_go():
    board = grids.board(6)
    grid = grids.fill(board, 12, rng())
    wanted = np.array([20, 4] * 6)
    dug = grids.dug(board, grid, wanted, rng(1))
    assert ((dug == 0) | (dug == grid)).all()
    for number, row in enumerate(columns(dug)):
        assert len(solutions(row)) == 1
        if number % 2 == 0:
            assert sum(map(bool, row)) == 20
            continue
        for cell, digit in enumerate(row):  # 4 is out of reach: it is minimal
            if digit:
                assert len(solutions([*row[:cell], 0, *row[cell + 1 :]])) == 2
