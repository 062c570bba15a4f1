"""Pictures as the model sees them: read with care, fitted to a budget of soft tokens,
cut into patches. Knows nothing of prompts or of the model.

PNG, JPEG, WebP and GIF are read, of an animated file the first frame. Sizes are checked
before anything is decoded, and nothing is ever fetched.
"""

import hashlib
import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Self

import numpy as np
from PIL import ExifTags, Image
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..errors import MediaError, SettingsError
from ..files.json import Keys, read_json
from .sources import is_path, name_of, read_source

SOFT_TOKENS = (70, 140, 280, 560, 1120)  # budgets the model was trained with
MOST = 32  # pictures in one call
MOST_PIXELS = 50_000_000  # of one picture
MOST_SIDE = 65_535  # pixels; the longest a JPEG can have
MOST_READS = 100_000  # of one file; a picture needs two for each of its parts
MOST_SCANS = 64  # of a progressive JPEG, which has ten; each costs a whole picture
MOST_PATCH, MOST_POOLING = 64, 16

# what a file starts with -> what reads it; asked by hand, since Image.open would warn
# of large pictures before they can be refused
READERS = {
    rb"\x89PNG\r\n\x1a\n": PngImageFile,
    rb"\xff\xd8\xff": JpegImageFile,
    rb"RIFF....WEBP": WebPImageFile,
    rb"GIF8[79]a": GifImageFile,
}
# what Pillow raises for files that are not as they should be; Warning: python -W error
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)
BROKEN += (EOFError, struct.error, zlib.error, Image.DecompressionBombError, Warning)
TURNS = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHITE = (255, 255, 255, 255)
STRIP_PIXELS = 2**22  # made opaque at a time
# byte -> value, multiplied in float64 and rounded once
LEVELS = (np.arange(256) * (1 / 255)).astype(np.float32)
# what a processor file may say of the preparation -> the only value supported
FIXED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "resample": Image.Resampling.BICUBIC.value,
}


