"""What `mlx_dgemma.lora --estimate` counts beside what MLX reports, on small models.

    python tests/bench/training_memory.py [--only NAME]

Random models of different proportions, a few updates of the trainer on rows as long as
the settings allow, each row of the table in a process of its own. Measured is
`mx.get_peak_memory` over these updates. Prints Markdown.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.adapters.lora import LoRA
from mlx_dgemma.checkpoint.config import ModelConfig
from mlx_dgemma.checkpoint.quantize import Quantization
from mlx_dgemma.performance.cost import Storage
from mlx_dgemma.performance.synthetic import TINY, config_from, synthetic_model
from mlx_dgemma.training.data import Dataset, Example
from mlx_dgemma.training.memory import Job, total
from mlx_dgemma.training.settings import Run, TrainSettings
from mlx_dgemma.training.trainer import Trainer

UPDATES = 2  # the optimizer's memory is there from the second on
EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Model:
    """A shape (changes to `synthetic.TINY`), how it is stored, and its batches."""

    text: dict[str, Any]
    canvas: int
    batch: int
    length: int  # of a row
    bits: int | None = None
    dtype: str = "float32"

    @property
    def config(self) -> ModelConfig:
        count = self.text["num_hidden_layers"]
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * count
        kinds = [*kinds[: count - 1], "full_attention"]
        text = TINY["text_config"] | {"layer_types": kinds} | self.text
        raw = TINY | {"canvas_length": self.canvas, "text_config": text}
        return config_from(raw)

    @property
    def quantization(self) -> Quantization | None:
        return None if self.bits is None else Quantization(bits=self.bits)

    @property
    def precision(self) -> mx.Dtype:
        return {"float32": mx.float32, "bfloat16": mx.bfloat16}[self.dtype]

    @property
    def storage(self) -> Storage:
        return Storage.planned(self.config, self.precision.size, self.quantization)


@dataclass(frozen=True)
class Way:
    """What is trained, and with which settings."""

    lora: LoRA | None = field(default_factory=LoRA)
    settings: dict[str, Any] = field(default_factory=dict)
    num_layers: int = -1


def shape(width: int, inner: int, expert: int, layers: int, words: int, **more: Any):
    """The numbers of a model that differ most."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "moe_intermediate_size": expert,
        "num_hidden_layers": layers,
        "vocab_size": words,
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": 64,
        "num_experts": 8,
    } | more


MOE = {"num_experts": 32, "top_k_experts": 4}
LONG = {"num_attention_heads": 8, "sliding_window": 256}
MODELS = {
    "words": Model(text=shape(256, 256, 64, 3, 65536), canvas=64, batch=2, length=320),
    "deep": Model(text=shape(128, 320, 64, 18, 2048), canvas=32, batch=4, length=288),
    "long": Model(
        text=shape(128, 256, 64, 6, 1024, **LONG), canvas=64, batch=1, length=1024
    ),
    "wide": Model(
        text=shape(768, 768, 192, 3, 8192, head_dim=128, global_head_dim=256),
        canvas=64,
        batch=2,
        length=256,
    ),
    "experts": Model(
        text=shape(256, 256, 256, 4, 2048, **MOE), canvas=64, batch=2, length=256
    ),
    "experts, 4 bit": Model(
        text=shape(256, 256, 256, 4, 2048, **MOE),
        canvas=64,
        batch=2,
        length=256,
        bits=4,
        dtype="bfloat16",
    ),
    "words, 4 bit": Model(
        text=shape(256, 256, 64, 3, 65536),
        canvas=64,
        batch=2,
        length=320,
        bits=4,
        dtype="bfloat16",
    ),
    "deep, bfloat16": Model(
        text=shape(128, 320, 64, 9, 2048),
        canvas=32,
        batch=4,
        length=288,
        dtype="bfloat16",
    ),
}
CHECKPOINT = {"grad_checkpoint": True}
WAYS = {
    "LoRA, checkpoint": Way(settings=CHECKPOINT),
    "LoRA": Way(),
    "full, checkpoint": Way(lora=None, settings=CHECKPOINT),
    "full": Way(lora=None),
    "last 2 layers": Way(lora=LoRA(num_layers=2)),
    "rank 4, adafactor, 2 micro-batches": Way(
        lora=LoRA(rank=4),
        settings=CHECKPOINT | {"optimizer": "adafactor", "grad_accumulation_steps": 2},
    ),
}


def settings_of(model: Model, way: Way) -> TrainSettings:
    given = {
        "batch_size": model.batch,
        "max_seq_length": model.length,
        "warmup_steps": 0,
        "val_batches": 0,
    } | way.settings
    steps = given.get("grad_accumulation_steps", 1)
    return TrainSettings(iters=UPDATES * steps, **given)


def estimated(model: Model, way: Way) -> int:
    """Bytes, by the formula for the device at hand."""
    settings = settings_of(model, way)
    return total(Job(model.config, model.storage, settings, way.lora, way.num_layers))


def measured(model: Model, way: Way) -> int:
    """Bytes that a few updates held at most, beside what was there before."""
    gc.collect()
    before = mx.get_active_memory()
    config = model.config
    built = synthetic_model(
        config, quantization=model.quantization, dtype=model.precision, seed=0
    )
    rng, length = np.random.default_rng(0), config.canvas_length
    examples = tuple(
        Example(
            prompt=tuple(rng.integers(2, config.vocab_size, model.length - length)),
            response=tuple(rng.integers(2, config.vocab_size, length)),
            fill=None,
        )
        for _ in range(EXAMPLES)
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            model="",
            data="",
            adapter_path=folder,
            lora=way.lora,
            num_layers=way.num_layers,
            settings=settings_of(model, way),
        )
        trainer = Trainer(run, built, Dataset(examples), compiled=False)
        mx.reset_peak_memory()
        list(trainer.events())
    return mx.get_peak_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--row", nargs=2, metavar=("MODEL", "WAY"))
    given = parser.parse_args()
    if given.row is not None:
        print(measured(MODELS[given.row[0]], WAYS[given.row[1]]))
        return
    print("| model | trained | estimated MB | measured MB | off |")
    print("| --- | --- | --- | --- | --- |")
    for name, model in MODELS.items():
        for words, way in WAYS.items():
            if given.only not in (None, name) or (way.lora is None and model.bits):
                continue
            command = [sys.executable, __file__, "--row", name, words]
            row = subprocess.run(command, capture_output=True, text=True, check=True)
            found, counted = int(row.stdout), estimated(model, way)
            off = counted / found - 1
            sizes = f"{counted / 1e6:.1f} | {found / 1e6:.1f}"
            print(f"| {name} | {words} | {sizes} | {off:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
