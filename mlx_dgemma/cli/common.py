"""What the commands share: options, one-line errors, exit codes, safe text."""

import json
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click

from .. import __version__, installation
from ..checkpoint.hub import built_in
from ..errors import DGemmaError, shortened
from . import interrupts
from .interrupts import INTERRUPTED as INTERRUPTED

FAILED, USAGE, PIPE_CLOSED = 1, 2, 141
FAILURES = (DGemmaError, ImportError, MemoryError, OSError, RuntimeError)
JOINERS = "\u200c\u200d"  # invisible, but Persian and families of emoji need them
BACKEND = f"{__name__}.backend"  # the key of --backend in a click context


# ---------------------------------------------------------------------- options


class Command(click.Command):
    """A command whose usage errors look like its other errors."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        try:
            code = super().main(*args, standalone_mode=False, **options)
        except click.Abort:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)
        except click.UsageError as error:
            if error.ctx is not None:
                click.echo(f"{error.ctx.get_usage()} (--help explains)", err=True)
            print_error(error.format_message())
            sys.exit(USAGE)
        sys.exit(code or 0)


def options(*decorators: Any) -> Any:
    """Return one decorator that adds these options in this order."""

    def add(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def _remember_backend(
    context: click.Context, option: click.Parameter, name: str | None
) -> None:
    context.meta[BACKEND] = name


def _go_offline(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's library reads it when imported


def _json_object(
    context: click.Context, option: click.Parameter, text: str | None
) -> dict[str, Any] | None:
    try:
        value = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict | None):
        raise click.BadParameter(f"{text!r} is not a JSON object; write '{{\"a\": 1}}'")
    return value


MODEL_HELP = f"Model folder, hub id or built-in name ({', '.join(built_in())})."
model_option = click.option("--model", required=True, help=MODEL_HELP)
hub_options = options(
    click.option("--revision", help="Branch, tag or commit of a hub id."),
    click.option(
        "--offline",
        is_flag=True,
        expose_value=False,
        callback=_go_offline,
        help="Fetch nothing.  [env: HF_HUB_OFFLINE]",
    ),
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["cpu", "metal", "cuda"]),
    expose_value=False,
    callback=_remember_backend,
    help="Device to compute on.  [env: MLX_DGEMMA_BACKEND; default: MLX's]",
)
force_option = click.option(
    "--force", is_flag=True, help="Load also what this device has no memory for."
)
debug_option = click.option(
    "--debug", is_flag=True, help="Show the whole traceback of an error."
)
version_option = click.version_option(
    __version__, prog_name="mlx-dgemma", help="Show the version and exit."
)
common_options = options(backend_option, debug_option, version_option)

POSITIVE, NOT_NEGATIVE = click.FloatRange(0, min_open=True), click.FloatRange(0)
SAMPLERS = click.Choice(["entropy-bound", "confidence"])
VALUES = [
    ("--system", str, "Text of a system turn in front."),
    ("--adapter-path", str, "Folder of an adapter to put beside the weights."),
    ("--seed", click.IntRange(0), "Of each answer; chosen and reported if not given."),
    ("--min-tokens", click.IntRange(0), "Tokens before the end; 1: no empty answers."),
    ("--canvas-length", click.IntRange(1, 65536), "Tokens per canvas."),
    ("--steps", click.IntRange(1), "Maximum denoising steps per canvas."),
    ("--entropy-bound", POSITIVE, "Nats of uncertainty accepted per step."),
    ("--t-max", POSITIVE, "First temperature."),
    ("--t-min", NOT_NEGATIVE, "Last temperature."),
    ("--stability", click.IntRange(0), "Equal drafts in a row that end a canvas."),
    ("--confidence", NOT_NEGATIVE, "Mean entropy, in nats, that ends a stable canvas."),
    ("--sampler", SAMPLERS, "confidence: reveal likely tokens for good."),
    ("--min-probability", NOT_NEGATIVE, "Of what --sampler confidence reveals."),
]


def generation_options(max_tokens: int | None = None) -> Any:
    """Options of a command that answers; settings default to the checkpoint's.

    max_tokens  a default of the command's own
    """
    return options(
        click.option(
            "--thinking/--no-thinking",
            default=False,
            help="Let the model think first; chat alone shows thoughts.",
        ),
        click.option(
            "--chat-template-args",
            "chat_template_kwargs",
            metavar="JSON",
            callback=_json_object,
            help="Variables of the chat template, as '{\"name\": true}'.",
        ),
        click.option(
            "--allow-special",
            is_flag=True,
            help="Let a message spell special tokens, as <|turn>.",
        ),
        click.option(
            "--max-tokens",
            "-m",
            type=click.IntRange(1),
            default=max_tokens,
            show_default=max_tokens is not None,
            help="Maximum tokens of the answer.",
        ),
        *(click.option(name, type=kind, help=text) for name, kind, text in VALUES),
        click.option(
            "--prefill-step-size",
            type=click.IntRange(1),
            default=2048,
            show_default=True,
            help="Prompt tokens encoded at a time.",
        ),
        hub_options,
        force_option,
    )


# ----------------------------------------------------------- errors and Ctrl-C


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Print errors and warnings as one line each and exit with the code for them.

    Selects the device of --backend first.
    """
    interrupts.install()
    with warnings.catch_warnings():
        if not debug:
            _print_warnings_once()
        try:
            context = click.get_current_context(silent=True)
            if context is not None and (name := context.meta.get(BACKEND)) is not None:
                from .. import backends  # loads MLX

                backends.choose(name, "--backend")
            yield
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # flushing what they buffer would fail at exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            sys.exit(PIPE_CLOSED)
        except FAILURES as error:
            if debug:
                raise
            print_error(explain(error))
            sys.exit(FAILED)


