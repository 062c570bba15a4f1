"""config.json: two layouts, defaults, refusals."""

import json
import time
import tracemalloc
import warnings
from typing import Any

import pytest
from configs import refused, write
from tiny import tiny_config

from mlx_dgemma.checkpoint.config import Rope, UnknownKeyWarning, read_config
from mlx_dgemma.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
REMOVED = object()


def tiny_text(**changes: Any) -> dict[str, Any]:
    """The tiny configuration with text_config changed; REMOVED takes a key out."""
    config = tiny_config(**changes)
    text = {k: v for k, v in config["text_config"].items() if v is not REMOVED}
    return config | {"text_config": text}


def tiny_top(**changes: Any) -> dict[str, Any]:
    """The tiny configuration with its outermost keys changed."""
    config = tiny_config() | changes
    return {k: v for k, v in config.items() if v is not REMOVED}


def test_the_two_layouts_mean_the_same_model(tmp_path):
    released = read_config(write(tmp_path, tiny_config()))
    other = tiny_text(
        global_head_dim=REMOVED,
        num_global_key_value_heads=REMOVED,
        per_layer_config={"2": {"head_dim": 32, "num_key_value_heads": 1}},
    )
    transformers = read_config(write(tmp_path, other))
    assert transformers.layers == released.layers
    shapes = [(one.kind, one.head_dim, one.kv_heads) for one in released.layers]
    assert shapes == [("sliding", 16, 2), ("sliding", 16, 2), ("full", 32, 1)]
    ours = {k: v for k, v in vars(released).items() if k != "raw"}
    assert ours == {k: v for k, v in vars(transformers).items() if k != "raw"}


def test_layers_not_overridden_have_the_common_shape(tmp_path):
    config = tiny_text(per_layer_config={"0": {"head_dim": 8}, "1": None})
    layers = read_config(write(tmp_path, config)).layers
    assert [one.head_dim for one in layers] == [8, 16, 16]
    assert [one.kv_heads for one in layers] == [2, 2, 2]


def test_what_is_silent_has_the_releases_defaults(tmp_path):
    optional = ("head_dim", "global_head_dim", "num_global_key_value_heads")
    config = tiny_text(
        num_hidden_layers=8,
        layer_types=REMOVED,
        final_logit_softcapping=REMOVED,
        **dict.fromkeys(optional, REMOVED),
    )
    del config["canvas_length"], config["tie_word_embeddings"]
    read = read_config(write(tmp_path, config))
    full = [i for i, layer in enumerate(read.layers) if not layer.sliding]
    assert full == [5, 7]  # every sixth, and always the last
    assert {(one.kind, one.head_dim, one.kv_heads) for one in read.layers} == {
        ("sliding", 256, 2),
        ("full", 512, 2),
    }
    assert read.layers[0].rope == Rope(theta=10_000.0, rotated=128)
    assert read.layers[5].rope == Rope(theta=1_000_000.0, rotated=64)
    assert (read.canvas_length, read.settings.canvas_length) == (256, 256)
    assert (read.rms_norm_eps, read.final_logit_softcapping) == (1e-6, 30.0)
    assert (read.attention_bias, read.has_vision) == (False, False)


def test_rope_parameters_are_read_per_kind_of_layer(tmp_path):
    rope = {
        SLIDING: {"rope_type": "default", "rope_theta": 500},
        FULL: {
            "rope_type": "proportional",
            "rope_theta": 7e5,
            "partial_rotary_factor": 0.5,
            "factor": 8.0,
        },
    }
    layers = read_config(write(tmp_path, tiny_text(rope_parameters=rope))).layers
    assert layers[0].rope == Rope(theta=500.0, rotated=8)
    assert layers[2].rope == Rope(theta=7e5, rotated=8, factor=8.0)


def test_null_means_absent(tmp_path):
    nulls = tiny_text(layer_types=None, rms_norm_eps=None, per_layer_config=None)
    read = read_config(write(tmp_path, nulls | {"vision_config": None}))
    assert [layer.kind for layer in read.layers] == ["sliding", "sliding", "full"]
    assert (read.rms_norm_eps, read.has_vision) == (1e-6, False)


def test_vision_is_known_from_its_configuration(tmp_path):
    assert read_config(write(tmp_path, tiny_top(vision_config={"x": 1}))).has_vision


def test_unknown_keys_are_named_in_one_warning(tmp_path):
    config = tiny_text(colour="red", rope_theta=1e4) | {"zebra": 1, "dtype": "float32"}
    with pytest.warns(UnknownKeyWarning) as caught:
        read_config(write(tmp_path, config))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(str(tmp_path / "config.json"))
    assert message.endswith("zebra, text_config.colour, text_config.rope_theta")


