"""Pictures: what the model sees of them, and what is refused before it can harm."""

import base64
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hostile
import numpy as np
import pytest
from PIL import ExifTags, Image

from mlx_dgemma.errors import ConfigError, MediaError, SettingsError
from mlx_dgemma.media import images
from mlx_dgemma.media.images import (
    SOFT_TOKENS,
    ImageBudget,
    read_picture,
    read_pictures,
)

SMALL = ImageBudget(soft_tokens=70)
WIDE, HIGH = 480, 336  # 10 x 7 soft tokens of 48 pixels: not resized at SMALL


def noise(width: int = WIDE, height: int = HIGH, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(width * height)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(source, budget: ImageBudget = SMALL) -> np.ndarray:
    """The pixels the model sees, put together again: (H, W, 3) of whole bytes."""
    picture = read_picture(source, budget)
    columns, rows = picture.positions.max(axis=0) + 1
    side = budget.patch
    canvas = np.zeros((rows * side, columns * side, 3))
    for values, (x, y) in zip(picture.patches, picture.positions, strict=True):
        square = values.reshape(side, side, 3)
        canvas[y * side : (y + 1) * side, x * side : (x + 1) * side] = square
    return np.round(canvas * 255).astype(np.uint8)


def refusal(source) -> str:
    """The one line that refuses a source, which must come soon."""
    started = time.perf_counter()
    with pytest.raises(MediaError) as caught:
        read_picture(source, ImageBudget())
    assert time.perf_counter() - started < 1
    message = str(caught.value)
    assert "\n" not in message and "0x" not in message and len(message) < 300
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


GRIDS = {  # (soft tokens, width, height) -> (columns, rows)
    (280, 640, 480): (19, 14),
    (280, 4032, 3024): (19, 14),
    (280, 64, 48): (19, 14),
    (280, 1, 1): (16, 16),
    (280, 1080, 1920): (12, 22),
    (280, 1000, 700): (20, 14),
    (280, 476, 680): (13, 19),  # 14 x 20 but for the rounding of floats
    (70, 385, 22): (34, 2),  # 35 x 2
    (70, 287, 410): (7, 9),  # 7 x 10
    (280, 2000, 1): (280, 1),
    (280, 1, 2000): (1, 280),
    (280, 5000, 37): (194, 1),
    (280, 37, 5000): (1, 194),
    (280, 999, 3): (280, 1),
    (280, 839, 3): (279, 1),
    (560, 5000, 37): (275, 2),
    (1120, 640, 480): (38, 28),
    (140, 700, 1000): (9, 14),
    (70, WIDE, HIGH): (10, 7),
}


@pytest.mark.parametrize(("soft_tokens", "width", "height"), GRIDS)
def test_a_grid_keeps_the_aspect_and_rounds_down(soft_tokens, width, height):
    grid = ImageBudget(soft_tokens).grid(width, height)
    assert grid == GRIDS[soft_tokens, width, height]


@pytest.mark.parametrize("soft_tokens", SOFT_TOKENS)
def test_no_size_goes_over_the_budget(soft_tokens):
    budget = ImageBudget(soft_tokens)
    for width in range(1, 400):
        for height in (1, 2, 3, 5, 7, 37, 48, 100, 333, 5000, 65_535):
            columns, rows = budget.grid(width, height)
            assert min(columns, rows) >= 1 and columns * rows <= soft_tokens
            assert budget.grid(height, width) == (rows, columns)


def test_the_side_of_a_soft_token_is_that_of_its_patches():
    picture = read_picture(
        Image.new("RGB", (100, 80)), ImageBudget(70, patch=8, pooling=2)
    )
    columns, rows = ImageBudget(70, 8, 2).grid(100, 80)
    assert picture.soft_tokens == columns * rows
    assert picture.patches.shape == (columns * rows * 4, 8 * 8 * 3)
    assert picture.positions.max(axis=0).tolist() == [2 * columns - 1, 2 * rows - 1]


def test_patches_are_rows_of_pixels_with_channels_last():
    pixels = noise()
    picture = read_picture(Image.fromarray(pixels), SMALL)
    assert picture.patches.dtype == np.float32
    assert picture.positions.dtype == np.int32
    assert picture.soft_tokens == 70 and picture.patches.shape == (630, 768)
    across = WIDE // 16
    for number in (0, 1, across - 1, across, 5 * across + 7, 629):
        y, x = divmod(number, across)
        assert picture.positions[number].tolist() == [x, y]
        square = pixels[16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
        wanted = (square.astype(np.float64) * (1 / 255)).astype(np.float32)
        np.testing.assert_array_equal(picture.patches[number], wanted.reshape(-1))
    assert picture.patches.min() == 0 and picture.patches.max() == 1


def test_a_picture_is_resized_by_cubic_filter_over_all_its_pixels():
    image = Image.fromarray(noise(1201, 803))
    columns, rows = SMALL.grid(1201, 803)
    size = (48 * columns, 48 * rows)
    wanted = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    for source in (image, saved(image, "PNG")):
        np.testing.assert_array_equal(seen(source), wanted)


def test_a_jpeg_is_decoded_in_full_before_it_is_resized():
    data = saved(Image.fromarray(noise(2000, 1400)), "JPEG", quality=90)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    wanted = image.resize((WIDE, HIGH), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(seen(data), np.asarray(wanted))


UPRIGHT = np.arange(HIGH * WIDE * 3).reshape(HIGH, WIDE, 3).astype(np.uint8)
STORED = {  # orientation -> how an upright picture lies in the file
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.swapaxes(0, 1),
    6: np.rot90(UPRIGHT),  # to be turned clockwise
    7: UPRIGHT.swapaxes(0, 1)[::-1, ::-1],
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "PIL"])
def test_exif_turns_a_picture_upright(orientation, kind):
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    source = image if kind == "PIL" else saved(image, kind, exif=exif, **options)
    np.testing.assert_array_equal(seen(source), UPRIGHT)


def test_an_orientation_that_is_none_changes_nothing():
    image = Image.fromarray(UPRIGHT)
    for orientation in (0, 9, 65_535):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        np.testing.assert_array_equal(seen(saved(image, "PNG", exif=exif)), UPRIGHT)


def test_exif_that_points_at_itself_ends():
    def entry(tag: int, kind: int, value: int) -> bytes:
        parts = ((tag, 2), (kind, 2), (1, 4), (value, 4))
        return b"".join(number.to_bytes(size, "little") for number, size in parts)

    # orientation 3; EXIF, GPS and interoperability lie where this table lies, as does
    # the table that follows it
    entries = [entry(0x0112, 3, 3)]
    entries += [entry(tag, 4, 8) for tag in (0x8769, 0x8825, 0xA005)]
    table = len(entries).to_bytes(2, "little") + b"".join(entries)
    block = b"Exif\0\0II*\0" + (8).to_bytes(4, "little") + table
    block += (8).to_bytes(4, "little")
    image = Image.fromarray(np.ascontiguousarray(STORED[3]))
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(image, kind, exif=block, **options)
        np.testing.assert_array_equal(seen(data), UPRIGHT)
    jpeg = saved(image, "JPEG", exif=block)
    assert read_picture(jpeg, SMALL).soft_tokens == 70


def test_transparency_shows_white():
    alpha = np.linspace(0, 255, HIGH).astype(np.uint8)[:, None].repeat(WIDE, axis=1)
    pixels = noise()
    image = Image.fromarray(np.dstack([pixels, alpha]))
    share = alpha[..., None] / 255
    wanted = pixels * share + 255 * (1 - share)
    assert np.abs(seen(image) - wanted).max() <= 1
    np.testing.assert_array_equal(seen(saved(image, "PNG")), seen(image))
    clear = Image.new("LA", (WIDE, HIGH), (0, 0))
    assert (seen(clear) == 255).all()
    single = Image.new("RGB", (WIDE, HIGH), (1, 2, 3))
    assert (seen(saved(single, "PNG", transparency=(1, 2, 3))) == 255).all()
    assert (seen(saved(single, "PNG", transparency=(1, 2, 4))) == (1, 2, 3)).all()
    first = Image.new("P", (WIDE, HIGH), 0)
    first.putpalette([9, 9, 9, 7, 7, 7])
    assert (seen(saved(first, "PNG", transparency=0)) == 255).all()
    assert (seen(saved(first, "GIF", transparency=0)) == 255).all()
    assert (seen(saved(first, "PNG", transparency=1)) == 9).all()


def test_strips_show_what_the_whole_shows(monkeypatch):
    image = Image.fromarray(noise(channels=4))
    whole = seen(image)
    for pixels in (1, 5 * WIDE, 100 * WIDE + 3):
        monkeypatch.setattr(images, "STRIP_PIXELS", pixels)
        np.testing.assert_array_equal(seen(image), whole)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_read(kind):
    frames = [Image.new("RGB", (WIDE, HIGH), (n, 99, 200 - n)) for n in (10, 90, 170)]
    options = {"lossless": True} if kind == "WEBP" else {}
    options |= {"save_all": True, "append_images": frames[1:], "duration": 50}
    assert (seen(saved(frames[0], kind, **options)) == (10, 99, 190)).all()


def test_every_kind_of_source_shows_the_same(tmp_path):
    image = Image.fromarray(noise(100, 90))
    data = saved(image, "PNG")
    path = tmp_path / "cat: ünïcode //.png".replace("/", "_")
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    urls = [f"data:image/png;base64,{text}", f"DATA:image/x;name=a;BASE64,{text}"]
    kinds = [image, data, path, str(path), *urls, saved(image, "WEBP", lossless=True)]
    digests = {read_picture(source, SMALL).digest for source in kinds}
    assert len(digests) == 1 and len(digests.pop()) == 64


def test_a_digest_tells_pictures_and_budgets_apart():
    pixels = noise()
    other = pixels.copy()
    other[200, 200, 1] ^= 1
    pictures = [
        read_picture(Image.fromarray(array), budget)
        for array in (pixels, other, pixels[:, ::-1], pixels.swapaxes(0, 1))
        for budget in (SMALL, ImageBudget(140))
    ]
    assert len({picture.digest for picture in pictures}) == len(pictures)
    plain = [Image.new("RGB", size) for size in ((100, 100), (200, 50), (50, 200))]
    assert len({read_picture(image, SMALL).digest for image in plain}) == 3


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_hostile_file_is_refused_in_one_line(name):
    make, ending = hostile.FILES[name]
    message = refusal(make())
    assert message.startswith("bytes: ") and ending in message


def test_hostile_files_are_refused_in_little_memory():
    ended = subprocess.run(
        [sys.executable, hostile.__file__], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0
    assert len(ended.stderr.splitlines()) == len(hostile.FILES)
    assert int(ended.stdout) < 500


KINDS = {
    "JPEG": ("JPEG", {}),
    "progressive JPEG": ("JPEG", {"progressive": True}),
    "PNG": ("PNG", {}),
    "WebP": ("WEBP", {}),
    "lossless WebP": ("WEBP", {"lossless": True}),
    "GIF": ("GIF", {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_truncated_file_is_refused_wherever_it_ends(name):
    kind, options = KINDS[name]
    data = saved(Image.fromarray(noise(90, 70)), kind, **options)
    ends = [*range(1, len(data) - 40, 100), len(data) - 40]
    assert len(ends) > 20
    for end in ends:
        message = refusal(data[:end])
        assert message.endswith((hostile.BROKEN, "save it as one of them"))
    assert read_picture(data, SMALL).soft_tokens


SOURCES = {
    "file:///etc/passwd": "file: sources are not fetched; download it and give the",
    "FILE:/etc/passwd": "file: sources are not fetched",
    "http://127.0.0.1/x.png": "http: sources are not fetched",
    "HTTPS://[::1]/x.png": "https: sources are not fetched",
    "http:/127.0.0.1/x.png": "http: sources are not fetched",
    "s3://bucket/x.png": "s3: sources are not fetched",
    "/etc/passwd": "/etc/passwd: no PNG, JPEG, WebP or GIF",
    "data:image/png;base64,@@@@": "data: URL: broken base64; encode the file again",
    "data:image/png;base64,iVBORw0": "data: URL: broken base64",
    "data:image/png;base64,é": "data: URL: broken base64",
    "data:image/png;base64,": "data: URL: is empty",
    "data:image/png,abc": "data: URL: it must start with data:image/...;base64,",
    "data:text/html;base64,aGk=": "data: URL: it must start with",
    "data:image/svg+xml;base64,PHN2Zy8+": "data: URL: SVG is not read; save it as PNG",
    "no/such.png": "no/such.png: no such file",
    "": ": not an ordinary file",
    "a\0b": r"'a\x00b': no such file",
    "a\nb.png": r"'a\nb.png': no such file",
    "x" * 10**6: "xxx…: cannot be read (File name too long)",
    "/dev/zero": "/dev/zero: not an ordinary file",
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: repr(source[:30]))
def test_a_hostile_source_is_refused_in_one_line(source):
    assert SOURCES[source] in refusal(source)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert refusal(tmp_path / "pipe.png").endswith("pipe.png: not an ordinary file")
    assert refusal(str(tmp_path)).endswith(": not an ordinary file")
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: cannot be read (Too many levels" in refusal(tmp_path / "loop")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    url = "data:image/png;base64," + "A" * 28 * 2**20
    for source in (tmp_path / "large.png", url):
        assert refusal(source).endswith(": larger than 20 MB; make it smaller")
    for odd in (None, 3, ["a.png"], bytearray(b"a")):
        assert refusal(odd).endswith(f"not {type(odd).__name__}")


def test_images_of_pillow_are_checked_too():
    assert refusal(Image.new("1", (10_000, 6000))).startswith("PIL image: 10000 x 6000")
    assert refusal(Image.new("L", (0, 5))) == "PIL image: 0 x 5 pixels hold nothing"
    data = saved(Image.fromarray(noise(90, 70)), "PNG")[:-200]
    assert refusal(Image.open(io.BytesIO(data))) == f"PIL image: {hostile.BROKEN}"


def test_too_many_pictures_are_refused_before_any_is_read(monkeypatch):
    read = []
    monkeypatch.setattr(images, "read_picture", lambda *a: read.append(a))
    for count in (33, 10_001):
        with pytest.raises(MediaError, match=rf"^{count} pictures; at most 32: send"):
            read_pictures([b"x"] * count, SMALL)
    assert read == []
    read_pictures([b"x"] * 32, SMALL)
    assert len(read) == 32


def test_of_many_pictures_the_one_that_fails_is_named():
    good = saved(Image.new("RGB", (9, 9)), "PNG")
    assert len(read_pictures([good, good], SMALL)) == 2
    assert read_pictures([], SMALL) == []
    with pytest.raises(MediaError, match=r"^picture 2: bytes: is empty"):
        read_pictures([good, b"", b""], SMALL)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"soft_tokens": 281}, "soft_tokens is 281; it must be one of 70, 140, 280"),
        ({"soft_tokens": "280"}, "soft_tokens is '280'"),
        ({"patch": 0}, "patch is 0; it must be a whole number from 1 to 64"),
        ({"patch": 16.0}, "patch is 16.0"),
        ({"pooling": 17}, "pooling is 17; it must be a whole number from 1 to 16"),
        ({"pooling": True}, "pooling is True"),
    ],
)
def test_a_budget_refuses_what_it_cannot_mean(values, named):
    with pytest.raises(SettingsError) as caught:
        ImageBudget(**values)
    assert named in str(caught.value)


SAID = {
    "do_convert_rgb": True,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_processor_type": "Gemma4ImageProcessor",
    "image_std": [1.0, 1.0, 1.0],
    "max_soft_tokens": 560,
    "patch_size": 14,
    "pooling_kernel_size": 4,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}


def write(folder: Path, name: str, values: dict) -> None:
    (folder / name).write_text(json.dumps(values))


def test_a_budget_is_read_from_a_checkpoint(tmp_path):
    assert ImageBudget.from_checkpoint(tmp_path) == ImageBudget(280, 16, 3)
    write(tmp_path, "preprocessor_config.json", {**SAID, "max_soft_tokens": 70})
    assert ImageBudget.from_checkpoint(tmp_path) == ImageBudget(70, 14, 4)
    # an older processor_config.json says nothing of images
    write(tmp_path, "processor_config.json", {"image_seq_length": 280})
    assert ImageBudget.from_checkpoint(tmp_path) == ImageBudget(70, 14, 4)
    nested = {"image_processor": SAID, "video_processor": {"max_soft_tokens": 70}}
    write(tmp_path, "processor_config.json", nested)
    assert ImageBudget.from_checkpoint(tmp_path) == ImageBudget(560, 14, 4)
    # normalising that changes nothing
    write(tmp_path, "processor_config.json", {"image_processor": SAID})
    write(
        tmp_path,
        "processor_config.json",
        {"image_processor": {**SAID, "do_normalize": True}},
    )
    assert ImageBudget.from_checkpoint(tmp_path) == ImageBudget(560, 14, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_soft_tokens", 300),
        ("patch_size", 0),
        ("patch_size", "16"),
        ("pooling_kernel_size", 3.0),
        ("do_resize", False),
        ("do_rescale", 1),
        ("do_convert_rgb", False),
        ("resample", 2),
        ("rescale_factor", 1.0),
        ("do_normalize", "yes"),
    ],
)
def test_a_checkpoint_that_asks_for_something_else_is_refused(tmp_path, key, value):
    write(tmp_path, "preprocessor_config.json", {**SAID, key: value})
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: {key} is "):
        ImageBudget.from_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["image_mean", "image_std"])
def test_a_checkpoint_that_normalises_is_refused(tmp_path, key):
    said = {**SAID, "do_normalize": True, key: [0.5, 0.5, 0.5]}
    write(tmp_path, "processor_config.json", {"image_processor": said})
    named = r"processor_config\.json: image_processor: do_normalize must be false"
    with pytest.raises(ConfigError, match=named):
        ImageBudget.from_checkpoint(tmp_path)
