"""`mlx_dgemma.generate`: an answer to one prompt, drawn while it is denoised."""

import sys
from dataclasses import replace
from typing import Any

import click

from .common import (
    INTERRUPTED,
    backend_option,
    debug_option,
    one_line_errors,
    version_option,
)
from .interrupt import interruptible
from .options import settings_options


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Sampler settings default to what the checkpoint says.",
)
@click.option("--model", required=True, help="Model folder, hub id or built-in name.")
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
@click.option("--system", help="A system turn before the prompt.")
@click.option(
    "--thinking/--no-thinking",
    default=False,
    help="Let the model think first; thoughts are not printed.",
)
@click.option(
    "--seed", type=click.IntRange(0), help="Chosen and reported if not given."
)
@click.option("--stop", multiple=True, help="Text that ends the answer; repeatable.")
@settings_options()
@click.option(
    "--prefill-step-size",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Prompt tokens encoded at a time.",
)
@click.option(
    "--show", is_flag=True, help="Draw the canvas while it is denoised, in a terminal."
)
@click.option("--adapter-path", help="Folder of an adapter to put beside the weights.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@backend_option
@debug_option
@version_option
def main(
    model: str,
    prompt: str,
    show: bool,
    adapter_path: str | None,
    revision: str | None,
    debug: bool,
    **given: Any,
) -> None:
    """Answer a prompt: text on stdout, numbers on stderr.

    Ctrl-C ends after the running step and keeps what is committed.
    """
    with one_line_errors(debug):
        prompt = read_prompt(prompt)
        interrupted = answer(
            model,
            prompt,
            show=show,
            adapter_path=adapter_path,
            revision=revision,
            **given,
        )
    if interrupted:
        sys.exit(INTERRUPTED)


def read_prompt(prompt: str) -> str:
    """The prompt, from stdin for "-". Raises SettingsError if it is empty."""
    from ..errors import SettingsError

    source = "--prompt"
    if prompt == "-":
        source = "stdin"
        if sys.stdin is None:
            raise SettingsError(f"{source} is closed; give the prompt itself")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise SettingsError(
                f"{source} is not UTF-8 at byte {error.start}; convert it first"
            ) from None
    if not prompt.strip():
        raise SettingsError(f"{source} is empty; give some text")
    return prompt


def answer(
    model_name: str,
    prompt: str,
    *,
    show: bool,
    adapter_path: str | None,
    revision: str | None,
    **given: Any,
) -> bool:
    """Load, generate, print; returns whether Ctrl-C ended it."""
    from ..diffusion.events import Commit, Step
    from ..diffusion.generation import stream_generate
    from ..diffusion.report import Report
    from ..loading import load
    from .render import screen

    model, tokenizer = load(model_name, adapter_path, revision=revision)
    report = Report()
    events = stream_generate(model, tokenizer, prompt, **given)
    commits: list[Commit] = []
    with interruptible() as interrupt, screen(tokenizer, show) as view:
        for event in events:
            report.add(event)
            view.show(event)
            if isinstance(event, Commit):
                commits.append(event)
            if interrupt and not (isinstance(event, Step) and event.last):
                break
        if commits and commits[-1].finish_reason is None:
            # text that waited for the next canvas is committed all the same
            view.show(replace(commits[-1], text=commits[-1].held))
    click.echo(report.line(), err=True)
    return bool(interrupt)


if __name__ == "__main__":
    main()