def test_keys_of_other_tools_that_change_nothing_pass_silently(tmp_path):
    config = tiny_text(use_cache=True, attention_dropout=0.0, dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_config(write(tmp_path, config | {"architectures": ["A"]}))


@pytest.mark.parametrize(
    ("top", "text", "ids"),
    [
        (7, 3, {7}),
        ([7, 2], 3, {2, 7}),
        (REMOVED, 3, {3}),
        ([], [5], {5}),
        (REMOVED, REMOVED, {1}),
    ],
)
def test_ids_that_end_a_text_come_from_the_outermost_key(tmp_path, top, text, ids):
    config = tiny_top(eos_token_id=top)
    config["text_config"] |= {"eos_token_id": text} if text is not REMOVED else {}
    assert read_config(write(tmp_path, config)).settings.eos == ids


def rope(kind: str = FULL, **parameters: Any) -> dict[str, Any]:
    return tiny_text(rope_parameters={kind: {"rope_theta": 1e4} | parameters})


# name -> (config.json, what the message must name)
IMPOSSIBLE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no model type": (tiny_top(model_type=REMOVED), ("model_type", "None")),
    "other model": (tiny_top(model_type="gemma4"), ("model_type", "gemma4")),
    "model type a list": (tiny_top(model_type=["x"]), ("model_type",)),
    "remote code": (tiny_top(auto_map={"AutoModel": "m.M"}), ("auto_map", "remote")),
    "untied head": (tiny_top(tie_word_embeddings=False), ("tie_word_embeddings",)),
    "untied text": (
        tiny_text(tie_word_embeddings=False),
        ("text_config", "tie_word_embeddings"),
    ),
    "no text config": (tiny_top(text_config=REMOVED), ("text_config", "missing")),
    "text config a list": (tiny_top(text_config=[1]), ("text_config", "object")),
    "vision a string": (tiny_top(vision_config="x"), ("vision_config", "object")),
    "no canvas": (tiny_top(canvas_length=0), ("canvas_length", "0")),
    "vast canvas": (tiny_top(canvas_length=10**9), ("canvas_length", "65536")),
    "eos text": (tiny_top(eos_token_id="<eos>"), ("eos_token_id", "'<eos>'")),
    "eos negative": (tiny_top(eos_token_id=[1, -1]), ("eos_token_id", "-1")),
    "eos true": (tiny_top(eos_token_id=True), ("eos_token_id", "True")),
    "eos unknown": (tiny_top(eos_token_id=[1, 32]), ("eos_token_id", "below 32")),
    "no layers": (tiny_text(num_hidden_layers=0), ("num_hidden_layers", "0")),
    "negative layers": (tiny_text(num_hidden_layers=-3), ("num_hidden_layers", "-3")),
    "vast layers": (tiny_text(num_hidden_layers=10**9), ("num_hidden_layers",)),
    "endless layers": (tiny_text(num_hidden_layers=10**400), ("num_hidden_layers",)),
    "layers a float": (tiny_text(num_hidden_layers=3.0), ("num_hidden_layers", "3.0")),
    "layers a string": (tiny_text(num_hidden_layers="3"), ("num_hidden_layers", "'3'")),
    "layers a bool": (tiny_text(num_hidden_layers=True), ("num_hidden_layers", "True")),
    "layers missing": (tiny_text(num_hidden_layers=None), ("num_hidden_layers",)),
    "width missing": (tiny_text(hidden_size=REMOVED), ("hidden_size", "missing")),
    "width vast": (tiny_text(hidden_size=2**40), ("hidden_size",)),
    "vocabulary vast": (tiny_text(vocab_size=10**12), ("vocab_size",)),
    "vocabulary of one": (tiny_text(vocab_size=1), ("vocab_size", "2")),
    "experts vast": (tiny_text(num_experts=2**31), ("num_experts",)),
    "inner zero": (tiny_text(intermediate_size=0), ("intermediate_size",)),
    "expert inner": (tiny_text(moe_intermediate_size={}), ("moe_intermediate_size",)),
    "few experts": (
        tiny_text(top_k_experts=5),
        ("top_k_experts", "5", "num_experts", "4"),
    ),
    "uneven heads": (
        tiny_text(num_key_value_heads=3),
        ("num_attention_heads", "3 key/value", "layer 0"),
    ),
    "uneven global heads": (
        tiny_text(num_global_key_value_heads=3),
        ("num_attention_heads", "layer 2"),
    ),
    "no heads": (tiny_text(num_attention_heads=0), ("num_attention_heads",)),
    "odd head": (tiny_text(head_dim=15), ("head_dim", "15", "even")),
    "wide head": (tiny_text(global_head_dim=2**20), ("global_head_dim",)),
    "window of one": (tiny_text(sliding_window=1), ("sliding_window", "1")),
    "no window": (tiny_text(sliding_window=REMOVED), ("sliding_window", "missing")),
    "unknown kind": (
        tiny_text(layer_types=[SLIDING, "linear_attention", FULL]),
        ("layer_types[1]", "linear_attention"),
    ),
    "kind a list": (tiny_text(layer_types=[SLIDING, [], FULL]), ("layer_types[1]",)),
    "too few kinds": (tiny_text(layer_types=[FULL]), ("layer_types", "1", "3")),
    "kinds an object": (tiny_text(layer_types={}), ("layer_types", "list")),
    "last layer slides": (
        tiny_text(layer_types=[FULL, FULL, SLIDING]),
        ("layer_types", "full_attention"),
    ),
    "eps zero": (tiny_text(rms_norm_eps=0), ("rms_norm_eps", "above 0")),
    "eps text": (tiny_text(rms_norm_eps="1e-6"), ("rms_norm_eps", "'1e-6'")),
    "eps endless": (tiny_text(rms_norm_eps=10**400), ("rms_norm_eps",)),
    "cap negative": (
        tiny_text(final_logit_softcapping=-30),
        ("final_logit_softcapping", "-30"),
    ),
    "cap a bool": (tiny_text(final_logit_softcapping=True), ("softcapping", "True")),
    "bias a number": (tiny_text(attention_bias=1), ("attention_bias", "is 1")),
    "bias a list": (tiny_text(attention_bias=[]), ("attention_bias",)),
    "activation": (tiny_text(hidden_activation="silu"), ("hidden_activation", "silu")),
    "bidirectional": (
        tiny_text(use_bidirectional_attention="all"),
        ("use_bidirectional_attention", "'all'"),
    ),
    "rope a list": (tiny_text(rope_parameters=[]), ("rope_parameters", "object")),
    "rope of nobody": (
        tiny_text(rope_parameters={"rope_theta": 1e4}),
        ("rope_parameters", "rope_theta"),
    ),
    "rope type": (rope(rope_type="yarn"), ("rope_type", "yarn")),
    "rope key": (rope(beta=1), (FULL, "beta")),
    "rope theta": (rope(SLIDING, rope_theta=0), (SLIDING, "rope_theta")),
    "rope without theta": (
        rope(rope_theta=None),
        (FULL, "rope_theta", "missing"),
    ),
    "rope part of default": (
        rope(SLIDING, partial_rotary_factor=0.5),
        ("partial_rotary_factor", "0.5"),
    ),
    "rope part above one": (
        rope(rope_type="proportional", partial_rotary_factor=1.5),
        ("partial_rotary_factor", "1.5"),
    ),
    "per layer of nobody": (tiny_text(per_layer_config={"3": {}}), ("3", "0 to 2")),
    "per layer by name": (tiny_text(per_layer_config={"x": {}}), ("per_layer", "x")),
    "per layer endless": (tiny_text(per_layer_config={"9" * 5000: {}}), ("per_layer",)),
    "per layer key": (
        tiny_text(per_layer_config={"1": {"sliding_window": 4}}),
        ("per_layer_config: 1", "sliding_window"),
    ),
    "per layer value": (
        tiny_text(per_layer_config={"1": {"head_dim": "a"}}),
        ("per_layer_config: 1", "head_dim"),
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_values_are_refused_by_file_and_key(tmp_path, name):
    config, named = IMPOSSIBLE[name]
    refused(write(tmp_path, config), tmp_path / "config.json", named)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "line 1"),
        (b"{}}", "line 1"),
        (b'{\n"a": 1,\n}', "line 3"),
        (b"[1]", "object"),
        (b"null", "object"),
        (b'{"t_max": NaN}', "NaN"),
        (b'{"t_max": -Infinity}', "Infinity"),
        (b'{"a": "\xff"}', "UTF-8 at byte 7"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "a number is too long"),
    ],
    ids=range(11),
)
def test_text_that_is_no_json_object_is_refused(tmp_path, file, content, named):
    write(tmp_path, tiny_config(), {})
    (tmp_path / file).write_bytes(content)
    refused(tmp_path, tmp_path / file, (named,))


def test_an_infinity_that_json_can_write_is_refused(tmp_path):
    text = json.dumps(tiny_config(rms_norm_eps=1.5)).replace("1.5", "1e999")
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, tmp_path / "config.json", ("rms_norm_eps is inf",))


def test_a_folder_without_config_says_so(tmp_path):
    refused(tmp_path, tmp_path / "config.json", ("no such file", "model folder"))


def test_a_folder_in_the_place_of_a_config_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    refused(tmp_path, tmp_path / "config.json", ("directory",))


def test_a_huge_file_is_refused_unread(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    refused(tmp_path, tmp_path / "config.json", ("64 MB",))


def test_vast_numbers_cost_neither_time_nor_memory(tmp_path):
    vast = tiny_text(num_hidden_layers=10**9, layer_types=REMOVED, vocab_size=10**12)
    write(tmp_path, vast)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(ConfigError):
        read_config(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - began < 1
    assert peak < 2**20
