"""Which layers are quantised how, and what config.json says of it."""

import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.checkpoint.quantize import (
    MODES,
    RECIPES,
    Quantization,
    QuantizationMap,
    quantizable,
    read_quantization,
)
from mlx_dgemma.errors import CheckpointError, ConfigError, ConversionError
from mlx_dgemma.model.loading import load_model

EVERY = [
    Quantization(mode=mode, bits=bits, group_size=size)
    for mode, known in MODES.items()
    for bits in known.bits
    for size in known.group_sizes
]
WIDTHS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 33)


def weight(*shape: int) -> mx.array:
    values = np.random.default_rng(0).normal(size=shape)
    return mx.array(values.astype(np.float32))


def named(q: Quantization) -> str:
    return f"{q.mode}-{q.bits}-{q.group_size}"


# What a quantisation may be


def test_the_modes_are_those_of_mlx():
    assert len(EVERY) == 6 * 3 + 3
    for bits in range(1, 10):
        for size in (8, 16, 32, 64, 128, 256):
            for mode, known in MODES.items():
                if bits not in known.bits or size not in known.group_sizes:
                    with pytest.raises(ConversionError, match=mode):
                        Quantization(mode=mode, bits=bits, group_size=size)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mode": "int4"}, ("q-mode", "'int4'", "affine, mxfp4, mxfp8, nvfp4")),
        ({"bits": 7}, ("q-bits is 7", "2, 3, 4, 5, 6, 8")),
        ({"group_size": 16}, ("q-group-size is 16", "32, 64, 128")),
        ({"mode": "mxfp4", "bits": 3, "group_size": 32}, ("q-bits is 3", "mxfp4")),
        ({"mode": "nvfp4", "group_size": 64}, ("q-group-size is 64", "16")),
    ],
)
def test_what_mlx_cannot_do_is_refused_by_flag(change, named):
    with pytest.raises(ConversionError) as caught:
        Quantization(**change)
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "bits", "size"),
    [("affine", 4, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
def test_defaults_are_the_modes_own_and_mlxs(mode, bits, size):
    found = Quantization.with_defaults(mode, None, None)
    assert found == Quantization(mode=mode, bits=bits, group_size=size)
    ours = found.quantize(weight(4, 64))
    theirs = mx.quantize(weight(4, 64), mode=mode)
    for part, array in zip(ours.values(), theirs, strict=True):
        assert mx.array_equal(part, array).item()


def test_what_is_given_replaces_a_default():
    wanted = Quantization(mode="affine", bits=3, group_size=128)
    assert Quantization.with_defaults("affine", 3, 128) == wanted
    with pytest.raises(ConversionError, match="nosuch"):
        Quantization.with_defaults("nosuch", None, None)


# Against mlx itself


@pytest.mark.parametrize("q", EVERY, ids=named)
def test_a_fitting_quantisation_packs_as_mlx_does(q):
    for width in WIDTHS:
        fitting = q.fit_to_shape((2, 6, width))
        assert (fitting is None) == (width % 32 != 0)
        if fitting is None:
            continue
        parts = fitting.quantize(weight(2, 6, width))
        shapes = {name: array.shape for name, array in parts.items()}
        assert shapes == fitting.packed_shapes((2, 6, width))
        for name, array in parts.items():
            assert array.dtype == (fitting.storage_dtype(name) or mx.float32)


@pytest.mark.parametrize("q", EVERY, ids=named)
def test_groups_shrink_only_as_far_as_a_width_needs(q):
    for width in WIDTHS:
        fitting = q.fit_to_shape((6, width))
        if fitting is None:
            continue
        assert (fitting.bits, fitting.mode) == (q.bits, q.mode)
        larger = [s for s in MODES[q.mode].group_sizes if s <= q.group_size]
        assert fitting.group_size == max(s for s in larger if width % s == 0)


def test_a_larger_group_than_asked_for_is_never_chosen():
    small = Quantization(group_size=32)
    assert small.fit_to_shape((4, 128)) == small
    assert Quantization(group_size=128).fit_to_shape((4, 96)) == small
    assert Quantization(group_size=128).fit_to_shape((4, 40)) is None


@pytest.mark.parametrize("q", EVERY, ids=named)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_undo_is_mlxs_dequantize(q, dtype):
    dense = weight(2, 4, 128).astype(dtype)
    parts = q.quantize(dense)
    spec = {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}
    theirs = mx.dequantize(*mx.quantize(dense, **spec), **spec, dtype=dtype)
    ours = q.dequantize(parts, dtype)
    assert ours.dtype == dtype
    assert mx.array_equal(ours, theirs).item()


# Recipes


def test_linear_maps_and_the_embedding_are_quantised_and_nothing_else(tiny):
    from mlx_dgemma.checkpoint.weights import expected_shapes

    shapes = expected_shapes(read_config(tiny))
    chosen = {name for name, shape in shapes.items() if quantizable(name, shape)}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in chosen} == set(
        "embed_tokens q_proj k_proj v_proj o_proj gate_proj up_proj down_proj proj "
        "gate_up_proj".split()
    )
    dense = {name.rpartition(".")[2] for name in set(shapes) - chosen}
    assert dense == {
        "weight",  # of norms
        "scale",
        "per_expert_scale",
        "encoder_scalar",
        "decoder_scalar",
    }


def test_uniform_treats_every_layer_alike():
    base = Quantization(bits=3)
    for layer in ("model.decoder.embed_tokens", "model.decoder.layers.0.experts.x"):
        assert RECIPES["uniform"](layer, base) == base


@pytest.mark.parametrize(
    "base", [Quantization(bits=3), Quantization.with_defaults("mxfp4", 4, 32)]
)
def test_mixed_keeps_all_but_the_experts_at_8_bits(base):
    mixed, path = RECIPES["mixed"], "model.decoder.layers.0"
    assert mixed(f"{path}.experts.down_proj", base) == base
    for layer in ("mlp.down_proj", "self_attn.q_proj", "router.proj"):
        assert mixed(f"{path}.{layer}", base) == Quantization(bits=8, group_size=64)


# config.json


@pytest.mark.parametrize("q", EVERY, ids=named)
def test_what_is_written_is_read_again(q):
    other = Quantization(bits=8, group_size=32)
    written = QuantizationMap(q, {"model.decoder.embed_tokens": other})
    raw = json.loads(json.dumps({"quantization": written.to_config()}))
    read = read_quantization(raw, "config.json")
    assert read == written
    assert read.of("model.decoder.embed_tokens") == other
    assert read.of("model.decoder.layers.0.mlp.up_proj") == q


def test_the_layout_is_mlx_lms():
    written = QuantizationMap(Quantization(), {"a.b": Quantization(bits=8)})
    assert written.to_config() == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "a.b": {"group_size": 64, "bits": 8, "mode": "affine"},
    }


