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
from mlx_dgemma.checkpoint.config import ModelConfig, read_config
from mlx_dgemma.checkpoint.weights import Files, parameter_name, read_layout, tied_to
from mlx_dgemma.errors import DGemmaError

BEGIN, END = "<!-- tensors -->", "<!-- /tensors -->"


def table(files: Files, config: ModelConfig) -> str:
    """Markdown: name on disk, shape, parameter here; layers of a kind in one line."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name, info in sorted(files.tensors.items(), key=lambda item: _natural(item[0])):
        number = re.search(r"\.layers\.(\d+)\.", name)
        kind = ""
        if number and "vision" not in name:
            kind = config.layers[int(number[1])].kind
        shape = " × ".join(map(str, info.shape))
        general = re.sub(r"\.layers\.\d+\.", ".layers.N.", name)
        lines.setdefault((general, shape), []).append(kind)
    rows = ["| on disk | shape | layers | parameter |", "| --- | --- | --- | --- |"]
    for (name, shape), kinds in lines.items():
        rows.append(f"| `{name}` | {shape} | {_kinds(kinds)} | {_parameter(name)} |")
    return "\n".join(rows)


def _kinds(kinds: list[str]) -> str:
    named = {kind for kind in kinds if kind}
    if not named:
        return "" if len(kinds) == 1 else "all"
    return "all" if len(named) > 1 else named.pop()


def _parameter(name: str) -> str:
    parameter = parameter_name(name.replace(".N.", ".0."))
    if parameter is None:
        return "tied copy, not read" if tied_to(name) else "carried, not read"
    return f"`{parameter.replace('.0.', '.N.')}`"


def _natural(name: str) -> list[str | int]:
    return [
        int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)
    ]


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
        config = read_config(folder)
        files = read_layout(folder, config).files
    except DGemmaError as error:
        raise click.ClickException(str(error)) from None
    if write is not None:
        text = write.read_text()
        before, _, rest = text.partition(BEGIN)
        _, marker, after = rest.partition(END)
        if not marker:
            raise click.ClickException(f"{write}: has no {BEGIN} … {END}")
        write.write_text(f"{before}{BEGIN}\n{table(files, config)}\n{END}{after}")
    elif markdown:
        click.echo(table(files, config))
    else:
        for name, info in files.tensors.items():
            dtype = str(info.dtype).removeprefix("mlx.core.")
            click.echo(f"{name}  {dtype}  {list(info.shape)}  {info.file.name}")
        click.echo(f"{len(files.tensors)} tensors, {files.nbytes:,} bytes")


if __name__ == "__main__":
    main()
