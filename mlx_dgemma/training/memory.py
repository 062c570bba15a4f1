"""How much memory a fine-tuning takes, estimated from names and settings alone.

The estimate adds up weights, optimizer, kept activations, the working set of a layer
and a tile of the vocabulary. Its factors are fitted to small models on a CPU, where it
is within 25 % (tests/bench/training_memory.py). GB are 10^9 bytes, except of memory as
sold, 2^30.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from .. import backends
from ..adapters.lora import LoRA, shapes, trained_layers
from ..checkpoint import hub
from ..checkpoint.config import ModelConfig, read_config
from ..checkpoint.weights import expected_shapes, read_layout
from ..errors import HubError, SettingsError, TrainingError
from ..performance.cost import Loaded, Storage, weight_bytes
from ..performance.estimate import PRECISIONS, usable_bytes
from ..performance.synthetic import config_26b
from .settings import TrainSettings

# The released model in a precision, for an estimate without its files.
NAMED = {"26b": "bf16", "26b-8bit": "8 bit", "26b-mixed": "mixed", "26b-4bit": "4 bit"}
MACS = (24, 32, 48, 64)  # GB
HEADLINE = "ESTIMATE of the peak of an update; not measured on a Mac or other GPU."
FLOAT = 4  # bytes of a master weight, an adapter and their gradients
STATES = {"adamw": 2, "adam": 2, "adafactor": 0}  # float32 arrays per weight


@dataclass(frozen=True)
class Job:
    """What of a fine-tuning decides how much memory it takes.

    storage   how the base's weights lie in memory
    lora      None to train the weights themselves, of the last `num_layers` layers
    longest   tokens of the longest row; None for as many as the settings allow
    ranks     processes that share a micro-batch, each on a machine of its own
    """

    config: ModelConfig
    storage: Storage
    settings: TrainSettings
    lora: LoRA | None
    num_layers: int = -1
    longest: int | None = None
    ranks: int = 1
    device: backends.Backend = field(default_factory=backends.current)

    @property
    def prefix(self) -> int:
        """Most tokens before a canvas."""
        most = self.settings.max_seq_length - self.config.canvas_length
        return max(1, most if self.longest is None else min(most, self.longest - 1))

    @property
    def layers(self) -> range:
        """Layers with something to train. Raises SettingsError for too many."""
        number = self.num_layers if self.lora is None else self.lora.num_layers
        return trained_layers(self.config, number)

    @cached_property
    def trained(self) -> int:
        """How many numbers are trained; routers are small and left out."""
        if self.lora is not None:
            return sum(map(math.prod, shapes(self.config, self.lora).values()))
        layers = tuple(f"layers.{index}." for index in self.layers)
        return sum(
            math.prod(shape)
            for name, shape in expected_shapes(self.config).items()
            if (self.num_layers == -1 or name.startswith(layers))
            and ".router." not in name
        )


def read_shape(model: str | Path, revision: str | None) -> tuple[ModelConfig, Storage]:
    """Return a model's shape and how its weights lie in memory, from headers alone.

    model   a folder, hub id, built-in name or name in NAMED; HubError for others
    """
    name = str(model)
    if name in NAMED and not Path(name).is_dir():
        return config_26b(), PRECISIONS[NAMED[name]]
    try:
        folder = hub.resolve(model, revision)
    except HubError as error:
        known = ", ".join(NAMED)
        raise HubError(f"{error}; an estimate knows {known} as well") from None
    config = read_config(folder)
    layout = read_layout(folder, config)
    sizes: dict[str, int] = {}
    for name, info in layout.parameters.items():
        layer, _, part = name.rpartition(".")
        weight = f"{layer}.weight" if part in ("scales", "biases") else name
        sizes[weight] = sizes.get(weight, 0) + info.nbytes
    return config, Loaded(layout.parameters["norm.weight"].dtype.size, sizes=sizes)


def estimate(job: Job) -> dict[str, int]:
    """Return the bytes of each part at the busiest moment of an update.

    Raises SettingsError when quantised weights are to be trained themselves.
    """
    config, settings, value = job.config, job.settings, job.storage.value_bytes
    weights, names = weight_bytes(config, job.storage), expected_shapes(config)
    dense = {name: math.prod(shape) for name, shape in names.items()}
    quantized = weights < value * sum(dense.values())
    if job.lora is None and quantized:
        raise SettingsError(
            "fine-tune-type full needs dense weights; use lora, or convert the "
            "model with --dequantize first"
        )
    table, device = config.vocab_size * config.hidden_size, job.device
    rows = max(1, settings.batch_size // job.ranks)
    decoded = rows * config.canvas_length
    encoded = rows * job.prefix + (decoded if settings.encoder_loss_weight else 0)
    kept, working, traced = _activations(job, encoded, decoded)
    chunk = min(device.vocabulary_chunk, config.vocab_size)
    copies = 6 if device.compiles else 16  # of logits; fewer where steps are fused
    logits = FLOAT * copies * min(device.vocabulary_rows, decoded) * chunk
    summed = FLOAT * job.trained if settings.grad_accumulation_steps > 1 else 0
    updated = 17 * job.trained  # gradients, their mean, that clipped, and new weights
    if job.lora is None and job.num_layers == -1:
        # each tile of positions gives the embedding a gradient of its own
        tiles = 2 + (encoded + decoded) // device.vocabulary_rows
        updated = max(updated, summed + 2 * value * tiles * table)
    backward = {
        "gradients": summed,
        "activations kept": kept,
        "working set": working,
        "vocabulary": logits + 2 * value * chunk * config.hidden_size * quantized,
    }
    moments = [{"gradients": updated}, backward]
    dtype = mx.float32 if value == FLOAT else mx.bfloat16
    if job.device.experts(dtype, quantized=quantized, pairs=1) == "loop":
        # A CPU that reads the choice of experts on the host while gradients are traced
        # frees nothing before: all arrays of all passes live, with dense weights.
        copies = 6 if settings.grad_checkpoint and quantized else 3
        layers = sum(n for name, n in dense.items() if name.startswith("layers."))
        signal = 16 * decoded * config.vocab_size + 2 * table
        loop = {"activations kept": traced, "working set": FLOAT * copies * layers}
        moments.append(backward | loop | {"vocabulary": FLOAT * signal})
    masters = FLOAT * job.trained if job.lora or value < FLOAT else 0
    states = {"optimizer": STATES[settings.optimizer] * FLOAT * job.trained}
    parts = {"weights": weights, "adapters or masters": masters} | states
    return parts | max(moments, key=lambda moment: sum(moment.values()))


def total(job: Job) -> int:
    return sum(estimate(job).values())


def _activations(job: Job, encoded: int, decoded: int) -> tuple[int, int, int]:
    """Return the bytes layers keep, those one works with, and those of all arrays."""
    config, value = job.config, job.storage.value_bytes
    checkpoint = job.settings.grad_checkpoint
    width, inner = config.hidden_size, config.intermediate_size
    heads, full = config.num_attention_heads, job.lora is None
    experts = config.top_k_experts * (width + 3 * config.moe_intermediate_size)
    # the gradient ends in the first layer that is trained, or in the embedding
    first = 0 if full and job.num_layers == -1 else job.layers.start
    kept = working = traced = 0.0
    for index, layer in enumerate(config.layers):
        queries, keys = heads * layer.head_dim, layer.kv_heads * layer.head_dim
        seen = 0.6 * encoded * config.canvas_length / decoded  # keys, on average
        if layer.sliding:
            seen = min(seen, 1.5 * config.sliding_window)
        numbers = 6 * width + 3 * inner + 3 * queries + 4 * keys + heads * seen
        numbers += experts
        inputs = 0  # of trained products, which their gradients need
        if index in job.layers:
            inputs = (value if full else FLOAT) * (2 * width + queries + inner)
            numbers += full * (10 * width + 2 * queries)  # norms have weights as well
        token = value * numbers + inputs
        kv = value * keys * (2 if layer.sliding else 1)
        chain = value * max(11 * width, 3 * heads * seen)  # of elementwise operations
        traced += ((1.6 if checkpoint else 1) * encoded + 2 * decoded) * token
        if checkpoint:
            kept += (encoded + decoded) * value * width + 2 * encoded * kv
            kept += 2.4 * decoded * inputs
            working = max(working, encoded * (token + 1.4 * inputs + chain))
        else:
            kept += decoded * token + encoded * kv
            kept += encoded * token * (index >= first)
            working = max(working, encoded * chain)
    return int(kept), int(working), int((3 if full else 4.5) * FLOAT / value * traced)


def lines(
    model: str | Path,
    revision: str | None,
    settings: TrainSettings,
    lora: LoRA | None,
    num_layers: int,
) -> list[str]:
    """Return what a run needs on a GPU, part by part, and which Macs have that much."""
    shape, gpu = read_shape(model, revision), backends.BACKENDS["metal"]
    job = Job(*shape, settings, lora, num_layers, device=gpu)
    count = len(job.layers)
    what = "all weights" if job.lora is None else f"adapters of rank {job.lora.rank}"
    which = "all" if count == len(job.config.layers) else f"the last {count}"
    parts = {part: size for part, size in estimate(job).items() if size}
    parts["together"] = needed = sum(parts.values())
    shown = [
        HEADLINE,
        f"{model}, {what} of {which} layers, {settings.optimizer}: batches of "
        f"{settings.batch_size}, rows of at most {settings.max_seq_length} tokens, "
        f"{'with' if settings.grad_checkpoint else 'without'} --grad-checkpoint.",
        "",
        *(f"{part:<26}{size / 1e9:>8.1f} GB" for part, size in parts.items()),
        "",
    ]
    for memory in MACS:
        limit, verdict = usable_bytes(memory), "fits"
        if needed > limit:
            advice = advise(job, limit)
            verdict = "does not fit, and no change of these settings would do"
            if advice is not None:
                verdict = f"does not fit; with {advice} it would"
        usable = f"{limit / 1e9:.1f} for one process"
        shown.append(f"Mac of {memory} GB ({usable}): {verdict}")
    return shown


def check(job: Job) -> None:
    """Raise TrainingError when a job needs more memory than this machine has."""
    limit, needed = backends.current().memory(), total(job)
    if limit is not None and needed > limit:
        advice = advise(job, limit) or "no change of these settings"
        raise TrainingError(
            f"training needs about {needed / 1e9:.1f} GB, this machine has "
            f"{limit / 1e9:.1f} GB: {advice} would make it fit"
        )


Step = tuple[str, Job] | None  # flags in words, and the job with them


def advise(job: Job, limit: float) -> str | None:
    """Return flags with which a job takes at most `limit` bytes; None if none do.

    The first kind of change that is enough alone, as little of it as possible; or else
    all kinds on top of one another, beginning with the base.
    """
    for chosen in ([0], [1], [2], [3], [4], [4, 0, 1, 2, 3]):
        changed, flags = job, dict[int, str]()
        for kind in chosen:
            while total(changed) > limit and (step := _steps(changed)[kind]):
                flags[kind], changed = step
        if total(changed) <= limit:
            return ", ".join(flags.values())
    return None


def _steps(job: Job) -> list[Step]:
    """Return the next step of each kind of change that saves memory: checkpoints,
    smaller batches, shorter rows, lower ranks, a coarser base."""
    settings, size, lora = job.settings, job.settings.batch_size, job.lora

    def step(words: str, **changes: int) -> Step:
        return words, replace(job, settings=replace(settings, **changes))

    checkpoint = batches = rows = rank = base = None
    if not settings.grad_checkpoint:
        checkpoint = step("--grad-checkpoint", grad_checkpoint=True)
    if sizes := [n for n in range(1, size) if size % n == n % job.ranks == 0]:
        changes = {  # as many updates of as many examples
            "batch_size": sizes[-1],
            "grad_accumulation_steps": settings.grad_accumulation_steps
            * size
            // sizes[-1],
            "iters": settings.iters * size // sizes[-1],
        }
        flags = (f"--{name.replace('_', '-')} {n}" for name, n in changes.items())
        batches = step(" ".join(flags), **changes)
    length = (job.prefix + job.config.canvas_length) // 2
    if length >= 2 * job.config.canvas_length:
        rows = step(f"--max-seq-length {length}", max_seq_length=length)
    if lora is not None and lora.rank > 1:
        half = replace(lora, rank=lora.rank // 2)
        rank = f"--rank {half.rank}", replace(job, lora=half)
    now = weight_bytes(job.config, job.storage)
    for bits in (4, 8):
        storage = PRECISIONS[f"{bits} bit"]
        # quantised weights can only be adapted
        if lora is not None and weight_bytes(job.config, storage) < now:
            words = f"a base of {bits} bits (mlx_dgemma.convert -q --q-bits {bits})"
            base = words, replace(job, storage=storage)
    return [checkpoint, batches, rows, rank, base]
