"""From the files of a checkpoint to a model whose every weight is in memory.

Only the vision tower waits until the first image: text alone does not pay for it.
"""

from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .. import backends
from ..checkpoint.config import ModelConfig
from ..checkpoint.generation_config import read_generation_config
from ..checkpoint.quantize import Quantization
from ..checkpoint.vision import (
    read_image_tokens,
    read_vision,
    read_vision_weights,
    vision_shapes,
)
from ..checkpoint.weights import read_layout
from ..files.safetensors import load_tensors
from .language import DiffusionGemma
from .layers import ExpertLinear, FeedForward, QuantizedExpertLinear, QuantizedLinear
from .vision import ImageEncoder, Vision


def load_model(folder: Path, config: ModelConfig) -> DiffusionGemma:
    """Return the model in `folder`, dense or quantised; every array evaluated.

    Evaluated arrays may be used from any thread, unevaluated ones only where they
    were made. Raises CheckpointError naming tensors that are missing, unexpected
    or of the wrong shape.
    """
    backends.current()  # chosen before the first array is made
    layout = read_layout(folder, config)
    model = DiffusionGemma(config)
    for layer, quantization in layout.quantized.items():
        replace_layer(model, layer, quantization)
    weights = load_tensors(layout.parameters)
    model.load_weights(list(weights.items()), strict=True)
    mx.eval(model.parameters())
    model.eval()
    model.settings = read_generation_config(config, folder)
    if config.has_vision:
        model.vision = ImageEncoder(
            folder,
            partial(read_image_tokens, config, str(folder / "config.json")),
            partial(_load_tower, folder, config),
        )
    return model


def _load_tower(folder: Path, config: ModelConfig) -> Vision:
    vision = read_vision(config, str(folder / "config.json"))
    shapes = vision_shapes(vision, config.hidden_size)
    tower = Vision(vision, config.hidden_size)
    tower.load_weights(read_vision_weights(folder, shapes), strict=True)
    mx.eval(tower.parameters())
    return tower


def join_products(model: DiffusionGemma) -> None:
    """Join gate and up of the feed-forwards where this device is faster for it.

    For models that are run only: training and fusing know the layers by their names on
    disk, which are gone then.
    """
    rows, width = backends.current().product_rows, model.config.intermediate_size
    if width % rows == 0 or 2 * width % rows:
        return
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.join()


def replace_layer(model: DiffusionGemma, layer: str, q: Quantization) -> None:
    """Put the quantised form of a layer in its place."""
    parent, name = find_layer(model, layer)
    dense = parent[name]
    spec = (q.group_size, q.bits, q.mode)
    if isinstance(dense, ExpertLinear):
        experts, outputs, inputs = dense.weight.shape
        parent[name] = QuantizedExpertLinear(experts, inputs, outputs, *spec)
    elif isinstance(dense, nn.Embedding):
        size, width = dense.weight.shape
        parent[name] = nn.QuantizedEmbedding(size, width, *spec)
    else:
        outputs, inputs = dense.weight.shape
        parent[name] = QuantizedLinear(inputs, outputs, "bias" in dense, *spec)


def find_layer(model: nn.Module, layer: str) -> tuple[nn.Module, str]:
    """Return the module that holds the layer of that path, and its name there."""
    *path, name = layer.split(".")
    parent = model
    for part in path:
        parent = parent[int(part)] if part.isdecimal() else parent[part]
    return parent, name
