"""Where the bytes of a picture or a video come from: a file, or what a caller gives.

Nothing is fetched, and no more is read than may be asked for. Knows no formats.
"""

import base64
import re
import stat
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ..errors import MediaError

MOST_BYTES = 20 * 2**20  # of one picture
SCHEME = re.compile(r"(?:data|https?|file|ftp):|[a-z][a-z\d+.-]*:(?=//)", re.I)


def shown(path: str | Path) -> str:
    """A path as a message can hold it: one line, not too long."""
    text = str(path)
    if len(text) > 200:
        text = f"{text[:60]}…"
    return text if text and text.isprintable() else repr(text)


def open_file(path: str | Path, most_bytes: int) -> BinaryIO:
    """An ordinary file, open for reading; never a pipe, which could wait for ever.

    Raises MediaError, one line.
    """
    if isinstance(path, str) and (scheme := SCHEME.match(path)):
        raise MediaError(
            f"{scheme[0].lower()} sources are not fetched; "
            "download it and give the file"
        )
    name = shown(path)
    try:
        state = Path(path).stat()
        if not stat.S_ISREG(state.st_mode):
            raise MediaError(f"{name}: not an ordinary file")
        if state.st_size > most_bytes:
            raise MediaError(_too_large(name, most_bytes))
        return Path(path).open("rb")
    except FileNotFoundError:
        raise MediaError(f"{name}: no such file") from None
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({error.strerror})") from None
    except ValueError:  # a zero byte in the path
        raise MediaError(f"{name}: no such file") from None


def name_of(source: str | Path | bytes | Image.Image) -> str:
    """What messages call a source."""
    match source:
        case bytes():
            return "bytes"
        case Image.Image():
            return "PIL image"
        case str() if _is_data(source):
            return "data: URL"
        case str() | Path():
            return shown(source)
    raise MediaError(
        "a picture is a path, bytes, a data: URL or a PIL image, "
        f"not {type(source).__name__}"
    )


def is_path(source: str | Path | bytes | Image.Image) -> bool:
    """Whether a source is the path of a file."""
    return isinstance(source, Path) or (
        isinstance(source, str) and not _is_data(source)
    )


def read_source(source: str | Path | bytes) -> bytes:
    """The bytes of a file given as a path, as bytes or as a data: URL.

    Raises MediaError, one line naming the source.
    """
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str) and _is_data(source):
        data = _read_url(source)
    else:
        data = _read_file(source)
    name = name_of(source)
    if len(data) > MOST_BYTES:
        raise MediaError(_too_large(name, MOST_BYTES))
    if not data:
        raise MediaError(f"{name}: is empty; download it again")
    return data


def _read_file(path: str | Path) -> bytes:
    with open_file(path, MOST_BYTES) as file:
        return file.read(MOST_BYTES + 1)  # it may grow meanwhile


def _is_data(source: str) -> bool:
    return source[:5].lower() == "data:"


def _read_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not re.fullmatch(r"data:image/[^,]*;base64", head, re.IGNORECASE):
        raise MediaError("data: URL: it must start with data:image/...;base64,")
    if len(body) > MOST_BYTES * 4 / 3 + 4:
        raise MediaError(_too_large("data: URL", MOST_BYTES))
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:
        raise MediaError("data: URL: broken base64; encode the file again") from None


def _too_large(name: str, most_bytes: int) -> str:
    return f"{name}: larger than {most_bytes // 2**20} MB; make it smaller"
