"""What all commands share: one-line errors, one-line warnings, exit codes."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..errors import DGemmaError

FAILED, INTERRUPTED = 1, 130

debug_option = click.option(
    "--debug", is_flag=True, help="Show the whole traceback of an error."
)


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn every refusal into one line on stderr and exit code 1; Ctrl-C into 130."""
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = _show_warning
        try:
            yield
        except DGemmaError as error:
            if debug:
                raise
            fail(str(error))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)
        except ImportError as error:
            if debug or "mlx" not in str(error):
                raise
            fail("MLX has no backend here; install mlx-dgemma[cpu] or [cuda13]")
        except (MemoryError, OSError) as error:
            if debug:
                raise
            fail(f"{type(error).__name__}: {error}")


def fail(message: str) -> None:
    """Print one line and leave with exit code 1."""
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(FAILED)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    click.echo("warning: " + " ".join(str(message).split()), err=True)
