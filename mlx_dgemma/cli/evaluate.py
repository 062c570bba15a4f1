"""`mlx_dgemma.evaluate`: how many answers are right, before and after tuning."""

import json
import re
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from .common import (
    backend_option,
    debug_option,
    is_terminal,
    one_line_errors,
    version_option,
)

if TYPE_CHECKING:
    from ..evaluation.evaluate import Progress, Result, Row

DRAWN = 500  # puzzles when --count does not say
ANOTHER = 2**32  # added to --seed: data sets written with it hold other puzzles


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Give one of --data and --givens.",
)
@click.option("--model", required=True, help="Model folder, hub id or built-in name.")
@click.option("--data", help="A .jsonl of rows, or a folder with test.jsonl.")
@click.option(
    "--givens",
    metavar="LOW-HIGH",
    help="Draw Sudoku of so many given cells; the model may have seen some.",
)
@click.option(
    "--size", type=click.Choice(["4", "6", "9"]), help="Of --givens.  [default: 9]"
)
@click.option(
    "--adapter-path",
    metavar="DIR",
    help="Adapter folder; the tuned model is measured beside the base.",
)
@click.option(
    "--task",
    type=click.Choice(["exact", "sudoku"]),
    help="sudoku: cells and givens too.  [default: exact; sudoku with --givens]",
)
@click.option(
    "--steps",
    metavar="N,N,…",
    help="Most steps per canvas, one measurement each.  [default: the checkpoint's]",
)
@click.option(
    "--count",
    type=click.IntRange(1),
    help=f"Rows, from the first.  [default: all; {DRAWN} with --givens]",
)
@click.option(
    "-b",
    "--batch-size",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Rows denoised together.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the puzzles drawn; row n is denoised with seed + n.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@backend_option
@debug_option
@version_option
def main(debug: bool, **given: Any) -> None:
    """Answer rows of prompts and tell how many answers are right.

    An answer is right if it is the row's text, whitespace around it left aside.
    """
    options = Options(**given)
    with one_line_errors(debug):
        options.check()
        rows, caps = _rows(options), _caps(options.steps)
        results = _measure(options, rows, caps)
        if options.as_json:
            click.echo(json.dumps(_found(options, len(rows), results), indent=2))
        else:
            from ..evaluation.evaluate import table

            click.echo("\n".join(table(results)))


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    model: str
    data: str | None
    givens: str | None
    size: str | None
    adapter_path: str | None
    task: str | None
    steps: str | None
    count: int | None
    batch_size: int
    seed: int
    as_json: bool
    revision: str | None

    def check(self) -> None:
        """Raise SettingsError for flags that do not go together."""
        from ..errors import SettingsError

        if (self.data is None) == (self.givens is None):
            raise SettingsError("give one of --data and --givens")
        if self.size is not None and self.givens is None:
            raise SettingsError("--size needs --givens: --data has its own size")

    @property
    def measured(self) -> str:
        """The task."""
        return self.task or ("exact" if self.givens is None else "sudoku")


def _caps(text: str | None) -> list[int | None]:
    """The step caps of --steps. Raises SettingsError."""
    from ..errors import SettingsError

    if text is None:
        return [None]
    caps = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[1-9][0-9]{0,6}", cap) for cap in caps):
        raise SettingsError(f"--steps is {text!r}; write it like 1,2,4,8")
    return [int(cap) for cap in caps]


def _rows(options: Options) -> list["Row"]:
    """The rows asked for, read or drawn."""
    from ..evaluation import sudoku
    from ..evaluation.evaluate import Row, check_sudoku, read_rows

    if options.data is not None:
        rows = read_rows(options.data)[: options.count]
    else:
        assert options.givens is not None
        givens = sudoku.parse_givens(options.givens)
        size, count = int(options.size or 9), options.count or DRAWN
        drawn = sudoku.draw(count, size, givens, ANOTHER + options.seed)
        rows = [Row(puzzle, solution) for puzzle, solution in drawn]
    if options.measured == "sudoku":
        check_sudoku(rows)
    return rows


def _measure(
    options: Options, rows: list["Row"], caps: list[int | None]
) -> dict[str, list["Result"]]:
    """Results by step cap, of the base and of the tuned model if there is one."""
    from ..adapters import folder as adapters
    from ..evaluation.evaluate import evaluate
    from ..loading import load

    def measure(label: str) -> list["Result"]:
        return evaluate(
            model,
            tokenizer,
            rows,
            task=options.measured,
            steps=caps,
            batch_size=options.batch_size,
            seed=options.seed,
            progress=_progress(label),
        )

    name, revision, adapter = options.model, options.revision, options.adapter_path
    model, tokenizer = load(name, revision=revision)
    if adapter is None:
        return {"base": measure("base")}
    adapters.check(model, adapter)  # now, not after the base was measured
    results = {"base": measure("base")}
    del model  # the next one needs the memory
    model, tokenizer = load(name, revision=revision, adapter_path=adapter)
    return {**results, "tuned": measure("tuned")}


def _progress(label: str) -> "Progress | None":
    """Draws how far a step cap is, where a person watches."""
    if not is_terminal(sys.stderr):
        return None

    def show(steps: int, done: int, count: int) -> None:
        line = f"\r{label}, steps {steps}: {done:,} of {count:,}"
        click.echo(line, nl=done == count, err=True)

    return show


def _found(
    options: Options, count: int, results: dict[str, list["Result"]]
) -> dict[str, Any]:
    """What --json prints."""
    from ..performance.measure import Machine

    drawn = None
    if options.givens is not None:
        drawn = {"size": int(options.size or 9), "givens": options.givens}
    return {
        "machine": asdict(Machine()),
        "model": options.model,
        "adapter_path": options.adapter_path,
        "data": options.data,
        "drawn": drawn,
        "task": options.measured,
        "count": count,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "results": {
            name: [asdict(r) for r in found] for name, found in results.items()
        },
    }


if __name__ == "__main__":
    main()
