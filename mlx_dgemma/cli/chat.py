"""`mlx_dgemma.chat`: a conversation in the terminal, each answer drawn as it comes."""

import sys
from typing import TYPE_CHECKING, Any

import click

from .common import (
    INTERRUPTED,
    backend_option,
    debug_option,
    is_terminal,
    one_line_errors,
    version_option,
)
from .options import settings_options

if TYPE_CHECKING:
    from .keyboard import Source

# A checkpoint's own default is for one answer to one prompt, often a single canvas;
# in a chat that would cut most answers short. Text ends where the model ends it.
MAX_TOKENS = 2048


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Sampler settings default to what the checkpoint says, but --max-tokens.",
)
@click.option("--model", required=True, help="Model folder, hub id or built-in name.")
@click.option("--system", help="A system turn before the conversation.")
@click.option("--thinking/--no-thinking", default=False, help="Let the model think.")
@click.option(
    "--seed", type=click.IntRange(0), help="Of each answer.  [default: chosen anew]"
)
@settings_options(MAX_TOKENS)
@click.option(
    "--prefill-step-size",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Prompt tokens encoded at a time.",
)
@click.option(
    "--show/--no-show",
    default=True,
    help="Draw the canvas while it is denoised, in a terminal.  [default: show]",
)
@click.option("--adapter-path", help="Folder of an adapter to put beside the weights.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--prompt-cache-file", help="Keep what is encoded there for the next chat."
)
@backend_option
@debug_option
@version_option
def main(
    model: str,
    seed: int | None,
    show: bool,
    adapter_path: str | None,
    revision: str | None,
    prompt_cache_file: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Chat with a model: answers on stdout, all other words on stderr.

    /help lists commands. Enter sends, Ctrl-C stops an answer, Ctrl-D leaves. Where
    stdin is no terminal, each of its lines is a message or a command.
    """
    with one_line_errors(debug):
        from .partner import Partner
        from .talk import Talk

        source, watched = listen()
        partner = Partner(
            model,
            adapter_path=adapter_path,
            revision=revision,
            cache_file=prompt_cache_file,
            **options,
        )
        if watched:
            click.echo("/help lists commands, Ctrl-D leaves", err=True)
        talk = Talk(partner, source, seed=seed, watched=watched, show=show, debug=debug)
        interrupted = talk.run()
        partner.keep()
    if interrupted:
        sys.exit(INTERRUPTED)


def listen() -> "tuple[Source, bool]":
    """Where lines come from, and whether a person types them and sees what is said."""
    from ..errors import SettingsError
    from .keyboard import Keyboard, Lines
    from .render import is_dumb

    if sys.stdin is None:
        raise SettingsError("stdin is closed; give it some lines, or a terminal")
    watched = is_terminal(sys.stdin) and any(map(is_terminal, (sys.stdout, sys.stderr)))
    if watched and not is_dumb():
        return Keyboard(), True
    return Lines(sys.stdin.buffer, asks=watched), watched


if __name__ == "__main__":
    main()
