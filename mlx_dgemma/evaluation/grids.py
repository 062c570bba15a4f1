"""Sudoku grids by the hundred: solving, filling, mixing and digging, in numpy.

Many grids are worked on at once, as bit masks of digits: (cells, n) uint16, bit d-1
for digit d, 0 for an empty cell. The last axis, n, is the grids: it is contiguous.
A puzzle is unique when a search that fills every forced cell, and else tries the
digits of the cell with the fewest, ends without a second solution.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..errors import SettingsError

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box
SPARSE = {4: 4, 6: 14, 9: 36}  # givens below which a random choice is seldom unique
ROUND = 256  # puzzles drawn together
BASES = 32  # solved grids a round starts from; symmetries make the rest
WIDTH = 2048  # most grids searched at once
TRIES = 40  # rounds of choices without success before giving up


@dataclass(frozen=True, eq=False)
class Board:
    """The geometry of a size. Numbers units: rows, then columns, then boxes."""

    size: int
    units: np.ndarray  # (3·size, size) the cells of each unit
    unit_of: np.ndarray  # (3, size²) the row, column and box of each cell
    bits: np.ndarray  # (2^size,) uint8, how many digits a mask holds

    @property
    def full(self) -> int:
        """The mask of all digits."""
        return (1 << self.size) - 1


@cache
def board(size: int) -> Board:
    """The board of a size. Raises SettingsError for one that is not supported."""
    if size not in BOXES:
        raise SettingsError(f"size is {size!r}; it must be 4, 6 or 9")
    high, wide = BOXES[size]
    row, column = np.divmod(np.arange(size * size), size)
    box = row // high * (size // wide) + column // wide
    unit_of = np.stack([row, size + column, 2 * size + box])
    units = np.stack([np.flatnonzero(of == u) for of in unit_of for u in np.unique(of)])
    bits = np.array([mask.bit_count() for mask in range(1 << size)], dtype=np.uint8)
    return Board(size, units, unit_of, bits)


def _candidates(b: Board, cells: np.ndarray) -> np.ndarray:
    """Digits each empty cell may hold, 0 for a filled one: (cells, n)."""
    used = np.bitwise_or.reduce(cells[b.units], axis=1)
    row, column, box = b.unit_of
    free = ~(used[row] | used[column] | used[box]) & b.full
    return np.where(cells == 0, free, 0).astype(np.uint16)


def _forced(b: Board, free: np.ndarray) -> np.ndarray:
    """Digits that are alone in their cell, or have one cell left in a unit."""
    once, twice = (np.zeros((3 * b.size, free.shape[1]), np.uint16) for _ in range(2))
    for cells in b.units.T:
        twice |= once & free[cells]
        once |= free[cells]
    once &= ~twice
    row, column, box = b.unit_of
    hidden = free & (once[row] | once[column] | once[box])
    naked = np.where(free & (free - np.uint16(1)), np.uint16(0), free)
    return np.where(hidden, hidden, naked)


def _settle(b: Board, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill every forced cell, again and again: new cells, and which (n,) may live.

    A grid that contradicts itself dies here or is refused once it is full.
    """
    cells, alive = cells.copy(), np.ones(cells.shape[1], dtype=bool)
    active = np.arange(cells.shape[1])
    while len(active):
        now = cells[:, active]
        free = _candidates(b, now)
        new = _forced(b, free)
        dead = ((now | free) == 0).any(axis=0) | (b.bits[new] > 1).any(axis=0)
        alive[active[dead]] = False
        cells[:, active] = now | new
        active = active[~dead & new.any(axis=0)]
    return cells, alive


def _valid(b: Board, cells: np.ndarray) -> np.ndarray:
    """Which grids are solved: every unit holds every digit. (n,) bool."""
    return (np.bitwise_or.reduce(cells[b.units], axis=1) == b.full).all(axis=0)


