"""config.json and generation_config.json: layouts, defaults, refusals."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from checkpoint.folders import refusal
from tiny import tiny_config

from mlx_dgemma.checkpoint.config import Rope, UnknownKeyWarning, read_config
from mlx_dgemma.checkpoint.generation_config import read_generation_config
from mlx_dgemma.settings import Settings

SLIDING, FULL = "sliding_attention", "full_attention"
GONE = object()  # takes a key out


def without_gone(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not GONE}


def tiny_text(**changes: Any) -> dict[str, Any]:
    """The tiny configuration with text_config changed."""
    config = tiny_config(**changes)
    return config | {"text_config": without_gone(config["text_config"])}


def write(folder: Path, config: dict[str, Any], generation: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def read(folder: Path, config: dict[str, Any], generation: Any = None):
    return read_config(write(folder, config, generation))


def sampling(folder: Path, config: dict[str, Any], generation: Any = None) -> Settings:
    return read_generation_config(read(folder, config, generation), folder)


def refused(folder: Path, file: str, named: str) -> None:
    message = refusal(lambda: read_generation_config(read_config(folder), folder))
    assert message.startswith(f"{folder / file}: ")
    assert named in message.removeprefix(str(folder / file))


# Layouts and defaults


def test_the_two_layouts_mean_the_same_model(tmp_path):
    released = read(tmp_path, tiny_config())
    other = tiny_text(
        global_head_dim=GONE,
        num_global_key_value_heads=GONE,
        per_layer_config={"2": {"head_dim": 32, "num_key_value_heads": 1}},
    )
    transformers = read(tmp_path, other)
    shapes = [(one.kind, one.head_dim, one.kv_heads) for one in released.layers]
    assert shapes == [("sliding", 16, 2), ("sliding", 16, 2), ("full", 32, 1)]
    ours = {k: v for k, v in vars(released).items() if k != "raw"}
    assert ours == {k: v for k, v in vars(transformers).items() if k != "raw"}


def test_layers_not_overridden_have_the_common_shape(tmp_path):
    config = tiny_text(per_layer_config={"0": {"head_dim": 8}, "1": None})
    layers = read(tmp_path, config).layers
    assert [one.head_dim for one in layers] == [8, 16, 16]
    assert [one.kv_heads for one in layers] == [2, 2, 2]


def test_defaults_are_those_of_the_release(tmp_path):
    optional = ("head_dim", "global_head_dim", "num_global_key_value_heads")
    optional += ("layer_types", "final_logit_softcapping")
    config = tiny_text(num_hidden_layers=8, **dict.fromkeys(optional, GONE))
    del config["canvas_length"], config["tie_word_embeddings"]
    found = read(tmp_path, config)
    full = [i for i, layer in enumerate(found.layers) if not layer.sliding]
    assert full == [5, 7]  # every sixth, and always the last
    assert {(one.kind, one.head_dim, one.kv_heads) for one in found.layers} == {
        ("sliding", 256, 2),
        ("full", 512, 2),
    }
    assert found.layers[0].rope == Rope(theta=10_000.0, rotated=128)
    assert found.layers[5].rope == Rope(theta=1_000_000.0, rotated=64)
    assert found.canvas_length == sampling(tmp_path, config).canvas_length == 256
    assert (found.rms_norm_eps, found.final_logit_softcapping) == (1e-6, 30.0)
    assert (found.attention_bias, found.has_vision) == (False, False)


def test_rope_parameters_are_read_per_kind_of_layer(tmp_path):
    proportional = {"partial_rotary_factor": 0.5, "factor": 8.0, "rope_theta": 7e5}
    rope = {
        SLIDING: {"rope_type": "default", "rope_theta": 500},
        FULL: {"rope_type": "proportional"} | proportional,
    }
    layers = read(tmp_path, tiny_text(rope_parameters=rope)).layers
    assert layers[0].rope == Rope(theta=500.0, rotated=8)
    assert layers[2].rope == Rope(theta=7e5, rotated=8, factor=8.0)


def test_null_means_absent(tmp_path):
    nulls = tiny_text(layer_types=None, rms_norm_eps=None, per_layer_config=None)
    found = read(tmp_path, nulls | {"vision_config": None})
    assert [layer.kind for layer in found.layers] == ["sliding", "sliding", "full"]
    assert (found.rms_norm_eps, found.has_vision) == (1e-6, False)
    assert read(tmp_path, tiny_config() | {"vision_config": {"x": 1}}).has_vision


def test_unknown_keys_are_named_in_one_warning(tmp_path):
    config = tiny_text(colour="red", rope_theta=1e4) | {"zebra": 1, "dtype": "float32"}
    with pytest.warns(UnknownKeyWarning) as caught:
        read(tmp_path, config)
    (warning,) = caught
    assert str(warning.message) == (
        f"{tmp_path / 'config.json'}: ignoring unknown keys "
        "zebra, text_config.colour, text_config.rope_theta"
    )
    known = tiny_text(use_cache=True, attention_dropout=0.0, dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path, known | {"architectures": ["A"]})


# Refusals: what is changed, and what the message must hold

# keys of text_config and values that are refused as "KEY is VALUE" or "KEY is missing"
BAD_TEXT = {
    "num_hidden_layers": [0, -3, 10**9, 10**400, 3.0, "3", True, None],
    "hidden_size": [GONE, 2**40],
    "moe_intermediate_size": [{}],
    "global_head_dim": [2**20],
    "sliding_window": [1, GONE],
    "rms_norm_eps": [0.0, "1e-6"],
    "final_logit_softcapping": [-30.0, True],
    "attention_bias": [1, []],
    "hidden_activation": ["silu"],
    "use_bidirectional_attention": ["all"],
    "tie_word_embeddings": [False],
}
BAD_TOP = {
    "model_type": [GONE, "gemma4", ["x"]],
    "canvas_length": [0, 10**9, True],
    "eos_token_id": ["<eos>", [1, -1], True, [1, 32]],
    "tie_word_embeddings": [False],
}
TOP: list[tuple[dict[str, Any], str]] = [
    ({"auto_map": {"AutoModel": "m.M"}}, "auto_map asks to run remote code"),
    ({"text_config": GONE}, "text_config is missing"),
    ({"vision_config": "x"}, "vision_config must be an object"),
]
TEXT: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 1}, "vocab_size is 1; it must be from 2"),
    ({"top_k_experts": 5}, "top_k_experts is 5, above num_experts 4"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4, no multiple of the 3"),
    ({"num_global_key_value_heads": 3}, "of layer 2"),
    ({"head_dim": 15}, "head_dim is 15 in layer 0; must be even"),
    ({"layer_types": [SLIDING, "linear", FULL]}, "layer_types[1] is 'linear'"),
    ({"layer_types": [FULL]}, "names 1 layers but num_hidden_layers is 3"),
    ({"layer_types": {}}, "layer_types must be a list"),
    ({"layer_types": [FULL, FULL, SLIDING]}, "must end with 'full_attention'"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0; it must be a number above 0"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps is inf"),
    ({"final_logit_softcapping": None}, "final_logit_softcapping is null"),
    ({"rope_parameters": []}, "rope_parameters must be an object"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters: rope_theta"),
    ({"per_layer_config": {"3": {}}}, "per_layer_config: 3 is no layer; they are 0"),
    ({"per_layer_config": {"9" * 5000: {}}}, "per_layer_config: 999"),
    ({"per_layer_config": {"1": {"sliding_window": 4}}}, "1: sliding_window"),
    ({"per_layer_config": {"1": {"head_dim": "a"}}}, "1: head_dim is 'a'"),
]
ROPE: list[tuple[dict[str, Any], str]] = [
    ({"rope_type": "yarn"}, "rope_type is 'yarn'"),
    ({"beta": 1}, f"{FULL}: beta"),
    ({"rope_theta": 0}, f"{FULL}: rope_theta"),
    ({"rope_theta": None}, "rope_theta is missing"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 for 'default'"),
    ({"rope_type": "proportional", "partial_rotary_factor": 1.5}, "is 1.5 for"),
]


def is_said(key: str, value: Any) -> str:
    gone = "None" if key == "model_type" else "missing"
    return f"{key} is {gone if value in (None, GONE) else repr(value)}"


def test_impossible_values_are_refused_by_file_and_key(tmp_path):
    top = [({k: v}, is_said(k, v)) for k, values in BAD_TOP.items() for v in values]
    text = [({k: v}, is_said(k, v)) for k, values in BAD_TEXT.items() for v in values]
    cases = [(without_gone(tiny_config() | keys), named) for keys, named in TOP + top]
    cases += [(tiny_text(**keys), named) for keys, named in TEXT + text]
    for keys, named in ROPE:
        rope = {FULL: {"rope_theta": 1e4} | keys}
        cases.append((tiny_text(rope_parameters=rope), named))
    for config, named in cases:
        refused(write(tmp_path, config), "config.json", named)


BAD_JSON = [
    (b"", "line 1"),
    (b'{\n"a": 1,\n}', "line 3"),
    (b"[1]", "is list, not an object"),
    (b'{"t_max": NaN}', "NaN"),
    (b'{"t_max": -Infinity}', "Infinity"),
    (b'{"a": "\xff"}', "UTF-8 at byte 7"),
    (b'{"a": "\\ud800"}', "lone surrogate"),
    (b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
    (b'{"a": 1' + b"0" * 5000 + b"}", "a number is too long"),
]


def test_text_that_is_no_json_object_is_refused(tmp_path):
    for file in ("config.json", "generation_config.json"):
        for content, named in BAD_JSON:
            write(tmp_path, tiny_config(), {})
            (tmp_path / file).write_bytes(content)
            refused(tmp_path, file, named)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    refused(tmp_path, "config.json", "no such file; is this the right folder?")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(rms_norm_eps=1.5)).replace("1.5", "1e999"))
    refused(tmp_path, "config.json", "rms_norm_eps is inf")
    with path.open("wb") as file:
        file.truncate(2**40)
    refused(tmp_path, "config.json", "64 MB")
    path.unlink()
    path.mkdir()
    refused(tmp_path, "config.json", "directory")


# generation_config.json

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
DEFAULT = Settings(canvas_length=16, eos=frozenset({1, 4}))
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


def test_sampler_settings_are_read(tmp_path):
    assert sampling(tmp_path, tiny_config()) == DEFAULT
    assert DEFAULT.entropy_bound == 0.1  # the sampler's reference value
    assert sampling(tmp_path, tiny_config(), GENERATION) == SAMPLING
    said = {"max_denoising_step": 3, "t_min": 0, "disable_compile": True}
    with pytest.warns(UnknownKeyWarning, match="keys max_denoising_step$"):
        assert sampling(tmp_path, tiny_config(), said).t_min == 0.0


def test_each_absent_setting_has_its_default(tmp_path):
    for key in GENERATION:
        rest = {k: v for k, v in GENERATION.items() if k != key}
        found = vars(sampling(tmp_path, tiny_config(), rest))
        (changed,) = (k for k in found if found[k] != vars(SAMPLING)[k])
        assert found[changed] == vars(DEFAULT)[changed]


def test_ids_that_end_a_text_come_from_the_outermost_key(tmp_path):
    cases = [(7, 3, {7}), ([7, 2], 3, {2, 7}), (GONE, 3, {3}), ([], [5], {5})]
    for top, text, ids in (*cases, (GONE, GONE, {1})):
        config = without_gone(tiny_text(eos_token_id=text) | {"eos_token_id": top})
        assert sampling(tmp_path, config).eos == ids


BAD_GENERATION: list[tuple[Any, str]] = [
    ([], "object"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_denoising_steps": 4.5}, "max_denoising_steps is 4.5"),
    ({"t_max": 0}, "t_max is 0.0; it must be a number above 0"),
    ({"t_min": -0.1}, "t_min is -0.1; it must be a number from 0 up"),
    ({"t_min": 0.9, "t_max": 0.5}, "t_min is 0.9, above t_max 0.5"),
    ({"t_min": "0.4"}, "t_min is '0.4'"),
    ({"stability_threshold": -1}, "stability_threshold is -1"),
    ({"confidence_threshold": -1}, "confidence_threshold is -1"),
    ({"eos_token_id": ["a"]}, "eos_token_id"),
    ({"eos_token_id": 106}, "eos_token_id is 106; it must be token ids below 32"),
    ({"sampler_config": {"_cls_name": "Other"}}, "_cls_name is 'Other'"),
    ({"sampler_config": "x"}, "sampler_config must be an object"),
    ({"sampler_config": {"entropy_bound": 0}}, "sampler_config: entropy_bound"),
    ({"sampler_config": {"entropy_bond": 9.0}}, "entropy_bond"),
]


def test_impossible_sampling_is_refused_by_file_and_key(tmp_path):
    for generation, named in BAD_GENERATION:
        write(tmp_path, tiny_config(), generation)
        refused(tmp_path, "generation_config.json", named)


def test_the_copy_in_config_json_counts_where_there_is_no_file(tmp_path):
    inside = tiny_config() | {"generation_config": GENERATION}
    assert sampling(tmp_path, inside) == SAMPLING  # as mlx-vlm writes it
    wrong = tiny_config() | {"generation_config": {"t_max": -1}}
    refused(write(tmp_path, wrong), "config.json", "generation_config: t_max is -1.0")
    both = sampling(tmp_path, inside, {"t_max": 0.5})
    assert (both.t_max, both.steps) == (0.5, 48)
