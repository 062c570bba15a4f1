"""`mlx_dgemma`: all commands behind one name; a command's module loads when it runs."""

from importlib import import_module
from typing import Any

import click

from ..checkpoint.hub import built_in
from .common import Command, version_option

COMMANDS = {
    "generate": "Answer one prompt.",
    "chat": "Chat in the terminal.",
    "convert": "Convert a Hugging Face checkpoint to MLX, quantised if asked.",
    "lora": "Fine-tune a model on your own data.",
    "fuse": "Fuse an adapter into the weights of its model.",
    "evaluate": "Count right answers, before and after fine-tuning.",
    "benchmark": "Measure how fast this machine denoises.",
}
EPILOG = f"""\
Built-in models: {", ".join(built_in())}.

Exit codes: 0 done; 1 refused or failed, with one line on stderr that says how to fix
it; 2 a flag is unknown, out of range or does not go with another; 130 Ctrl-C;
141 the reader of stdout left.
"""


class LazyGroup(Command, click.Group):
    """COMMANDS, of which each is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        return import_module(f".{cmd_name}", __package__).main

    def format_commands(self, ctx: click.Context, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, epilog=EPILOG, invoke_without_command=True)
@version_option
@click.pass_context
def main(context: click.Context) -> None:
    """DiffusionGemma in MLX: convert, run, watch it denoise, fine-tune."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
