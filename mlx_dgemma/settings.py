"""Sampler settings of a request: a frozen record that validates itself.

Knows nothing of files, models or text. The defaults are those of the released
checkpoint; a checkpoint's own `generation_config.json` replaces them on load.
"""

import dataclasses
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field, fields
from math import inf
from sys import float_info
from typing import Self, TypedDict, Unpack

from .errors import SettingsError

MAX_CANVAS_LENGTH = 65_536
MAX_COUNT = 1_000_000  # of denoising steps, and of canvases that must agree
MAX_SEED = 2**64 - 1
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

    Raises SettingsError naming the setting, its value and the allowed range.
    """

    max_tokens: int = 256  # maximum tokens of text to return; never shortens a canvas
    canvas_length: int = 256  # L, tokens denoised together
    steps: int = 48  # maximum denoising steps per canvas
    entropy_bound: float = 0.1  # nats; accept while those accepted before sum to it
    t_max: float = 0.8  # the temperature falls linearly from t_max
    t_min: float = 0.4  # towards t_min
    stability: int = 1  # earlier drafts (argmax canvases) that must equal the newest
    confidence: float = 0.005  # nats; mean entropy below which a stable canvas is done
    eos: frozenset[int] = frozenset({1, 106, 50})  # ids that end the text
    # position in the answer -> token id that is fixed, never renoised
    pinned: Mapping[int, int] = field(default_factory=dict[int, int])
    min_tokens: int = 0  # tokens of text before any eos; 1 rules out empty answers
    # "entropy-bound", or "confidence": reveal for good every position whose argmax is
    # likely enough, at least one per step; tests/bench/RESULTS.md compares the texts
    sampler: str = SAMPLERS[0]
    min_probability: float = 0.9  # how likely, for the sampler "confidence"

    def __post_init__(self) -> None:
        eos, pinned = self.eos, self.pinned
        if not isinstance(eos, Set | list | tuple):
            raise SettingsError(f"eos is {eos!r}; it must be a set of token ids")
        if not isinstance(pinned, Mapping):
            wrong = f"pinned is {pinned!r}; it must map positions to token ids"
            raise SettingsError(wrong)
        # copies, so that later changes of the caller's objects have no effect
        object.__setattr__(self, "eos", frozenset(eos))
        object.__setattr__(self, "pinned", dict(pinned))
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
        for token in eos:
            check_int("eos", token, 0, MAX_TOKEN)
        for position, token in pinned.items():
            check_int("pinned position", position, 0, MAX_TOKEN)
            check_int(f"pinned[{position}]", token, 0, MAX_TOKEN)
        if self.sampler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise SettingsError(f"sampler is {self.sampler!r}; supported: {known}")
        if self.min_tokens > self.max_tokens:
            wrong = f"min_tokens is {self.min_tokens}, above max_tokens"
            raise SettingsError(f"{wrong} {self.max_tokens}")
        early = [p for p, t in self.pinned.items() if t in self.eos]
        if early and min(early) < self.min_tokens:
            raise SettingsError(
                f"pinned[{min(early)}] ends the text before min_tokens "
                f"{self.min_tokens}"
            )
        if self.t_min > self.t_max:
            wrong = f"t_min is {self.t_min}, above t_max {self.t_max}: lower t_min"
            raise SettingsError(wrong)
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
        if unknown := sorted(overrides.keys() - known):
            wrong = f"{unknown[0]!r} is no setting; the settings are {', '.join(known)}"
            raise SettingsError(wrong)
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


def check_int(name: str, value: object, minimum: int, maximum: float = inf) -> None:
    """Raise SettingsError unless `value` is a whole number of the range."""
    if type(value) is not int or not minimum <= value <= maximum:
        to = "up" if maximum == inf else f"to {maximum}"
        allowed = f"a whole number from {minimum} {to}"
        large = isinstance(value, int) and value.bit_length() > 10_000
        shown = "too large" if large else repr(value)  # Python prints no such number
        raise SettingsError(f"{name} is {shown:.80}; it must be {allowed}")


def _check_number(name: str, value: object, *, positive: bool = False) -> None:
    allowed = "a number above 0" if positive else "a number from 0 up"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingsError(f"{name} is {value!r}; it must be {allowed}")
    # compared with the maximum: math.isfinite fails for an int that no float can hold
    if not 0 <= value <= float_info.max or (positive and value == 0):
        raise SettingsError(f"{name} is {value}; it must be {allowed}")
