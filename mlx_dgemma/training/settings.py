"""Settings of a fine-tuning run; the defaults follow Google and NVIDIA."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.lora import LoRA
from ..errors import SettingsError
from ..files.opening import user_path

COUNT = (1, math.inf)
WHOLE = {  # least and most of whole numbers
    **dict.fromkeys(("iters", "batch_size", "grad_accumulation_steps"), COUNT),
    **dict.fromkeys(("steps_per_report", "steps_per_eval", "save_every"), COUNT),
    "max_seq_length": COUNT,
    "warmup_steps": (0, math.inf),
    "val_batches": (-1, math.inf),
    "seed": (0, 2**32 - 1),
}
NUMBERS = {
    "learning_rate": (1e-12, 1e3),
    "weight_decay": (0, 1),
    "max_grad_norm": (1e-12, math.inf),
    "encoder_loss_weight": (0, 1e3),
    "self_conditioning": (0, 1),
}
WORDS = {
    "optimizer": ("adamw", "adam", "adafactor"),
    "lr_schedule": ("cosine", "constant"),
}
LAST_RATE = 0.1  # of the peak, at the end of the cosine


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one run; names and meanings are mlx-lm's where it has them.

    iters                   micro-batches to train on, over all ranks together
    batch_size              examples in each, over all ranks together
    grad_accumulation_steps micro-batches per update of the weights
    optimizer               "adamw", "adam" or "adafactor"
    learning_rate           at its peak
    lr_schedule             "cosine" takes the rate to a tenth by the end, or "constant"
    warmup_steps            updates over which the rate rises to the peak
    max_grad_norm           longer gradients are scaled down to that
    max_seq_length          most tokens of prompt and answer together
    encoder_loss_weight     of the encoder's next-token loss; 0 leaves it out
    mask_prompt             that loss leaves out the tokens of the prompt
    self_conditioning       share of examples whose decoder sees its first guess
    levels                  noise levels t are uniform between these
    grad_checkpoint         run layers again for their gradients, to save memory
    allow_special           let a text of a row spell special tokens
    seed                    of adapters, order, noise and self-conditioning

    Raises SettingsError naming the setting and its range.
    """

    iters: int = 1000
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1.5e-4
    lr_schedule: str = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    max_seq_length: int = 2048
    encoder_loss_weight: float = 1.0
    mask_prompt: bool = False
    self_conditioning: float = 0.5
    levels: tuple[float, float] = (1e-3, 1.0)
    grad_checkpoint: bool = False
    steps_per_report: int = 10
    steps_per_eval: int = 200
    val_batches: int = 25
    save_every: int = 100
    allow_special: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _check(name, value)
        low, high = self.levels
        if not 0 <= low <= high <= 1:
            raise SettingsError(f"levels are {self.levels}; they must rise from 0 to 1")
        if self.iters % self.grad_accumulation_steps:
            raise SettingsError(
                f"iters is {self.iters}; it must be a multiple of "
                f"grad_accumulation_steps, {self.grad_accumulation_steps}"
            )

    @property
    def updates(self) -> int:
        return self.iters // self.grad_accumulation_steps

    def rate(self, update: int) -> float:
        """Return the learning rate of update 0, 1, …"""
        if update < self.warmup_steps:
            return self.learning_rate * (update + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return self.learning_rate
        span = max(1, self.updates - self.warmup_steps)
        done = min(1.0, (update - self.warmup_steps) / span)
        swing = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (LAST_RATE + (1 - LAST_RATE) * swing)


def _check(name: str, value: Any) -> None:
    if name in WORDS and value not in WORDS[name]:
        known = ", ".join(WORDS[name])
        raise SettingsError(f"{name} is {value!r}; supported: {known}")
    if name not in WHOLE | NUMBERS:
        return
    kind, word = (int, "whole number") if name in WHOLE else (int | float, "number")
    if isinstance(value, bool) or not isinstance(value, kind):
        raise SettingsError(f"{name} is {value!r}; it must be a {word}")
    low, high = (WHOLE | NUMBERS)[name]
    if not low <= value <= high:
        top = "up" if high == math.inf else f"to {high:g}"
        raise SettingsError(f"{name} is {value}; it must be from {low:g} {top}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A fine-tuning by names: the arguments of `mlx_dgemma.train`, explained there."""

    model: str | Path
    data: str | Path
    adapter_path: str | Path = "adapters"
    lora: LoRA | None = field(default_factory=LoRA)
    num_layers: int = -1
    train_router: bool = False
    settings: TrainSettings = TrainSettings()
    resume: bool = False
    resume_adapter_file: str | Path | None = None
    skip_bad: bool = False
    revision: str | None = None

    @property
    def folder(self) -> Path:
        return user_path(self.adapter_path)
