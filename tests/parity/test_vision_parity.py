"""Images against transformers: soft tokens, the prefix they write, logits behind it.

Both read the same pictures, each with its own processor. The measure is that of
test_model_parity.
"""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image as Pictures
from test_images_parity import opaque
from test_model_parity import assert_as_exact, ids, load_all

from mlx_dgemma.media.images import ImageBudget, read_picture
from mlx_dgemma.model.vision import Image

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

IMAGE, BEGIN, END = 9, 7, 8  # of the toy tokenizer
RNG = np.random.default_rng(0)
PICTURES = {
    "small": [(40, 30, "RGB")],
    "large": [(1900, 1300, "RGB")],
    "wide": [(2000, 9, "RGB")],
    "tall": [(7, 900, "RGB")],
    "transparent": [(300, 200, "RGBA")],
    "grey and others": [(300, 200, "L"), (64, 640, "RGB"), (500, 501, "RGBA")],
}
# layout, standardize, clipped, budget of soft tokens: each pair of values at least once
TOWERS = [
    ("release", True, False, 70),
    ("release", False, True, 280),
    ("transformers", True, True, 280),
    ("transformers", False, False, 70),
]
CASES = [
    pytest.param(pictures, TOWERS[(n + shift) % 4], id=f"{name}, {shift}")
    for n, (name, pictures) in enumerate(PICTURES.items())
    for shift in (0, 2)
]


def draw(width: int, height: int, mode: str):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = RNG.integers(0, 256, (height, width, channels)).astype(np.uint8)
    return Pictures.fromarray(pixels.squeeze(), mode)


def chunks(length: int, size: int, images: list[Image]):
    """Yield the bounds of chunks of `size` tokens that split no image."""
    begin = 0
    while begin < length:
        end = min(begin + size, length)
        end = next((i.end for i in images if i.start < end < i.end), end)
        yield begin, end
        begin = end


@pytest.mark.parametrize(("sizes", "tower"), CASES)
def test_pictures_to_logits(checkpoint, sizes, tower):
    """Images longer than the window of 8, in one chunk and in chunks of 1, 7 and 64."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import (
        Gemma4ImageProcessorPil,
    )

    layout, standardize, clipped, budget = tower
    vision = {"standardize": standardize, "use_clipped_linears": clipped}
    vision |= {"num_hidden_layers": 2, "num_key_value_heads": 1}
    vision |= {"position_embedding_size": 1024}
    model, truth, theirs = load_all(checkpoint(layout=layout, vision=vision))
    pictures = [draw(*size) for size in sizes]
    processor = Gemma4ImageProcessorPil(max_soft_tokens=budget)
    made = processor([opaque(p) for p in pictures], return_tensors="np")
    given = np.asarray(made["pixel_values"]), np.asarray(made["image_position_ids"])
    tokens, images = list(RNG.integers(10, 32, 11)), []
    for picture in pictures:
        read = read_picture(picture, ImageBudget(budget))
        soft = model.vision.encode_image(read.patches, read.positions)
        images.append(Image(len(tokens) + 1, soft))
        tokens += [BEGIN, *[IMAGE] * read.soft_tokens, END]
        tokens += RNG.integers(10, 32, RNG.integers(0, 7)).tolist()
    prompt, canvas = np.array([[*tokens, 12]]), RNG.integers(10, 32, (1, 32))
    exact = truth.encode_images(prompt, *given)
    reference = theirs.encode_images(prompt, *given)
    soft = mx.concatenate([image.features for image in images])
    assert_as_exact("soft tokens", soft, reference[0], exact[0])
    hidden = model.encode_hidden(ids(prompt), model.make_cache(), images)
    assert_as_exact("hidden", hidden, reference[1], exact[1])
    wanted = theirs.denoise(canvas, reference[2]), truth.denoise(canvas, exact[2])
    for size in (prompt.shape[1], 1, 7, 64):
        cache = model.make_cache()
        for begin, end in chunks(prompt.shape[1], size, images):
            inside = [
                Image(image.start - begin, image.features)
                for image in images
                if begin <= image.start < end
            ]
            model.encode(ids(prompt[:, begin:end]), cache, inside)
        logits = model.denoise(ids(canvas), cache)
        assert_as_exact(f"{size} at a time", logits, *wanted)
