"""Draw Sudoku puzzles with one solution each, as train, valid and test JSONL.

    python examples/sudoku/data.py --size 9 --givens 36-46 --out DIR

A puzzle is text: `size` lines of `size` digits, 0 for an empty cell; --digits,
--empty and --row choose other marks. Many grids are worked on at once, as bit masks
of digits: (cells, n) uint16, bit d-1 for digit d, 0 for an empty cell. The last axis,
n, counts the grids. A puzzle is unique when a search that fills every forced cell,
and else tries the digits of the cell with the fewest, finds no second solution.
"""

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box
MIN_GIVENS = {4: 4, 6: 8, 9: 17}  # below which no puzzle is unique
SPARSE = {4: 4, 6: 14, 9: 36}  # givens below which a random choice is seldom unique
ROUND = 256  # puzzles drawn together
BASES = 32  # solved grids a round starts from; symmetries make the rest
WIDTH = 2048  # most grids searched at once
TRIES = 40  # rounds of choices without success before giving up
STALE = 8  # rounds without a new puzzle before giving up
SEPARATORS = "|,;"  # may stand between cells, as whitespace may


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
    """Return the board of a size. Raises ValueError for an unsupported one."""
    if size not in BOXES:
        raise ValueError(f"size is {size!r}; it must be 4, 6 or 9")
    high, wide = BOXES[size]
    row, column = np.divmod(np.arange(size * size), size)
    box = row // high * (size // wide) + column // wide
    unit_of = np.stack([row, size + column, 2 * size + box])
    units = np.stack([np.flatnonzero(of == u) for of in unit_of for u in np.unique(of)])
    bits = np.array([mask.bit_count() for mask in range(1 << size)], dtype=np.uint8)
    return Board(size, units, unit_of, bits)


def _candidates(b: Board, cells: np.ndarray) -> np.ndarray:
    """Return the digits each empty cell may hold, 0 for a filled one: (cells, n)."""
    used = np.bitwise_or.reduce(cells[b.units], axis=1)
    row, column, box = b.unit_of
    free = ~(used[row] | used[column] | used[box]) & b.full
    return np.where(cells == 0, free, 0).astype(np.uint16)


def _forced(b: Board, free: np.ndarray) -> np.ndarray:
    """Return digits alone in their cell, or with one cell left in a unit."""
    once, twice = (np.zeros((3 * b.size, free.shape[1]), np.uint16) for _ in range(2))
    for cells in b.units.T:
        twice |= once & free[cells]
        once |= free[cells]
    once &= ~twice
    row, column, box = b.unit_of
    hidden = free & (once[row] | once[column] | once[box])
    naked = np.where(free & (free - np.uint16(1)), np.uint16(0), free)
    return np.where(hidden, hidden, naked)


