"""`mlx_dgemma.generate`: an answer to one prompt, drawn while it is denoised."""

import sys
from typing import Any

import click

from ..checkpoint.hub import resolve
from ..errors import SettingsError
from .common import (
    INTERRUPTED,
    Command,
    busy,
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
    "--image", "images", multiple=True, help="A picture before the prompt; repeatable."
)
@click.option("--video", "videos", multiple=True, help="A video, as a frame a second.")
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
    force: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Answer a prompt: text on stdout, numbers on stderr.

    Ctrl-C ends after the running step and keeps what is committed.
    """
    with one_line_errors(debug):
        prompt = read_prompt(prompt)
        from ..diffusion.events import Commit
        from ..diffusion.generation import stream_generate
        from ..diffusion.report import Report
        from ..loading import load
        from .render import AnswerView

        folder = resolve(model, revision)
        with busy(f"loading {model}"):
            loaded, tokenizer = load(folder, adapter_path, force=force)
        report, commit = Report(), None
        with AnswerView(tokenizer, show) as view:
            options["prompt_progress_callback"] = view.prefilled
            events = stream_generate(loaded, tokenizer, prompt, **options)
            for event in view.follow(events):
                report.add(event)
                if isinstance(event, Commit):
                    commit = event
                    view.write(event.text)
            if commit is not None and commit.finish_reason is None:
                # committed text that might have begun a stop string
                view.write(commit.pending_text)
        click.echo(report.line(), err=True)
    if view.interrupted:
        sys.exit(INTERRUPTED)


def read_prompt(prompt: str) -> str:
    """Return the prompt, from stdin for "-". Raises SettingsError if it is empty."""
    source = "--prompt"
    if prompt == "-":
        source = "stdin"
        if sys.stdin is None:
            raise SettingsError("stdin is closed; give the prompt itself")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SettingsError(
                f"stdin is not UTF-8 at byte {error.start}; convert it first"
            ) from None
    if not prompt.strip():
        raise SettingsError(f"{source} is empty; give some text")
    return prompt
