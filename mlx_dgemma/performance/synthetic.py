"""Models of a real shape with random weights, to measure time and memory with.

Their text is noise: only how long it takes and how much memory it needs counts.
"""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.config import ModelConfig, read_config
from ..checkpoint.generation_config import read_generation_config
from ..checkpoint.quantize import RECIPES, Quantization
from ..checkpoint.weights import layer_path
from ..model.language import DiffusionGemma
from ..model.layers import ExpertLinear
from ..model.loading import join_products, replace_layer

# Of text_config: google/diffusiongemma-26B-A4B-it, and a model small enough for tests.
# The reader of config.json takes the release's values for keys that are missing.
NUMBERS = {
    "vocab_size": (262144, 512),
    "hidden_size": (2816, 64),
    "intermediate_size": (2112, 96),
    "moe_intermediate_size": (704, 32),
    "num_hidden_layers": (30, 3),
    "num_attention_heads": (16, 4),
    "num_key_value_heads": (8, 2),
    "head_dim": (256, 16),
    "num_global_key_value_heads": (2, 1),
    "global_head_dim": (512, 32),
    "num_experts": (128, 4),
    "top_k_experts": (8, 2),
    "sliding_window": (1024, 8),
}
RELEASE_26B, TINY = (
    {
        "model_type": "diffusion_gemma",
        "canvas_length": canvas_length,
        "eos_token_id": [1, 106, 50],
        "text_config": {key: numbers[column] for key, numbers in NUMBERS.items()},
    }
    for column, canvas_length in enumerate((256, 16))
)
NO_NAN = 0xFEFEFEFE  # clears bit 0 of each byte: of the 8-bit floats 0x7F, 0xFF are NaN


def config_from(raw: dict[str, Any]) -> ModelConfig:
    """Return the model that a config.json of this content declares."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return read_config(Path(folder))


def config_26b() -> ModelConfig:
    """Return the released 26B, text only."""
    return config_from(RELEASE_26B)


def config_tiny() -> ModelConfig:
    """Return three layers of width 64 over 512 words, for tests."""
    return config_from(TINY)


SHAPES = {"26b": config_26b, "tiny": config_tiny}


def synthetic_model(
    config: ModelConfig,
    *,
    quantization: Quantization | None,
    recipe: str = "uniform",
    dtype: mx.Dtype,
    seed: int,
) -> DiffusionGemma:
    """Return a model of this shape with random weights, evaluated.

    quantization    None: dense
    recipe          name in RECIPES: which layers the quantization is for
    dtype           of norms, scales and dense weights

    Norms and scalars are 1; the other weights have mean 0 and a deviation of about
    1/sqrt(inputs), so logits are finite. One tensor is made at a time: memory stays
    below the size of the model and of its largest tensor.
    """
    model = DiffusionGemma(config)
    codes: dict[str, Quantization] = {}
    for path, layer in model.named_modules():
        linear = isinstance(layer, nn.Linear | nn.Embedding | ExpertLinear)
        if quantization is not None and linear:
            code = RECIPES[recipe](layer_path(path), quantization)
            if (code := code.fit_to_shape(layer.weight.shape)) is not None:
                replace_layer(model, path, code)
                codes[path] = code
    shapes = {n: a.shape for n, a in dict(tree_flatten(model.parameters())).items()}
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    weights = []
    for (name, shape), key in zip(shapes.items(), keys, strict=True):
        layer, _, part = name.rpartition(".")
        if part == "bias":
            array = mx.zeros(shape, dtype=dtype)
        elif layer in codes:
            array = _quantized(part, shape, codes[layer], dtype, key)
        else:
            array = _dense(shape, dtype, key)
        mx.eval(array)  # frees its random bits before the next tensor is made
        weights.append((name, array))
    model.load_weights(weights, strict=True)
    model.eval()
    model.settings = read_generation_config(config)
    join_products(model)
    return model


def _dense(shape: tuple[int, ...], dtype: mx.Dtype, key: mx.array) -> mx.array:
    """Return ones for a norm or scalar, else values from 256 equal steps."""
    if len(shape) < 2:
        return mx.ones(shape, dtype=dtype)
    size = math.prod(shape)
    steps = _bits(-(-size // 4), key).view(mx.uint8)[:size].reshape(shape)
    return (steps.astype(dtype) - 127.5) * math.sqrt(12 / (4**8 * shape[-1]))


def _quantized(
    part: str, shape: tuple[int, ...], q: Quantization, dtype: mx.Dtype, key: mx.array
) -> mx.array:
    """Return a part of a quantised layer: any bits, and scales of a real row."""
    if part == "weight":
        packed = _bits(math.prod(shape), key).reshape(shape)
        return packed & NO_NAN if q.mode == "mxfp8" else packed
    inputs = shape[-1] * q.group_size
    row = mx.random.normal((1, inputs), dtype, key=mx.random.key(0)) / inputs**0.5
    return mx.contiguous(mx.broadcast_to(q.quantize(row)[part], shape))


def _bits(words: int, key: mx.array) -> mx.array:
    """Return (words,) random uint32: a split key is raw random bits."""
    return mx.random.split(key, -(-words // 2)).reshape(-1)[:words]
