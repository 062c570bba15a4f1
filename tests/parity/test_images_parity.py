"""Pictures and frames are what transformers makes of them, bit for bit.

The oracle is its Pillow backend, which it takes where torchvision is missing. With
torchvision it resizes by another code: up to 2/255 off, on less than 1 % of the values.
It turns and flattens files differently according to who opened them: here Pillow opens
a file, `exif_transpose` turns it, and the processor makes it opaque. Before 5.24 it
dropped transparency and chose other frames of videos: there pictures come opaque, and
frames are not compared.
"""

import io
import json
from functools import cache

import numpy as np
import pytest
import transformers
from packaging.version import Version
from PIL import ExifTags, Image, ImageOps

from mlx_dgemma.media.images import SOFT_TOKENS, ImageBudget, Picture, read_picture
from mlx_dgemma.media.videos import FRAME, _choose, read_frames

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def pillow_backend():
    from transformers.models.gemma4 import image_processing_pil_gemma4

    return image_processing_pil_gemma4


CURRENT = Version(transformers.__version__) >= Version("5.24")
frames_changed = pytest.mark.skipif(not CURRENT, reason="other frames before 5.24")


def opaque(image: Image.Image) -> Image.Image:
    """Return an image on white where the oracle would drop what is transparent."""
    if CURRENT or ("A" not in image.getbands() and "transparency" not in image.info):
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def processor(**options):
    return pillow_backend().Gemma4ImageProcessorPil(**options)


def assert_same(picture: Picture, theirs, row: int = 0) -> None:
    """No tolerance; behind our patches theirs are padding."""
    count = len(picture.patches)
    values, positions = theirs["pixel_values"][row], theirs["image_position_ids"][row]
    assert values.dtype == picture.patches.dtype
    np.testing.assert_array_equal(picture.patches, values[:count])
    np.testing.assert_array_equal(picture.positions, positions[:count])
    assert picture.soft_tokens == theirs["num_soft_tokens_per_image"][row]
    assert (positions[count:] == -1).all() and not values[count:].any()


def compare(source: bytes | Image.Image, soft_tokens: int = 280) -> None:
    image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
    oracle = processor(max_soft_tokens=soft_tokens)
    theirs = oracle(opaque(ImageOps.exif_transpose(image)), return_tensors="np")
    assert_same(read_picture(source, ImageBudget(soft_tokens)), theirs)


