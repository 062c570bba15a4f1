"""Pictures as the model sees them: checked, decoded, fitted to a budget of soft tokens
and cut into patches.

PNG, JPEG, WebP and GIF are read, and BMP, TIFF, AVIF and HEIC where the installed
Pillow can; of an animated file the first frame. Sizes are checked before anything is
decoded, and nothing is ever fetched.
"""

import base64
import hashlib
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..errors import MediaError, SettingsError
from ..files.json import Keys, read_json
from ..files.opening import open_regular

Source = str | Path | bytes | Image.Image

SOFT_TOKENS = (70, 140, 280, 560, 1120)  # budgets the model was trained with
MAX_PICTURES = 32  # in one call
MAX_BYTES = 40 * 2**20  # of one picture, and the film that phones put behind it
MAX_PIXELS = 50_000_000  # of one picture
MAX_SIDE = 65_535  # pixels; the longest a JPEG can have
MAX_READS = 100_000  # of one file; a picture needs two for each of its parts
MAX_SCANS = 64  # of a progressive JPEG, which has ten; each costs a whole picture
MAX_SEGMENTS = 10_000  # of a JPEG
MAX_PATCH, MAX_POOLING = 64, 16

# What a file starts with -> its reader. Image.open is not used: it would warn of large
# pictures before they can be refused.
READERS = {
    rb"\x89PNG\r\n\x1a\n": PngImageFile,
    rb"\xff\xd8\xff": JpegImageFile,
    rb"RIFF....WEBP": WebPImageFile,
    rb"GIF8[79]a": GifImageFile,
}
# Read by Image.open, where Pillow has them.
OTHERS = {rb"BM": "BMP", rb"II\*\0|MM\0\*": "TIFF", rb"....ftypavi[fs]": "AVIF"}
OTHERS |= {rb"....ftyp(?:hei[cx]|mif1|msf1)": "HEIF"}
FILL, SCAN_END = re.compile(rb"\xff+"), re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# What Pillow raises for broken files; Warning: under python -W error.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)
BROKEN += (EOFError, RuntimeError, struct.error, zlib.error, Warning)
BROKEN += (Image.DecompressionBombError,)
SCHEME = re.compile(r"(?:data|https?|file|ftp):|[a-z][a-z\d+.-]*:(?=//)", re.I)
UPRIGHT = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRIP_PIXELS = 2**22  # made opaque at a time, to save memory
# byte -> value, multiplied in float64 and rounded once
LEVELS = (np.arange(256) * (1 / 255)).astype(np.float32)
FIXED = {  # key of a processor file -> the only value supported
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "resample": Image.Resampling.BICUBIC.value,
}


