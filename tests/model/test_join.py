"""Gate and up as one product: the same logits, and only where it is asked for."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoint.folders import logits
from tiny import write_tiny

from mlx_dgemma import LoRA, convert, load
from mlx_dgemma.adapters.lora import adapt
from mlx_dgemma.loading import load_as_stored
from mlx_dgemma.model.layers import FeedForward, Linear, QuantizedLinear
from mlx_dgemma.model.loading import join_products

# the same sums; some BLAS orders those of a wider product otherwise
ROUNDED = {"rtol": 0, "atol": 2e-5}
MODES = {
    "4 bit": {"q_bits": 4},
    "4 bit, half": {"q_bits": 4, "dtype": "float16"},
    "mxfp4": {"q_mode": "mxfp4"},
}
NAMES = ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp", "self_conditioning"]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """`quantised(64, "mxfp4")`: a tiny checkpoint of that inner width, made once."""

    @functools.cache
    def make(width: int, mode: str = "4 bit") -> Path:
        folder = tmp_path_factory.mktemp("quantised")
        source = write_tiny(folder / "dense", intermediate_size=width)
        convert(source, folder / "model", quantize=True, **MODES[mode])
        return folder / "model"

    return make


def joined(model) -> list[str]:
    """Names of the feed-forwards whose gate and up are one."""
    modules = dict(model.named_modules()).items()
    return sorted(
        name
        for name, module in modules
        if isinstance(module, FeedForward) and "gate_up_proj" in module
    )


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("mode", "width"), [("4 bit", 192), ("4 bit, half", 64), ("mxfp4", 64)]
)
def test_a_joined_model_computes_the_same(request, quantised, device, mode, width):
    if device == "gpu":
        request.getfixturevalue("as_gpu")
    request.getfixturevalue("tuned")(product_rows=128)
    folder = quantised(width, mode)
    ours, theirs = load(folder)[0], load_as_stored(folder)[0]
    assert (joined(ours), joined(theirs)) == (NAMES, [])
    with ThreadPoolExecutor(1) as pool:  # joined weights serve any thread
        found = pool.submit(logits, ours).result()
    np.testing.assert_allclose(found, logits(theirs), **ROUNDED)


def test_joined_only_where_that_makes_a_multiple(quantised, tuned):
    for rows, width in ((1, 64), (64, 96), (128, 64), (128, 128)):
        tuned(product_rows=rows)
        helps = (rows, width) in ((64, 96), (128, 64))
        assert joined(load(quantised(width))[0]) == (NAMES if helps else [])


CODES = [(64, 8, "affine"), (32, 4, "affine"), (32, 4, "mxfp4"), None, "adapted"]


@pytest.mark.parametrize("code", CODES, ids=str)
def test_only_what_is_coded_alike_is_joined(quantised, tuned, code):
    model, _ = load_as_stored(quantised(64))
    other = Linear(64, 64, bias=False)
    if code == "adapted":
        adapt(model, LoRA(keys=("mlp.up_proj",), num_layers=1))
        other = model.layers[2].mlp.up_proj
        other.lora_b = mx.random.normal(other.lora_b.shape, key=mx.random.key(2))
    elif code is not None:
        other = QuantizedLinear.from_linear(other, *code)
    model.layers[2].mlp.up_proj = other
    before = logits(model)
    tuned(product_rows=128)
    join_products(model)
    assert joined(model) == [name for name in NAMES if name != "layers.2.mlp"]
    assert model.layers[2].mlp.up_proj is other
    np.testing.assert_allclose(logits(model), before, **ROUNDED)
