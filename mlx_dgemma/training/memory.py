"""How much memory a fine-tuning takes, estimated from names and settings alone.

The estimate adds up weights, optimizer, kept activations, the working set of a layer
and a tile of the vocabulary. Its factors are fitted to small models on a CPU, where it
is within 25 % (tests/bench/training_memory.py). GB are 10^9 bytes, except of memory as
sold, 2^30.
"""

import math
from dataclasses import dataclass, field, replace
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
from .settings import Run, TrainSettings

# The released model in a precision, for an estimate without its files.
NAMED = {"26b": "bf16", "26b-8bit": "8 bit", "26b-mixed": "mixed", "26b-4bit": "4 bit"}
MACS = (24, 32, 48, 64)  # GB
FLOAT = 4  # bytes of a master weight, an adapter and their gradients
STATES = {"adamw": 2, "adam": 2, "adafactor": 0}  # float32 arrays per weight


@dataclass(frozen=True)
class Job:
    """What of a fine-tuning decides how much memory it takes.

    storage   how the base's weights lie in memory
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
    """Return a model's shape and how its weights lie in memory, from headers alone.

    model   a folder, hub id, built-in name or name in NAMED; HubError for others
    """
    if str(model) in NAMED and not Path(model).is_dir():
        return config_26b(), PRECISIONS[NAMED[str(model)]]
    try:
        folder = hub.resolve(model, revision)
    except HubError as error:
        known = ", ".join(NAMED)
        raise HubError(f"{error}; an estimate knows {known} as well") from None
    config, sizes = read_config(folder), dict[str, int]()
    parameters = read_layout(folder, config).parameters
    for name, info in parameters.items():
        layer, _, part = name.rpartition(".")
        weight = f"{layer}.weight" if part in ("scales", "biases") else name
        sizes[weight] = sizes.get(weight, 0) + info.nbytes
    return config, Loaded(parameters["norm.weight"].dtype.size, sizes=sizes)


def estimate(job: Job) -> dict[str, int]:
    """Return the bytes of each part at the busiest moment of an update.

    Raises SettingsError when quantised weights are to be trained themselves.
    """
    config, settings, value = job.config, job.settings, job.storage.value_bytes
    weights, trained, device = (
        weight_bytes(config, job.storage),
        job.trained,
        job.device,
    )
    sizes = {name: math.prod(shape) for name, shape in expected_shapes(config).items()}
    quantized = weights < value * sum(sizes.values())
    if job.lora is None and quantized:
        raise SettingsError(
            "fine-tune-type full needs dense weights; use lora, or convert the "
            "model with --dequantize first"
        )
    rows = max(1, settings.batch_size // job.ranks)
    decoded = rows * config.canvas_length  # tokens
    encoded = rows * job.prefix + (decoded if settings.encoder_loss_weight else 0)
    kept, working, traced = _activations(job, encoded, decoded)
    table = value * config.vocab_size * config.hidden_size
    chunk = min(device.vocabulary_chunk, config.vocab_size)
    copies = 6 if device.compiles else 16  # of logits; fewer where steps are fused
    logits = FLOAT * copies * min(device.vocabulary_rows, decoded) * chunk
    summed = FLOAT * trained * (settings.grad_accumulation_steps > 1)
    updated = 17 * trained  # gradients, their mean, that clipped, and new weights
    if job.lora is None and job.num_layers == -1:
        # each tile of positions gives the embedding a gradient of its own
        tiles = 2 + (encoded + decoded) // device.vocabulary_rows
        updated = max(updated, summed + 2 * tiles * table)
    backward = {
        "gradients": summed,
        "activations kept": kept,
        "working set": working,
        "vocabulary": logits + 2 * value * chunk * config.hidden_size * quantized,
    }
    moments = [{"gradients": updated}, backward]
    dtype = mx.float32 if value == FLOAT else mx.bfloat16
    if device.experts(dtype, quantized=quantized, pairs=1) == "loop":
        # A CPU that reads the choice of experts on the host while gradients are traced
        # frees nothing before: all arrays of all passes live, with dense weights.
        copies = FLOAT * (6 if settings.grad_checkpoint and quantized else 3)
        layers = sum(size for name, size in sizes.items() if name.startswith("layers."))
        signal = 16 * FLOAT * decoded * config.vocab_size + 4 * table
        loop = traced, copies * layers, signal
        moments.append(dict(zip(backward, (summed, *loop), strict=True)))
    masters = FLOAT * trained * (job.lora is not None or value < FLOAT)
    states = FLOAT * trained * STATES[settings.optimizer]
    parts = {"weights": weights, "adapters or masters": masters, "optimizer": states}
    moment = max(moments, key=lambda moment: sum(moment.values()))
    return {part: int(size) for part, size in (parts | moment).items()}


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


def lines(run: Run) -> list[str]:
    """Return what a run needs on a GPU, part by part, and which Macs have that much."""
    shape, gpu = read_shape(run.model, run.revision), backends.BACKENDS["metal"]
    job = Job(*shape, run.settings, run.lora, run.num_layers, device=gpu)
    parts = {part: size for part, size in estimate(job).items() if size}
    parts["together"] = needed = sum(parts.values())
    what = "all weights" if run.lora is None else f"adapters of rank {run.lora.rank}"
    shown = [
        "ESTIMATE of the peak of an update; not measured on a Mac or other GPU.",
        f"{run.model}, {what} of the last {len(job.layers)} layers, "
        f"{run.settings.optimizer}: batches of {run.settings.batch_size}, rows of at "
        f"most {run.settings.max_seq_length} tokens, "
        f"{'with' if run.settings.grad_checkpoint else 'without'} --grad-checkpoint.",
        "",
        *(f"{part:<26}{size / 1e9:>8.1f} GB" for part, size in parts.items()),
        "",
    ]
    for memory in MACS:
        limit, verdict = usable_bytes(memory), "fits"
        if needed > limit:
            verdict = f"does not fit; {advise(job, limit)} would make it fit"
        usable = f"{limit / 1e9:.1f} for one process"
        shown.append(f"Mac of {memory} GB ({usable}): {verdict}")
    return shown


def check(job: Job) -> None:
    """Raise TrainingError when a job needs more memory than this machine has."""
    limit, needed = backends.current().memory(), total(job)
    if limit is not None and needed > limit:
        raise TrainingError(
            f"training needs about {needed / 1e9:.1f} GB, this machine has "
            f"{limit / 1e9:.1f} GB: {advise(job, limit)} would make it fit"
        )


def advise(job: Job, limit: float) -> str:
    """Return flags with which a job takes at most `limit` bytes.

    The first kind of change that is enough alone, as little of it as possible; or else
    all kinds on top of one another, beginning with the base.
    """
    for kinds in ([0], [1], [2], [3], [4], [4, 0, 1, 2, 3]):
        changed, flags = job, dict[int, str]()
        for kind in kinds:
            while total(changed) > limit and (steps := _steps(changed)[kind]):
                flags[kind], changed = steps[0]
        if total(changed) <= limit:
            return ", ".join(flags.values())
    return "no change of these settings"


def _steps(job: Job) -> list[list[tuple[str, Job]]]:
    """Return what saves memory, as flags and the job with them, smallest step first:
    checkpoints, smaller batches, shorter rows, lower ranks, a coarser base."""
    settings, size = job.settings, job.settings.batch_size

    def change(**changes: int) -> tuple[str, Job]:
        flags = (f"--{name.replace('_', '-')} {n}" for name, n in changes.items())
        words = " ".join(flags).removesuffix(" True")
        return words, replace(job, settings=replace(settings, **changes))

    checkpoint = [] if settings.grad_checkpoint else [change(grad_checkpoint=True)]
    batches = [
        change(  # as many updates of as many examples
            batch_size=size // n,
            grad_accumulation_steps=settings.grad_accumulation_steps * n,
            iters=settings.iters * n,
        )
        for n in range(2, size + 1)
        if size % n == size // n % job.ranks == 0
    ]
    length = (job.prefix + job.config.canvas_length) // 2
    enough = length >= 2 * job.config.canvas_length
    rows = [change(max_seq_length=length)] if enough else []
    if job.lora is None:  # quantised weights can only be adapted
        return [checkpoint, batches, rows, [], []]
    half = replace(job.lora, rank=max(1, job.lora.rank // 2))
    ranks = [(f"--rank {half.rank}", replace(job, lora=half))] * (half != job.lora)
    now, bases = weight_bytes(job.config, job.storage), list[tuple[str, Job]]()
    for bits in (8, 4):
        if weight_bytes(job.config, storage := PRECISIONS[f"{bits} bit"]) < now:
            words = f"a base of {bits} bits (mlx_dgemma.convert -q --q-bits {bits})"
            bases.append((words, replace(job, storage=storage)))
    return [checkpoint, batches, rows, ranks, bases]
