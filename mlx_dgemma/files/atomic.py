"""Files and folders that appear under their name when they are whole and durable.

A hidden sibling of a random name is filled, locked for as long as its writer lives, and
then takes the name. What a killed writer left has no lock, so the next one removes it.
"""

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError

if TYPE_CHECKING:
    import mlx.core as mx

SPARE_BYTES = 64 * 2**20  # for tokenizer, configuration and the file system
PARTIAL, REPLACED = ".partial-", ".replaced-"  # and eight random digits
OURS = re.compile(r".*\.(partial|replaced)-[0-9a-f]{8}")
LOCK = ".lock"  # in a folder that is filled or replaced
# what file systems without it answer to fsync of a folder
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


def write_atomically(
    path: Path, write: Callable[[Path], object], *, private: bool = False
) -> None:
    """Have `write` fill a hidden sibling of `path`, which then takes its name.

    The file is durable before it is renamed. A link is followed to its target; a file
    that is replaced keeps its mode; a new one is for its owner alone if `private`. On
    failure `path` stays as it was and nothing is left beside it; an OSError names
    `path`.
    """
    target = Path(os.path.realpath(path))
    try:
        remove_partials(target.parent)
        partial, handle = _open_partial(target, 0o600 if private else 0o666)
        try:
            write(partial)
            os.fsync(handle)
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
            fsync_folder(target.parent)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            os.close(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _open_partial(target: Path, mode: int) -> tuple[Path, int]:
    """Return a new hidden sibling of a file, opened and locked."""
    while True:
        partial = target.with_name(PARTIAL + secrets.token_hex(4))
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        try:
            _lock(handle)
        except BlockingIOError:  # another process takes it for a leftover
            os.close(handle)
            continue
        except OSError:  # a file system without locks
            return partial, handle
        if partial.exists():
            return partial, handle
        os.close(handle)


def save_arrays(
    path: Path,
    arrays: "Mapping[str, mx.array]",
    metadata: dict[str, str] | None = None,
    *,
    private: bool = False,
) -> None:
    """Write a safetensors file with `write_atomically`. Raises OSError."""
    import mlx.core as mx

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # MLX would add a suffix to a name
            more = {"format": "mlx", **(metadata or {})}
            mx.save_safetensors(file, dict(arrays), more)

    write_atomically(path, write, private=private)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented, sorted JSON, as the other tools of the field do."""
    text = json.dumps(value, indent=4, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Make a file durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    try:
        fsync(path)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


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

    Raises ConversionError if another one is being filled for the same target, or if
    something that may not be replaced appeared meanwhile.
    """
    target = target.absolute()
    folder = target.with_name(f".{target.name}{PARTIAL}{secrets.token_hex(4)}")
    handle = None
    try:
        folder.mkdir()
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with suppress(OSError):
            _lock(handle)
        if remove_leftovers(target, besides=folder):
            raise ConversionError(f"{target}: another conversion to it is running")
        yield folder
        for file in folder.iterdir():
            fsync(file)
        fsync_folder(folder)
        _check_free(target, overwrite)
        _take_place(folder, target)
    except OSError as error:
        why = error.strerror or error
        raise ConversionError(f"{target}: {why}; nothing was kept") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _take_place(folder: Path, target: Path) -> None:
    """Give `folder` the name of `target`, which is never empty for long."""
    replaced = target.with_name(folder.name.replace(PARTIAL, REPLACED))
    try:
        if not target.exists():
            folder.rename(target)
        else:
            (target / LOCK).touch()  # what is replaced is ours to remove
            if not exchange(folder, target):
                target.rename(replaced)
                folder.rename(target)
    finally:  # an interrupt, too, must not leave the name empty
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        (target / LOCK).unlink(missing_ok=True)
    fsync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; return False where the system cannot."""
    libc = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "linux":  # AT_FDCWD, RENAME_EXCHANGE
            return libc.renameat2(-100, names[0], -100, names[1], 2) == 0
        return libc.renamex_np(*names, 2) == 0  # RENAME_SWAP
    except AttributeError:
        return False


def remove_leftovers(target: Path, besides: Path | None = None) -> bool:
    """Remove what killed processes left beside a target; whether one is alive.

    A folder that was being replaced when its process died is put back. What has no
    lock file is nobody's leftover.
    """
    alive = False
    for kind in (PARTIAL, REPLACED):
        for old in target.parent.glob(f".{escape(target.name)}{kind}*"):
            if old == besides or not OURS.fullmatch(old.name):
                continue
            if (handle := _try_lock(old / LOCK)) is None:
                alive |= (old / LOCK).exists()
                continue
            if kind == REPLACED and not target.exists():
                old.rename(target)
            else:
                shutil.rmtree(old, ignore_errors=True)
            os.close(handle)
    if not alive and target.is_dir():
        (target / LOCK).unlink(missing_ok=True)  # of one that died after it
    return alive


def remove_partials(folder: Path) -> None:
    """Remove the unfinished files in a folder whose writers were killed."""
    for partial in folder.glob(f"{PARTIAL}*"):
        handle = _try_lock(partial) if OURS.fullmatch("." + partial.name) else None
        if handle is not None:
            partial.unlink(missing_ok=True)
            os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file, which is made; yield whether nobody else holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _lock(handle)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    """Lock an open file until it is closed.

    Raises BlockingIOError if another process has locked it, another OSError where the
    file system has no locks.
    """
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _try_lock(path: Path) -> int | None:
    """Return an open and locked file; None if its writer may be alive."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        _lock(handle)
    except OSError:
        os.close(handle)
        return None
    return handle
