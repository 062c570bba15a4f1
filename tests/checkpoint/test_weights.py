"""Names on disk and in the model, and the strict checks of a folder's tensors."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.utils
import pytest
from checkpoint.folders import refusal
from tiny import tiny_config

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.weights import (
    SINGLE,
    disk_name,
    expected_shapes,
    parameter_name,
    read_layout,
    read_tensors,
    tied_to,
)
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.model.loading import load_model

DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
VISION = "model.encoder.vision_tower.patch.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = f"{DECODER}norm.weight"
QUERY = f"{DECODER}layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def config(tiny):
    return read_config(tiny)


@pytest.fixture(scope="module")
def tensors(tiny) -> dict[str, mx.array]:
    return dict(mx.load(str(tiny / WEIGHTS)))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the tiny configuration and no weights yet."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    return tmp_path


def save(folder: Path, tensors: dict[str, mx.array], name: str = WEIGHTS) -> None:
    mx.save_safetensors(str(folder / name), tensors)


def save_shards(folder: Path, tensors: dict[str, mx.array], **changes) -> None:
    """The tensors dealt out to three shards, and an index with some entries changed."""
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save(folder, {n: tensors[n] for n in names[i::3]}, file)
        weight_map |= dict.fromkeys(names[i::3], file)
    entries = (weight_map | changes).items()
    weight_map = {name: file for name, file in entries if file is not ...}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def flat(model: DiffusionGemma) -> dict[str, mx.array]:
    return dict(mlx.utils.tree_flatten(model.parameters()))


def refused(folder: Path, *named: str) -> None:
    """Loading is refused with one line that names all of that."""
    message = refusal(load_model, folder, read_config(folder))
    for part in named:
        assert part in message.replace(str(folder), "")


# Names


def test_names_and_parameters_are_one_to_one(config):
    parameters = list(expected_shapes(config))
    names = [disk_name(parameter) for parameter in parameters]
    assert len(set(names)) == len(parameters)
    assert [parameter_name(name) for name in names] == parameters
    released = f"""
        {DECODER}embed_tokens.weight {DECODER}layers.2.self_attn.k_proj.weight
        {DECODER}layers.0.layer_scalar {ENCODER}layers.0.layer_scalar
        {DECODER}layers.1.router.per_expert_scale {DECODER}layers.1.experts.down_proj
        {DECODER}self_conditioning.pre_norm.weight {DECODER}norm.weight
    """
    assert set(names) >= set(released.split())
    assert f"{DECODER}layers.2.self_attn.v_proj.weight" not in names
    path = "layers.1.experts.gate_up_proj"
    for suffix in ("weight", "scales"):
        assert parameter_name(f"{DECODER}{path}.{suffix}") == f"{path}.{suffix}"
    # the model's own names of the scalars are not the release's
    others = [f"{DECODER}layers.0.{mode}coder_scalar" for mode in ("en", "de")]
    others += ["lm_head.weight", VISION, f"{ENCODER}norm.weight", "norm.weight", ""]
    assert not any(parameter_name(name) for name in others)


def test_the_expected_shapes_are_the_models_parameters(tmp_path):
    for bias in (False, True):
        text = json.dumps(tiny_config(attention_bias=bias))
        (tmp_path / "config.json").write_text(text)
        config = read_config(tmp_path)
        shapes = {n: array.shape for n, array in flat(DiffusionGemma(config)).items()}
        assert expected_shapes(config) == shapes
        assert ("layers.0.self_attn.q_proj.bias" in shapes) == bias


# Loading


def test_every_tensor_is_loaded_bit_for_bit_into_its_parameter(tiny, tensors, config):
    model = load_model(tiny, config)
    loaded = flat(model)
    assert {parameter_name(name) for name in tensors} == set(loaded)
    for name, array in tensors.items():
        assert mx.array_equal(array, loaded[parameter_name(name)]).item()
    layer, scalar = model.layers[1], tensors[f"{ENCODER}layers.1.layer_scalar"]
    assert mx.array_equal(layer.encoder_scalar, scalar).item()
    assert not mx.array_equal(layer.encoder_scalar, layer.decoder_scalar).item()


def test_shards_load_as_one_file_does(tiny, folder, tensors, config):
    save_shards(folder, tensors)
    (folder / WEIGHTS).write_bytes(b"the index wins over a single file")
    ours, theirs = flat(load_model(folder, config)), flat(load_model(tiny, config))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[n], theirs[n]).item() for n in ours)
    layout = read_layout(folder, config)
    assert layout.nbytes == sum(array.nbytes for array in tensors.values())


# Tensors that are missing, unexpected or wrong


def test_missing_tensors_are_named(folder, tensors):
    gone = {NORM, f"{ENCODER}layers.1.layer_scalar"}
    save(folder, {n: a for n, a in tensors.items() if n not in gone})
    refused(folder, "missing tensors", *gone)
    save(folder, {n: a for n, a in tensors.items() if ".layers.0." not in n})
    count = sum(".layers.0." in name for name in tensors)
    refused(folder, "missing tensors", f"and {count - 5} more")


def test_an_unexpected_tensor_is_named(folder, tensors):
    for name in (
        *("unknown", "lm_head.bias", VISION),  # no vision_config
        *(f"{ENCODER}unknown.weight", f"{ENCODER}layers.7.input_layernorm.weight"),
        f"{DECODER}layers.3.layer_scalar",
        f"{DECODER}layers.2.self_attn.v_proj.weight",  # full layers have none
        f"{DECODER}layers.0.encoder_scalar",
        f"{DECODER}layers.0.experts.down_proj.weight",  # there without .weight too
        f"{DECODER}layers.0.self_attn.q_proj.bias",
    ):
        save(folder, tensors | {name: mx.ones((1,))})
        refused(folder, "unexpected tensors", name)


def test_a_wrong_shape_or_dtype_is_named(folder, tensors):
    router = f"{DECODER}layers.0.router.proj.weight"
    for name, array, named in (
        (QUERY, mx.ones((64, 32)), "[64, 32], but config.json needs [64, 64]"),
        (router, mx.ones((64, 4)), "has shape [64, 4], but config.json needs [4, 64]"),
        (NORM, mx.ones((64,), dtype=mx.int32), "int32, not floats"),
        (NORM, mx.ones((64,), dtype=mx.bool_), "bool, not floats"),
    ):
        save(folder, tensors | {name: array})
        refused(folder, WEIGHTS, name, named)


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
    moved = {n: a for n, a in tensors.items() if n != NORM}
    save(folder, moved | {f"{ENCODER}norm.weight": tensors[NORM]})
    refused(folder, "unexpected tensors", f"{ENCODER}norm.weight")


# Index and files


def test_an_index_may_only_name_files_of_its_folder(folder, tensors):
    save(folder.parent, {NORM: tensors[NORM]}, "x.safetensors")
    places = "../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors"
    strange = "", "config.json", *(f"{x}.safetensors" for x in ("\0", "é", "x" * 250))
    for place in (*places, *strange, None, [WEIGHTS]):
        save_shards(folder, tensors, **{NORM: place})
        refused(folder, INDEX, NORM, repr(place)[:100], "same folder")


def test_index_and_shards_must_agree(folder, tensors):
    save_shards(folder, tensors, **{NORM: ...})
    refused(folder, INDEX, "does not name", NORM)
    other = "model-00003-of-00003.safetensors"
    save_shards(folder, tensors, **{"model.decoder.more": other})
    refused(folder, other, "lacks model.decoder.more")
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    refused(folder, shard.name, "truncated")
    shard.unlink()
    refused(folder, shard.name, "no such file")
    for text in ("{}", '{"weight_map": []}', "[]", "{", '{"weight_map": 1}'):
        (folder / INDEX).write_text(text)
        refused(folder, INDEX)
    (folder / INDEX).unlink()
    refused(folder, "", "2 shards are there, not all, and no", INDEX)


def test_whole_weights_are_found_whatever_the_index(folder, tensors, tiny):
    save_shards(folder, tensors)
    wanted = read_tensors(folder).keys()
    (folder / INDEX).rename(folder / "index")
    assert read_tensors(folder).keys() == wanted  # all shards, no index
    (folder / "index").rename(folder / INDEX)
    for shard in folder.glob("model-*"):
        shard.unlink()
    (folder / SINGLE).write_bytes((tiny / SINGLE).read_bytes())
    assert read_tensors(folder).keys() == wanted  # a whole file, an older index
    (folder / INDEX).unlink()
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../blobs/none")
    refused(folder, SINGLE, "links to ../blobs/none, which is gone; download it")


def test_pickles_are_refused_unless_there_are_safetensors(folder, tiny):
    refused(folder, WEIGHTS, INDEX)
    for name in ("pytorch_model.bin", "model.pt", "weights.ckpt"):
        (folder / name).write_bytes(b"\x80\x04.")
        refused(folder, name, "run code")
        (folder / name).rename(folder / "checkpoint")
    (folder / "checkpoint").rename(folder / "pytorch_model.bin")
    shutil.copy(tiny / WEIGHTS, folder)
    assert read_tensors(folder).keys() == read_tensors(tiny).keys()