def _tightest(b: Board, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The empty cell with the fewest candidates, and their mask: two (n,)."""
    free = _candidates(b, cells)
    at = np.where(cells == 0, b.bits[free], b.size + 1).argmin(axis=0)
    return at, free[at, np.arange(len(at))]


def unique(b: Board, puzzles: np.ndarray) -> np.ndarray:
    """Which puzzles (cells, n) have exactly one solution: (n,) bool."""
    found = np.zeros(puzzles.shape[1], dtype=int)
    open_, owner = puzzles, np.arange(puzzles.shape[1])
    while len(owner):
        # the newest first, few at a time: a search in breadth would grow for ever
        cells, alive = _settle(b, open_[:, -WIDTH:])
        of = owner[-WIDTH:]
        solved = alive & _valid(b, cells)
        found += np.bincount(of[solved], minlength=len(found))
        go_on = alive & (cells == 0).any(axis=0)
        cells, of = cells[:, go_on], of[go_on]
        at, free = _tightest(b, cells)
        parts, owners = [open_[:, :-WIDTH]], [owner[:-WIDTH]]
        for bit in 1 << np.arange(b.size):
            take = np.flatnonzero(free & bit)
            tried = cells[:, take]
            tried[at[take], np.arange(len(take))] = bit
            parts.append(tried)
            owners.append(of[take])
        open_, owner = np.concatenate(parts, axis=1), np.concatenate(owners)
        wanted = found[owner] < 2
        open_, owner = open_[:, wanted], owner[wanted]
    return found == 1


def fill(b: Board, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random solved grids: (cells, count)."""
    cells = np.zeros((b.size**2, count), dtype=np.uint16)
    while not _valid(b, cells).all():
        cells, alive = _settle(b, cells)
        cells[:, ~alive | ((cells != 0).all(axis=0) & ~_valid(b, cells))] = 0
        left = np.flatnonzero((cells == 0).any(axis=0))
        at, free = _tightest(b, cells[:, left])
        among = (free >> np.arange(b.size)[:, None]) & 1  # (size, left)
        digit = (among * rng.random(among.shape)).argmax(axis=0)
        cells[at, left] = 1 << digit
    return cells


def mixed(b: Board, grids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each grid (cells, n) under a random symmetry of Sudoku."""
    high, wide = BOXES[b.size]
    n = grids.shape[1]

    def lines(of: int) -> np.ndarray:
        """An order of lines that keeps blocks of `of` together: (size, n)."""
        blocks = rng.random((b.size // of, 1, n)).argsort(axis=0)
        within = rng.random((b.size // of, of, n)).argsort(axis=1)
        return (blocks * of + within).reshape(b.size, n)

    cells = lines(high)[:, None] * b.size + lines(wide)
    if high == wide:
        cells = np.where(rng.random(n) < 0.5, cells, cells.swapaxes(0, 1))
    moved = np.take_along_axis(grids, cells.reshape(b.size**2, n), axis=0)
    digits = rng.random((b.size, n)).argsort(axis=0)
    made = np.zeros_like(moved)
    for digit, new in enumerate(digits):
        made += (moved >> digit & 1) << new.astype(np.uint16)
    return made


def dug(
    b: Board, puzzles: np.ndarray, givens: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Unique puzzles with cells emptied, one by one, while they stay unique.

    givens (n,): where to stop; a puzzle may end with more.
    """
    puzzles = puzzles.copy()
    for cell in rng.random(puzzles.shape).argsort(axis=0):
        left = (puzzles != 0).sum(axis=0)
        at = np.flatnonzero(
            (left > givens) & (puzzles[cell, np.arange(len(cell))] != 0)
        )
        if len(at):
            tried = puzzles[:, at]
            tried[cell[at], np.arange(len(at))] = 0
            good = unique(b, tried)
            puzzles[:, at[good]] = tried[:, good]
    return puzzles


def draw_round(
    b: Board, givens: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Unique puzzles and their solutions, both (cells, ROUND).

    Raises SettingsError when a number of givens is not to be found.
    """
    bases = fill(b, BASES, rng)
    wanted = rng.integers(givens[0], givens[1] + 1, ROUND)
    puzzles = np.zeros((b.size**2, ROUND), dtype=np.uint16)
    answers, idle = np.zeros_like(puzzles), 0
    while len(missing := np.flatnonzero((puzzles == 0).all(axis=0))):
        slot = np.resize(missing, ROUND)  # what is missing is tried many times at once
        grids = mixed(b, bases[:, rng.integers(BASES, size=ROUND)], rng)
        order = rng.random(grids.shape).argsort(axis=0).argsort(axis=0)
        shown = np.maximum(wanted[slot], SPARSE[b.size])
        drawn = np.where(order < shown, grids, 0).astype(np.uint16)
        good = np.flatnonzero(unique(b, drawn))
        drawn = drawn[:, good]
        if (wanted[slot[good]] < SPARSE[b.size]).any():
            drawn = dug(b, drawn, wanted[slot[good]], rng)
        reached = (drawn != 0).sum(axis=0) == wanted[slot[good]]
        drawn, good = drawn[:, reached], good[reached]
        into, first = np.unique(slot[good], return_index=True)
        puzzles[:, into], answers[:, into] = drawn[:, first], grids[:, good[first]]
        idle = 0 if len(into) else idle + 1
        if idle == TRIES:
            raise SettingsError(
                f"no {b.size}x{b.size} puzzle of {wanted[missing].min()} givens found "
                f"in {TRIES * ROUND:,} tries; ask for more givens"
            )
    return puzzles, answers
