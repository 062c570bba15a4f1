"""`mlx_dgemma.generate`: an answer to one prompt, drawn while it is denoised."""

import sys
from typing import Any

import click

from .common import (
    INTERRUPTED,
    Command,
    catch_interrupt,
    common_options,
    generation_options,
    model_option,
    one_line_errors,
)


@click.command(
    cls=Command, epilog="Sampler settings default to what the checkpoint says."
)
@model_option
@click.option(
    "--prompt", "-p", required=True, help="The prompt, taken as it is; - reads stdin."
)
@click.option(
    "--image",
    "images",
    multiple=True,
    help="A picture in front of the prompt; repeatable.",
)
@click.option(
    "--video",
    "videos",
    multiple=True,
    help="A video in front of it, as a frame a second.",
)
@click.option("--stop", multiple=True, help="Text that ends the answer; repeatable.")
@click.option(
    "--show", is_flag=True, help="Draw the canvas while it is denoised, in a terminal."
)
@generation_options()
@common_options
def main(
    model: str,
    prompt: str,
    show: bool,
    adapter_path: str | None,
    revision: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Answer a prompt: text on stdout, numbers on stderr.

    Ctrl-C ends after the running step and keeps what is committed.
    """
    with one_line_errors(debug):
        prompt = read_prompt(prompt)
        from ..diffusion.events import Commit, Step
        from ..diffusion.generation import stream_generate
        from ..diffusion.report import Report
        from ..loading import load
        from .render import AnswerView

        loaded, tokenizer = load(model, adapter_path, revision=revision)
        report, commit = Report(), None
        events = stream_generate(loaded, tokenizer, prompt, **options)
        with catch_interrupt() as interrupted, AnswerView(tokenizer, show) as view:
            for event in events:
                report.add(event)
                view.show(event)
                if isinstance(event, Commit):
                    commit = event
                # after the last step of a canvas its commit comes at no cost
                last = isinstance(event, Step) and event.last
                if interrupted.is_set() and not last:
                    break
            if commit is not None and commit.finish_reason is None:
                # committed text that might have begun a stop string
                view.write(commit.held)
        click.echo(report.line(), err=True)
    if interrupted.is_set():
        sys.exit(INTERRUPTED)


def read_prompt(prompt: str) -> str:
    """Return the prompt, from stdin for "-". Raises SettingsError if it is empty."""
    from ..errors import SettingsError

    source = "--prompt"
    if prompt == "-":
        source = "stdin"
        if sys.stdin is None:
            raise SettingsError("stdin is closed; give the prompt itself")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise SettingsError(
                f"stdin is not UTF-8 at byte {error.start}; convert it first"
            ) from None
    if not prompt.strip():
        raise SettingsError(f"{source} is empty; give some text")
    return prompt
