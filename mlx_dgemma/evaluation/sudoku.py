"""Sudoku of 4x4, 6x6 and 9x9 as a task: drawing, writing data sets, scoring.

    python -m mlx_dgemma.evaluation.sudoku --size 9 --givens 36-46 --out DIR

A puzzle is text: `size` lines of `size` digits, 0 for an empty cell. What is written
may use other marks; what is scored finds out which.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import click
import numpy as np

from ..cli.common import debug_option, one_line_errors, version_option
from ..errors import DataError, SettingsError
from ..settings import check_int
from . import grids

FEWEST = {4: 4, 6: 8, 9: 17}  # givens below which no puzzle is unique
SEPARATORS = "|,;"  # may stand between cells, as whitespace may
STALE = 8  # rounds without a new puzzle before there are said to be no more


def draw(
    count: int,
    size: int = 9,
    givens: tuple[int, int] = (36, 46),
    seed: int = 0,
    but_not: Collection[str] = (),
) -> list[tuple[str, str]]:
    """Different (puzzle, solution) texts; every puzzle has exactly one solution.

    givens      fewest and most given cells; each number is as likely
    seed        same seed, same puzzles; more of them begin with the same ones
    but_not     puzzles never to return

    Raises SettingsError for what is impossible or was not found.
    """
    check_int("count", count, 0)
    check_int("seed", seed, 0)
    board = grids.board(size)
    fewest, most = check_givens(size, givens)
    known, found, stale = set(but_not), [], 0
    for number in itertools.count():
        if len(found) >= count:
            return found[:count]
        rng = np.random.default_rng([seed, size, fewest, most, number])
        puzzles, solutions = grids.draw_round(board, (fewest, most), rng)
        before = len(found)
        for puzzle, solution in zip(_texts(puzzles), _texts(solutions), strict=True):
            if puzzle not in known:
                known.add(puzzle)
                found.append((puzzle, solution))
        stale = 0 if len(found) > before else stale + 1
        if stale == STALE:
            raise SettingsError(
                f"only {len(found):,} different {size}x{size} puzzles of {fewest} to "
                f"{most} givens found; ask for fewer, or for other givens"
            )
    raise AssertionError("unreachable")


def check_givens(size: int, givens: tuple[int, int]) -> tuple[int, int]:
    """The range of givens. Raises SettingsError for one no puzzle can have."""
    grids.board(size)
    for number in givens:
        check_int(
            f"givens of a {size}x{size} puzzle", number, FEWEST[size], size * size
        )
    fewest, most = givens
    if fewest > most:
        raise SettingsError(f"givens {fewest}-{most} is no range; turn it round")
    return fewest, most


def parse_givens(text: str) -> tuple[int, int]:
    """The range in "36-46" or "40". Raises SettingsError naming --givens."""
    found = re.fullmatch(r"\s*([0-9]{1,3})\s*(?:-\s*([0-9]{1,3})\s*)?", text)
    if found is None:
        raise SettingsError(f"--givens is {text!r}; write it like 36-46")
    return int(found[1]), int(found[2] or found[1])


def _texts(cells: np.ndarray) -> list[str]:
    """The texts of grids given as masks (cells, n)."""
    size = math.isqrt(len(cells))
    digit = np.array([mask.bit_length() for mask in range(1 << size)], dtype=np.uint8)
    lines = np.full((cells.shape[1], size, size + 1), ord("\n"), dtype=np.uint8)
    lines[:, :, :-1] = digit[cells].T.reshape(-1, size, size) + ord("0")
    text, width = lines.tobytes().decode("ascii"), size * (size + 1)
    return [text[at : at + width - 1] for at in range(0, len(text), width)]


class Form(TypedDict, total=False):
    """How puzzles are put into words.

    prompt  what is asked; "{puzzle}" in it stands for the puzzle  ["{puzzle}"]
    digits  the `size` marks that stand for 1, 2, …  ["123456789"]
    empty   the mark of an empty cell  ["0"]
    row     what stands between rows: whitespace or |,;  ["\\n"]
    """

    prompt: str
    digits: str
    empty: str
    row: str


def write_data(
    folder: str | Path,
    *,
    size: int,
    givens: tuple[int, int],
    train: int,
    valid: int,
    test: int,
    seed: int = 0,
    overwrite: bool = False,
    **form: Unpack[Form],
) -> dict[str, int]:
    """Write train.jsonl, valid.jsonl and test.jsonl; returns rows by file name.

    No puzzle is in two of them; the test puzzles do not depend on how many others
    are asked for. A split of 0 rows has no file.

    Raises SettingsError for impossible settings and files that exist already.
    """
    folder = Path(folder)
    written = _wording(size, **form)
    counts = {"test.jsonl": test, "valid.jsonl": valid, "train.jsonl": train}
    for name, count in counts.items():
        check_int(name.removesuffix(".jsonl"), count, 0)
        if (folder / name).exists() and not overwrite:
            raise SettingsError(
                f"{folder / name}: exists; choose another --out or add --overwrite"
            )
    pairs = iter(draw(train + valid + test, size, givens, seed))
    folder.mkdir(parents=True, exist_ok=True)
    staged: dict[str, Path] = {}
    try:
        for name, count in counts.items():
            staged[name] = folder / f".{name}.partial-{os.getpid()}"
            with staged[name].open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(written(*p) for p in itertools.islice(pairs, count))
                file.flush()
                os.fsync(file.fileno())
        for name, count in counts.items():
            if count:
                staged[name].replace(folder / name)
            else:  # what was there is of another draw
                (folder / name).unlink(missing_ok=True)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
    return {name: counts[name] for name in reversed(counts) if counts[name]}


def _wording(
    size: int,
    prompt: str = "{puzzle}",
    digits: str | None = None,
    empty: str = "0",
    row: str = "\n",
) -> Callable[[str, str], str]:
    """What makes a line of JSON of a puzzle and its solution.

    Raises SettingsError for marks that could not be told apart when scored.
    """
    digits = "123456789"[:size] if digits is None else digits
    marks = digits + empty
    if len(digits) != size or len(set(digits)) != size or _cells(digits) != [*digits]:
        raise SettingsError(
            f"digits is {digits!r}; it must be {size} different characters, without "
            f"whitespace and {SEPARATORS}"
        )
    if len(empty) != 1 or empty in digits or not _cells(empty):
        raise SettingsError(
            f"empty is {empty!r}; it must be one character that is no digit, "
            f"whitespace or one of {SEPARATORS}"
        )
    if _cells(row):
        raise SettingsError(
            f"row is {row!r}; it must be of whitespace and {SEPARATORS} alone"
        )
    try:
        asked = prompt.format(puzzle="\ue000")
        (prompt + marks).encode("utf-8")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        asked = ""
    if "\ue000" not in asked:
        raise SettingsError(
            f"prompt is {prompt!r}; it must hold {{puzzle}}, and other braces twice"
        )
    written = dict(zip("0123456789", empty + digits, strict=False))
    table = str.maketrans({**written, "\n": row})

    def line(puzzle: str, solution: str) -> str:
        asked = prompt.format(puzzle=puzzle.translate(table))
        question = {"role": "user", "content": asked}
        answer = {"role": "assistant", "content": solution.translate(table)}
        return json.dumps({"messages": [question, answer]}, ensure_ascii=False) + "\n"

    return line


@dataclass(frozen=True)
class Score:
    """How right an answer is."""

    exact: bool  # the text of the solution
    cells: float  # share of the empty cells filled right
    givens: float  # share of the given cells kept


@dataclass(frozen=True)
class Puzzle:
    """A puzzle found in a prompt, with its solution: size² characters each."""

    cells: str
    solution: str

    @property
    def given(self) -> list[bool]:
        """Which cells are given."""
        return [a == b for a, b in zip(self.cells, self.solution, strict=True)]


def read(puzzle_text: str, solution_text: str) -> Puzzle:
    """The puzzle a prompt ends with, and its solution.

    A cell is any character but whitespace and |,; - the solution tells size and
    digits, and the one other mark in the puzzle stands for an empty cell.

    Raises DataError, a reason without a place.
    """
    solution = _cells(solution_text)
    size = math.isqrt(len(solution))
    if size not in grids.BOXES or size * size != len(solution):
        raise DataError(
            f"the answer has {len(solution)} cells; a Sudoku has 16, 36 or 81"
        )
    units = grids.board(size).units.tolist()
    if len(set(solution)) != size or any(
        len({solution[cell] for cell in unit}) != size for unit in units
    ):
        raise DataError(f"the answer is no solved {size}x{size} Sudoku")
    cells = _cells(puzzle_text)[-size * size :]
    if len(cells) != len(solution) or len({*cells} - {*solution}) > 1:
        raise DataError(f"the prompt does not end with a {size}x{size} Sudoku")
    if any(a != b and a in solution for a, b in zip(cells, solution, strict=True)):
        raise DataError("the answer contradicts the puzzle the prompt ends with")
    return Puzzle("".join(cells), "".join(solution))


def score(puzzle_text: str, answer_text: str, solution_text: str) -> Score:
    """Compare an answer with the solution of the puzzle a prompt ends with.

    Only characters of the puzzle count as cells of the answer; unless there are as
    many as the puzzle has, no cell is right. A share of no cells is 1.

    Raises DataError where puzzle or solution cannot be found.
    """
    puzzle = read(puzzle_text, solution_text)
    exact = answer_text.strip() == solution_text.strip()
    marks = {*puzzle.cells, *puzzle.solution}
    cells = [character for character in answer_text if character in marks]
    if len(cells) != len(puzzle.cells):
        return Score(exact, 0.0, 0.0)
    right = [a == b for a, b in zip(cells, puzzle.solution, strict=True)]
    shares = []
    for kind in (False, True):
        of = [r for r, g in zip(right, puzzle.given, strict=True) if g is kind]
        shares.append(sum(of) / len(of) if of else 1.0)
    return Score(exact, *shares)


def _cells(text: str) -> list[str]:
    """The characters of a text that may be cells."""
    return [c for c in text if not c.isspace() and c not in SEPARATORS]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--size", type=click.Choice(["4", "6", "9"]), default="9", show_default=True
)
@click.option(
    "--givens",
    default="36-46",
    show_default=True,
    metavar="LOW-HIGH",
    help="Fewest and most given cells.",
)
@click.option("--train", type=click.IntRange(0), default=3000, show_default=True)
@click.option("--valid", type=click.IntRange(0), default=200, show_default=True)
@click.option("--test", type=click.IntRange(0), default=500, show_default=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write to."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--prompt", help="Words that end with {puzzle}.  [default: {puzzle}]")
@click.option("--digits", help="Marks that stand for 1, 2, …  [default: 123456789]")
@click.option("--empty", help="Mark of an empty cell.  [default: 0]")
@click.option("--row", help="What stands between rows.  [default: a new line]")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@debug_option
@version_option
def main(debug: bool, size: str, givens: str, out: Path, **given: Any) -> None:
    """Write Sudoku puzzles with one solution each as train, valid and test JSONL."""
    with one_line_errors(debug):
        asked = {name: value for name, value in given.items() if value is not None}
        counts = write_data(out, size=int(size), givens=parse_givens(givens), **asked)
        rows = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        click.echo(f"{out}: {rows or 'nothing asked for'}")


if __name__ == "__main__":
    main()
