"""`mlx_dgemma.fuse`: an adapter into the weights of its model."""

from typing import Any

import click

from .common import (
    Command,
    common_options,
    hub_options,
    model_option,
    one_line_errors,
)
from .convert import print_summary, show_progress, upload_option


@click.command(cls=Command)
@model_option
@click.option(
    "--adapter-path",
    default="adapters",
    show_default=True,
    help="Folder of the adapter, ours or PEFT's.",
)
@click.option(
    "--save-path", default="fused_model", show_default=True, help="Folder to write."
)
@click.option(
    "-d",
    "--dequantize",
    "--de-quantize",
    is_flag=True,
    help="Make quantised layers dense.",
)
@hub_options
@upload_option
@click.option("--overwrite", is_flag=True, help="Replace a model at --save-path.")
@common_options
def main(
    model: str, adapter_path: str, save_path: str, debug: bool, **options: Any
) -> None:
    """Fuse an adapter into a DiffusionGemma model, as one folder to use like any.

    Layers without an adapter stay as they are, quantised ones too; those with one are
    quantised again in their own way. An interrupted run leaves nothing at --save-path.
    """
    with one_line_errors(debug):
        from ..adapters.fuse import fuse

        with show_progress("fusing") as progress:
            fused = fuse(model, adapter_path, save_path, progress=progress, **options)
        print_summary(fused)
