"""`mlx_dgemma.convert`: Hugging Face safetensors to MLX weights."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from .common import (
    backend_option,
    debug_option,
    is_terminal,
    one_line_errors,
    version_option,
)

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from ..checkpoint.convert import Converted, Progress

SECONDS_BETWEEN_LINES = 5.0
NUMBERS_WIDTH = 36  # of bytes, rate and time beside the bar


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--hf-path", required=True, help="Model folder, hub id or built-in name.")
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
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--upload-repo", help="Hub repository to upload the result to.")
@click.option("--overwrite", is_flag=True, help="Replace a model at --mlx-path.")
@backend_option
@debug_option
@version_option
def main(
    hf_path: str,
    mlx_path: str,
    quantize: bool,
    q_bits: str | None,
    q_group_size: str | None,
    q_mode: str,
    quant_predicate: str,
    dtype: str | None,
    dequantize: bool,
    revision: str | None,
    upload_repo: str | None,
    overwrite: bool,
    debug: bool,
) -> None:
    """Convert a DiffusionGemma checkpoint to MLX, quantised if asked.

    Tensors are read and written one at a time. An interrupted conversion leaves
    nothing at --mlx-path.
    """
    with one_line_errors(debug):
        from ..checkpoint.convert import convert

        with show_progress() as progress:
            converted = convert(
                hf_path,
                mlx_path,
                quantize=quantize,
                q_bits=None if q_bits is None else int(q_bits),
                q_group_size=None if q_group_size is None else int(q_group_size),
                q_mode=q_mode,
                quant_predicate=quant_predicate,
                dtype=dtype,
                dequantize=dequantize,
                revision=revision,
                upload_repo=upload_repo,
                overwrite=overwrite,
                progress=progress,
            )
        summarise(converted)


def summarise(converted: "Converted") -> None:
    """What was written, and what could not be done as asked."""
    from ..diffusion.report import format_bytes

    if converted.regrouped:
        sizes = sorted(set(converted.regrouped.values()))
        click.echo(
            f"{len(converted.regrouped)} layers have widths the group size does not "
            f"divide; they use groups of {', '.join(map(str, sizes))}",
            err=True,
        )
    if converted.dense:
        shown = ", ".join(converted.dense[:3])
        click.echo(
            f"{len(converted.dense)} layers have widths no group size divides and stay "
            f"dense: {shown}{'…' if len(converted.dense) > 3 else ''}",
            err=True,
        )
    click.echo(
        f"{converted.path}: {format_bytes(converted.bytes)} in {converted.shards} "
        f"{'file' if converted.shards == 1 else 'files'}, "
        f"{converted.bits_per_weight:.2f} bits per weight "
        f"(from {format_bytes(converted.source_bytes)})"
    )


@contextmanager
def show_progress(doing: str = "converting") -> Iterator["Progress"]:
    """A bar with bytes, rate and time left on a terminal; else a line now and then."""
    if not is_terminal(sys.stderr):
        yield _Lines(doing)
        return
    bar = _Bar()
    try:
        yield bar
    finally:
        bar.close()


class _Bar:
    """Progress for a person, from the first tensor on: not amid a download's bars."""

    def __init__(self) -> None:
        self.bar: Bar | None = None

    def __call__(self, name: str, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = _new_bar()
            self.bar.start()
            self.task = self.bar.add_task("", total=total)
        self.bar.update(self.task, completed=done)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _new_bar() -> "Bar":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    return Progress(
        BarColumn(max(4, min(40, console.width - NUMBERS_WIDTH))),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class _Lines:
    """Progress for logs: a line every few seconds and one at the end."""

    def __init__(self, doing: str = "converting") -> None:
        self.doing = doing
        self.started = self.last = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        from ..diffusion.report import format_bytes

        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES and done < total:
            return
        self.last = now
        rate = done / max(now - self.started, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        click.echo(
            f"{self.doing} {format_bytes(done)} of {format_bytes(total)}, "
            f"{format_bytes(int(rate))}/s, {left:.0f} s left",
            err=True,
        )


if __name__ == "__main__":
    main()