@dataclass(frozen=True)
class Budget:
    """How many soft tokens a picture may become, and how it is cut.

    soft_tokens   most soft tokens of one picture, one of SOFT_TOKENS
    patch         side of a patch, pixels
    pooling       side of the square of patches that becomes one soft token

    Raises SettingsError naming the value that is out of range.
    """

    soft_tokens: int = 280
    patch: int = 16
    pooling: int = 3

    def __post_init__(self) -> None:
        if self.soft_tokens not in SOFT_TOKENS:
            raise SettingsError(
                f"soft_tokens is {self.soft_tokens!r}; it must be one of "
                + ", ".join(map(str, SOFT_TOKENS))
            )
        ranges = {"patch": (self.patch, MOST_PATCH)}
        ranges["pooling"] = (self.pooling, MOST_POOLING)
        for name, (value, most) in ranges.items():
            if type(value) is not int or not 1 <= value <= most:
                raise SettingsError(
                    f"{name} is {value!r}; it must be a whole number from 1 to {most}"
                )

    @property
    def side(self) -> int:
        """Pixels along the side of one soft token."""
        return self.patch * self.pooling

    @classmethod
    def of(cls, folder: Path) -> Self:
        """What a checkpoint says, in processor_config.json or else in
        preprocessor_config.json; the defaults where it says nothing.

        Raises ConfigError naming the file and the key.
        """
        keys = _processor_keys(Path(folder))
        for key, supported in FIXED.items():
            keys.one_of(key, supported, (supported,))
        if keys.one_of("do_normalize", False, (False, True)):
            means, deviations = keys.array("image_mean"), keys.array("image_std")
            if means != [0, 0, 0] or deviations != [1, 1, 1]:
                raise keys.refuse("do_normalize", "must be false, or change nothing")
        return cls(
            keys.one_of("max_soft_tokens", cls.soft_tokens, SOFT_TOKENS),
            keys.integer("patch_size", cls.patch, 1, MOST_PATCH),
            keys.integer("pooling_kernel_size", cls.pooling, 1, MOST_POOLING),
        )

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of soft tokens for a picture of so many pixels."""
        # in this order, so that exact ratios round as they do in transformers
        factor = math.sqrt(self.soft_tokens * self.side**2 / (height * width))
        columns = math.floor(factor * width / self.side)
        rows = math.floor(factor * height / self.side)
        if rows == 0:  # a strip so thin that it fills the budget
            return self.soft_tokens, 1
        if columns == 0:
            return 1, self.soft_tokens
        return columns, rows


def _processor_keys(folder: Path) -> Keys:
    """What a folder says of its image processor, possibly nothing."""
    path = folder / "processor_config.json"
    if path.exists():
        nested = Keys(read_json(path), str(path)).mapping("image_processor")
        if nested is not None:
            return nested
    path = folder / "preprocessor_config.json"
    return Keys(read_json(path) if path.exists() else {}, str(path))


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


def read_pictures(
    sources: Sequence[str | Path | bytes | Image.Image], budget: Budget
) -> list[Picture]:
    """`read_picture` of each source; too many are refused before any is read.

    Raises MediaError, one line that counts pictures from 1.
    """
    if len(sources) > MOST:
        raise MediaError(f"{len(sources)} pictures; at most {MOST}: send fewer")
    pictures = []
    for number, source in enumerate(sources, 1):
        try:
            pictures.append(read_picture(source, budget))
        except MediaError as error:
            raise MediaError(f"picture {number}: {error}") from None
    return pictures


def read_picture(source: str | Path | bytes | Image.Image, budget: Budget) -> Picture:
    """A picture turned upright, made opaque on white, fitted and cut.

    `source` is a path, the bytes of a file, a `data:image/...;base64,` URL or an image
    of Pillow's. The pixels are those of transformers' Pillow backend, bit for bit; its
    torchvision backend, the default where torchvision is there, is up to 2/255 off.

    Raises MediaError, one line naming the source.
    """
    name = name_of(source)
    if isinstance(source, Image.Image):
        image = source
    else:
        image = _open(read_source(source), name)
    width, height = image.size
    if width * height == 0:
        raise MediaError(f"{name}: {width} x {height} pixels hold nothing")
    if width * height > MOST_PIXELS or max(width, height) > MOST_SIDE:
        raise MediaError(
            f"{name}: {width} x {height} pixels; at most {MOST_PIXELS // 10**6} "
            f"million and {MOST_SIDE} a side: make it smaller"
        )
    picture = fit(_decode(image, name), budget)
    return replace(picture, source=str(source)) if is_path(source) else picture


def fit(image: Image.Image, budget: Budget) -> Picture:
    """An RGB image resized to the budget and cut; the aspect is kept where it can."""
    columns, rows = budget.grid(*image.size)
    size = (columns * budget.side, rows * budget.side)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    across, down = columns * budget.pooling, rows * budget.pooling
    cut = pixels.reshape(down, budget.patch, across, budget.patch, 3).swapaxes(1, 2)
    y, x = np.divmod(np.arange(down * across, dtype=np.int32), across)
    patches = LEVELS[cut.reshape(down * across, -1)]
    return Picture(patches, np.stack([x, y], axis=1), columns * rows)


class _Patience(BytesIO):
    """A file that ends a reading of millions of tiny parts."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MOST_READS:
            raise OSError
        return super().read(size)


def _open(data: bytes, name: str) -> ImageFile:
    """The header of a file; nothing is decoded yet."""
    for start, reader in READERS.items():
        if re.match(start, data, re.DOTALL):
            if reader is JpegImageFile and data.count(b"\xff\xda") > MOST_SCANS:
                raise _broken(name)
            try:
                return reader(_Patience(data))
            except BROKEN:
                raise _broken(name) from None
    if b"<svg" in data[:4096].lower():
        raise MediaError(f"{name}: SVG is not read; save it as PNG")
    raise MediaError(f"{name}: no PNG, JPEG, WebP or GIF; save it as one of them")


def _broken(name: str) -> MediaError:
    return MediaError(f"{name}: broken or truncated; save it or download it again")


def _decode(image: Image.Image, name: str) -> Image.Image:
    """All pixels, upright, in RGB."""
    try:
        image.load()
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        if turn is not None:
            image = image.transpose(turn)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            return _on_white(image)
        return image.convert("RGB")
    except BROKEN:
        raise _broken(name) from None


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of an image with transparency; in strips, or it would be held three times."""
    opaque = Image.new("RGB", image.size)
    step = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, step):
        box = (0, top, image.width, min(top + step, image.height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, WHITE)
        opaque.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return opaque
