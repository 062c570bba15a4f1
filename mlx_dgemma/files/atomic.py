"""Files and folders that appear under their name when they are whole and durable.

A hidden sibling is filled and then renamed. A folder's sibling carries the id of its
process, so the next process recognises and removes what a killed one left.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError

if TYPE_CHECKING:
    import mlx.core as mx

_staging: set[Path] = set()  # folders this process is filling
SPARE_BYTES = 64 * 2**20  # for tokenizer, configuration and the file system


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a hidden sibling of `path`, which then takes its name.

    The file is durable before it is renamed. A link is followed to its target; a file
    that is replaced keeps its mode. On failure `path` stays as it was and nothing is
    left beside it; an OSError names `path`.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".partial-{target.name}")
    try:
        write(partial)
        fsync(partial)
        if target.exists():
            shutil.copymode(target, partial)
        partial.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save_arrays(
    path: Path, arrays: "Mapping[str, mx.array]", metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with `write_atomically`. Raises OSError."""
    import mlx.core as mx

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # MLX would add a suffix to a name
            more = {"format": "mlx", **(metadata or {})}
            mx.save_safetensors(file, dict(arrays), more)

    write_atomically(path, write)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented, sorted JSON, as the other tools of the field do."""
    text = json.dumps(value, indent=4, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a folder to write that exists, or whose parent cannot be written to.

    Removes what killed processes left first, which may put an old folder back.
    Raises ConversionError saying how to fix it.
    """
    remove_leftovers(target.absolute())
    _check_free(target, overwrite)
    parent = target.absolute().parent
    if not parent.is_dir():
        raise ConversionError(f"{parent}: no such folder to write into")
    if not os.access(parent, os.W_OK):
        raise ConversionError(f"{parent}: cannot be written to")


def _check_free(target: Path, overwrite: bool) -> None:
    if target.is_symlink():
        raise ConversionError(f"{target}: is a link; give the folder it leads to")
    if not target.exists():
        return
    if not overwrite:
        why = "exists; choose another folder or add --overwrite"
        raise ConversionError(f"{target}: {why}")
    empty = target.is_dir() and not any(target.iterdir())
    if not empty and not (target / "config.json").is_file():
        raise ConversionError(f"{target}: is no model folder, so not overwritten")


def check_apart(source: Path, target: Path, what: str = "the model to convert") -> None:
    """Refuse to replace the folder that is read, or one around it."""
    if source.resolve().is_relative_to(target.resolve()):
        raise ConversionError(f"{target}: holds {what}; choose another folder to write")


def check_disk(target: Path, needed: int) -> None:
    """Raise ConversionError when `needed` bytes do not fit beside the target."""
    needed += SPARE_BYTES
    free = shutil.disk_usage(target.absolute().parent).free
    if needed > free:
        why = f"needs {needed:,} bytes, but only {free:,} are free there"
        raise ConversionError(f"{target}: {why}")


@contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `target` at the end, or vanishes on failure.

    Raises ConversionError if something that may not be replaced appeared meanwhile.
    """
    target = target.absolute()
    folder = target.with_name(f".{target.name}.partial-{os.getpid()}")
    if folder in _staging:
        raise ConversionError(f"{target}: another conversion to it is running")
    _staging.add(folder)
    try:
        folder.mkdir()
        yield folder
        for file in folder.iterdir():
            fsync(file)
        fsync(folder)
        _check_free(target, overwrite)
        _take_place(folder, target)
    except OSError as error:
        why = error.strerror or error
        raise ConversionError(f"{folder}: {why}; nothing was kept") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _staging.discard(folder)


def _take_place(folder: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    try:
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
    finally:  # an interrupt, too, must not leave the name empty
        if replaced.exists() and not target.exists():
            replaced.rename(target)
    fsync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside the same target.

    A folder that was being replaced when its process died is put back.
    """
    for kind in ("partial", "replaced"):
        for old in target.parent.glob(f".{escape(target.name)}.{kind}-*"):
            process = old.name.rpartition("-")[2]
            if old in _staging or not process.isdecimal() or _is_alive(int(process)):
                continue
            if kind == "replaced" and not target.exists():
                old.rename(target)
            else:
                shutil.rmtree(old, ignore_errors=True)


def _is_alive(process: int) -> bool:
    """Whether another process has that id. Our own id was used by one before us."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
