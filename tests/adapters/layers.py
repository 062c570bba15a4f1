"""Adapted layers of random numbers, and the dense weights that should say the same."""

import copy
from dataclasses import astuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dgemma.adapters.lora import LoRAExpertLinear, LoRALinear, delta
from mlx_dgemma.checkpoint.quantize import Quantization
from mlx_dgemma.model.layers import (
    ExpertLinear,
    Experts,
    Linear,
    QuantizedExpertLinear,
    QuantizedLinear,
)

CODES = {
    "affine": Quantization(group_size=32),
    "mxfp4": Quantization.with_defaults("mxfp4"),
}


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    rng = np.random.default_rng([seed, *shape])
    return mx.array((rng.normal(size=shape) * scale).astype(np.float32))


def flat(tree) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def fill(model: nn.Module) -> None:
    """Random numbers for everything trainable, so that adapters do something."""
    weights = [
        (name, random(*a.shape, seed=i, scale=0.5 / a.shape[-1] ** 0.5))
        for i, (name, a) in enumerate(flat(model.trainable_parameters()).items())
    ]
    model.update(tree_unflatten(weights))


def delta_of(layer) -> mx.array:
    return delta(layer.lora_a, layer.lora_b, layer.scale)


def linear(mode: str, *, bias: bool = False) -> tuple[nn.Module, mx.array]:
    """A layer from 64 to 48, and its dense weight."""
    layer = Linear(64, 48, bias=bias)
    layer.weight = random(48, 64, seed=1)
    if bias:
        layer.bias = random(48, seed=2)
    if mode == "dense":
        return layer, layer.weight
    coded = QuantizedLinear(64, 48, bias, *astuple(CODES[mode]))
    if bias:
        coded.bias = layer.bias
    return coded, quantise(coded, layer.weight, mode)


def experts(mode: str, inputs: int = 64, outputs: int = 32):
    """Four expert layers, and their dense weight."""
    layer = ExpertLinear(4, inputs, outputs)
    layer.weight = random(4, outputs, inputs, seed=3, scale=inputs**-0.5)
    if mode == "dense":
        return layer, layer.weight
    coded = QuantizedExpertLinear(4, inputs, outputs, *astuple(CODES[mode]))
    return coded, quantise(coded, layer.weight, mode)


def quantise(layer: nn.Module, weight: mx.array, mode: str) -> mx.array:
    """Put a weight into a quantised layer; returns what it became."""
    parts = CODES[mode].quantize(weight)
    for name, part in parts.items():
        layer[name] = part
    return CODES[mode].dequantize(parts, mx.float32)


def beside(layer: nn.Module, *, rank: int = 3, scale: float = 0.7):
    """The layer with an adapter of random numbers."""
    if isinstance(layer, ExpertLinear | QuantizedExpertLinear):
        a, b = (4, rank, layer.inputs), (4, layer.outputs, rank)
        kind = LoRAExpertLinear
    else:
        kind, a, b = LoRALinear, (64, rank), (rank, 48)
    factors = random(*a, seed=9, scale=a[-1] ** -0.5), random(*b, seed=4)
    return kind(layer, *factors, scale)


def mixture(mode: str, width: int = 64) -> tuple[Experts, Experts]:
    """A mixture of adapted experts, and a dense one that should say the same."""
    ours = Experts.__new__(Experts)
    nn.Module.__init__(ours)
    plain = copy.copy(ours)
    for name, shape in (("gate_up_proj", (width, 64)), ("down_proj", (32, width))):
        layer, weight = experts(mode, *shape)
        ours[name] = beside(layer)
        plain[name] = ExpertLinear(4, *shape)
        plain[name].weight = weight + delta_of(ours[name])
    return ours, plain


def choices(tokens: int) -> tuple[mx.array, mx.array, mx.array]:
    """Tokens, two experts for each, and what these weigh. The last has none."""
    rng = np.random.default_rng(tokens)
    indices = np.stack([rng.permutation(3)[:2] for _ in range(tokens)])
    weights = rng.uniform(0.2, 0.8, (tokens, 2)).astype(np.float32)
    return random(tokens, 64, seed=7), mx.array(indices), mx.array(weights)
