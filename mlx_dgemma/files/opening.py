"""The one way to a file of the user's or a stranger's: its path, its bytes."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import SettingsError


def user_path(path: str | Path) -> Path:
    """Return a path as a user wrote it, `~` being the home of a user who is known.

    Raises SettingsError for what no file can be called.
    """
    path = Path(os.path.expanduser(path))
    try:
        path.lstat()
    except ValueError:
        raise SettingsError(f"{path}: no file can have this name") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise SettingsError(f"{path}: {error.strerror}") from None
    return path


def open_regular(path: Path) -> BinaryIO:
    """Return an open file; a pipe or a device could block or never end.

    Raises OSError, also for what is no ordinary file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", str(path))
    raise OSError(errno.EINVAL, "it is no ordinary file", str(path))


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a file of at most `max_bytes`. Raises OSError."""
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        size = f"it is larger than {max_bytes // 2**20} MB"
        raise OSError(errno.EFBIG, size, str(path))
    return data
