"""Settings refuse impossible values, and name the setting."""

import inspect
import math
from dataclasses import fields

import pytest

from mlx_dgemma import GenerateOptions, Settings, SettingsOverrides, stream_generate
from mlx_dgemma.errors import SettingsError

IMPOSSIBLE = {
    "max_tokens": [0, -1, 1.5, True, "4"],
    "canvas_length": [0, 65_537, 2.0],
    "steps": [0, 48.0, 10**20],
    "stability": [-1, 0.5, 10**20],
    "entropy_bound": [0, -0.1, math.nan, math.inf, "1", 10**400],
    "t_max": [0.0, -1.0, math.nan, 1e-6],  # the last is below t_min
    "t_min": [-0.1, math.inf, 0.9],  # 0.9 is above t_max
    "confidence": [-1e-9, math.nan],
    "eos": [frozenset({-1}), frozenset({"a"}), 4],
    "pinned": [{-1: 3}, {0: -2}, {0: "x"}, [3]],
    "min_tokens": [-1, 300],  # 300 is above max_tokens
    "sampler": ["greedy"],
    "min_probability": [-1],
}


def test_impossible_values_are_refused_by_name():
    for name, value in ((name, v) for name, vs in IMPOSSIBLE.items() for v in vs):
        with pytest.raises(SettingsError, match=f"^[^\n]*{name}[^\n]*$"):
            Settings(**{name: value})
    with pytest.raises(SettingsError, match="last step's temperature must be at least"):
        Settings(t_max=1e-6, t_min=0)
    with pytest.raises(SettingsError, match=r"pinned\[3\] ends the text before"):
        Settings(pinned={3: 1}, eos={1}, min_tokens=4)
    Settings(pinned={4: 1}, eos={1}, min_tokens=4)


def test_replace_changes_what_is_given_and_refuses_other_names():
    given = {3: 4}
    settings = Settings(steps=7, pinned=given)
    given[5] = 6  # later changes have no effect
    changed = settings.replace(steps=None, t_max=2.0)
    assert changed == Settings(steps=7, t_max=2.0, pinned={3: 4})
    with pytest.raises(SettingsError, match=r"'temperature' is no setting.*t_max"):
        settings.replace(temperature=1.0)


def test_typed_keywords_are_the_settings_and_those_of_stream_generate():
    names = {field.name for field in fields(Settings)}
    assert set(SettingsOverrides.__annotations__) == names
    parameters = inspect.signature(stream_generate).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert set(GenerateOptions.__annotations__) == keywords | names


def test_defaults_canvases_and_temperatures():
    s = Settings()  # the release's
    assert (s.steps, s.entropy_bound, s.t_max, s.t_min) == (48, 0.1, 0.8, 0.4)
    assert (s.stability, s.confidence, s.eos) == (1, 0.005, {1, 106, 50})
    counts = [Settings(max_tokens=n, canvas_length=16).canvases for n in (1, 16, 17)]
    assert counts == [1, 1, 2]
    s = Settings(steps=4, t_min=0.4)  # falls linearly towards t_min
    assert [s.temperature(i) for i in range(4)] == pytest.approx([0.8, 0.7, 0.6, 0.5])