def _fill_forced(b: Board, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill forced cells until none is left.

    Returns the cells, and which grids (n,) do not contradict themselves so far.
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
    """Return which grids are solved: every unit holds every digit. (n,) bool."""
    return (np.bitwise_or.reduce(cells[b.units], axis=1) == b.full).all(axis=0)


def _tightest(b: Board, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the empty cell with the fewest candidates, and their mask: two (n,)."""
    free = _candidates(b, cells)
    at = np.where(cells == 0, b.bits[free], b.size + 1).argmin(axis=0)
    return at, free[at, np.arange(len(at))]


def unique(b: Board, puzzles: np.ndarray) -> np.ndarray:
    """Return which puzzles (cells, n) have exactly one solution: (n,) bool."""
    found = np.zeros(puzzles.shape[1], dtype=int)
    open_, owner = puzzles, np.arange(puzzles.shape[1])
    while len(owner):
        # the newest first, few at a time, so that the open list stays short
        cells, alive = _fill_forced(b, open_[:, -WIDTH:])
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
    """Return random solved grids: (cells, count)."""
    cells = np.zeros((b.size**2, count), dtype=np.uint16)
    while not _valid(b, cells).all():
        cells, alive = _fill_forced(b, cells)
        cells[:, ~alive | ((cells != 0).all(axis=0) & ~_valid(b, cells))] = 0
        left = np.flatnonzero((cells == 0).any(axis=0))
        at, free = _tightest(b, cells[:, left])
        among = (free >> np.arange(b.size)[:, None]) & 1  # (size, left)
        digit = (among * rng.random(among.shape)).argmax(axis=0)
        cells[at, left] = 1 << digit
    return cells


def transform(b: Board, grids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return each grid (cells, n) under a random symmetry of Sudoku."""
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


def dig(
    b: Board, puzzles: np.ndarray, givens: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Empty cells of puzzles, one by one, as long as they stay unique.

    givens    (n,) where to stop; a puzzle may end with more
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
    """Return unique puzzles and their solutions, both (cells, ROUND).

    Raises ValueError when no puzzle with a number of givens is found.
    """
    bases = fill(b, BASES, rng)
    wanted = rng.integers(givens[0], givens[1] + 1, ROUND)
    puzzles = np.zeros((b.size**2, ROUND), dtype=np.uint16)
    answers, idle = np.zeros_like(puzzles), 0
    while len(missing := np.flatnonzero((puzzles == 0).all(axis=0))):
        slot = np.resize(missing, ROUND)  # what is missing is tried many times at once
        grids = transform(b, bases[:, rng.integers(BASES, size=ROUND)], rng)
        order = rng.random(grids.shape).argsort(axis=0).argsort(axis=0)
        shown = np.maximum(wanted[slot], SPARSE[b.size])
        drawn = np.where(order < shown, grids, 0).astype(np.uint16)
        good = np.flatnonzero(unique(b, drawn))
        drawn = drawn[:, good]
        if (wanted[slot[good]] < SPARSE[b.size]).any():
            drawn = dig(b, drawn, wanted[slot[good]], rng)
        reached = (drawn != 0).sum(axis=0) == wanted[slot[good]]
        drawn, good = drawn[:, reached], good[reached]
        into, first = np.unique(slot[good], return_index=True)
        puzzles[:, into], answers[:, into] = drawn[:, first], grids[:, good[first]]
        idle = 0 if len(into) else idle + 1
        if idle == TRIES:
            raise ValueError(
                f"no {b.size}x{b.size} puzzle of {wanted[missing].min()} givens found "
                f"in {TRIES * ROUND:,} tries; ask for more givens"
            )
    return puzzles, answers


def draw(
    count: int, size: int = 9, givens: tuple[int, int] = (36, 46), seed: int = 0
) -> list[tuple[str, str]]:
    """Return different (puzzle, solution) texts; each puzzle has one solution.

    givens    lowest and highest number of given cells; each number is as likely
    seed      same seed, same puzzles; more of them begin with the same ones

    Raises ValueError for what is impossible or was not found.
    """
    low, high = givens
    b = board(size)
    if not MIN_GIVENS[size] <= low <= high <= size * size:
        raise ValueError(
            f"givens of a {size}x{size} puzzle are {low}-{high}; they must be a range "
            f"within {MIN_GIVENS[size]}-{size * size}"
        )
    found: dict[str, str] = {}
    stale = 0
    for number in itertools.count():
        if len(found) >= count:
            break
        rng = np.random.default_rng([seed, size, low, high, number])
        puzzles, solutions = draw_round(b, (low, high), rng)
        before = len(found)
        for puzzle, solution in zip(texts(puzzles), texts(solutions), strict=True):
            found.setdefault(puzzle, solution)
        stale = 0 if len(found) > before else stale + 1
        if stale == STALE:
            raise ValueError(
                f"only {len(found):,} different {size}x{size} puzzles of {low} to "
                f"{high} givens found; ask for fewer, or for other givens"
            )
    return list(found.items())[:count]


def texts(cells: np.ndarray) -> list[str]:
    """Return the texts of grids given as masks (cells, n)."""
    size = math.isqrt(len(cells))
    digit = np.array([mask.bit_length() for mask in range(1 << size)], dtype=np.uint8)
    lines = np.full((cells.shape[1], size, size + 1), ord("\n"), dtype=np.uint8)
    lines[:, :, :-1] = digit[cells].T.reshape(-1, size, size) + ord("0")
    text, width = lines.tobytes().decode("ascii"), size * (size + 1)
    return [text[at : at + width - 1] for at in range(0, len(text), width)]


def row_writer(
    size: int, prompt: str, digits: str, empty: str, row: str
) -> Callable[[str, str], str]:
    """Return a function from a puzzle and its solution to a line of JSON.

    Raises ValueError for marks that a scorer could not tell apart.
    """
    marks = digits[:size] + empty
    if len(marks) != size + 1 or len(set(marks)) != size + 1 or separates(marks):
        raise ValueError(
            f"digits is {digits!r} and empty is {empty!r}; they must be {size} + 1 "
            f"different characters without whitespace and {SEPARATORS}"
        )
    if row and not all(separates(character) for character in row):
        raise ValueError(
            f"row is {row!r}; it must be of whitespace and {SEPARATORS} alone"
        )
    if "{puzzle}" not in prompt:
        raise ValueError(f"prompt is {prompt!r}; it must hold {{puzzle}}")
    plain = "0123456789"[: size + 1]
    table = str.maketrans(
        dict(zip(plain, empty + digits[:size], strict=True)) | {"\n": row}
    )

    def line(puzzle: str, solution: str) -> str:
        asked = prompt.replace("{puzzle}", puzzle.translate(table))
        question = {"role": "user", "content": asked}
        answer = {"role": "assistant", "content": solution.translate(table)}
        return json.dumps({"messages": [question, answer]}, ensure_ascii=False) + "\n"

    return line


def separates(text: str) -> bool:
    """Return whether a text holds whitespace or a separator of cells."""
    return any(c.isspace() or c in SEPARATORS for c in text)


def parse_givens(text: str) -> tuple[int, int]:
    """Return the range in "36-46" or "40". Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]{1,3})\s*(?:-\s*([0-9]{1,3})\s*)?", text)
    if found is None:
        raise ValueError(f"--givens is {text!r}; write it like 36-46")
    return int(found[1]), int(found[2] or found[1])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--size", type=click.Choice(["4", "6", "9"]), default="9", show_default=True
)
@click.option("--givens", default="36-46", show_default=True, metavar="LOW-HIGH")
@click.option("--train", type=click.IntRange(0), default=3000, show_default=True)
@click.option("--valid", type=click.IntRange(0), default=200, show_default=True)
@click.option("--test", type=click.IntRange(0), default=500, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--prompt", default="{puzzle}", show_default=True)
@click.option("--digits", default="123456789", show_default=True)
@click.option("--empty", default="0", show_default=True, help="Mark of an empty cell.")
@click.option("--row", default="\n", help="Text between rows.  [default: a new line]")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
def main(
    size: str, givens: str, out: Path, seed: int, overwrite: bool, **given: Any
) -> None:
    """Write Sudoku puzzles with one solution each as train, valid and test JSONL."""
    # test rows come first, so they do not depend on how many others there are
    counts = {f"{name}.jsonl": given.pop(name) for name in ("test", "valid", "train")}
    for name in counts:
        if (out / name).exists() and not overwrite:
            raise click.ClickException(
                f"{out / name}: exists; choose another --out or add --overwrite"
            )
    try:
        line = row_writer(int(size), **given)
        pairs = draw(sum(counts.values()), int(size), parse_givens(givens), seed)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    drawn = iter(pairs)
    for name, count in counts.items():
        rows = [line(*pair) for pair in itertools.islice(drawn, count)]
        (out / name).unlink(missing_ok=True)
        if rows:
            (out / name).write_text("".join(rows), encoding="utf-8", newline="\n")
    written = ", ".join(f"{n} {c:,}" for n, c in reversed(counts.items()) if c)
    click.echo(f"{out}: {written or 'nothing asked for'}")


if __name__ == "__main__":
    main()
