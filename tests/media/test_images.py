"""Pictures: what the model sees of them, and what is refused before it can harm."""

import base64
import io
import json
import os
import struct
import subprocess
import sys
from contextlib import suppress

import hostile
import numpy as np
import pytest
from PIL import ExifTags, Image

from mlx_dgemma.errors import ConfigError, MediaError, SettingsError
from mlx_dgemma.media import images
from mlx_dgemma.media.images import SOFT_TOKENS, ImageBudget, read_picture

SMALL = ImageBudget(soft_tokens=70)
WIDE, HIGH = 480, 336  # 10 x 7 soft tokens of 48 pixels: not resized at SMALL


def noise(width: int = WIDE, height: int = HIGH, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(width * height)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    if kind == "WEBP":
        options.setdefault("lossless", True)
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
    return hostile.refused(lambda: read_picture(source, ImageBudget()))


GRIDS = {  # (soft tokens, width, height) -> (columns, rows)
    (280, 640, 480): (19, 14),
    (280, 1, 1): (16, 16),
    (280, 476, 680): (13, 19),  # 14 x 20 but for the rounding of floats
    (70, 385, 22): (34, 2),  # 35 x 2
    (280, 2000, 1): (280, 1),
    (280, 839, 3): (279, 1),
    (1120, 640, 480): (38, 28),
}


def test_a_grid_keeps_the_aspect_and_rounds_down():
    for (soft_tokens, width, height), expected in GRIDS.items():
        assert ImageBudget(soft_tokens).grid(width, height) == expected
        assert ImageBudget(soft_tokens).grid(height, width) == expected[::-1]
    for budget in map(ImageBudget, SOFT_TOKENS):
        for width in range(1, 400, 3):
            for height in (1, 2, 3, 5, 7, 37, 48, 100, 333, 5000, 65_535):
                columns, rows = budget.grid(width, height)
                assert min(columns, rows) >= 1 and columns * rows <= budget.soft_tokens


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
    picture = read_picture(Image.new("RGB", (9, 7)), ImageBudget(70, 8, pooling=2))
    assert picture.soft_tokens == 63 and picture.patches.shape == (63 * 4, 8 * 8 * 3)
    assert picture.positions.max(axis=0).tolist() == [2 * 9 - 1, 2 * 7 - 1]


def test_a_picture_is_resized_by_cubic_filter_over_all_its_pixels():
    image = Image.fromarray(noise(901, 603))
    columns, rows = SMALL.grid(901, 603)
    size = (48 * columns, 48 * rows)
    jpeg = saved(image, "JPEG", quality=90)  # not decoded coarsely first
    for source, pixels in (
        (image, image),
        (saved(image, "PNG", compress_level=1), image),
        (jpeg, Image.open(io.BytesIO(jpeg)).convert("RGB")),
    ):
        wanted = np.asarray(pixels.resize(size, Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(seen(source), wanted)


PIXELS = np.arange(HIGH * WIDE * 3).reshape(HIGH, WIDE, 3).astype(np.uint8)
STORED = {  # orientation -> how an upright picture lies in the file
    0: PIXELS,
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.swapaxes(0, 1),
    6: np.rot90(PIXELS),  # to be turned clockwise
    7: PIXELS.swapaxes(0, 1)[::-1, ::-1],
    8: np.rot90(PIXELS, -1),
    65_535: PIXELS,
}


def test_exif_turns_a_picture_upright():
    for orientation, pixels in STORED.items():
        image = Image.fromarray(np.ascontiguousarray(pixels))
        exif = image.getexif()
        exif[ExifTags.Base.Orientation] = orientation
        png = saved(image, "PNG", exif=exif, compress_level=1)
        for source in (image, png, saved(image, "WEBP", exif=exif, method=0)):
            np.testing.assert_array_equal(seen(source), PIXELS)


def test_exif_that_points_at_itself_ends():
    # orientation 3; EXIF, GPS and interoperability lie where this table lies, as does
    # the table that follows it
    entries = [struct.pack("<HHII", 0x0112, 3, 1, 3)]
    entries += [struct.pack("<HHII", tag, 4, 1, 8) for tag in (0x8769, 0x8825, 0xA005)]
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries)
    block += struct.pack("<I", 8)
    image = Image.fromarray(np.ascontiguousarray(STORED[3]))
    for kind in ("PNG", "WEBP"):
        np.testing.assert_array_equal(seen(saved(image, kind, exif=block)), PIXELS)
    assert read_picture(saved(image, "JPEG", exif=block), SMALL).soft_tokens == 70


def test_transparency_shows_white(monkeypatch):
    alpha = np.linspace(0, 255, HIGH).astype(np.uint8)[:, None].repeat(WIDE, axis=1)
    pixels = noise()
    image = Image.fromarray(np.dstack([pixels, alpha]))
    share = alpha[..., None] / 255
    wanted = pixels * share + 255 * (1 - share)
    whole = seen(image)
    assert np.abs(whole - wanted).max() <= 1
    np.testing.assert_array_equal(seen(saved(image, "PNG")), whole)
    assert (seen(Image.new("LA", (WIDE, HIGH), (0, 0))) == 255).all()
    single = Image.new("RGB", (WIDE, HIGH), (1, 2, 3))
    assert (seen(saved(single, "PNG", transparency=(1, 2, 3))) == 255).all()
    assert (seen(saved(single, "PNG", transparency=(1, 2, 4))) == (1, 2, 3)).all()
    first = Image.new("P", (WIDE, HIGH), 0)
    first.putpalette([9, 9, 9, 7, 7, 7])
    for kind in ("PNG", "GIF"):
        assert (seen(saved(first, kind, transparency=0)) == 255).all()
    assert (seen(saved(first, "PNG", transparency=1)) == 9).all()
    for strip in (5 * WIDE, 100 * WIDE + 3):
        monkeypatch.setattr(images, "STRIP_PIXELS", strip)
        np.testing.assert_array_equal(seen(image), whole)


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (WIDE, HIGH), (n, 99, 200 - n)) for n in (10, 90, 170)]
    options = {"save_all": True, "append_images": frames[1:], "duration": 50}
    for kind in ("GIF", "WEBP", "PNG"):
        assert (seen(saved(frames[0], kind, **options)) == (10, 99, 190)).all()


