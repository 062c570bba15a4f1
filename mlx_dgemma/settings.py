"""Sampler settings of a request: a frozen record that validates itself.

Knows nothing of files, models or text. The defaults are those of the released
checkpoint; a checkpoint's own `generation_config.json` replaces them on load.
"""

import dataclasses
import sys
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Self, TypedDict, Unpack

from .errors import SettingsError

MAX_CANVAS_LENGTH = 65_536
MAX_COUNT = 1_000_000  # of denoising steps, and of canvases that must agree
MAX_TOKEN = 2**31 - 1  # ids and positions are int32 everywhere
SAMPLERS = ("entropy-bound", "confidence")
MIN_TEMPERATURE = 1e-6  # a lower one makes float32 logits infinite


class SettingsOverrides(TypedDict, total=False):
    """Keywords that replace single `Settings`; None leaves a setting as it is."""

    max_tokens: int | None
    canvas_length: int | None
    steps: int | None
    entropy_bound: float | None
    t_max: float | None
    t_min: float | None
    stability: int | None
    confidence: float | None
    eos: Collection[int] | None
    pinned: Mapping[int, int] | None
    min_tokens: int | None
    sampler: str | None
    min_probability: float | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sampler settings of one request.

    max_tokens      maximum tokens of text to return; never shortens a canvas
    canvas_length   L, tokens denoised together
    steps           maximum denoising steps per canvas
    entropy_bound   nats; accept while the entropies accepted before stay within it
    t_max, t_min    the temperature falls linearly from t_max towards t_min
    stability       previous argmax canvases that must equal the newest one
    confidence      nats; mean entropy below which a stable canvas is finished
    eos             ids that end the text
    pinned          position in the answer -> token id that is fixed, never renoised
    min_tokens      tokens of text that come before any eos; 1 rules out empty answers

    The following can change the text, and are off by default. tests/bench/RESULTS.md
    gives their measured quality.

    sampler           "entropy-bound", or "confidence": reveal for good every position
                      whose argmax is likely enough, at least one per step
    min_probability   how likely, for the sampler "confidence"

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
    pinned: Mapping[int, int] = field(default_factory=dict[int, int])
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
        # copies, so that later changes of the caller's objects have no effect
        object.__setattr__(self, "eos", frozenset(self.eos))
        object.__setattr__(self, "pinned", dict(self.pinned))
        check_int("max_tokens", self.max_tokens, 1, MAX_TOKEN)
        check_int("canvas_length", self.canvas_length, 1, MAX_CANVAS_LENGTH)
        check_int("steps", self.steps, 1, MAX_COUNT)
        check_int("stability", self.stability, 0, MAX_COUNT)
        check_int("min_tokens", self.min_tokens, 0, MAX_TOKEN)
        _check_number("entropy_bound", self.entropy_bound, positive=True)
        _check_number("t_max", self.t_max, positive=True)
        _check_number("t_min", self.t_min)
        _check_number("confidence", self.confidence)
        _check_number("min_probability", self.min_probability)
        for token in self.eos:
            check_int("eos", token, 0, MAX_TOKEN)
        for position, token in self.pinned.items():
            check_int("pinned position", position, 0, MAX_TOKEN)
            check_int(f"pinned[{position}]", token, 0, MAX_TOKEN)
        if self.sampler not in SAMPLERS:
            raise SettingsError(
                f"sampler is {self.sampler!r}; supported: {', '.join(SAMPLERS)}"
            )
        if self.min_tokens > self.max_tokens:
            raise SettingsError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}"
            )
        if self.t_min > self.t_max:
            raise SettingsError(
                f"t_min is {self.t_min}, above t_max {self.t_max}: lower t_min"
            )
        if (last := self.temperature(self.steps - 1)) < MIN_TEMPERATURE:
            raise SettingsError(
                f"t_max and t_min cool to {last}; the last step's temperature must be "
                f"at least {MIN_TEMPERATURE}"
            )

    def replace(self, **overrides: Unpack[SettingsOverrides]) -> Self:
        """Return these settings with some changed; None leaves a setting as it is.

        Raises SettingsError for a name that is no setting.
        """
        known = [f.name for f in fields(self)]
        for name in overrides:
            if name not in known:
                raise SettingsError(
                    f"{name!r} is no setting; the settings are {', '.join(known)}"
                )
        changes = {k: v for k, v in overrides.items() if v is not None}
        return dataclasses.replace(self, **changes)

    @property
    def canvases(self) -> int:
        """Maximum number of canvases of this request."""
        return -(-self.max_tokens // self.canvas_length)

    def temperature(self, step: int) -> float:
        """Return the temperature of denoising step `step` in 0 … steps-1.

        t_min + (t_max - t_min) · remaining / steps, where remaining counts the
        running step (transformers' LinearTemperatureScheduleLogitsProcessor).
        """
        remaining = self.steps - step
        return self.t_min + (self.t_max - self.t_min) * (remaining / self.steps)


def check_int(
    name: str, value: object, minimum: int, maximum: int | None = None
) -> None:
    """Raise SettingsError unless `value` is a whole number of the range."""
    allowed = f"a whole number from {minimum}" + (
        f" to {maximum}" if maximum else " up"
    )
    if not isinstance(value, int) or isinstance(value, bool):
        raise SettingsError(f"{name} is {value!r}; it must be {allowed}")
    if value < minimum or (maximum is not None and value > maximum):
        raise SettingsError(f"{name} is {value}; it must be {allowed}")


def _check_number(name: str, value: object, *, positive: bool = False) -> None:
    allowed = "a number above 0" if positive else "a number from 0 up"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SettingsError(f"{name} is {value!r}; it must be {allowed}")
    # compared with the maximum: math.isfinite fails for an int that no float can hold
    if not 0 <= value <= sys.float_info.max or (positive and value == 0):
        raise SettingsError(f"{name} is {value}; it must be {allowed}")
