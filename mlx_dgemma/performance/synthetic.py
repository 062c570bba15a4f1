"""Models of a real shape with random weights, to measure time and memory with.

The text they write is noise: only how long it takes and what it needs means
anything. No file is read and none is written but a configuration, on its way
through the same reader as a checkpoint's.
"""

import json
import math
from collections.abc import Callable
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
from ..errors import SettingsError
from ..model.language import DiffusionGemma
from ..model.layers import ExpertLinear
from ..model.loading import join_products, replace_layer

# config.json of google/diffusiongemma-26B-A4B-it without its vision tower, and its
# generation_config.json under the key where the reader also looks for it.
RELEASE_26B: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "eos_token_id": [1, 106],
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 262144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "moe_intermediate_size": 704,
        "num_hidden_layers": 30,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "num_global_key_value_heads": 2,
        "global_head_dim": 512,
        "num_experts": 128,
        "top_k_experts": 8,
        "sliding_window": 1024,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": "vision",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    },
    "generation_config": {
        "eos_token_id": [1, 106, 50],
        "max_new_tokens": 256,
        "max_denoising_steps": 48,
        "t_max": 0.8,
        "t_min": 0.4,
        "stability_threshold": 1,
        "confidence_threshold": 0.005,
        "sampler_config": {
            "_cls_name": "EntropyBoundSamplerConfig",
            "entropy_bound": 0.1,
        },
    },
}
# Every kind of layer and of fallback, small enough for a test; like no release.
TINY: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": 16,
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_global_key_value_heads": 1,
        "global_head_dim": 32,
        "num_experts": 4,
        "top_k_experts": 2,
        "sliding_window": 8,
    },
}
# Numbers a 4-bit float (e2m1) and an 8-bit one (e4m3, top exponent bit 0) can be.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = [
    2.0 ** (max(exponent, 1) - 7) * ((exponent > 0) + fraction / 8)
    for exponent in range(8)
    for fraction in range(8)
]
NUMBERS = {"mxfp4": E2M1, "nvfp4": E2M1, "mxfp8": E4M3}
NO_NAN = 0xBFBFBFBF  # clears each byte's top exponent bit: 0x7F and 0xFF are NaN


def config_26b() -> ModelConfig:
    """The released 26B, text only."""
    return _read(RELEASE_26B)


def config_tiny() -> ModelConfig:
    """Three layers of width 64 over 512 words, for tests."""
    return _read(TINY)


SHAPES: dict[str, Callable[[], ModelConfig]] = {
    "26b": config_26b,
    "tiny": config_tiny,
}


def synthetic_model(
    config: ModelConfig,
    *,
    quantization: Quantization | None,
    recipe: str = "uniform",
    dtype: mx.Dtype,
    seed: int,
) -> DiffusionGemma:
    """A model of this shape with random weights, evaluated on the default device.

    `quantization` by `recipe`, a name in RECIPES, or dense for None; `dtype` is that
    of norms, scales and dense weights. Linear maps and embedding have mean 0 and
    standard deviation about 1/sqrt(inputs), norms and scalars are 1: logits are
    finite. Text from it is noise. One tensor is made at a time, so memory stays
    below the model's size and once more its largest tensor's. Raises SettingsError
    for an unknown recipe.
    """
    model = DiffusionGemma(config)
    codes = {} if quantization is None else _quantize(model, quantization, recipe)
    parameters = tree_flatten(model.parameters())
    assert isinstance(parameters, list)
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    weights = []
    for (name, placeholder), key in zip(parameters, keys, strict=True):
        layer, _, part = name.rpartition(".")
        if layer in codes:
            array = _coded(part, placeholder.shape, codes[layer], dtype, key)
        else:
            array = _dense(part, placeholder.shape, dtype, key)
        mx.eval(array)  # its random bits are freed before the next tensor's are made
        weights.append((name, array))
    model.load_weights(weights, strict=True)
    model.eval()
    model.settings = read_generation_config(config)
    join_products(model)
    return model


def _read(raw: dict[str, Any]) -> ModelConfig:
    """A configuration by the reader of checkpoint folders."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return read_config(Path(folder))


def _quantize(
    model: DiffusionGemma, base: Quantization, recipe: str
) -> dict[str, Quantization]:
    """Put quantised layers where the recipe wants them: path -> how it is coded."""
    if recipe not in RECIPES:
        raise SettingsError(f"recipe is {recipe!r}; supported: {', '.join(RECIPES)}")
    codes = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Embedding | ExpertLinear):
            continue
        code = RECIPES[recipe](layer_path(path), base).fit_to_shape(layer.weight.shape)
        if code is not None:
            replace_layer(model, path, code)
            codes[path] = code
    return codes


def _dense(
    part: str, shape: tuple[int, ...], dtype: mx.Dtype, key: mx.array
) -> mx.array:
    """Ones for a norm or scalar, zeros for a bias, else one of 256 even values."""
    if part == "bias":
        return mx.zeros(shape, dtype=dtype)
    if len(shape) < 2:
        return mx.ones(shape, dtype=dtype)
    size = math.prod(shape)
    steps = _bits(-(-size // 4), key).view(mx.uint8)[:size].reshape(shape)
    return (steps.astype(dtype) - 127.5) * _even_step(8, shape[-1])


def _coded(
    part: str, shape: tuple[int, ...], q: Quantization, dtype: mx.Dtype, key: mx.array
) -> mx.array:
    """One part of a quantised layer: any bits, and a scale that suits them."""
    if part == "bias":
        return mx.zeros(shape, dtype=dtype)
    if part == "weight":
        packed = _bits(math.prod(shape), key).reshape(shape)
        return packed & NO_NAN if q.mode == "mxfp8" else packed
    inputs = shape[-1] * q.group_size
    if q.mode == "affine":
        step = _even_step(q.bits, inputs)
        middle = -step * (2**q.bits - 1) / 2
        return mx.full(shape, step if part == "scales" else middle, dtype=dtype)
    numbers = NUMBERS[q.mode]
    spread = math.sqrt(sum(number**2 for number in numbers) / len(numbers))
    scale = 1 / (spread * math.sqrt(inputs))
    if q.mode == "nvfp4":  # its scales are e4m3, the others' powers of two
        return mx.full(shape, mx.to_fp8(mx.array(scale)))
    return mx.full(shape, 127 + round(math.log2(scale)), dtype=mx.uint8)


def _even_step(bits: int, inputs: int) -> float:
    """Between 2^bits even values, all as likely, whose deviation is 1/sqrt(inputs)."""
    return math.sqrt(12 / ((4**bits - 1) * inputs))


def _bits(words: int, key: mx.array) -> mx.array:
    """(words,) random uint32. A split is raw random bits, floats would round them."""
    return mx.random.split(key, -(-words // 2)).reshape(-1)[:words]
