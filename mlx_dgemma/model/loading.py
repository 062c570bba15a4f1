"""From the files of a checkpoint to a model whose every weight is in memory.

Only the vision tower waits until the first image: who reads text does not pay for it.
"""

from pathlib import Path
from threading import Lock

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import backends
from ..checkpoint.config import ModelConfig
from ..checkpoint.generation_config import read_generation_config
from ..checkpoint.quantize import Quantization
from ..checkpoint.vision import (
    ImageTokens,
    read_image_tokens,
    read_vision,
    read_vision_weights,
    vision_shapes,
)
from ..checkpoint.weights import read_layout
from .language import DiffusionGemma
from .layers import ExpertLinear, FeedForward, QuantizedExpertLinear, QuantizedLinear
from .vision import Vision


def load_model(folder: Path, config: ModelConfig) -> DiffusionGemma:
    """The model in `folder`, dense or quantised; every array evaluated.

    Evaluated arrays may be used from any thread, unevaluated ones only where they
    were made. Raises CheckpointError naming tensors that are missing, unexpected
    or of the wrong shape.
    """
    backends.current()  # chosen before the first array is made
    layout = read_layout(folder, config)
    model = DiffusionGemma(config)
    for layer, quantization in layout.quantized.items():
        replace_layer(model, layer, quantization)
    arrays: dict[Path, dict[str, mx.array]] = {}
    weights = []
    for parameter, name in layout.names.items():
        file = layout.files.tensors[name].file
        if file not in arrays:
            arrays[file] = layout.files.load_file(file)
        weights.append((parameter, arrays[file].pop(name)))
    model.load_weights(weights, strict=True)
    mx.eval(model.parameters())
    model.eval()
    model.settings = read_generation_config(config, folder)
    if config.has_vision:
        model.vision = ImageEncoder(folder, config)
    return model


class ImageEncoder:
    """The vision tower of a checkpoint, read when it is first used; for any thread."""

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder, self._config = folder, config
        self._lock = Lock()
        self._vision: Vision | None = None

    @property
    def tokens(self) -> ImageTokens:
        """The ids that stand for images in a prompt."""
        return read_image_tokens(self._config, str(self.folder / "config.json"))

    def encode_image(self, patches: np.ndarray, positions: np.ndarray) -> mx.array:
        """One image's patches (P, 3 · patch²) and (P, 2) x, y -> (n, D), evaluated.

        Raises ConfigError or CheckpointError where the tower cannot be read.
        """
        soft = self._opened()(patches, positions)
        mx.eval(soft)
        return soft

    def _opened(self) -> Vision:
        with self._lock:
            if self._vision is None:
                where = str(self.folder / "config.json")
                vision = read_vision(self._config, where)
                width = self._config.hidden_size
                weights = read_vision_weights(self.folder, vision_shapes(vision, width))
                tower = Vision(vision, width)
                tower.load_weights(weights, strict=True)
                mx.eval(tower.parameters())
                self._vision = tower
            return self._vision


def join_products(model: DiffusionGemma) -> None:
    """Join gate and up of the feed-forwards where this device is faster for it.

    For models that are run only: training and fusing know the layers by their names on
    disk, which are gone then.
    """
    rows = backends.current().product_rows
    width = model.config.intermediate_size
    if width % rows == 0 or 2 * width % rows:
        return
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.join()


def replace_layer(model: DiffusionGemma, layer: str, q: Quantization) -> None:
    """Put the quantised twin of a layer in its place."""
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
    """The module that holds the layer of that path, and its name there."""
    *path, name = layer.split(".")
    parent = model
    for part in path:
        parent = parent[int(part)] if part.isdecimal() else parent[part]
    return parent, name