def test_what_is_silent_is_the_modes_default():
    found = read_quantization({"quantization": {"mode": "nvfp4"}}, "c")
    assert found.default == Quantization.with_defaults("nvfp4", None, None)
    found = read_quantization({"quantization": {"group_size": 32, "bits": 8}}, "c")
    assert found.default == Quantization(group_size=32, bits=8)


def test_layers_said_to_be_dense_are_no_override():
    raw = {"quantization": {"bits": 4, "group_size": 64, "vision": False}}
    assert read_quantization(raw, "c").overrides == {}


@pytest.mark.parametrize("raw", [{}, {"quantization": None}, {"quantization": {}}])
def test_no_declaration_means_dense(raw):
    assert read_quantization(raw, "c") is None


def test_either_key_declares_and_the_first_wins():
    first, second = {"bits": 3}, {"bits": 8}
    read = read_quantization({"quantization_config": second}, "c")
    assert read.default.bits == 8
    both = {"quantization": first, "quantization_config": second}
    assert read_quantization(both, "c").default.bits == 3


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("4bit", ("object",)),
        ([4, 64], ("object",)),
        ({"bits": 7}, ("bits", "7")),
        ({"bits": 4.0}, ("bits", "4.0")),
        ({"bits": True}, ("bits", "True")),
        ({"bits": "4"}, ("bits", "'4'")),
        ({"group_size": 16}, ("group_size", "16")),
        ({"mode": "mxfp4", "bits": 8}, ("bits", "8")),
        ({"mode": "int8"}, ("mode", "'int8'")),
        ({"mode": []}, ("mode",)),
        ({"bits": 4, "a.b": {"bits": 9}}, ("a.b", "bits", "9")),
        ({"bits": 4, "a.b": True}, ("a.b", "True")),
        ({"bits": 4, "desc_act": 1}, ("desc_act",)),
    ],
)
def test_impossible_declarations_are_refused_by_key(value, named):
    with pytest.raises(ConfigError) as caught:
        read_quantization({"quantization": value}, "config.json")
    message = str(caught.value)
    assert message.startswith("config.json: quantization")
    for part in named:
        assert part in message


# Folders whose weights and declaration disagree


