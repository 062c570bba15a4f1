"""What a fine-tuning run is told, checked; the defaults follow Google and NVIDIA."""

import math
from dataclasses import dataclass

from ..errors import SettingsError

OPTIMIZERS = ("adamw", "adam", "adafactor")
SCHEDULES = ("cosine", "constant")
LEAST_RATE = 0.1  # of the peak, at the end of the cosine


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one run; names and meanings are mlx-lm's where it has them.

    iters                   micro-batches to train on, over all ranks together
    batch_size              examples in each, over all ranks together
    grad_accumulation_steps micro-batches per update of the weights
    learning_rate           at its peak; lr_schedule takes it to a tenth by the end
    warmup_steps            updates over which it rises to the peak
    max_grad_norm           longer gradients are shortened to that
    max_seq_length          most tokens of prompt and answer together
    encoder_loss_weight     of the encoder's next-token loss; 0 leaves it out
    mask_prompt             that loss leaves out the tokens of the prompt
    self_conditioning       share of examples whose decoder sees its first guess
    levels                  noise levels t are uniform between these
    grad_checkpoint         run layers again for their gradients, to save memory
    seed                    of adapters, order, noise and decisions
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
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "iters",
            "batch_size",
            "grad_accumulation_steps",
            "max_seq_length",
            "steps_per_report",
            "steps_per_eval",
            "save_every",
        ):
            self._check(name, 1, math.inf, whole=True)
        self._check("warmup_steps", 0, math.inf, whole=True)
        self._check("seed", 0, 2**32 - 1, whole=True)
        self._check("val_batches", -1, math.inf, whole=True)
        self._check("learning_rate", 1e-12, 1e3)
        self._check("weight_decay", 0, 1)
        self._check("max_grad_norm", 1e-12, math.inf)
        self._check("encoder_loss_weight", 0, 1e3)
        self._check("self_conditioning", 0, 1)
        low, high = self.levels
        if not 0 <= low <= high <= 1:
            raise SettingsError(f"levels are {self.levels}; they must rise from 0 to 1")
        for name, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("lr_schedule", self.lr_schedule, SCHEDULES),
        ):
            if value not in known:
                raise SettingsError(
                    f"{name} is {value!r}; supported: {', '.join(known)}"
                )
        if self.iters % self.grad_accumulation_steps:
            raise SettingsError(
                f"iters is {self.iters}; it must be a multiple of "
                f"grad_accumulation_steps, {self.grad_accumulation_steps}"
            )

    def _check(
        self, name: str, least: float, most: float, *, whole: bool = False
    ) -> None:
        value = vars(self)[name]
        kinds, kind = (int, "whole number") if whole else (int | float, "number")
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise SettingsError(f"{name} is {value!r}; it must be a {kind}")
        if not least <= value <= most:
            top = "up" if most == math.inf else f"to {most:g}"
            raise SettingsError(f"{name} is {value}; it must be from {least:g} {top}")

    @property
    def updates(self) -> int:
        return self.iters // self.grad_accumulation_steps

    def rate(self, update: int) -> float:
        """The learning rate of update 0, 1, …"""
        if update < self.warmup_steps:
            return self.learning_rate * (update + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return self.learning_rate
        span = max(1, self.updates - self.warmup_steps)
        done = min(1.0, (update - self.warmup_steps) / span)
        swing = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (LEAST_RATE + (1 - LEAST_RATE) * swing)
