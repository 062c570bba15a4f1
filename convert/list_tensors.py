"""List the tensors of a checkpoint, from its headers alone.

    python convert/list_tensors.py DIR               every tensor: dtype, shape, file
    python convert/list_tensors.py DIR --markdown    one line per kind of tensor

`--write README.md` puts the Markdown table between the markers of that file.
"""

import re
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.weights import Layout, parameter_name, read_layout, tied_to
from mlx_dgemma.errors import DGemmaError

BEGIN, END = "<!-- tensors -->", "<!-- /tensors -->"


def table(layout: Layout) -> str:
    """Return a Markdown table; a tensor that stands in several layers has one row."""
    rows: dict[tuple[str, str], list[str]] = {}  # name and shape -> kinds of layers
    for name in sorted(layout.tensors, key=_natural):
        number = re.search(r"\.layers\.(\d+)\.", name)
        kind = ""
        if number and "vision" not in name:
            kind = layout.config.layers[int(number[1])].kind
        shape = " × ".join(map(str, layout.tensors[name].shape))
        general = re.sub(r"\.layers\.\d+\.", ".layers.N.", name)
        rows.setdefault((general, shape), []).append(kind)
    lines = ["| on disk | shape | layers | parameter |", "| --- | --- | --- | --- |"]
    for (name, shape), kinds in rows.items():
        one_kind = len(set(kinds)) == 1 and (kinds[0] or len(kinds) == 1)
        layers = kinds[0] if one_kind else "all"
        lines.append(f"| `{name}` | {shape} | {layers} | {_parameter(name)} |")
    return "\n".join(lines)


def _parameter(name: str) -> str:
    parameter = parameter_name(name.replace(".N.", ".0."))
    if parameter is None:
        return "tied copy, not read" if tied_to(name) else "carried, not read"
    return f"`{parameter.replace('.0.', '.N.')}`"


def _natural(name: str) -> list[str | int]:
    """Sort numbers in names by value."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdecimal() else part for part in parts]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--markdown", is_flag=True, help="One line per kind of tensor.")
@click.option(
    "--write",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Put the Markdown table between the markers of this file.",
)
def main(folder: Path, markdown: bool, write: Path | None) -> None:
    """List the tensors of a checkpoint FOLDER."""
    try:
        layout = read_layout(folder, read_config(folder))
    except DGemmaError as error:
        raise click.ClickException(str(error)) from None
    if write is not None:
        text = write.read_text()
        before, _, rest = text.partition(BEGIN)
        _, marker, after = rest.partition(END)
        if not marker:
            raise click.ClickException(f"{write}: has no {BEGIN} … {END}")
        write.write_text(f"{before}{BEGIN}\n{table(layout)}\n{END}{after}")
    elif markdown:
        click.echo(table(layout))
    else:
        for name, info in layout.tensors.items():
            dtype = str(info.dtype).removeprefix("mlx.core.")
            click.echo(f"{name}  {dtype}  {list(info.shape)}  {info.file.name}")
        click.echo(f"{len(layout.tensors)} tensors, {layout.nbytes:,} bytes")


if __name__ == "__main__":
    main()