def _print_warnings_once() -> None:
    """Print each warning once, as one line."""
    shown: set[str] = set()

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        text = one_line(str(message))
        if text not in shown:
            shown.add(text)
            # not click.echo, which writes into the line of a spinner
            print("warning: " + text, file=sys.stderr)

    warnings.showwarning = show


def explain(error: BaseException) -> str:
    """Return what went wrong and how to fix it, for a person."""
    match error:
        case DGemmaError():
            return str(error)
        case ImportError():
            known = installation.explain(error)
            return known or f"{error}; install mlx-dgemma again"
        case MemoryError():
            return "out of memory; quantise the model or give it a larger machine"
        case OSError(filename=str(path), strerror=str(reason)):
            return f"{path}: {reason}"
        case OSError(strerror=str(reason)):
            return reason
    return f"{type(error).__name__}: {error}; --debug shows where"


def print_error(message: str) -> None:
    click.echo("error: " + one_line(message), err=True)


# --------------------------------------------------------------------- terminal


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a person sees this stream; a closed one is None."""
    return stream is not None and stream.isatty()


@contextmanager
def busy(text: str, *, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Say what takes its time, where stderr is a terminal; yields what changes it."""
    if not shown or not is_terminal(sys.stderr) or is_dumb():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(printable(text)) as status:
        yield lambda text: status.update(printable(text))


def is_dumb() -> bool:
    """Return whether this terminal knows no codes."""
    return os.environ.get("TERM", "dumb") == "dumb"


def printable(text: str) -> str:
    """Return the text without anything that could control a terminal.

    C0 controls become their pictures (␛), others their code point; newlines stay.
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    # Cf: invisible, as bidirectional overrides; Zl, Zp: line ends; Cs: surrogates
    controls = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs")
    if not controls or character in f"\n{JOINERS}":
        return character
    code = ord(character)
    if character == "\t":
        return "    "
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"<U+{code:04X}>"


def one_line(message: str) -> str:
    """Return the message, printable, without line breaks and not too long."""
    return shortened(" ".join(printable(message).split()))
