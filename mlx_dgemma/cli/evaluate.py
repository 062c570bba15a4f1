"""`mlx_dgemma.evaluate`: how many answers are right, before and after tuning."""

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..checkpoint.hub import resolve
from .common import (
    Command,
    busy,
    common_options,
    force_option,
    hub_options,
    model_option,
    one_line_errors,
)

if TYPE_CHECKING:
    from ..evaluation import Result


COUNT = click.IntRange(1)
PROGRESS = "{}, steps {}: {:,} of {:,}"  # model, step cap, answers done, answers


@click.command(cls=Command)
@model_option
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
@click.option("--count", type=COUNT, help="Rows, from the first.  [default: all]")
@click.option(
    "-b",
    "--batch-size",
    type=COUNT,
    default=50,
    help="Rows at a time.  [default: 50]",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    help="Row n: seed + n.  [default: 0]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@hub_options
@force_option
@common_options
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
    force: bool,
    debug: bool,
) -> None:
    """Answer rows of prompts and count how many answers are right.

    An answer is right if it equals the row's text, apart from whitespace around it.
    A scorer adds shares of its own. If its file has a function check(prompt,
    expected), a row for which that raises ValueError is refused at the start.
    """
    with one_line_errors(debug):
        from ..adapters import folder as adapters
        from ..evaluation import evaluate, load_scorer, read_rows, table
        from ..loading import load
        from ..performance.measure import machine

        caps = _step_caps(steps)
        rows = read_rows(data)[:count]
        score = None if scorer is None else load_scorer(scorer, rows)
        folder = resolve(model, revision)
        options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
        options |= {"scorer": score, "steps": caps}

        def measure(label: str, adapter: str | None = None) -> "list[Result]":
            with busy(f"loading {model}") as say:
                loaded, tokenizer = load(folder, adapter, force=force)
                if adapter_path is not None and adapter is None:
                    adapters.check(loaded, adapter_path)  # before the base is measured
                progress = lambda *sizes: say(PROGRESS.format(label, *sizes))  # noqa: E731
                return evaluate(loaded, tokenizer, rows, progress=progress, **options)

        results = {"base": measure("base")}
        if adapter_path is not None:  # the base is no longer in memory
            results["tuned"] = measure("tuned", adapter_path)
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


def _step_caps(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    caps = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[1-9][0-9]{0,6}", cap) for cap in caps):
        raise click.UsageError(f"--steps is {text!r}; write it like 1,2,4,8")
    return [int(cap) for cap in caps]


if __name__ == "__main__":
    main()
