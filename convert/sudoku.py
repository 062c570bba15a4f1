"""4x4 Sudoku with a unique solution: drawing puzzles, holding some out, text form.

A puzzle is 16 cells, row by row, 0 for empty. Only 288 solved grids exist, so whether
a puzzle is unique is a look-up: does any other grid agree with all its givens? One
puzzle in 16, chosen by a hash of its cells, is never drawn for training.
"""

import itertools
import zlib

import numpy as np

HELD_OUT = 16  # one puzzle in so many


def _all_grids() -> np.ndarray:
    """Return every solved grid, (288, 16) uint8 in 1…4."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    halves = [  # two rows whose boxes hold every digit once
        (top, second)
        for top, second in itertools.permutations(rows, 2)
        if not (set(top[:2]) & set(second[:2]) or set(top[2:]) & set(second[2:]))
    ]
    grids = [np.array(one + other) for one in halves for other in halves]
    solved = [g.ravel() for g in grids if (np.sort(g, axis=0).T == (1, 2, 3, 4)).all()]
    return np.array(solved, dtype=np.uint8)


GRIDS = _all_grids()
_BITS = 1 << np.arange(16)
# AGREE[g, h]: the cells in which grids g and h are equal, as a 16-bit mask.
AGREE = ((GRIDS[:, None] == GRIDS[None]) @ _BITS).astype(np.uint16)


def text(cells: np.ndarray) -> str:
    """Return sixteen cells as four lines of four digits."""
    return "\n".join("".join(map(str, row)) for row in np.reshape(cells, (4, 4)))


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
        givens = rng.integers(4, 9, size=tries)
        order = rng.random((tries, 16)).argsort(axis=1).argsort(axis=1)
        shown = order < givens[:, None]
        mask = (shown @ _BITS).astype(np.uint16)[:, None]
        unique = ((AGREE[grid] & mask) == mask).sum(axis=1) == 1
        cells = np.where(shown, GRIDS[grid], 0).astype(np.uint8)[unique]
        hashes = np.array([zlib.crc32(row.tobytes()) for row in cells])
        side = (hashes % HELD_OUT == 0) == held_out
        puzzles.append(cells[side])
        answers.append(GRIDS[grid[unique]][side])
        found += int(side.sum())
    return np.concatenate(puzzles)[:count], np.concatenate(answers)[:count]


def held_out(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return different (puzzle, solution) texts that training can never have drawn."""
    rng, pairs = np.random.default_rng(seed), {}
    while len(pairs) < count:
        for puzzle, answer in zip(*draw(count, rng, held_out=True), strict=True):
            pairs.setdefault(text(puzzle), text(answer))
    return list(pairs.items())[:count]
