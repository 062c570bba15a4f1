"""The busiest moment of an update: what a fine-tuning needs, from figures alone.

An update has a few moments that may hold the most; each is a sum of what `held` counts.
Which parts are alive together in one was read off the buffers of small models.
"""

import math
from dataclasses import dataclass, field, fields
from functools import cached_property

import mlx.core as mx

from ..adapters.lora import TARGETS, LoRA, shapes, trained_layers
from ..checkpoint.config import ModelConfig
from ..checkpoint.quantize import quantizable
from ..checkpoint.weights import expected_shapes
from ..errors import SettingsError
from ..performance.cost import Storage, weight_bytes
from .held import FLOAT, PRODUCTS, Pass, Traits
from .objective import BUCKET
from .passes import first_seen
from .settings import TrainSettings

STATES = {"adamw": 2, "adam": 2, "adafactor": 0}  # of a weight, float32
# Arrays of the largest weight among what an update computes with.
TEMPORARIES = {"adamw": 1.5, "adam": 1.5, "adafactor": 3}
# A quantised weight made dense while gradients are traced: bytes of each number beside
# the result. MLX's CPU unpacks in two steps for each code of a word and frees none.
UNPACKING = 18
# What a CPU computes of a guess's signal while gradients are traced: float32 arrays
# of logits, of the embedding, and of states for each chunk of the vocabulary.
SIGNAL = 16, 2, 4


@dataclass(frozen=True)
class Need:
    """Bytes in the busiest moment of an update, by what they are for."""

    weights: int = 0
    masters: int = field(default=0, metadata={"shown": "adapters or masters"})
    optimizer: int = 0
    batch: int = 0
    gradients: int = 0
    activations: int = field(default=0, metadata={"shown": "activations held"})
    working: int = field(default=0, metadata={"shown": "working set of a layer"})
    vocabulary: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def parts(self) -> dict[str, int]:
        """By their names in words."""
        return {
            part.metadata.get("shown", part.name): vars(self)[part.name]
            for part in fields(self)
        }


