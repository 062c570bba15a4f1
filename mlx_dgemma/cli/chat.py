"""`mlx_dgemma.chat`: a conversation in the terminal, each answer drawn as it comes."""

import os
import sys
from typing import Any

import click

from ..checkpoint.hub import resolve
from .common import (
    INTERRUPTED,
    Command,
    busy,
    common_options,
    generation_options,
    model_option,
    one_line_errors,
)

# The default of a checkpoint is often a single canvas, too short for a chat.
MAX_TOKENS = 2048


@click.command(
    cls=Command,
    epilog="Sampler settings default to what the checkpoint says, but --max-tokens.",
)
@model_option
@click.option(
    "--show/--no-show",
    default=True,
    help="Draw the canvas while it is denoised, in a terminal.  [default: show]",
)
@click.option(
    "--prompt-cache-file", help="File of the encoded prompt, for the next chat."
)
@generation_options(MAX_TOKENS)
@common_options
def main(
    model: str,
    seed: int | None,
    show: bool,
    adapter_path: str | None,
    revision: str | None,
    force: bool,
    prompt_cache_file: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Chat with a model: answers on stdout, all other words on stderr.

    /help lists commands. Enter sends, Ctrl-C stops an answer, Ctrl-D leaves. Where
    stdin is no terminal, each of its lines is a message or a command.
    """
    with one_line_errors(debug):
        from ..diffusion.conversation import Conversation
        from ..loading import load
        from .chat_input import open_input
        from .chat_loop import Chat

        lines, interactive = open_input()
        folder = resolve(model, revision)
        with busy(f"loading {model}", shown=interactive):
            loaded, tokenizer = load(folder, adapter_path, force=force)
        conversation = Conversation(loaded, tokenizer, **options)
        if prompt_cache_file is not None and os.path.exists(prompt_cache_file):
            conversation.load(prompt_cache_file)
        if interactive:
            click.echo("/help lists commands, Ctrl-D leaves", err=True)
        chat = Chat(conversation, lines, seed, interactive, show, debug)
        interrupted = chat.run()
        if prompt_cache_file is not None and conversation.messages:
            conversation.save(prompt_cache_file)
    if interrupted:
        sys.exit(INTERRUPTED)
