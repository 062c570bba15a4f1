"""Images against transformers: soft tokens, the prefix they write, logits behind it.

The measure is that of test_model_parity.
"""

import mlx.core as mx
import numpy as np
import pytest
from test_model_parity import assert_as_exact, ids, load_all

from mlx_dgemma.diffusion.prefix import ImageSpan
from mlx_dgemma.media.images import ImageBudget, read_picture
from mlx_dgemma.model.vision import Image

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

IMAGE, BEGIN, END = 9, 7, 8  # of the toy tokenizer
POOLING, PATCH = 3, 16
# (width, height) in soft tokens: small, wide, tall, large
SIZES = [(1, 1), (2, 3), (9, 1), (1, 11), (6, 5)]
RNG = np.random.default_rng(0)


def picture(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (P, 768) and positions (P, 2) of an image of `size` soft tokens."""
    width, height = (POOLING * n for n in size)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    positions = np.stack([x, y], axis=-1).reshape(-1, 2)
    pixels = RNG.random((len(positions), 3 * PATCH**2)).astype(np.float32)
    return pixels, positions


def padded(pictures) -> list[np.ndarray]:
    """Return all images as one batch, padded as the processor pads it."""
    longest = max(len(pixels) for pixels, _ in pictures)
    return [
        np.stack(
            [
                np.pad(a, [(0, longest - len(a)), (0, 0)], constant_values=value)
                for a in arrays
            ]
        )
        for arrays, value in zip(zip(*pictures, strict=True), (0, -1), strict=True)
    ]


def prompt_with(sizes) -> tuple[np.ndarray, list[int]]:
    """Return (1, T) ids with text between images, and the start of each image."""
    tokens, starts = list(RNG.integers(10, 32, 11)), []
    for width, height in sizes:
        tokens.append(BEGIN)
        starts.append(len(tokens))
        tokens += [IMAGE] * (width * height) + [END]
        tokens += RNG.integers(10, 32, RNG.integers(0, 7)).tolist()
    return np.array([[*tokens, 12]]), starts


def chunks(length: int, size: int, images: list[Image]):
    """Yield the bounds of chunks of `size` tokens that split no image."""
    begin = 0
    while begin < length:
        end = min(begin + size, length)
        end = next((i.end for i in images if i.start < end < i.end), end)
        yield begin, end
        begin = end


# layout, standardize, clipped: each pair of values at least once
CASES = [
    ("release", True, False),
    ("release", False, True),
    ("transformers", True, True),
    ("transformers", False, False),
]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompts_with_images(checkpoint, case, count):
    """Images longer than the window of 8, in one chunk and in chunks of 1, 7 and 64."""
    layout, standardize, clipped = case
    vision = {"standardize": standardize, "num_hidden_layers": 2}
    vision |= {"use_clipped_linears": clipped, "num_key_value_heads": 1}
    path = checkpoint(seed=count, layout=layout, vision=vision)
    sizes = [SIZES[(count + 2 * i) % len(SIZES)] for i in range(count)]
    tokens, starts = prompt_with(sizes)
    pictures = [picture(size) for size in sizes]
    canvas = RNG.integers(10, 32, (1, 32))
    model, truth, theirs = load_all(path)
    exact = truth.encode_images(tokens, *padded(pictures))
    reference = theirs.encode_images(tokens, *padded(pictures))
    soft = [model.vision.encode_image(*one) for one in pictures]
    assert_as_exact("soft tokens", mx.concatenate(soft), reference[0], exact[0])
    images = [Image(start, one) for start, one in zip(starts, soft, strict=True)]
    assert max(image.end - image.start for image in images) >= 6
    wanted = truth.denoise(canvas, exact[2]), theirs.denoise(canvas, reference[2])
    hidden = model.encode_hidden(ids(tokens), model.make_cache(), images)
    assert_as_exact("hidden", hidden, reference[1], exact[1])
    for size in (tokens.shape[1], 1, 7, 64):
        cache = model.make_cache()
        for begin, end in chunks(tokens.shape[1], size, images):
            inside = [
                Image(image.start - begin, image.features)
                for image in images
                if begin <= image.start < end
            ]
            model.encode(ids(tokens[:, begin:end]), cache, inside)
        logits = model.denoise(ids(canvas), cache)
        assert_as_exact(f"{size} at a time", logits, wanted[1], wanted[0])


def drawn(width: int, height: int, mode: str):
    from PIL import Image as Pictures

    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = RNG.integers(0, 256, (height, width, channels)).astype(np.uint8)
    return Pictures.fromarray(pixels.squeeze(), mode)


PICTURES = {
    "small": [(40, 30, "RGB")],
    "large": [(1900, 1300, "RGB")],
    "wide": [(2000, 9, "RGB")],
    "tall": [(7, 900, "RGB")],
    "transparent": [(300, 200, "RGBA")],
    "grey and others": [(300, 200, "L"), (64, 640, "RGB"), (500, 501, "RGBA")],
}


@pytest.mark.parametrize("budget", [70, 280])
@pytest.mark.parametrize("sizes", PICTURES.values(), ids=PICTURES)
def test_files_to_logits(checkpoint, sizes, budget):
    """Compare with transformers' processor and model, from pictures on."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import (
        Gemma4ImageProcessorPil,
    )

    path = checkpoint(vision={"position_embedding_size": 1024})
    pictures = [drawn(*size) for size in sizes]
    processor = Gemma4ImageProcessorPil(max_soft_tokens=budget)
    made = processor(pictures, return_tensors="np")
    given = np.asarray(made["pixel_values"]), np.asarray(made["image_position_ids"])
    tokens, spans = list(RNG.integers(10, 32, 11)), []
    for image in pictures:
        read = read_picture(image, ImageBudget(budget))
        tokens.append(BEGIN)
        spans.append(ImageSpan(len(tokens), read))
        tokens += [IMAGE] * read.soft_tokens + [END]
    prompt, canvas = np.array([tokens]), RNG.integers(10, 32, (1, 32))
    model, truth, theirs = load_all(path)
    exact = truth.encode_images(prompt, *given)
    reference = theirs.encode_images(prompt, *given)
    images = [
        Image(
            p.start, model.vision.encode_image(p.picture.patches, p.picture.positions)
        )
        for p in spans
    ]
    soft = mx.concatenate([image.features for image in images])
    assert_as_exact("soft tokens", soft, reference[0], exact[0])
    cache = model.make_cache()
    model.encode(ids(prompt), cache, images)
    assert_as_exact(
        "logits",
        model.denoise(ids(canvas), cache),
        theirs.denoise(canvas, reference[2]),
        truth.denoise(canvas, exact[2]),
    )
