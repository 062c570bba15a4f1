"""What all commands share: one-line errors, harmless text, exit codes."""

import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import click

from .. import __version__, installation
from ..errors import DGemmaError

FAILED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141  # 128 + the signal, as shells count
JOINERS = "\u200c\u200d"  # invisible, but Persian and families of emoji need them

version_option = click.version_option(
    __version__, prog_name="mlx-dgemma", help="Show the version and exit."
)
debug_option = click.option(
    "--debug", is_flag=True, help="Show the whole traceback of an error."
)
BACKEND = f"{__name__}.backend"  # where a context keeps what --backend says


def _remember_backend(
    context: click.Context, option: click.Parameter, name: str | None
) -> None:
    context.meta[BACKEND] = name


backend_option = click.option(
    "--backend",
    type=click.Choice(["cpu", "metal", "cuda"]),
    expose_value=False,
    callback=_remember_backend,
    help="Device to compute on.  [env: MLX_DGEMMA_BACKEND; default: MLX's]",
)


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn every refusal into one line on stderr and exit code 1; Ctrl-C into 130.

    A reader that went away, as `head` does, is no error worth a line: 141. What
    --backend asks for is chosen first.
    """
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = _show_warning
        try:
            _choose_backend()
            yield
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            _drop_output()
            sys.exit(PIPE_CLOSED)
        except (DGemmaError, ImportError, MemoryError, OSError, RuntimeError) as error:
            if debug:
                raise
            fail(explain(error))


def _choose_backend() -> None:
    context = click.get_current_context(silent=True)
    if context is None or (name := context.meta.get(BACKEND)) is None:
        return
    from .. import backends  # MLX is loaded when it is needed

    backends.choose(name, "--backend")


def explain(error: BaseException) -> str:
    """What to tell a person of an error."""
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


def fail(message: str) -> None:
    """Print one line and leave with exit code 1."""
    complain(message)
    sys.exit(FAILED)


def complain(message: str) -> None:
    """Print one line."""
    click.echo("error: " + one_line(message), err=True)


def harmless(text: str) -> str:
    """`text` with nothing in it that could steer a terminal.

    C0 controls become their pictures (␛), others their code point; newlines stay.
    """
    return "".join(c if c == "\n" or not _steers(c) else _picture(c) for c in text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person watches; a closed stream is None."""
    return stream is not None and stream.isatty()


def _steers(character: str) -> bool:
    # Cf: invisible, as bidirectional overrides are; Zl, Zp: line ends; Cs: no text
    category = unicodedata.category(character)
    return category in ("Cc", "Cf", "Zl", "Zp", "Cs") and character not in JOINERS


def _picture(character: str) -> str:
    code = ord(character)
    if character == "\t":
        return "    "
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def one_line(message: str) -> str:
    """The message, harmless and without a line break."""
    return " ".join(harmless(message).split())


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    click.echo("warning: " + one_line(str(message)), err=True)


def _drop_output() -> None:
    """Point stdout and stderr nowhere: what they still hold would fail at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
