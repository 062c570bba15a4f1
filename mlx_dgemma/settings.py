"""How one request is denoised: a frozen record that refuses what it cannot mean.

Knows nothing of files, models or text. The defaults are those of the released
checkpoint; a checkpoint's own `generation_config.json` replaces them on load.
"""

import dataclasses
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any, Self

from .errors import SettingsError

MAX_CANVAS_LENGTH = 65_536
MAX_COUNT = 1_000_000  # of denoising steps, and of canvases that must agree
MAX_TOKEN = 2**31 - 1  # ids and positions are int32 everywhere
SAMPLERS = ("entropy-bound", "confidence")
COLDEST = 1e-6  # a lower temperature makes float32 logits infinite


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sampler settings of one request.

    max_tokens      most tokens of text to return; never shortens a canvas
    canvas_length   L, tokens denoised together
    steps           most denoising steps per canvas
    entropy_bound   nats; accept while the entropies accepted before stay within it
    t_max, t_min    temperature falls linearly from t_max towards t_min
    stability       previous argmax canvases that must equal the newest one
    confidence      nats; mean entropy below which a stable canvas is finished
    eos             ids that end the text
    pinned          position in the answer -> token id that is given, never renoised
    min_tokens      tokens of text before which none may be an eos: 1 rules out the
                    empty answers that terse prompts are known to get

    What follows can change the text. It is off unless asked for; README tells its
    measured quality.

    sampler           "entropy-bound", or "confidence": reveal for good whatever
                      argmax is likely enough, at least one position per step
    min_probability   how likely that is, for the sampler "confidence"

    Raises SettingsError naming the setting, its value and the allowed range.
    """

    max_tokens: int = 256
    canvas_length: int = 256
    steps: int = 48
    entropy_bound: float = 0.1
    t_max: float = 0.8
    t_min: float = 0.4
    stability: int = 1
    confidence: float = 0.005
    eos: frozenset[int] = frozenset({1, 106, 50})
    pinned: Mapping[int, int] = field(default_factory=dict)
    min_tokens: int = 0
    sampler: str = SAMPLERS[0]
    min_probability: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.eos, Set | list | tuple):
            raise SettingsError(f"eos is {self.eos!r}; it must be a set of token ids")
        if not isinstance(self.pinned, Mapping):
            raise SettingsError(
                f"pinned is {self.pinned!r}; it must map positions to token ids"
            )
        # copies: what the caller does with theirs later is no concern of ours
        object.__setattr__(self, "eos", frozenset(self.eos))
        object.__setattr__(self, "pinned", dict(self.pinned))
        check_int("max_tokens", self.max_tokens, 1, MAX_TOKEN)
        check_int("canvas_length", self.canvas_length, 1, MAX_CANVAS_LENGTH)
        check_int("steps", self.steps, 1, MAX_COUNT)
        check_int("stability", self.stability, 0, MAX_COUNT)
        _real("entropy_bound", self.entropy_bound, positive=True)
        _real("t_max", self.t_max, positive=True)
        _real("t_min", self.t_min)
        _real("confidence", self.confidence)
        _real("min_probability", self.min_probability)
        check_int("min_tokens", self.min_tokens, 0, MAX_TOKEN)
        if self.min_tokens > self.max_tokens:
            raise SettingsError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}"
            )
        if self.sampler not in SAMPLERS:
            raise SettingsError(
                f"sampler is {self.sampler!r}; supported: {', '.join(SAMPLERS)}"
            )
        if self.t_min > self.t_max:
            raise SettingsError(
                f"t_min is {self.t_min}, above t_max {self.t_max}: lower t_min"
            )
        if (coldest := self.temperature(self.steps - 1)) < COLDEST:
            raise SettingsError(
                f"t_max and t_min cool to {coldest}; the last step's temperature "
                f"must be at least {COLDEST}"
            )
        for token in self.eos:
            check_int("eos", token, 0, MAX_TOKEN)
        for position, token in self.pinned.items():
            check_int("pinned position", position, 0, MAX_TOKEN)
            check_int(f"pinned[{position}]", token, 0, MAX_TOKEN)

    def replace(self, **changes: Any) -> Self:
        """These settings with some changed; None means "leave as it is".

        Raises SettingsError for a name that is no setting.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise SettingsError(
                    f"{name!r} is no setting; the settings are {', '.join(known)}"
                )
        return dataclasses.replace(
            self, **{k: v for k, v in changes.items() if v is not None}
        )

    @property
    def canvases(self) -> int:
        """Most canvases this request may need."""
        return -(-self.max_tokens // self.canvas_length)

    def temperature(self, step: int) -> float:
        """Temperature of denoising step `step` in 0 … steps-1.

        t_min + (t_max - t_min) · remaining / steps, where remaining counts the
        running step (transformers' LinearTemperatureScheduleLogitsProcessor).
        """
        remaining = self.steps - step
        return self.t_min + (self.t_max - self.t_min) * (remaining / self.steps)


def check_int(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise SettingsError unless `value` is a whole number of the range."""
    allowed = f"a whole number from {least}" + (f" to {most}" if most else " up")
    if not isinstance(value, int) or isinstance(value, bool):
        raise SettingsError(f"{name} is {value!r}; it must be {allowed}")
    if value < least or (most is not None and value > most):
        raise SettingsError(f"{name} is {value}; it must be {allowed}")


def _real(name: str, value: object, *, positive: bool = False) -> None:
    allowed = "a number above 0" if positive else "a number from 0 up"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SettingsError(f"{name} is {value!r}; it must be {allowed}")
    # compared, not asked for finiteness: an int may be too large to be a float
    if not 0 <= value <= sys.float_info.max or (positive and value == 0):
        raise SettingsError(f"{name} is {value}; it must be {allowed}")
