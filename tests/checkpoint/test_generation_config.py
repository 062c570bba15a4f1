"""generation_config.json: what a checkpoint says of its sampling."""

from typing import Any

import pytest
from configs import refused, write
from tiny import tiny_config

from mlx_dgemma.checkpoint.config import UnknownKeyWarning, read_config
from mlx_dgemma.settings import Settings

GENERATION = {
    "max_new_tokens": 77,
    "max_denoising_steps": 9,
    "t_max": 1.5,
    "t_min": 0,
    "stability_threshold": 0,
    "confidence_threshold": 0.25,
    "eos_token_id": [3, 7],
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.7},
}
SAMPLING = Settings(
    canvas_length=16,
    max_tokens=77,
    steps=9,
    t_max=1.5,
    t_min=0.0,
    stability=0,
    confidence=0.25,
    eos=frozenset({3, 7}),
    entropy_bound=0.7,
)


def test_the_generation_config_is_the_samplers_truth(tmp_path):
    read = read_config(write(tmp_path, tiny_config(), GENERATION))
    assert read.settings == SAMPLING


@pytest.mark.parametrize("key", GENERATION)
def test_where_the_generation_config_is_silent_the_release_speaks(tmp_path, key):
    rest = {k: v for k, v in GENERATION.items() if k != key}
    found = read_config(write(tmp_path, tiny_config(), rest)).settings
    default = Settings(canvas_length=16, eos=frozenset({1, 4}))
    changed = [k for k in vars(found) if getattr(found, k) != getattr(SAMPLING, k)]
    assert len(changed) == 1
    assert getattr(found, changed[0]) == getattr(default, changed[0])


def test_without_generation_config_settings_are_the_releases(tmp_path):
    read = read_config(write(tmp_path, tiny_config()))
    assert read.settings == Settings(canvas_length=16, eos=frozenset({1, 4}))
    assert read.settings.entropy_bound == 0.1  # the sampler's reference value


def test_zero_is_a_temperature_to_end_with_and_a_confidence(tmp_path):
    zeros = {"t_min": 0, "confidence_threshold": 0.0}
    settings = read_config(write(tmp_path, tiny_config(), zeros)).settings
    assert (settings.t_min, settings.confidence) == (0.0, 0.0)


SAMPLER = "sampler_config"
UNSAMPLEABLE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a list": ([], ("object",)),
    "no tokens": ({"max_new_tokens": 0}, ("max_new_tokens", "0")),
    "no steps": ({"max_denoising_steps": 0}, ("max_denoising_steps",)),
    "steps a float": ({"max_denoising_steps": 4.5}, ("max_denoising_steps", "4.5")),
    "cold start": ({"t_max": 0}, ("t_max", "above 0")),
    "negative": ({"t_max": -1, "t_min": -2}, ("t_max", "-1")),
    "below zero": ({"t_min": -0.1}, ("t_min", "-0.1", "from 0 up")),
    "upside down": ({"t_min": 0.9, "t_max": 0.5}, ("t_min", "0.9", "t_max", "0.5")),
    "text": ({"t_min": "0.4"}, ("t_min", "'0.4'")),
    "stability": ({"stability_threshold": -1}, ("stability_threshold", "-1")),
    "confidence": ({"confidence_threshold": -1}, ("confidence_threshold", "-1")),
    "endless": ({"confidence_threshold": 10**999}, ("confidence_threshold",)),
    "eos": ({"eos_token_id": ["a"]}, ("eos_token_id",)),
    "eos unknown": ({"eos_token_id": 106}, ("eos_token_id", "106", "below 32")),
    "sampler": ({SAMPLER: {"_cls_name": "Other"}}, (SAMPLER, "_cls_name", "Other")),
    "sampler a string": ({SAMPLER: "x"}, (SAMPLER, "object")),
    "bound": ({SAMPLER: {"entropy_bound": 0}}, (SAMPLER, "entropy_bound")),
    "bound a list": ({SAMPLER: {"entropy_bound": []}}, (SAMPLER, "entropy_bound")),
}


@pytest.mark.parametrize("name", UNSAMPLEABLE)
def test_impossible_sampling_is_refused_by_file_and_key(tmp_path, name):
    generation, named = UNSAMPLEABLE[name]
    folder = write(tmp_path, tiny_config(), generation)
    refused(folder, tmp_path / "generation_config.json", named)


def test_unknown_keys_are_named_and_the_samplers_are_refused(tmp_path):
    said = {"max_denoising_step": 3, "steps": 4, "disable_compile": True}
    folder = write(tmp_path, tiny_config(), generation=said)
    with pytest.warns(UnknownKeyWarning) as warned:
        read_config(folder)
    (warning,) = warned
    assert str(warning.message) == (
        f"{folder / 'generation_config.json'}: ignoring unknown keys "
        "max_denoising_step, steps"
    )
    said = {"sampler_config": {"entropy_bond": 9.0}}
    write(tmp_path, tiny_config(), generation=said)
    refused(tmp_path, tmp_path / "generation_config.json", ("entropy_bond",))


def test_mlx_vlms_copy_inside_config_json_counts_where_there_is_no_file(tmp_path):
    inside = tiny_config() | {"generation_config": GENERATION}
    (tmp_path / "one").mkdir()
    assert read_config(write(tmp_path / "one", inside)).settings == SAMPLING
    (tmp_path / "two").mkdir()
    both = read_config(write(tmp_path / "two", inside, {"t_max": 0.5}))
    assert both.settings.t_max == 0.5 and both.settings.steps == 48
    wrong = tiny_config() | {"generation_config": {"t_max": -1}}
    (tmp_path / "three").mkdir()
    write(tmp_path / "three", wrong)
    refused(tmp_path / "three", tmp_path / "three" / "config.json", ("t_max", "-1"))