@cache
def photo(width: int, height: int) -> np.ndarray:
    """Waves, an edge and noise: (height, width, 3) bytes."""
    rng = np.random.default_rng(width * 7 + height)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7 + y / 11), np.cos(x / 5) * np.sin(y / 13), (x > y) * 1.0]
    values = (
        127 + 100 * np.stack(waves, axis=-1) + rng.normal(0, 15, (height, width, 3))
    )
    return values.clip(0, 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


SIZES = [(1, 1), (3, 2), (640, 480), (1000, 700), (476, 680), (1, 2000), (5000, 37)]


@pytest.mark.parametrize("soft_tokens", SOFT_TOKENS)
def test_sizes(soft_tokens):
    for width, height in SIZES:
        compare(Image.fromarray(photo(width, height)), soft_tokens)
        compare(Image.fromarray(photo(height, width)), soft_tokens)


@pytest.mark.parametrize("soft_tokens", SOFT_TOKENS)
def test_every_size_has_the_same_grid(soft_tokens):
    expected = pillow_backend().get_aspect_ratio_preserving_size
    budget = ImageBudget(soft_tokens)
    rng = np.random.default_rng(soft_tokens)
    sizes = [(w, h) for w in range(1, 200) for h in range(1, 200)]
    sizes += [tuple(map(int, rng.integers(1, 2**e, 2))) for e in (10, 13) * 20_000]
    sizes += [(17 * k, 7 * n) for k in range(1, 60) for n in range(1, 60)]
    for width, height in sizes:
        wanted = expected(height, width, 16, soft_tokens * 9, 3)
        columns, rows = budget.grid(width, height)
        assert (48 * rows, 48 * columns) == wanted, (width, height)


@cache
def modes() -> dict[str, Image.Image | bytes]:
    """Images of every mode a file can have, some as they lie in a file."""
    image = Image.fromarray(photo(301, 207))
    alpha = Image.fromarray(photo(301, 207)[..., 1])
    clear, grey = image.copy(), image.convert("L")
    clear.putalpha(alpha)
    both = grey.copy()
    both.putalpha(alpha)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    few, black = image.quantize(16), image.convert("1")
    more = {"save_all": True, "append_images": [image.rotate(9)]}
    steps = bytes(range(0, 160, 10))
    found = {"RGBA": clear, "LA": both, "PA": few.convert("PA"), "P": few, "L": grey}
    found |= {"1": black, "I;16": deep, "I": deep.convert("I"), "F": grey.convert("F")}
    found |= {mode: image.convert(mode) for mode in ("CMYK", "YCbCr", "HSV")}
    for name, source, kind, options in (
        ("RGBA", clear, "PNG", {}),
        ("RGBA", clear, "WEBP", {"lossless": True}),
        ("RGBA, lossy", clear, "WEBP", {}),
        ("LA", both, "PNG", {}),
        ("P with one clear colour", few, "PNG", {"transparency": 3}),
        ("P with clear colours", few, "PNG", {"transparency": steps}),
        ("P", few, "GIF", {}),
        ("P with one clear colour", few, "GIF", {"transparency": 3}),
        ("RGB with one clear colour", image, "PNG", {"transparency": (255, 0, 0)}),
        ("L with one clear colour", grey, "PNG", {"transparency": 127}),
        ("L", grey, "JPEG", {}),
        ("1", black, "PNG", {}),
        ("I;16", deep, "PNG", {}),
        ("CMYK", image.convert("CMYK"), "JPEG", {}),
        ("RGB", image, "JPEG", {"quality": 70, "subsampling": 2}),
        ("progressive", image, "JPEG", {"progressive": True}),
        ("RGB", image, "WEBP", {}),
        ("animated", few, "GIF", more | {"append_images": [few.rotate(9)]}),
        ("animated", image, "WEBP", more),
        ("animated", image, "PNG", more),
        ("large", Image.fromarray(photo(3000, 2000)), "JPEG", {}),
    ):
        found[f"{name} in {kind}"] = saved(source, kind, **options)
    return found


@pytest.mark.parametrize("mode", modes())
def test_modes(mode):
    compare(modes()[mode], 70)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientations(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for kind in ("JPEG", "PNG", "WEBP"):
        compare(saved(Image.fromarray(photo(320, 200)), kind, exif=exif))


def test_the_processor_of_a_checkpoint_and_its_budget(tmp_path):
    oracle = processor(max_soft_tokens=140)
    oracle.save_pretrained(tmp_path)
    assert ImageBudget.from_checkpoint(tmp_path) == ImageBudget(140)
    nested = {"image_processor": {**oracle.to_dict(), "max_soft_tokens": 560}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    found = type(oracle).from_pretrained(tmp_path)
    budget = ImageBudget.from_checkpoint(tmp_path)
    assert budget == ImageBudget(560, found.patch_size, found.pooling_kernel_size)
    images = [Image.fromarray(photo(500, 300)), Image.fromarray(photo(30, 90))]
    theirs = found(images, return_tensors="np")
    for row, image in enumerate(images):
        assert_same(read_picture(image, budget), theirs, row)


@frames_changed
def test_the_same_frames_of_a_video_are_chosen():
    from fractions import Fraction

    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    for rate in (10, 24, 25, 30, 50, 60):
        for total in range(1, 300, 7):
            metadata = VideoMetadata(total_num_frames=total, fps=float(rate))
            times = [Fraction(number, rate) for number in range(total)]
            for fps in (0.5, 1, 2, 5):
                theirs = default_sample_indices_fn(metadata, fps=fps).tolist()
                assert _choose(times, fps) == theirs, (rate, total, fps)


@frames_changed
def test_frames_of_a_video(tmp_path):
    import av
    from transformers.video_utils import default_sample_indices_fn, read_video_pyav

    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for number in range(95):
            pixels = np.roll(photo(320, 240), 3 * number, axis=1)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

    def choose(metadata):
        return default_sample_indices_fn(metadata, fps=2)

    pixels, metadata = read_video_pyav(path, choose)
    frames = read_frames(path, fps=2)
    assert [seconds for seconds, _ in frames] == pytest.approx(metadata.timestamps)
    assert len(frames) == 6
    oracle = processor(max_soft_tokens=FRAME.soft_tokens)
    theirs = oracle([Image.fromarray(frame) for frame in pixels], return_tensors="np")
    for row, (_, picture) in enumerate(frames):
        assert_same(picture, theirs, row)
