"""How much memory a fine-tuning takes, estimated from names and settings alone.

The estimate adds up weights, optimizer, kept activations, the working set of a layer
and a tile of the vocabulary. Its factors are fitted to small models on a CPU, where it
is within 25 % (tests/bench/training_memory.py). GB are 10^9 bytes, except of memory as
sold, 2^30.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from .. import backends
from ..adapters.lora import LoRA, shapes, trained_layers
from ..checkpoint import hub
from ..checkpoint.config import ModelConfig, read_config
from ..checkpoint.weights import expected_shapes, read_layout
from ..errors import HubError, SettingsError
from ..performance.cost import Storage
from ..performance.estimate import precision
from ..performance.synthetic import config_26b
from .settings import TrainSettings

# The released model in a precision, for an estimate without its files.
NAMED = {"26b": "bf16", "26b-8bit": "8 bit", "26b-mixed": "mixed", "26b-4bit": "4 bit"}
FLOAT = 4  # bytes of a master weight, an adapter and their gradients
STATES = {"adamw": 2, "adam": 2, "adafactor": 0}  # float32 arrays per weight


@dataclass(frozen=True)
class Job:
    """What of a fine-tuning decides how much memory it takes.

    lora      None to train the weights themselves, of the last `num_layers` layers
    longest   tokens of the longest row, where it is known
    ranks     processes that share a micro-batch, each on a machine of its own
    """

    config: ModelConfig
    storage: Storage
    settings: TrainSettings
    lora: LoRA | None
    num_layers: int = -1
    longest: float = math.inf
    ranks: int = 1
    device: backends.Backend = field(default_factory=backends.current)

    @property
    def prefix(self) -> int:
        """Most tokens before a canvas."""
        allowed = self.settings.max_seq_length - self.config.canvas_length
        return int(max(1, min(allowed, self.longest - 1)))

    @property
    def layers(self) -> range:
        """Layers with something to train. Raises SettingsError for too many."""
        number = self.num_layers if self.lora is None else self.lora.num_layers
        return trained_layers(self.config, number)

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        names = expected_shapes(self.config)
        if self.lora is not None:
            names = shapes(self.config, self.lora)
        elif self.num_layers != -1:
            layers = tuple(f"layers.{index}." for index in self.layers)
            names = {name: names[name] for name in names if name.startswith(layers)}
        return sum(map(math.prod, names.values()))


def read_shape(model: str | Path, revision: str | None) -> tuple[ModelConfig, Storage]:
    """Return a model's configuration and how it is stored, from its headers alone.

    model   folder, hub id, built-in name, or a name in NAMED
    """
    if str(model) in NAMED:
        return config_26b(), precision(config_26b(), NAMED[str(model)])
    try:
        folder = hub.resolve(model, revision)
    except HubError as error:
        known = ", ".join(NAMED)
        raise HubError(f"{error}; an estimate knows {known} as well") from None
    config = read_config(folder)
    return config, Storage.of_files(read_layout(folder, config).parameters)


def estimate(job: Job) -> dict[str, int]:
    """Return the bytes of each part at the busiest moment of an update.

    Raises SettingsError when quantised weights are to be trained themselves.
    """
    config, settings, value = job.config, job.settings, job.storage.value_bytes
    weights, trained, device = job.storage.weight_bytes, job.trained, job.device
    sizes = {name: math.prod(shape) for name, shape in expected_shapes(config).items()}
    quantized = weights < value * sum(sizes.values())
    if job.lora is None and quantized:
        why = "use lora, or convert the model with --dequantize first"
        raise SettingsError(f"fine-tune-type full needs dense weights; {why}")
    rows = max(1, settings.batch_size // job.ranks)
    decoded = rows * config.canvas_length  # tokens
    encoded = rows * job.prefix + (decoded if settings.encoder_loss_weight else 0)
    kept, working, traced = _activations(job, encoded, decoded)
    table = value * config.vocab_size * config.hidden_size
    chunk = min(device.vocabulary_chunk, config.vocab_size)
    copies = 6 if device.compiles else 16  # of logits; fewer where steps are fused
    logits = FLOAT * copies * min(device.vocabulary_rows, decoded) * chunk
    logits += 2 * value * chunk * config.hidden_size * quantized
    summed = FLOAT * trained * (settings.grad_accumulation_steps > 1)
    updated = 17 * trained  # gradients, their mean, that clipped, and new weights
    if job.lora is None and job.num_layers == -1:
        # each tile of positions gives the embedding a gradient of its own
        tiles = 2 + (encoded + decoded) // device.vocabulary_rows
        updated = max(updated, summed + 2 * tiles * table)
    # gradients, activations kept, working set, vocabulary: in the update and backward
    moments = [(updated, 0, 0, 0), (summed, kept, working, logits)]
    dtype = mx.float32 if value == FLOAT else mx.bfloat16
    if device.experts(dtype, quantized=quantized, pairs=1) == "loop":
        # A CPU that reads the choice of experts on the host while gradients are traced
        # frees nothing before: all arrays of all passes live, with dense weights.
        copies = FLOAT * (6 if settings.grad_checkpoint and quantized else 3)
        layers = sum(size for name, size in sizes.items() if name.startswith("layers."))
        signal = 16 * FLOAT * decoded * config.vocab_size + 4 * table
        moments.append((summed, traced, copies * layers, signal))
    masters = FLOAT * trained * (job.lora is not None or value < FLOAT)
    states = FLOAT * trained * STATES[settings.optimizer]
    names = "weights", "adapters or masters", "optimizer", "gradients"
    names += "activations kept", "working set", "vocabulary"
    found = weights, masters, states, *max(moments, key=sum)
    return {name: int(size) for name, size in zip(names, found, strict=True)}


def total(job: Job) -> int:
    return sum(estimate(job).values())


def _activations(job: Job, encoded: int, decoded: int) -> tuple[float, float, float]:
    """Return the bytes layers keep, those one works with, and those of all arrays."""
    config, value, full = job.config, job.storage.value_bytes, job.lora is None
    checkpoint, heads = job.settings.grad_checkpoint, config.num_attention_heads
    width, inner = config.hidden_size, config.intermediate_size
    experts = config.top_k_experts * (width + 3 * config.moe_intermediate_size)
    # the gradient ends in the first layer that is trained, or in the embedding
    first = 0 if full and job.num_layers == -1 else job.layers.start
    kept = working = widest = every = 0.0
    for index, layer in enumerate(config.layers):
        queries, keys = heads * layer.head_dim, layer.kv_heads * layer.head_dim
        seen = 0.6 * encoded * config.canvas_length / decoded  # keys, on average
        if layer.sliding:
            seen = min(seen, 1.5 * config.sliding_window)
        scores = value * heads * seen
        widest = max(widest, encoded * scores)
        # inputs of trained products, which their gradients need
        inputs = FLOAT * (2 * width + queries + inner) * (index in job.layers)
        norms = 18 if full else 11  # trained ones need their inputs as well
        numbers = norms * width + 3 * inner + 3 * queries + 4 * keys + experts
        token = value * numbers + inputs
        every += (encoded + decoded) * (token + scores)
        if checkpoint:
            kept += (encoded + decoded) * value * (width + 2 * keys)
            kept += 2.4 * decoded * inputs
            working = max(working, 1.5 * encoded * token)
        else:
            kept += (decoded + encoded * (index >= first)) * (token + scores)
    working += (3 if checkpoint else 2) * widest
    every *= (1.5 if checkpoint else 0.9) * (3 if full else 4.5) * FLOAT / value
    return kept, working, every
