"""Files made to harm a reader. As a program: the memory that refusing them takes."""

import io
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from mlx_dgemma.errors import MediaError
from mlx_dgemma.media.images import ImageBudget, read_picture


def refused(read: Callable[[], object]) -> str:
    """The one line that refuses a source, which must come soon."""
    started = time.process_time()
    with pytest.raises(MediaError) as caught:
        read()
    assert time.process_time() - started < 1
    message = str(caught.value)
    assert "\n" not in message and "0x" not in message and len(message) < 300
    return message


def chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png(width: int, height: int, extra: bytes = b"", rows: int | None = None) -> bytes:
    """RGB zeros, `rows` of them, compressed."""
    row = bytes(1 + 3 * width)
    packer = zlib.compressobj(1)
    rows = height if rows is None else rows
    data = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@cache
def zeros() -> bytes:
    """100 KB that unpack to 100 MB."""
    return zlib.compress(bytes(10**8), 9)


def text_bomb(kind: bytes, count: int = 1) -> bytes:
    head = b"a\0\1\0\0\0" if kind == b"iTXt" else b"a\0\0"
    return png(9, 9, chunk(kind, head + zeros()) * count)


def progressive(scans: int) -> bytes:
    """A JPEG whose last scan comes again and again."""
    file = io.BytesIO()
    Image.radial_gradient("L").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def webp(width: int, height: int) -> bytes:
    """The header of an extended file, and nothing behind it."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width: int, height: int, tail: bytes = b"") -> bytes:
    """One frame to be disposed of, of one pixel at the far corner of the screen."""
    control = b"!\xf9\4\x09\0\0\0\0"  # transparent, restore to background
    frame = b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\2\2D\1\0"
    return b"GIF89a" + struct.pack("<HH", 1, 1) + bytes(3) + tail + control + frame


JPEG = b"\xff\xd8\xff"
START = png(9, 9)[:33]  # signature and header
LARGE = "pixels; at most 50 million and 65535 a side: make it smaller"
BROKEN = "broken or truncated; save it or download it again"

# name -> (the bytes, how the refusal ends)
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "169 Mpx": (lambda: png(13_000, 13_000), f"13000 x 13000 {LARGE}"),
    "900 Mpx, header only": (lambda: png(30_000, 30_000, rows=0), LARGE),
    "longer than any JPEG": (lambda: png(65_536, 1), f"65536 x 1 {LARGE}"),
    "268 Mpx WebP": (lambda: webp(16_383, 16_383), BROKEN),
    "GIF frame far larger than its screen": (lambda: gif(65_535, 65_535), BROKEN),
    "GIF of 64 Mpx": (lambda: gif(8000, 8000), LARGE),
    "zTXt bomb": (lambda: text_bomb(b"zTXt"), BROKEN),
    "iTXt bomb": (lambda: text_bomb(b"iTXt"), BROKEN),
    "100 zTXt": (lambda: text_bomb(b"zTXt", 100), BROKEN),
    "iCCP bomb": (lambda: text_bomb(b"iCCP"), BROKEN),
    "a million chunks": (lambda: START + chunk(b"abCd", b"") * 10**6, BROKEN),
    "a million markers": (lambda: JPEG[:2] + b"\xff\xe0\0\2" * 10**6, BROKEN),
    "padding for ever": (lambda: JPEG + b"\xff" * 10**7, BROKEN),
    "a million comments": (lambda: gif(9, 9, b"!\xfe\1a\0" * 10**6), BROKEN),
    "10,000 scans": (lambda: progressive(10_000), BROKEN),
    "empty": (lambda: b"", "is empty; download it again"),
    "too many bytes": (lambda: bytes(40 * 2**20 + 1), "larger than 40 MB; make it"),
    "SVG": (
        lambda: b'<?xml version="1.0"?>\n<svg xmlns="x"/>',
        "SVG is not read; save",
    ),
    "BMP": (lambda: b"BM" + bytes(99), BROKEN),
}


def main() -> None:
    """Read every file and print the most memory that took, MB."""
    for make, _ in FILES.values():
        try:
            read_picture(make(), ImageBudget())
        except MediaError as error:
            print(error, file=sys.stderr)
    print(peak_megabytes())


def peak_megabytes() -> int:
    """Return the most memory this process has held."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
    # on Linux ru_maxrss may be that of the process this one was started from
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 2**10


if __name__ == "__main__":
    main()