@pytest.fixture(scope="module")
def quantised(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint at 4 bits; do not write to it."""
    folder = tmp_path_factory.mktemp("quantised") / "model"
    convert(tiny, folder, quantize=True)
    return folder


@pytest.fixture
def folder(quantised, tmp_path) -> Path:
    """A copy of the 4-bit checkpoint."""
    for file in quantised.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder: Path, **keys) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | keys
    raw = {key: value for key, value in raw.items() if value is not None}
    path.write_text(json.dumps(raw))


def rewrite(folder: Path, **changes: mx.array | None) -> None:
    """Replace tensors of the folder's only file, or take them out with None."""
    path = folder / "model.safetensors"
    arrays = dict(mx.load(str(path)))
    mx.eval(arrays)
    arrays |= {name.replace("__", "."): array for name, array in changes.items()}
    kept = {name: array for name, array in arrays.items() if array is not None}
    mx.save_safetensors(str(path), kept)


def refused(folder: Path, error: type[Exception], *named: str) -> None:
    with pytest.raises(error) as caught:
        load_model(folder, read_config(folder))
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message


FOREIGN = [
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    {"quant_method": "awq", "bits": 4, "group_size": -1},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {}}},
]


@pytest.mark.parametrize("declared", FOREIGN, ids=lambda d: d["quant_method"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "quantised"])
def test_other_peoples_quantisation_is_refused_with_advice(
    folder, tiny, declared, dense
):
    if dense:
        weights = (tiny / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights)
    edit(folder, quantization=None, quantization_config=declared)
    advice = (declared["quant_method"], "quantization_config", "bfloat16 release")
    refused(folder, ConfigError, *advice)


def test_8_bit_floats_are_refused_with_advice(folder, tiny):
    from mlx_dgemma.checkpoint.weights import read_tensors

    name = "model.decoder.norm.weight"
    header = {name: {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(4)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .*F8_E4M3.* bfloat16 release"):
        read_tensors(folder)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_stored_with_other_bits_than_declared_are_refused(folder, bits):
    edit(folder, quantization=asdict(Quantization(bits=bits)))
    shapes = ("[32, 8]", f"[32, {2 * bits}]")
    refused(folder, CheckpointError, f"{bits}-bit", "quantization", *shapes)


def test_weights_stored_in_other_groups_than_declared_are_refused(folder):
    edit(folder, quantization=asdict(Quantization(group_size=32)))
    refused(folder, CheckpointError, "model.decoder.", "groups of 32", "quantization")


def test_weights_stored_in_another_mode_than_declared_are_refused(folder):
    edit(folder, quantization=asdict(Quantization.with_defaults("mxfp4", None, None)))
    refused(folder, CheckpointError, "model.decoder.")


def test_an_override_that_is_forgotten_is_refused(folder):
    declared = json.loads((folder / "config.json").read_text())["quantization"]
    layer = "model.decoder.layers.0.experts.down_proj"
    assert declared.pop(layer)["group_size"] == 32
    edit(folder, quantization=declared)
    refused(folder, CheckpointError, layer, "groups of 64")


def test_quantised_weights_without_declaration_are_refused(folder):
    edit(folder, quantization=None, quantization_config=None)
    refused(folder, CheckpointError, "quantization is missing", "model.decoder.")


def test_a_declaration_alone_does_not_make_dense_weights_quantised(folder, tiny):
    weights = (tiny / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights)
    model = load_model(folder, read_config(folder))
    assert model.embed_tokens.weight.dtype == mx.float32


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_missing_part_is_named(folder, part):
    rewrite(folder, **{f"model__decoder__embed_tokens__{part}": None})
    if part == "scales":  # the other two then look like a dense layer
        refused(folder, CheckpointError, "unexpected", "embed_tokens.biases")
    else:
        refused(folder, CheckpointError, "missing", f"embed_tokens.{part}")


@pytest.mark.parametrize(
    ("part", "dtype"),
    [("weight", mx.float32), ("weight", mx.int32), ("scales", mx.uint8)],
)
def test_parts_of_another_dtype_are_named(folder, part, dtype):
    name = f"model.decoder.embed_tokens.{part}"
    array = mx.load(str(folder / "model.safetensors"))[name].astype(dtype)
    rewrite(folder, **{name.replace(".", "__"): array})
    refused(folder, CheckpointError, name, str(dtype), "model.safetensors")


def test_scales_of_what_is_no_layer_are_refused(folder):
    rewrite(folder, model__decoder__norm__scales=mx.ones((64, 1)))
    refused(folder, CheckpointError, "model.decoder.norm.scales")
