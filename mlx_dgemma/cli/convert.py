"""`mlx_dgemma.convert`: Hugging Face safetensors to MLX weights."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .common import (
    MODEL_HELP,
    Command,
    common_options,
    hub_options,
    is_terminal,
    one_line_errors,
)

if TYPE_CHECKING:
    from ..checkpoint.convert import Converted

SECONDS_BETWEEN_LINES = 5.0
QUANTIZING = ("q_bits", "q_group_size", "q_mode", "quant_predicate")
upload_option = click.option(
    "--upload-repo", help="Hub repository to upload the result to."
)


@click.command(cls=Command)
@click.option("--hf-path", help=MODEL_HELP)
@click.option(
    "--mlx-path", default="mlx_model", show_default=True, help="Folder to write."
)
@click.option("-q", "--quantize", is_flag=True, help="Quantise the weights.")
@click.option(
    "--q-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    help="Bits per weight.  [default: the mode's]",
)
@click.option(
    "--q-group-size",
    type=click.Choice(["16", "32", "64", "128"]),
    help="Weights per scale.  [default: the mode's]",
)
@click.option(
    "--q-mode",
    type=click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"]),
    default="affine",
    show_default=True,
)
@click.option(
    "--quant-predicate",
    type=click.Choice(["uniform", "mixed"]),
    default="uniform",
    show_default=True,
    help="Recipe; mixed: experts as asked, everything else at 8 bits.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Type of what stays dense.  [default: the checkpoint's]",
)
@click.option("-d", "--dequantize", is_flag=True, help="Make quantised layers dense.")
@hub_options
@upload_option
@click.option("--overwrite", is_flag=True, help="Replace a model at --mlx-path.")
@click.option("--verify", help="Check the SHA-256 of a folder or download instead.")
@common_options
@click.pass_context
def main(
    context: click.Context,
    hf_path: str | None,
    mlx_path: str,
    verify: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Convert a DiffusionGemma checkpoint to MLX, quantised if asked.

    Tensors are read and written one at a time. An interrupted conversion leaves
    nothing at --mlx-path.
    """
    if (hf_path is None) == (verify is None):
        raise click.UsageError("give one of --hf-path and --verify")
    if options["quantize"] and options["dequantize"]:
        raise click.UsageError("--quantize and --dequantize exclude one another")
    for name in QUANTIZING:
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and not options["quantize"]:
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} is given without --quantize; add it")
    for name in ("q_bits", "q_group_size"):
        options[name] = options[name] and int(options[name])
    with one_line_errors(debug):
        from ..checkpoint import hub, sums
        from ..checkpoint.convert import convert

        if hf_path is None:
            with show_progress("checking") as progress:
                folder = hub.resolve(verify or "", options["revision"])
                checked = sums.verify(folder, progress)
            click.echo(f"{folder}: {len(checked)} files are as they were written")
            return
        with show_progress("converting") as progress:
            converted = convert(hf_path, mlx_path, progress=progress, **options)
        print_summary(converted)


def print_summary(converted: "Converted") -> None:
    """Print what was written, and what could not be done as asked."""
    from ..diffusion.report import format_bytes

    if converted.regrouped:
        sizes = map(str, sorted(set(converted.regrouped.values())))
        click.echo(
            f"{len(converted.regrouped)} layers have widths the group size does not "
            f"divide; they use groups of {', '.join(sizes)}",
            err=True,
        )
    if converted.dense:
        shown = ", ".join(converted.dense[:3]) + "…" * (len(converted.dense) > 3)
        click.echo(
            f"{len(converted.dense)} layers have widths no group size divides and stay "
            f"dense: {shown}",
            err=True,
        )
    click.echo(
        f"{converted.path}: {format_bytes(converted.bytes)} in {converted.shards} "
        f"file{'s' * (converted.shards > 1)}, "
        f"{converted.bits_per_weight:.2f} bits per weight "
        f"(from {format_bytes(converted.source_bytes)})"
    )


@contextmanager
def show_progress(verb: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback that draws a bar in a terminal, or prints a line at times."""
    from rich import progress as rich
    from rich.console import Console
    from rich.table import Column

    from ..diffusion.report import format_bytes

    fixed = Column(no_wrap=True)  # in a narrow terminal the bar alone is shorter
    bar = rich.Progress(
        rich.BarColumn(bar_width=None),
        rich.DownloadColumn(table_column=fixed),
        rich.TransferSpeedColumn(table_column=fixed),
        rich.TimeRemainingColumn(table_column=fixed),
        console=Console(stderr=True),
        expand=True,
        disable=not is_terminal(sys.stderr),
    )
    started = last_line = time.monotonic()

    def progress(name: str, done: int, total: int) -> None:
        nonlocal last_line
        if not bar.tasks:
            bar.start()  # with the first tensor, below the bars of a download
            bar.add_task("", total=total)
        bar.update(bar.tasks[0].id, completed=done)
        now = time.monotonic()
        late = now - last_line >= SECONDS_BETWEEN_LINES
        if bar.disable and (late or done == total):
            last_line = now
            rate = done / max(now - started, 1e-9)
            numbers = f"{format_bytes(done)} of {format_bytes(total)}"
            speed = f"{format_bytes(int(rate))}/s"
            left = (total - done) / max(rate, 1e-9)
            click.echo(f"{verb} {numbers}, {speed}, {left:.0f} s left", err=True)

    try:
        yield progress
    finally:
        bar.stop()