@dataclass(frozen=True)
class ImageBudget:
    """How many soft tokens a picture may become, and how it is cut.

    soft_tokens   maximum of one picture, one of SOFT_TOKENS
    patch         side of a patch, pixels
    pooling       side of the square of patches that becomes one soft token

    Raises SettingsError naming the value that is out of range.
    """

    soft_tokens: int = 280
    patch: int = 16
    pooling: int = 3

    def __post_init__(self) -> None:
        def check(name: str, value: object, allowed: Sequence[int], what: str) -> None:
            if type(value) is not int or value not in allowed:
                raise SettingsError(f"{name} is {value!r}; it must be {what}")

        sizes = ", ".join(map(str, SOFT_TOKENS))
        check("soft_tokens", self.soft_tokens, SOFT_TOKENS, f"one of {sizes}")
        whole = "a whole number from 1 to"
        patches, poolings = range(1, MAX_PATCH + 1), range(1, MAX_POOLING + 1)
        check("patch", self.patch, patches, f"{whole} {MAX_PATCH}")
        check("pooling", self.pooling, poolings, f"{whole} {MAX_POOLING}")

    @property
    def side(self) -> int:
        """Pixels along the side of one soft token."""
        return self.patch * self.pooling

    @classmethod
    def from_checkpoint(cls, folder: Path) -> Self:
        """Read processor_config.json or else preprocessor_config.json; what they do
        not say is the default.

        Raises ConfigError naming the file and the key.
        """
        path = Path(folder) / "processor_config.json"
        keys = Keys(read_json(path) if path.exists() else {}, str(path))
        keys = keys.mapping("image_processor")
        if keys is None:
            path = path.with_name("preprocessor_config.json")
            keys = Keys(read_json(path) if path.exists() else {}, str(path))
        for key, supported in FIXED.items():
            keys.one_of(key, supported, (supported,))
        if keys.one_of("do_normalize", False, (False, True)):
            means, deviations = keys.array("image_mean"), keys.array("image_std")
            if means != [0, 0, 0] or deviations != [1, 1, 1]:
                raise keys.refuse("do_normalize", "must be false, or change nothing")
        return cls(
            keys.one_of("max_soft_tokens", cls.soft_tokens, SOFT_TOKENS),
            keys.integer("patch_size", cls.patch, 1, MAX_PATCH),
            keys.integer("pooling_kernel_size", cls.pooling, 1, MAX_POOLING),
        )

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return (columns, rows) of soft tokens for a picture of so many pixels."""
        # in this order, so that exact ratios round as they do in transformers
        factor = math.sqrt(self.soft_tokens * self.side**2 / (height * width))
        columns = math.floor(factor * width / self.side)
        rows = math.floor(factor * height / self.side)
        if rows == 0:  # a strip so thin that it fills the budget
            return self.soft_tokens, 1
        if columns == 0:
            return 1, self.soft_tokens
        return columns, rows


@dataclass(frozen=True, eq=False)
class Picture:
    """What the model sees of one picture; P patches, row by row.

    patches       (P, 3 * patch**2) float32 in [0, 1]; rows of pixels, channels last
    positions     (P, 2) int32, (x, y) of each patch
    soft_tokens   P / pooling**2
    source        the path it was read from, if it was one
    """

    patches: np.ndarray
    positions: np.ndarray
    soft_tokens: int
    source: str | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex; equal where the model sees the same."""
        digest = hashlib.sha256(repr(self.patches.shape).encode())
        for array in (self.patches, self.positions):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def read_pictures(sources: Sequence[Source], budget: ImageBudget) -> list[Picture]:
    """Return `read_picture` of each source; too many are refused before any is read.

    Raises MediaError, one line that counts pictures from 1.
    """
    if len(sources) > MAX_PICTURES:
        raise MediaError(f"{len(sources)} pictures; at most {MAX_PICTURES}: send fewer")
    pictures = []
    for number, source in enumerate(sources, 1):
        try:
            pictures.append(read_picture(source, budget))
        except MediaError as error:
            raise MediaError(f"picture {number}: {error}") from None
    return pictures


def read_picture(source: Source, budget: ImageBudget) -> Picture:
    """Return a picture turned upright, made opaque on white, fitted and cut.

    `source` is a path, the bytes of a file, a `data:image/...;base64,` URL or an image
    of Pillow's. The pixels are those of transformers' Pillow backend, bit for bit; its
    torchvision backend, the default where torchvision is there, is up to 2/255 off.

    Raises MediaError, one line naming the source.
    """
    path = None
    match source:
        case Image.Image():
            name, image = "PIL image", source
        case bytes():
            name, image = "bytes", _open(source, "bytes")
        case str() if source[:5].lower() == "data:":
            name, image = "data: URL", _open(_decode_url(source), "data: URL")
        case str() | Path():
            path, name = str(source), shown(source)
            try:
                with open_file(source, MAX_BYTES) as file:
                    data = file.read(MAX_BYTES + 1)  # it may have grown
            except OSError as error:
                why = f"cannot be read ({error.strerror})"
                raise MediaError(f"{name}: {why}") from None
            image = _open(data, name)
        case _:
            kind = type(source).__name__
            kinds = "a path, bytes, a data: URL or a PIL image"
            raise MediaError(f"a picture is {kinds}, not {kind}")
    width, height = image.size
    if width * height == 0:
        raise MediaError(f"{name}: {width} x {height} pixels hold nothing")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise MediaError(
            f"{name}: {width} x {height} pixels; at most {MAX_PIXELS // 10**6} "
            f"million and {MAX_SIDE} a side: make it smaller"
        )
    try:
        image = _to_rgb(image)
    except BROKEN:
        raise _broken(name) from None
    return fit(image, budget, path)


def fit(image: Image.Image, budget: ImageBudget, source: str | None = None) -> Picture:
    """Resize an RGB image to the budget and cut it; the aspect is kept where it can."""
    columns, rows = budget.grid(*image.size)
    size = (columns * budget.side, rows * budget.side)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    across, down = columns * budget.pooling, rows * budget.pooling
    cut = pixels.reshape(down, budget.patch, across, budget.patch, 3).swapaxes(1, 2)
    y, x = np.divmod(np.arange(down * across, dtype=np.int32), across)
    patches = LEVELS[cut.reshape(down * across, -1)]
    return Picture(patches, np.stack([x, y], axis=1), columns * rows, source)


