"""Names on disk and in the model, and the strict checks of a folder's tensors."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.utils
import numpy as np
import pytest
from tiny import tiny_config

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.weights import (
    disk_name,
    expected_shapes,
    read_tensors,
    parameter_name,
    read_layout,
    tied_to,
)
from mlx_dgemma.errors import CheckpointError, ConfigError
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.model.loading import load_model

DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = f"{DECODER}norm.weight"
QUERY = f"{DECODER}layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def config(tiny):
    return read_config(tiny)


@pytest.fixture(scope="module")
def tensors(tiny) -> dict[str, mx.array]:
    arrays = mx.load(str(tiny / WEIGHTS))
    assert isinstance(arrays, dict)
    return arrays


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the tiny configuration and no weights yet."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    return tmp_path


def save(folder: Path, tensors: dict[str, mx.array], name: str = WEIGHTS) -> None:
    mx.save_safetensors(str(folder / name), tensors)


def save_shards(folder: Path, tensors: dict[str, mx.array], shards: int = 3) -> dict:
    """The tensors dealt out to shards; returns the index that names them."""
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save(folder, {n: tensors[n] for n in names[i::shards]}, file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def refused(folder: Path, *named: str) -> None:
    """Loading is refused with one line that names all of that."""
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_model(folder, read_config(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for part in named:
        assert part in message.replace(str(folder), "")


# Names


def test_names_and_parameters_are_one_to_one(config):
    parameters = list(expected_shapes(config))
    names = [disk_name(parameter) for parameter in parameters]
    assert len(set(names)) == len(parameters)
    assert [parameter_name(name) for name in names] == parameters


def test_names_are_the_releases(config):
    names = {disk_name(parameter) for parameter in expected_shapes(config)}
    for name in (
        "model.decoder.embed_tokens.weight",
        "model.decoder.layers.2.self_attn.k_proj.weight",
        "model.decoder.layers.0.layer_scalar",
        "model.encoder.language_model.layers.0.layer_scalar",
        "model.decoder.layers.1.router.per_expert_scale",
        "model.decoder.self_conditioning.pre_norm.weight",
        "model.decoder.norm.weight",
    ):
        assert name in names
    assert "model.decoder.layers.2.self_attn.v_proj.weight" not in names


def test_experts_are_known_with_and_without_weight():
    for name in ("gate_up_proj", "down_proj"):
        path = f"layers.1.experts.{name}"
        assert parameter_name(f"{DECODER}{path}") == f"{path}.weight"
        assert parameter_name(f"{DECODER}{path}.weight") == f"{path}.weight"
        assert parameter_name(f"{DECODER}{path}.scales") == f"{path}.scales"


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.encoder.vision_tower.patch.weight",
        f"{ENCODER}norm.weight",
        f"{DECODER}layers.0.encoder_scalar",  # our names, not the release's
        f"{DECODER}layers.0.decoder_scalar",
        "decoder.norm.weight",
        "",
    ],
)
def test_no_other_name_fills_a_parameter(name):
    assert parameter_name(name) is None


def test_the_expected_shapes_are_the_models_parameters(config):
    parameters = mlx.utils.tree_flatten(DiffusionGemma(config).parameters())
    shapes = {name: array.shape for name, array in parameters}
    assert expected_shapes(config) == shapes


def test_attention_biases_are_expected_where_the_config_has_them(tmp_path):
    text = json.dumps(tiny_config(attention_bias=True))
    (tmp_path / "config.json").write_text(text)
    config = read_config(tmp_path)
    shapes = expected_shapes(config)
    assert shapes["layers.0.self_attn.q_proj.bias"] == (64,)
    parameters = mlx.utils.tree_flatten(DiffusionGemma(config).parameters())
    assert set(shapes) == {name for name, _ in parameters}


# Loading


def test_every_tensor_is_loaded_bit_for_bit_into_its_parameter(tiny, tensors, config):
    model = load_model(tiny, config)
    loaded = dict(mlx.utils.tree_flatten(model.parameters()))
    assert {parameter_name(name) for name in tensors} == set(loaded)
    for name, array in tensors.items():
        assert mx.array_equal(array, loaded[parameter_name(name)]).item()


def test_the_scalars_of_the_two_modes_are_not_exchanged(tiny, tensors, config):
    layer = load_model(tiny, config).layers[1]
    encoder, decoder = f"{ENCODER}layers.1.layer_scalar", f"{DECODER}layers.1"
    assert mx.array_equal(layer.encoder_scalar, tensors[encoder]).item()
    wanted = tensors[f"{decoder}.layer_scalar"]
    assert mx.array_equal(layer.decoder_scalar, wanted).item()
    assert not mx.array_equal(layer.encoder_scalar, wanted).item()


def test_shards_load_as_one_file_does(tiny, folder, tensors, config):
    save_shards(folder, tensors)
    ours = dict(mlx.utils.tree_flatten(load_model(folder, config).parameters()))
    theirs = dict(mlx.utils.tree_flatten(load_model(tiny, config).parameters()))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[n], theirs[n]).item() for n in ours)


def test_the_index_wins_over_a_single_file(folder, tensors):
    save_shards(folder, tensors)
    (folder / WEIGHTS).write_bytes(b"left over from something else")
    assert len(read_tensors(folder)) == len(tensors)


def test_nbytes_is_what_the_tensors_hold(tiny, tensors):
    assert read_tensors(tiny).nbytes == sum(array.nbytes for array in tensors.values())


def test_the_model_is_ready_for_any_thread(tiny, config):
    import threading

    model, sums = load_model(tiny, config), []
    worker = threading.Thread(
        target=lambda: sums.append(np.array(model.norm.weight).sum())
    )
    worker.start()
    worker.join()
    assert sums == [np.array(model.norm.weight).sum()]


# Tensors that are missing, unexpected or wrong


def test_missing_tensors_are_named(folder, tensors):
    gone = {NORM, f"{ENCODER}layers.1.layer_scalar"}
    save(folder, {n: a for n, a in tensors.items() if n not in gone})
    refused(folder, "missing tensors", *gone)


def test_of_many_missing_tensors_some_are_named_and_the_rest_counted(folder, tensors):
    save(folder, {n: a for n, a in tensors.items() if ".layers.0." not in n})
    count = sum(".layers.0." in name for name in tensors)
    refused(folder, "missing tensors", f"and {count - 5} more")


@pytest.mark.parametrize(
    "name",
    [
        f"{DECODER}layers.3.layer_scalar",
        f"{DECODER}layers.2.self_attn.v_proj.weight",  # full layers have none
        f"{DECODER}layers.0.encoder_scalar",
        f"{DECODER}layers.0.experts.down_proj.weight",  # there without .weight too
        f"{DECODER}layers.0.self_attn.q_proj.bias",
        f"{ENCODER}unknown.weight",
        f"{ENCODER}layers.7.input_layernorm.weight",
        "model.encoder.vision_tower.patch.weight",  # no vision_config
        "lm_head.bias",
        "unknown",
    ],
)
def test_an_unexpected_tensor_is_named(folder, tensors, name):
    save(folder, tensors | {name: mx.ones((1,))})
    refused(folder, "unexpected tensors", name)


def test_a_wrong_shape_is_named_with_both_shapes(folder, tensors):
    save(folder, tensors | {QUERY: mx.ones((64, 32))})
    refused(folder, QUERY, "[64, 32]", "[64, 64]", WEIGHTS)


def test_a_transposed_weight_is_refused(folder, tensors):
    name = f"{DECODER}layers.0.router.proj.weight"
    save(folder, tensors | {name: tensors[name].T})
    refused(folder, name, "[64, 4]", "[4, 64]")


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.bool_])
def test_a_weight_that_is_no_float_is_named(folder, tensors, dtype):
    save(folder, tensors | {NORM: mx.ones((64,), dtype=dtype)})
    refused(folder, NORM, str(dtype), "not floats")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_floats_stay_half_floats(folder, tensors, config, dtype):
    save(folder, {name: array.astype(dtype) for name, array in tensors.items()})
    model = load_model(folder, config)
    assert model.dtype == dtype
    wanted = tensors[QUERY].astype(dtype)
    assert mx.array_equal(model.layers[0].self_attn.q_proj.weight, wanted).item()


# Copies and vision


def test_tied_copies_are_tolerated_and_not_loaded(folder, tensors, config):
    copies = {
        ENCODER + name.removeprefix(DECODER): mx.zeros_like(array)
        for name, array in tensors.items()
        if name.startswith(DECODER) and not name.endswith("layer_scalar")
    }
    copies["lm_head.weight"] = mx.zeros((32, 64))
    save(folder, tensors | copies)
    assert tied_to("lm_head.weight") == f"{DECODER}embed_tokens.weight"
    model = load_model(folder, config)
    embedding = tensors[f"{DECODER}embed_tokens.weight"]
    assert mx.array_equal(model.embed_tokens.weight, embedding).item()


def test_a_copy_of_a_tensor_that_is_missing_does_not_replace_it(folder, tensors):
    moved = {n: a for n, a in tensors.items() if n != NORM}
    save(folder, moved | {f"{ENCODER}norm.weight": tensors[NORM]})
    refused(folder, "unexpected tensors", f"{ENCODER}norm.weight")


def test_vision_tensors_are_left_alone_where_the_config_has_vision(folder, tensors):
    vision = {
        "model.encoder.vision_tower.patch.weight": mx.ones((2, 2)),
        "model.encoder.embed_vision.projection.weight": mx.ones((2, 2)),
    }
    save(folder, tensors | vision)
    config = tiny_config() | {"vision_config": {"hidden_size": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    layout = read_layout(folder, read_config(folder))
    assert set(layout.names.values()) == set(tensors)
    load_model(folder, read_config(folder))


# Index and files


@pytest.mark.parametrize(
    "place",
    [
        "../x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "..",
        ".",
        "",
        "config.json",
        "\0.safetensors",
        None,
        7,
        ["model.safetensors"],
    ],
)
def test_an_index_may_only_name_files_of_its_folder(folder, tensors, place):
    index = save_shards(folder, tensors)
    outside = folder.parent / "x.safetensors"
    save(outside.parent, {NORM: tensors[NORM]}, outside.name)
    index["weight_map"][NORM] = place
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, INDEX, NORM, repr(place), "same folder")


def test_a_tensor_the_index_does_not_name_is_refused(folder, tensors):
    index = save_shards(folder, tensors)
    file = index["weight_map"].pop(NORM)
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, INDEX, NORM, file)


def test_a_tensor_its_shard_lacks_is_refused(folder, tensors):
    index = save_shards(folder, tensors)
    other = next(f for f in index["weight_map"].values() if f.startswith("model-00003"))
    index["weight_map"] |= {"model.decoder.more": other}
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, other, "lacks model.decoder.more")


def test_a_missing_shard_is_named(folder, tensors):
    save_shards(folder, tensors)
    shard = "model-00002-of-00003.safetensors"
    (folder / shard).unlink()
    refused(folder, shard, "no such file")


def test_a_cut_shard_is_named(folder, tensors):
    save_shards(folder, tensors)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    refused(folder, shard.name, "truncated")


@pytest.mark.parametrize(
    "text",
    ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{", '{"weight_map": 1}'],
)
def test_an_index_without_a_map_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


def test_shards_without_their_index_ask_for_it(folder, tensors):
    save_shards(folder, tensors)
    (folder / INDEX).unlink()
    refused(folder, INDEX, "missing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_refused_and_named(folder, name):
    (folder / name).write_bytes(b"\x80\x04.")
    refused(folder, name, "run code")


def test_a_folder_without_weights_says_what_is_looked_for(folder):
    refused(folder, WEIGHTS, INDEX)


def test_pickles_beside_safetensors_do_not_matter(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    load_model(folder, read_config(folder))