def test_every_kind_of_source_shows_the_same(tmp_path):
    image = Image.fromarray(noise(100, 90))
    data = saved(image, "PNG")
    path = tmp_path / "cat: ünïcode __.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    urls = [f"data:image/png;base64,{text}", f"DATA:image/x;name=a;BASE64,{text}"]
    kinds = [image, data, path, str(path), *urls, saved(image, "WEBP")]
    pictures = [read_picture(source, SMALL) for source in kinds]
    assert len({picture.digest for picture in pictures}) == 1
    named = [picture.source for picture in pictures]
    assert named == [None, None, str(path), str(path), None, None, None]


def test_a_data_url_may_be_broken_into_lines_or_percent_encoded():
    image = Image.fromarray(noise(64, 64))
    data, wanted = saved(image, "PNG"), read_picture(image, SMALL).digest
    text = base64.b64encode(data).decode()
    encoded = text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    for body in (text + "\n", base64.encodebytes(data).decode(), encoded, f" {text}"):
        assert read_picture(f"data:image/png;base64,{body}", SMALL).digest == wanted


def test_what_stands_behind_a_jpeg_changes_nothing():
    """As the film of a motion photo does, which holds any bytes."""
    image = Image.fromarray(noise(200, 150))
    rng = np.random.default_rng(0)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}):
        data = saved(image, "JPEG", **options)
        wanted = read_picture(data, SMALL).digest
        for size in (1, 1000, 16 * 2**20):
            tails = [rng.bytes(size), b"\xff\xda" * (size // 2), bytes(size)]
            for tail in tails:
                assert read_picture(data + tail, SMALL).digest == wanted


def test_other_kinds_are_read_where_pillow_can(monkeypatch):
    image = Image.fromarray(noise())
    for kind in ("BMP", "TIFF"):
        np.testing.assert_array_equal(seen(saved(image, kind)), np.asarray(image))
        assert refusal(saved(image, kind)[:300]).endswith(hostile.BROKEN)
    Image.init()
    if "AVIF" in Image.OPEN:
        data = saved(image, "AVIF")
        assert read_picture(data, SMALL).soft_tokens == 70
        for at in range(60, 300):  # of its boxes; libavif's faults are RuntimeErrors
            broken = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
            with suppress(MediaError):
                read_picture(broken, SMALL)
        assert refusal(data[:300]).endswith(hostile.BROKEN)
    monkeypatch.delitem(Image.OPEN, "TIFF")
    why = "bytes: TIFF is not read by this Pillow; save it as PNG"
    assert refusal(saved(image, "TIFF")) == why


def test_a_digest_tells_pictures_and_budgets_apart():
    pixels = noise()
    other = pixels.copy()
    other[200, 200, 1] ^= 1
    kinds = [Image.fromarray(array) for array in (pixels, other, pixels.swapaxes(0, 1))]
    kinds += [Image.new("RGB", size) for size in ((100, 100), (200, 50), (50, 200))]
    budgets = (SMALL, ImageBudget(140))
    pictures = [read_picture(image, budget) for image in kinds for budget in budgets]
    assert len({picture.digest for picture in pictures}) == len(pictures)


@pytest.mark.parametrize("name", list(hostile.FILES)[1:])  # the first takes seconds
def test_a_hostile_file_is_refused_in_one_line(name):
    make, ending = hostile.FILES[name]
    message = refusal(make())
    assert message.startswith("bytes: ") and ending in message


@pytest.mark.slow
def test_hostile_files_are_refused_in_little_memory():
    ended = subprocess.run(
        [sys.executable, hostile.__file__], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0
    refusals = ended.stderr.splitlines()
    for message, (_, ending) in zip(refusals, hostile.FILES.values(), strict=True):
        assert message.startswith("bytes: ") and ending in message
    assert int(ended.stdout) < 500


def test_a_truncated_file_is_refused_wherever_it_ends():
    image = Image.fromarray(noise(90, 70))
    for kind, options in (
        *(("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})),
        *(("WEBP", {}), ("WEBP", {"lossless": False}), ("GIF", {})),
    ):
        data = saved(image, kind, **options)
        for end in (1, 20, len(data) // 4, len(data) // 2, len(data) - 40):
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
    "": ": cannot be read (it is a directory)",
    "a\0b": r"'a\x00b': no such file",
    "a\nb.png": r"'a\nb.png': no such file",
    "x" * 10**6: "xxx…: cannot be read (File name too long)",
    "/dev/zero": "/dev/zero: cannot be read (it is no ordinary file)",
    "data:image/png;base64," + "A" * 56 * 2**20: ": larger than 40 MB; make it smaller",
}


def test_hostile_sources_are_refused_in_one_line(tmp_path):
    for source, why in SOURCES.items():
        assert why in refusal(source)
    os.mkfifo(tmp_path / "pipe.png")
    assert refusal(tmp_path / "pipe.png").endswith(
        "pipe.png: cannot be read (it is no ordinary file)"
    )
    assert refusal(str(tmp_path)).endswith(": cannot be read (it is a directory)")
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: cannot be read (Too many levels" in refusal(tmp_path / "loop")
    large = tmp_path / "large.png"
    large.touch()
    os.truncate(large, images.MAX_BYTES + 1)
    assert refusal(large).endswith(": larger than 40 MB; make it smaller")
    for odd in (None, 3, ["a.png"], bytearray(b"a")):
        assert refusal(odd).endswith(f"not {type(odd).__name__}")


def test_images_of_pillow_are_checked_too():
    assert refusal(Image.new("1", (10_000, 6000))).startswith("PIL image: 10000 x 6000")
    assert refusal(Image.new("L", (0, 5))) == "PIL image: 0 x 5 pixels hold nothing"
    data = saved(Image.fromarray(noise(90, 70)), "PNG")[:-200]
    assert refusal(Image.open(io.BytesIO(data))) == f"PIL image: {hostile.BROKEN}"


def test_several_pictures():
    good = saved(Image.new("RGB", (9, 9)), "PNG")
    assert len(images.read_pictures([good] * 32, SMALL)) == 32
    assert images.read_pictures([], SMALL) == []
    with pytest.raises(MediaError, match=r"^picture 2: bytes: is empty"):
        images.read_pictures([good, b"", b""], SMALL)
    for count in (33, 10_001):  # before any is read
        with pytest.raises(MediaError, match=rf"^{count} pictures; at most 32: send"):
            images.read_pictures([b""] * count, SMALL)


def test_an_impossible_budget_is_refused():
    for values, why in (
        ({"soft_tokens": 281}, "soft_tokens is 281; it must be one of 70, 140, 280"),
        ({"soft_tokens": "280"}, "soft_tokens is '280'"),
        ({"patch": 0}, "patch is 0; it must be a whole number from 1 to 64"),
        ({"patch": 16.0}, "patch is 16.0"),
        ({"pooling": 17}, "pooling is 17; it must be a whole number from 1 to 16"),
        ({"pooling": True}, "pooling is True"),
    ):
        with pytest.raises(SettingsError, match=why):
            ImageBudget(**values)


PROCESSOR = {
    **dict.fromkeys(("do_convert_rgb", "do_rescale", "do_resize"), True),
    "do_normalize": False,
    "image_mean": [0.0] * 3,
    "image_std": [1.0] * 3,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "max_soft_tokens": 560,
    "patch_size": 14,
    "pooling_kernel_size": 4,
    "image_processor_type": "Gemma4ImageProcessor",
}


def test_a_budget_is_read_from_a_checkpoint(tmp_path):
    def budget(name: str, values: dict) -> ImageBudget:
        (tmp_path / f"{name}_config.json").write_text(json.dumps(values))
        return ImageBudget.from_checkpoint(tmp_path)

    assert ImageBudget.from_checkpoint(tmp_path) == ImageBudget(280, 16, 3)
    small = {**PROCESSOR, "max_soft_tokens": 70}
    assert budget("preprocessor", small) == ImageBudget(70, 14, 4)
    # an older processor_config.json says nothing of images
    assert budget("processor", {"image_seq_length": 280}) == ImageBudget(70, 14, 4)
    nested = {"image_processor": PROCESSOR, "video_processor": {"max_soft_tokens": 70}}
    assert budget("processor", nested) == ImageBudget(560, 14, 4)
    same = {"image_processor": {**PROCESSOR, "do_normalize": True}}  # by 0 and 1
    assert budget("processor", same) == ImageBudget(560, 14, 4)


def test_a_processor_that_does_something_else_is_refused(tmp_path):
    path = tmp_path / "processor_config.json"
    for changes, why in (
        ({"max_soft_tokens": 300}, "max_soft_tokens is 300"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": "16"}, "patch_size is '16'"),
        ({"pooling_kernel_size": 3.0}, "pooling_kernel_size is 3.0"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_rescale": 1}, "do_rescale is 1"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False"),
        ({"resample": 2}, "resample is 2"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"do_normalize": "yes"}, "do_normalize is 'yes'"),
        ({"do_normalize": True, "image_mean": [1, 1, 1]}, "do_normalize must be false"),
        ({"do_normalize": True, "image_std": [0.5] * 3}, "do_normalize must be false"),
    ):
        path.write_text(json.dumps({"image_processor": PROCESSOR | changes}))
        with pytest.raises(ConfigError) as caught:
            ImageBudget.from_checkpoint(tmp_path)
        assert f"{path}: image_processor: {why}" in str(caught.value)
