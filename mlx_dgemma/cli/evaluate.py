"""`mlx_dgemma.evaluate`: how many answers are right, before and after tuning."""

import json
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .common import (
    MODEL_HELP,
    Command,
    backend_option,
    debug_option,
    is_terminal,
    one_line_errors,
    version_option,
)

if TYPE_CHECKING:
    from ..evaluation import Progress, Result, Row


@click.command(cls=Command)
@click.option("--model", required=True, help=MODEL_HELP)
@click.option(
    "--data", required=True, help="A .jsonl of rows, or a folder with test.jsonl."
)
@click.option(
    "--adapter-path",
    metavar="DIR",
    help="Adapter folder; the tuned model is measured beside the base.",
)
@click.option(
    "--scorer",
    metavar="FILE.py:FUNCTION",
    help="Called with (prompt, answer, expected); returns named shares.",
)
@click.option(
    "--steps",
    metavar="N,N,…",
    help="Most steps per canvas, one measurement each.  [default: the checkpoint's]",
)
@click.option(
    "--count", type=click.IntRange(1), help="Rows, from the first.  [default: all]"
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
    help="Row n is denoised with seed + n.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@backend_option
@debug_option
@version_option
def main(
    model: str,
    data: str,
    adapter_path: str | None,
    scorer: str | None,
    steps: str | None,
    count: int | None,
    batch_size: int,
    seed: int,
    as_json: bool,
    revision: str | None,
    debug: bool,
) -> None:
    """Answer rows of prompts and count how many answers are right.

    An answer is right if it equals the row's text, apart from whitespace around it.
    A scorer adds shares of its own. If its file has a function check(prompt,
    expected), a row for which that raises ValueError is refused at the start.
    """
    with one_line_errors(debug):
        from ..evaluation import check_rows, load_scorer, read_rows, table
        from ..performance.measure import machine

        caps = _step_caps(steps)
        rows = read_rows(data)[:count]
        score, check = (None, None) if scorer is None else load_scorer(scorer)
        if check is not None:
            check_rows(rows, check)
        how = {"scorer": score, "steps": caps, "batch_size": batch_size, "seed": seed}
        results = _measure(model, revision, adapter_path, rows, **how)
        if not as_json:
            click.echo("\n".join(table(results)))
            return
        found = {
            "machine": machine(),
            "model": model,
            "adapter_path": adapter_path,
            "data": data,
            "scorer": scorer,
            "count": len(rows),
            "batch_size": batch_size,
            "seed": seed,
            "results": {k: [asdict(r) for r in v] for k, v in results.items()},
        }
        click.echo(json.dumps(found, indent=2))


def _measure(
    model: str, revision: str | None, adapter: str | None, rows: list["Row"], **how: Any
) -> dict[str, list["Result"]]:
    """Evaluate the base model, and the tuned one if there is an adapter."""
    from ..adapters import folder as adapters
    from ..evaluation import evaluate
    from ..loading import load

    loaded, tokenizer = load(model, revision=revision)
    if adapter is not None:
        adapters.check(loaded, adapter)  # before the base model is measured
    results = {
        "base": evaluate(loaded, tokenizer, rows, progress=_progress("base"), **how)
    }
    if adapter is not None:
        del loaded  # the tuned model needs the memory
        loaded, tokenizer = load(model, adapter, revision=revision)
        results["tuned"] = evaluate(
            loaded, tokenizer, rows, progress=_progress("tuned"), **how
        )
    return results


def _step_caps(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    caps = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[1-9][0-9]{0,6}", cap) for cap in caps):
        raise click.UsageError(f"--steps is {text!r}; write it like 1,2,4,8")
    return [int(cap) for cap in caps]


def _progress(label: str) -> "Progress | None":
    """Return what draws the progress of a step cap, if stderr is a terminal."""
    if not is_terminal(sys.stderr):
        return None

    def show(steps: int, done: int, count: int) -> None:
        line = f"\r{label}, steps {steps}: {done:,} of {count:,}"
        click.echo(line, nl=done == count, err=True)

    return show


if __name__ == "__main__":
    main()