@dataclass(frozen=True, kw_only=True)
class Job:
    """A fine-tuning as far as memory goes.

    storage      how the base's weights lie in memory
    lora         None for the weights themselves, of the last `num_layers` layers
    prefix       most tokens before a canvas; None for as many as the settings allow
    ranks        processes that share a micro-batch

    Raises SettingsError for layers the model lacks, and for quantised weights that
    are to be trained themselves.
    """

    config: ModelConfig
    storage: Storage
    lora: LoRA | None
    settings: TrainSettings
    num_layers: int = -1
    prefix: int | None = None
    ranks: int = 1
    traits: Traits = field(default_factory=Traits.here)

    def __post_init__(self) -> None:
        if self.lora is None and self.quantized:
            raise SettingsError(
                "fine-tune-type full needs dense weights; use lora, or convert the "
                "model with --dequantize first"
            )

    @property
    def value(self) -> int:
        """Bytes of an activation."""
        return self.storage.value_bytes

    @property
    def column(self) -> int:
        """Where a canvas begins at most."""
        longest = self.settings.max_seq_length - self.config.canvas_length
        if self.prefix is not None:
            longest = min(longest, self.prefix)
        return -(-max(1, longest) // BUCKET) * BUCKET

    @property
    def texts(self) -> int:
        return max(1, self.settings.batch_size // self.ranks)

    @property
    def encoding(self) -> bool:
        return self.settings.encoder_loss_weight > 0

    @property
    def whole(self) -> bool:
        """Whether all weights are trained, the embedding among them."""
        return self.lora is None and self.num_layers == -1

    @cached_property
    def _coded(self) -> set[str]:
        """Parameters that are stored quantised."""
        return {
            name
            for name, shape in expected_shapes(self.config).items()
            if quantizable(name, shape)
            and self.storage.nbytes(name, shape) < self.value * math.prod(shape)
        }

    @property
    def quantized(self) -> bool:
        """Whether any layer is."""
        return bool(self._coded)

    @cached_property
    def loops(self) -> bool:
        """Whether the choice of experts is read while gradients are traced."""
        dtype = mx.float32 if self.value == FLOAT else mx.bfloat16
        coded = "layers.0.experts.gate_up_proj.weight" in self._coded
        return self.traits.loops(dtype, quantized=coded)

    @cached_property
    def layers(self) -> range:
        """That have something to train."""
        number = self.num_layers if self.lora is None else self.lora.num_layers
        return trained_layers(self.config, number)

    @cached_property
    def trained(self) -> dict[str, int]:
        """Numbers in each trained array."""
        if self.lora is not None:
            found = shapes(self.config, self.lora)
        else:
            found = {
                name: shape
                for name, shape in expected_shapes(self.config).items()
                if self._trains(name)
            }
        return {name: math.prod(shape) for name, shape in found.items()}

    def _trains(self, name: str) -> bool:
        """Whether a full fine-tuning trains this weight; routers are small."""
        first, *rest = name.split(".")
        if first != "layers":
            return self.whole
        fixed = rest[1] == "router" or rest[1].endswith("_scalar")
        return int(rest[0]) in self.layers and not fixed

    @cached_property
    def encoder(self) -> list[Pass]:
        """The causal pass through each layer."""
        length = self.config.canvas_length if self.encoding else 0
        return [
            self._pass(index, new=self.column + length, seen=0, causal=True)
            for index in range(len(self.config.layers))
        ]

    @cached_property
    def decoder(self) -> list[Pass]:
        """The canvas's pass through each layer."""
        new, found = self.config.canvas_length, []
        for index, layer in enumerate(self.config.layers):
            seen = self.column - first_seen(self.config, layer, self.column)
            found.append(self._pass(index, new=new, seen=seen, causal=False))
        return found

    def _pass(self, index: int, *, new: int, seen: int, causal: bool) -> Pass:
        layer, keys = self.config.layers[index], []
        if index in self.layers:
            wanted = [key for key in PRODUCTS if key != "router.proj"]
            wanted = wanted if self.lora is None else self.lora.keys
            keys = [key for key in wanted if key in PRODUCTS]
        if not layer.sliding:
            keys = [key for key in keys if key != "self_attn.v_proj"]
        return Pass(
            config=self.config,
            layer=layer,
            traits=self.traits,
            texts=self.texts,
            new=new,
            seen=seen,
            causal=causal,
            keys=keys,
            rank=0 if self.lora is None else self.lora.rank,
            value=self.value,
        )

    @property
    def encoded(self) -> list[Pass]:
        """The encoder's passes that gradients go back through."""
        return self.encoder[0 if self.whole else self.layers.start :]

    @property
    def decoded(self) -> list[Pass]:
        """The decoder's, whose input may depend on what is trained."""
        guiding = self.lora is not None and any(
            key in TARGETS["self_conditioning"] for key in self.lora.keys
        )
        return self.decoder[0 if self.whole or guiding else self.layers.start :]


def estimate(job: Job) -> Need:
    """The parts of the busiest moment."""
    trained = FLOAT * sum(job.trained.values())
    copies = job.lora is None and job.value < FLOAT
    weights = weight_bytes(job.config, job.storage)
    moments = [_way_back(job), _denoised(job), _update(job)]
    if job.encoding:
        moments.append(_encoded(job))
    if job.whole:
        moments.append(_embedding(job))
    if job.loops:
        moments.append(_traced(job))
    return max(
        (
            Need(
                weights=weights,
                masters=trained if copies or job.lora is not None else 0,
                optimizer=STATES[job.settings.optimizer] * trained,
                batch=_batch(job),
                **moment,
            )
            for moment in moments
        ),
        key=lambda need: need.total,
    )


def _batch(job: Job) -> int:
    """Masks and tables of each kind of layer; token ids are small."""
    columns, found = job.column + job.config.canvas_length, 0
    for kind in set(job.config.layers):
        found += job.texts * columns * (columns + 2 * FLOAT * kind.rope.rotated)
    return found


def _summed(job: Job) -> int:
    """Gradients of the micro-batches before."""
    several = job.settings.grad_accumulation_steps > 1
    return FLOAT * sum(job.trained.values()) if several else 0


def _states(job: Job) -> int:
    """Hidden states behind the last layer, of both passes."""
    return job.encoder[-1].input() + job.decoder[-1].input()


def _held(job: Job, passes: list[Pass]) -> int:
    """What passes leave for their way back: with checkpoints their inputs alone."""
    if not job.settings.grad_checkpoint:
        return sum(each.residuals() for each in passes)
    return sum(each.input() + each.causal * each.kept() for each in passes)


def _way_back(job: Job) -> dict[str, int]:
    """In the encoder's last layers. The decoder has left the factors of its weights'
    gradients and the cotangents of keys and values; so has the layer just left."""
    again = job.settings.grad_checkpoint
    held = _held(job, job.encoded) + _states(job) + _left(job)
    if again:
        held += sum(each.input() for each in job.decoded)
    working = max(each.chain() for each in job.encoded)
    if again:
        working += max(each.residuals() for each in job.encoded)
        working += max(each.leaves() for each in job.encoded)
    gradients = _summed(job) + (_tiles(job) * _table(job) if job.whole else 0)
    return {"gradients": gradients, "activations": held, "working": working}


def _denoised(job: Job) -> dict[str, int]:
    """In the canvas's logits, behind all layers of both passes."""
    held = _held(job, job.encoded) + _held(job, job.decoded)
    return _at_logits(job, job.decoder, held, alone=False)


def _encoded(job: Job) -> dict[str, int]:
    """In the encoder's logits, with the decoder's way back behind."""
    held = _held(job, job.encoded) + _left(job)
    alone = not job.settings.grad_checkpoint
    return _at_logits(job, job.encoder, held, alone=alone)


def _at_logits(
    job: Job, passes: list[Pass], held: int, *, alone: bool
) -> dict[str, int]:
    """alone: whether nothing but logits is computed meanwhile. Else half as many of
    them were alive, for the other half of what is allocated ahead is of layers."""
    rows, last = min(job.traits.device.vocabulary_rows, passes[0].tokens), passes[-1]
    chunk = min(job.traits.device.vocabulary_chunk, job.config.vocab_size)
    logits = FLOAT * job.traits.logits * rows * chunk
    if job.quantized:  # two chunks of the table made dense
        logits += 2 * job.value * chunk * job.config.hidden_size
    return {
        "gradients": _summed(job),
        "activations": held + _states(job),
        "working": last.residuals() if job.settings.grad_checkpoint else 0,
        "vocabulary": logits if alone else logits // 2,
    }


def _left(job: Job) -> int:
    """What the decoder leaves: factors of gradients, cotangents of keys and values."""
    leaves = sum(each.leaves() for each in job.decoder)
    return leaves + sum(each.kept() for each in job.encoded)


def _embedding(job: Job) -> dict[str, int]:
    """At the end, when the embedding's gradients are added up: one for each tile of
    positions, its chunks and their whole, and two of looking tokens up."""
    tiles = _tiles(job)
    layers = sum(n for name, n in job.trained.items() if name.startswith("layers."))
    copies = tiles + min(tiles + 2, 9)
    return {
        "gradients": _summed(job) + copies * _table(job) + FLOAT * layers,
        "activations": _states(job),
    }


def _table(job: Job) -> int:
    """Bytes of the embedding's gradient."""
    return job.value * job.config.vocab_size * job.config.hidden_size


def _tiles(job: Job) -> int:
    """How many gradients the vocabulary's losses and signal give the embedding."""
    rows = job.traits.device.vocabulary_rows
    found = -(-job.decoder[0].tokens // rows)
    if job.encoding:
        found += -(-(job.encoder[0].tokens - job.texts) // rows)
    return found + (job.settings.self_conditioning > 0)


def _update(job: Job) -> dict[str, int]:
    """While new weights are made: gradients summed, their mean, that shortened; the
    new weights beside those the model still has."""
    trained = sum(job.trained.values())
    new = FLOAT if job.lora is not None else job.value
    largest = FLOAT * max(job.trained.values())
    temporaries = TEMPORARIES[job.settings.optimizer]
    return {
        "gradients": 3 * FLOAT * trained,
        "working": new * trained + round(temporaries * largest),
    }


def _traced(job: Job) -> dict[str, int]:
    """When all is traced on a CPU that reads the choice of experts on the host: then
    every array made for that is alive, weights made dense included."""
    again, guess = job.settings.grad_checkpoint, job.settings.self_conditioning > 0
    encoder, decoder = job.encoder, job.decoder
    runs = encoder + decoder * (1 + guess)
    held = sum(each.choosing() + each.feeding() for each in runs)
    dense = sum(each.attention_weights() + each.feeding_weights() for each in runs)
    unpacked = UNPACKING / FLOAT if job.quantized else 0
    for last in (encoder[-1], decoder[-1]):
        if not again:  # nobody has asked for what is behind its choice
            held -= last.feeding()
            dense -= last.feeding_weights()
        else:
            dense += round(unpacked * last.feeding_weights())
    if again:
        held += sum(each.choosing() for each in encoder + decoder)
        weights = sum(each.attention_weights() for each in encoder + decoder)
        dense += round((1 + unpacked) * weights)
    return {
        "gradients": _summed(job),
        "activations": held,
        "working": dense,
        "vocabulary": _signal(job) if guess else 0,
    }


def _signal(job: Job) -> int:
    """What a guess's signal leaves when all of it stays."""
    logits, tables, states = SIGNAL
    tokens, width = job.decoder[0].tokens, job.config.hidden_size
    words = job.config.vocab_size
    chunks = -(-words // job.traits.device.vocabulary_chunk)
    mixing = 70 * tokens * job.config.intermediate_size  # its way into the canvas
    found = logits * tokens * words + tables * words * width
    return FLOAT * (found + states * chunks * tokens * width) + mixing
