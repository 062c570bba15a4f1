"""Settings refuse what they cannot mean, and name the setting."""

import math

import pytest

from mlx_dgemma.errors import DGemmaError, SettingsError
from mlx_dgemma.settings import Settings

IMPOSSIBLE = {
    "max_tokens": [0, -1, 1.5, True, "4"],
    "canvas_length": [0, 65_537, 2.0],
    "steps": [0, -3, 48.0, 10**20],
    "stability": [-1, 0.5, 10**20],
    "entropy_bound": [0, -0.1, math.nan, math.inf, "1", 10**400],
    "t_max": [0.0, -1.0, math.nan],
    "t_min": [-0.1, math.inf, 0.9],  # 0.9 is above t_max
    "confidence": [-1e-9, math.nan],
    "eos": [frozenset({-1}), frozenset({"a"}), 4],
    "pinned": [{-1: 3}, {0: -2}, {0: "x"}, [3]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in IMPOSSIBLE.items() for v in values]
)
def test_impossible_values_are_refused_by_name(name, value):
    with pytest.raises(SettingsError, match=name) as error:
        Settings(**{name: value})
    assert "\n" not in str(error.value)
    assert isinstance(error.value, DGemmaError)
    assert isinstance(error.value, ValueError)


def test_temperatures_that_overflow_are_refused():
    with pytest.raises(SettingsError, match="last step's temperature must be at least"):
        Settings(t_max=1e-6, t_min=0)
    Settings(t_max=0.8, t_min=0)


def test_settings_keep_no_hold_of_what_they_were_given():
    given = {3: 4}
    settings = Settings(pinned=given)
    given[5] = 6
    assert settings.pinned == {3: 4}


def test_defaults_are_the_releases():
    s = Settings()
    assert (s.steps, s.entropy_bound, s.t_max, s.t_min) == (48, 0.1, 0.8, 0.4)
    assert (s.stability, s.confidence, s.eos) == (1, 0.005, {1, 106, 50})


def test_but_changes_only_what_is_given():
    s = Settings(steps=7)
    assert s.replace(steps=None, t_max=2.0) == Settings(steps=7, t_max=2.0)


def test_but_refuses_names_that_are_no_setting():
    with pytest.raises(SettingsError, match=r"'temperature' is no setting.*t_max"):
        Settings().replace(temperature=1.0)


@pytest.mark.parametrize(
    ("max_tokens", "length", "canvases"), [(1, 16, 1), (16, 16, 1), (17, 16, 2)]
)
def test_canvases_cover_max_tokens(max_tokens, length, canvases):
    s = Settings(max_tokens=max_tokens, canvas_length=length)
    assert s.canvases == canvases


def test_temperature_falls_linearly_towards_t_min():
    s = Settings(steps=4, t_max=0.8, t_min=0.4)
    assert [s.temperature(i) for i in range(4)] == pytest.approx([0.8, 0.7, 0.6, 0.5])