def shown(path: str | Path) -> str:
    """A path as a message can hold it: one line, not too long."""
    text = str(path)
    text = text if len(text) <= 200 else f"{text[:60]}…"
    return text if text and text.isprintable() else repr(text)


def open_file(path: str | Path, max_bytes: int) -> BinaryIO:
    """Open an ordinary file for reading; never a pipe, which could block for ever.

    Raises MediaError, one line.
    """
    if isinstance(path, str) and (scheme := SCHEME.match(path)):
        kind = scheme[0].lower()
        raise MediaError(
            f"{kind} sources are not fetched; download it and give the file"
        )
    name = shown(path)
    try:
        file = open_regular(Path(path))
    except (FileNotFoundError, ValueError):  # ValueError: a zero byte in the path
        raise MediaError(f"{name}: no such file") from None
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({error.strerror})") from None
    if os.fstat(file.fileno()).st_size > max_bytes:
        file.close()
        raise _too_large(name, max_bytes)
    return file


class _LimitedFile(BytesIO):
    """A file that ends a reading of millions of tiny parts."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise OSError
        return super().read(size)


def _open(data: bytes, name: str) -> Image.Image:
    """The header of a file; nothing is decoded yet."""
    if len(data) > MAX_BYTES:
        raise _too_large(name, MAX_BYTES)
    if not data:
        raise MediaError(f"{name}: is empty; download it again")
    for start, reader in READERS.items():
        if re.match(start, data, re.DOTALL):
            if reader is JpegImageFile:
                data = _cut_jpeg(data, name)
            try:
                return reader(_LimitedFile(data))
            except BROKEN:
                raise _broken(name) from None
    for start, kind in OTHERS.items():
        if re.match(start, data, re.DOTALL):
            return _open_other(data, name, kind)
    if b"<svg" in data[:4096].lower():
        raise MediaError(f"{name}: SVG is not read; save it as PNG")
    raise MediaError(f"{name}: no PNG, JPEG, WebP or GIF; save it as one of them")


def _open_other(data: bytes, name: str, kind: str) -> Image.Image:
    """Open a file of a kind that not every Pillow reads."""
    Image.init()
    if kind not in Image.OPEN:
        raise MediaError(f"{name}: {kind} is not read by this Pillow; save it as PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, refused later
            return Image.open(_LimitedFile(data), formats=[kind])
    except BROKEN:
        raise _broken(name) from None


def _cut_jpeg(data: bytes, name: str) -> bytes:
    """Return a JPEG without what stands behind it, such as the film of a phone.

    Raises MediaError for more scans or segments than pictures have.
    """
    at, scans = 2, 0
    for _ in range(MAX_SEGMENTS):
        if (fill := FILL.match(data, at)) is None or fill.end() >= len(data):
            return data  # Pillow says what is wrong
        at = fill.end() - 1
        marker = data[at + 1]
        if marker == 0xD9:
            return data[: at + 2]
        alone = marker == 0x01 or 0xD0 <= marker <= 0xD8
        at += 2 if alone else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise _broken(name)
            if (end := SCAN_END.search(data, at)) is None:
                return data
            at = end.start()
    raise _broken(name)


def _decode_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not re.fullmatch(r"data:image/[^,]*;base64", head, re.IGNORECASE):
        raise MediaError("data: URL: it must start with data:image/...;base64,")
    if len(body) > MAX_BYTES * 3:  # percent-encoding may triple a sign
        raise _too_large("data: URL", MAX_BYTES)
    try:
        # in lines, or percent-encoded, as some clients send it
        text = unquote_to_bytes(body).translate(None, b" \t\r\n")
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise MediaError("data: URL: broken base64; encode the file again") from None


def _broken(name: str) -> MediaError:
    return MediaError(f"{name}: broken or truncated; save it or download it again")


def _too_large(name: str, max_bytes: int) -> MediaError:
    return MediaError(f"{name}: larger than {max_bytes // 2**20} MB; make it smaller")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode all pixels: upright, RGB, what is transparent on white."""
    image.load()
    # not by ImageOps.exif_transpose, which fails on EXIF that it cannot write again
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    opaque = Image.new("RGB", image.size)
    step = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, step):
        box = (0, top, image.width, min(top + step, image.height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        opaque.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return opaque
