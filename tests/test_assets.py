"""The built-in checkpoints load by name and do what they are for."""

import pytest

from mlx_dgemma import generate, load
from mlx_dgemma.checkpoint.hub import built_in

PUZZLES = {
    "sudoku4": ("4000\n0310\n0430\n0000", "4123\n2314\n1432\n3241"),
    "sudoku6": (
        "162400\n304062\n600200\n200603\n521306\n006001",
        "162435\n354162\n613254\n245613\n521346\n436521",
    ),
}


def test_these_are_built_in():
    assert built_in() == sorted(PUZZLES)


@pytest.mark.parametrize("name", PUZZLES)
def test_it_solves_a_puzzle(name):
    puzzle, solution = PUZZLES[name]
    assert generate(*load(name), puzzle, seed=0) == solution
