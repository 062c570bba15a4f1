"""`mlx_dgemma.generate`: an answer to one prompt, drawn while it is denoised."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

import click

from .common import (
    INTERRUPTED,
    backend_option,
    debug_option,
    one_line_errors,
    version_option,
)

if TYPE_CHECKING:
    from ..diffusion.generation import Changes

SETTINGS = [
    click.option("--max-tokens", "-m", type=click.IntRange(1), help="Most tokens."),
    click.option(
        "--canvas-length", type=click.IntRange(1, 65536), help="Tokens per canvas."
    ),
    click.option("--steps", type=click.IntRange(1), help="Most steps per canvas."),
    click.option(
        "--entropy-bound",
        type=click.FloatRange(0, min_open=True),
        help="Nats of uncertainty accepted per step.",
    ),
    click.option(
        "--t-max", type=click.FloatRange(0, min_open=True), help="First temperature."
    ),
    click.option("--t-min", type=click.FloatRange(0), help="Last temperature."),
    click.option(
        "--stability",
        type=click.IntRange(0),
        help="Equal drafts in a row before a canvas is done.",
    ),
    click.option(
        "--confidence",
        type=click.FloatRange(0),
        help="Mean entropy, in nats, below which a stable canvas is done.",
    ),
]
SHORTCUTS = [
    click.option(
        "--sampler",
        type=click.Choice(["entropy-bound", "confidence"]),
        help="confidence: reveal likely tokens for good.",
    ),
    click.option(
        "--min-probability",
        type=click.FloatRange(0),
        help="How likely a token is that --sampler confidence reveals.",
    ),
    click.option(
        "--trim-eos",
        is_flag=True,
        default=None,
        help="Drop what lies behind an accepted end of text.",
    ),
    click.option(
        "--freeze",
        is_flag=True,
        default=None,
        help="Skip positions that are sure; check all before the commit.",
    ),
    click.option(
        "--signal-top-k",
        type=click.IntRange(0),
        help="Tokens that make the self-conditioning signal, where they suffice.",
    ),
]


def settings_options(command):
    """The sampler's settings; each defaults to what the checkpoint says."""
    for option in reversed(SETTINGS + SHORTCUTS):
        command = option(command)
    return command


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Sampler settings default to what the checkpoint says.",
)
@click.option("--model", required=True, help="Model folder, hub id or built-in name.")
@click.option(
    "--prompt", "-p", required=True, help="The prompt, taken as it is; - reads stdin."
)
@click.option("--system", help="A system turn before the prompt.")
@click.option("--thinking/--no-thinking", default=False, help="Let the model think.")
@click.option(
    "--seed", type=click.IntRange(0), help="Chosen and reported if not given."
)
@click.option("--stop", multiple=True, help="Text that ends the answer; repeatable.")
@settings_options
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
    system: str | None,
    thinking: bool,
    seed: int | None,
    stop: tuple[str, ...],
    prefill_step_size: int,
    show: bool,
    adapter_path: str | None,
    revision: str | None,
    debug: bool,
    **changes,
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
            system=system,
            thinking=thinking,
            stop=stop,
            seed=seed,
            prefill_step_size=prefill_step_size,
            **changes,
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
    system: str | None,
    thinking: bool,
    stop: tuple[str, ...],
    seed: int | None,
    prefill_step_size: int,
    **changes,
) -> bool:
    """Load, generate, print; returns whether Ctrl-C ended it."""
    from ..diffusion.events import Commit, Step
    from ..diffusion.generation import load, stream_generate
    from ..diffusion.report import Report
    from .render import screen

    settings: Changes = changes  # type: ignore[assignment]
    model, tokenizer = load(model_name, adapter_path, revision=revision)
    report = Report()
    events = stream_generate(
        model,
        tokenizer,
        prompt,
        system=system,
        thinking=thinking,
        stop=stop,
        seed=seed,
        prefill_step_size=prefill_step_size,
        **settings,
    )
    commits: list[Commit] = []
    with _interrupt() as interrupt, screen(tokenizer, show) as view:
        for event in events:
            report.add(event)
            view.show(event)
            if isinstance(event, Commit):
                commits.append(event)
            if interrupt and not (isinstance(event, Step) and event.last):
                break
        if commits and commits[-1].finish_reason is None:
            # text that waited for the next canvas is committed all the same
            whole = tokenizer.decode([t for c in commits for t in c.tokens])
            rest = whole.removeprefix("".join(c.text for c in commits))
            view.show(replace(commits[-1], text=rest))
    click.echo(report.line(), err=True)
    return bool(interrupt)


@contextmanager
def _interrupt() -> Iterator[list[int]]:
    """A list that Ctrl-C puts something into; a second Ctrl-C ends at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
