"""`mlx_dgemma.fuse`: an adapter into the weights of its model."""

import click

from .common import backend_option, debug_option, one_line_errors, version_option
from .convert import show_progress, summarise


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="Model folder, hub id or built-in name.")
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
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--upload-repo", help="Hub repository to upload the result to.")
@click.option("--overwrite", is_flag=True, help="Replace a model at --save-path.")
@backend_option
@debug_option
@version_option
def main(
    model: str,
    adapter_path: str,
    save_path: str,
    dequantize: bool,
    revision: str | None,
    upload_repo: str | None,
    overwrite: bool,
    debug: bool,
) -> None:
    """Fuse an adapter into a DiffusionGemma model, as one folder to use like any.

    Layers without an adapter stay as they are, quantised ones too; those with one are
    quantised again in their own way. An interrupted run leaves nothing at --save-path.
    """
    with one_line_errors(debug):
        from ..adapters.fuse import fuse

        with show_progress("fusing") as progress:
            fused = fuse(
                model,
                adapter_path,
                save_path,
                dequantize=dequantize,
                revision=revision,
                upload_repo=upload_repo,
                overwrite=overwrite,
                progress=progress,
            )
        summarise(fused)


if __name__ == "__main__":
    main()
