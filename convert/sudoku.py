"""4x4 Sudoku with a unique solution: drawing puzzles, holding some out, text form.

A puzzle is 16 cells, row by row, 0 for empty. Only 288 solved grids exist, so whether
a puzzle is unique is a look-up: does any other grid agree with all its givens? One
puzzle in 16, chosen by a hash of its cells, is never drawn for training.
"""

import itertools
import zlib

import numpy as np

GIVENS = (4, 8)
HELD_OUT = 16  # one puzzle in so many


def _all_grids() -> np.ndarray:
    """Every solved grid, (288, 16) uint8 in 1…4."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    grids = []
    for top, second in itertools.permutations(rows, 2):
        if set(top[:2]) & set(second[:2]) or set(top[2:]) & set(second[2:]):
            continue
        for third, last in itertools.permutations(rows, 2):
            grid = np.array((top, second, third, last))
            boxes = grid.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)
            units = np.concatenate([grid.T, boxes])
            if all(len(set(unit)) == 4 for unit in units.tolist()):
                grids.append(grid.ravel())
    return np.array(grids, dtype=np.uint8)


GRIDS = _all_grids()
_BITS = 1 << np.arange(16)
# AGREE[g, h]: the cells in which grids g and h are equal, as a 16-bit mask.
AGREE = ((GRIDS[:, None] == GRIDS[None]) @ _BITS).astype(np.uint16)


def text(cells: np.ndarray) -> str:
    """Sixteen cells as four lines of four digits."""
    return "\n".join("".join(map(str, row)) for row in np.reshape(cells, (4, 4)))


def is_held_out(cells: np.ndarray) -> bool:
    """Whether the puzzle `cells` (16,) belongs to the test side of the split."""
    return zlib.crc32(np.asarray(cells, dtype=np.uint8).tobytes()) % HELD_OUT == 0


def draw(
    count: int, rng: np.random.Generator, *, held_out: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draw unique puzzles of 4…8 givens from one side of the split.

    Returns puzzles and their solutions, both (count, 16) uint8.
    """
    puzzles, answers, found = [], [], 0
    while found < count:
        tries = 64 * count if held_out else 4 * count
        grid = rng.integers(len(GRIDS), size=tries)
        givens = rng.integers(GIVENS[0], GIVENS[1] + 1, size=tries)
        order = rng.random((tries, 16)).argsort(axis=1).argsort(axis=1)
        shown = order < givens[:, None]
        mask = (shown @ _BITS).astype(np.uint16)[:, None]
        unique = ((AGREE[grid] & mask) == mask).sum(axis=1) == 1
        cells = np.where(shown, GRIDS[grid], 0).astype(np.uint8)[unique]
        side = np.array([is_held_out(row) == held_out for row in cells], dtype=bool)
        puzzles.append(cells[side])
        answers.append(GRIDS[grid[unique]][side])
        found += int(side.sum())
    return np.concatenate(puzzles)[:count], np.concatenate(answers)[:count]


def held_out(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different (puzzle, solution) texts that training can never have drawn."""
    rng, pairs = np.random.default_rng(seed), {}
    while len(pairs) < count:
        for puzzle, answer in zip(*draw(count, rng, held_out=True), strict=True):
            pairs.setdefault(text(puzzle), text(answer))
    return list(pairs.items())[:count]
