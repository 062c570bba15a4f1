"""What a conversion writes: values, configuration, shards, copied files."""

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoint.folders import (
    copied,
    listing,
    logits,
    read_json,
    refusal,
    same,
    tensors,
)
from tiny import tiny_config, write_tiny

from mlx_dgemma import load
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.checkpoint.sums import verify
from mlx_dgemma.checkpoint.weights import INDEX, read_tensors
from mlx_dgemma.model.loading import load_model

DECODER = "model.decoder."
VISION = {
    "model.encoder.vision_tower.patch.weight": mx.arange(6).reshape(2, 3) / 7,
    "model.encoder.embed_vision.projection.weight": mx.ones((4, 2)).astype(mx.bfloat16),
}


# Dense values


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_dense_conversion_keeps_every_value_bit_for_bit(tiny, tmp_path, dtype):
    tied = {"lm_head.weight": mx.zeros((32, 64))}  # not written
    source = copied(tiny, tmp_path / "source", dtype=dtype, more=tied)
    convert(source, tmp_path / "one")
    wanted = tensors(source)
    del wanted["lm_head.weight"]
    same(tensors(tmp_path / "one"), wanted)
    assert read_tensors(tmp_path / "one").keys() == read_tensors(tiny).keys()
    convert(tmp_path / "one", tmp_path / "two")
    for name in listing(tmp_path / "one"):
        one, two = (tmp_path / which / name for which in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_of_every_dense_tensor_and_in_the_config(tiny, tmp_path, dtype):
    text = tiny_config()["text_config"] | {"dtype": "float32"}
    config = {"dtype": "float32", "torch_dtype": "float32", "text_config": text}
    source = copied(tiny, tmp_path / "source", config=config)
    convert(source, tmp_path / "out", dtype=dtype)
    kinds = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    wanted = {name: a.astype(kinds[dtype]) for name, a in tensors(tiny).items()}
    same(tensors(tmp_path / "out"), wanted)
    written = read_json(tmp_path / "out")
    named = written["dtype"], written["torch_dtype"], written["text_config"]["dtype"]
    assert set(named) == {dtype}


def test_without_dtype_dense_parts_keep_the_sources(tiny, quantised, tmp_path):
    source = copied(tiny, tmp_path / "source", dtype=mx.bfloat16)
    convert(source, tmp_path / "out", quantize=True)
    found = tensors(tmp_path / "out")
    assert found["norm.weight"].dtype == mx.bfloat16
    assert found["embed_tokens.scales"].dtype == mx.bfloat16
    model = load_model(tmp_path / "out", read_config(tmp_path / "out"))
    assert model.dtype == mx.bfloat16
    convert(quantised, tmp_path / "dense", dequantize=True, dtype="float16")
    dense = tensors(tmp_path / "dense").values()
    assert {array.dtype for array in dense} == {mx.float16}


@pytest.mark.parametrize("how", [{"dtype": "float16"}, {"quantize": True}], ids=str)
def test_the_vision_tower_is_kept_as_it_is(tiny, tmp_path, how):
    config = {"vision_config": {"hidden_size": 3}}
    source = copied(tiny, tmp_path / "source", more=VISION, config=config)
    converted = convert(source, tmp_path / "out", **how)
    found = tensors(tmp_path / "out")
    same({name: found[name] for name in VISION}, VISION)
    assert read_json(tmp_path / "out")["vision_config"] == {"hidden_size": 3}
    plain = convert(tiny, tmp_path / "plain", **how)
    assert converted.bits_per_weight == plain.bits_per_weight
    assert converted.bytes == plain.bytes + sum(a.nbytes for a in VISION.values())


# Rounded values

# How a weight of inner width 64 or 128 is stored, and one of 32: experts' down_proj.
Spec, Tensors = dict[str, Any], dict[str, mx.array]
ROUNDED: dict[str, tuple[Spec, Spec, Spec]] = {
    f"affine-{bits}": (
        {"q_bits": bits},
        {"group_size": 64, "bits": bits, "mode": "affine"},
        {"group_size": 32, "bits": bits, "mode": "affine"},
    )
    for bits in (3, 8)
}
for mode, size, bits in (("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)):
    spec = {"group_size": size, "bits": bits, "mode": mode}
    ROUNDED[mode] = ({"q_mode": mode}, spec, spec)
EIGHT = {"group_size": 64, "bits": 8, "mode": "affine"}


def rounded(weights: Tensors, spec_of: Callable[[str, int], Spec]) -> Tensors:
    """The matrices among the weights, rounded by mlx."""
    found = {}
    for name, weight in weights.items():
        if weight.ndim > 1:
            spec = spec_of(name, weight.shape[-1])
            parts = mx.quantize(weight, **spec)
            found[name] = mx.dequantize(*parts, **spec, dtype=mx.float32)
    return found


@pytest.mark.parametrize("name", ROUNDED)
def test_quantised_logits_are_those_of_weights_rounded_by_hand(tiny, tmp_path, name):
    how, wide, narrow = ROUNDED[name]
    converted = convert(tiny, tmp_path / "q", quantize=True, **how)
    found = logits(load_model(tmp_path / "q", read_config(tmp_path / "q")))
    weights = rounded(tensors(tiny), lambda _, width: narrow if width == 32 else wide)
    model = load_model(tiny, read_config(tiny))
    exact = logits(model)
    wanted = logits(model.load_weights(list(weights.items()), strict=False))
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert np.abs(wanted - exact).max() > 0.02  # rounding shows, and alike
    assert converted.bits_per_weight < 32 / 2
    convert(tmp_path / "q", tmp_path / "dense", dequantize=True)
    same(tensors(tmp_path / "dense"), tensors(tiny) | weights)
    keys = read_json(tmp_path / "dense").keys()
    assert not keys & {"quantization", "quantization_config"}


def test_the_mixed_recipe_rounds_only_the_experts_further(tiny, tmp_path):
    out = tmp_path / "out"
    convert(tiny, out, quantize=True, q_bits=3, quant_predicate="mixed")
    _, wide, narrow = ROUNDED["affine-3"]

    def spec(name: str, width: int) -> Spec:
        if ".experts." in name:
            return narrow if width == 32 else wide
        return EIGHT

    convert(out, tmp_path / "dense", dequantize=True)
    same(tensors(tmp_path / "dense"), tensors(tiny) | rounded(tensors(tiny), spec))
    # overrides are written by path on disk, as mlx-lm does
    quantization = read_json(out)["quantization"]
    assert read_json(out)["quantization_config"] == quantization
    assert {k: quantization.pop(k) for k in wide} == wide
    names = read_tensors(out)
    layers = {n.removesuffix(".scales") for n in names if n.endswith(".scales")}
    for layer in layers:
        fits = layer.endswith("experts.gate_up_proj")
        found = quantization.pop(layer, None)
        special = narrow if ".experts." in layer else EIGHT
        assert found == (None if fits else special)
    assert not quantization


def test_layers_no_group_divides_stay_dense_and_are_reported(tmp_path):
    source = write_tiny(tmp_path / "source", intermediate_size=40, attention_bias=True)
    converted = convert(source, tmp_path / "out", quantize=True, q_bits=8)
    dense = {f"{DECODER}layers.{i}.mlp.down_proj" for i in range(3)}
    assert set(converted.dense) == dense | {f"{DECODER}self_conditioning.down_proj"}
    regrouped = {f"{DECODER}layers.{i}.experts.down_proj": 32 for i in range(3)}
    assert converted.regrouped == regrouped
    model = load_model(tmp_path / "out", read_config(tmp_path / "out"))
    assert model.layers[0].mlp.down_proj.weight.shape == (64, 40)
    bias = "layers.0.self_attn.k_proj.bias"
    kept = [{bias: tensors(folder)[bias]} for folder in (tmp_path / "out", source)]
    same(*kept)
    exact = logits(load_model(source, read_config(source)))
    assert np.abs(logits(model) - exact).max() < 1


# Configuration and files


def test_transformers_layout_becomes_the_releases(tiny, tmp_path):
    text = tiny_config()["text_config"]
    del text["global_head_dim"], text["num_global_key_value_heads"]
    text["per_layer_config"] = {"2": {"head_dim": 32, "num_key_value_heads": 1}}
    others = {"architectures": ["X"], "image_token_id": 9}
    source = copied(tiny, tmp_path / "1", config={"text_config": text} | others)
    convert(source, tmp_path / "out")
    assert read_json(tmp_path / "out") == tiny_config() | others
    # shapes the release's layout cannot say stay in their own
    layers = {"0": {"head_dim": 8}, "2": {"head_dim": 32, "num_key_value_heads": 1}}
    source = write_tiny(tmp_path / "2", per_layer_config=layers)
    convert(source, tmp_path / "odd")
    ours, theirs = read_config(tmp_path / "odd"), read_config(source)
    assert ours.layers == theirs.layers
    assert [one.head_dim for one in ours.layers] == [8, 16, 32]


def test_files_of_a_model_are_copied_and_no_others(tiny, tmp_path):
    source = shutil.copytree(tiny, tmp_path / "source")
    kept = {
        "generation_config.json": b'{"t_max": 0.9}',
        "special_tokens_map.json": b'{"bos_token": "<bos>"}',
        "LICENSE": b"terms\r\n\xff",
    }
    left = {"README.md": b"x", "pytorch_model.bin": b"x", "modeling.py": b"x"}
    for name, content in (kept | left).items():
        (source / name).write_bytes(content)
    convert(source, tmp_path / "out")
    # README.md is our own card, not the source's
    assert listing(tmp_path / "out") == sorted(
        [*kept, *listing(tiny), "README.md", "SHA256SUMS"]
    )
    for name in (*kept, "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert "library_name: mlx" in (tmp_path / "out" / "README.md").read_text()
    model, tokenizer = load(tmp_path / "out")
    assert tokenizer.chat_template is not None
    assert model.settings.t_max == 0.9


@pytest.mark.parametrize("how", [{}, {"quantize": True}], ids=["dense", "quantised"])
def test_shards_and_their_index_hold_what_one_file_would(tiny, tmp_path, how):
    one, many = tmp_path / "one", tmp_path / "many"
    limit, calls = 20_000, []
    single = convert(tiny, one, **how)
    weights = sum(array.size for array in tensors(tiny).values())
    assert single.bits_per_weight == pytest.approx(8 * single.bytes / weights)
    assert single.source_bytes == sum(a.nbytes for a in tensors(tiny).values())
    assert (single.path, single.shards) == (one, 1)
    converted = convert(
        tiny, many, shard_bytes=limit, progress=lambda *a: calls.append(a), **how
    )
    same(tensors(many), tensors(one))
    files = sorted(many.glob("*.safetensors"))
    assert len(files) == converted.shards > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = read_json(many, INDEX)
    total = sum(array.nbytes for array in tensors(one).values())
    assert index["metadata"]["total_size"] == converted.bytes == total
    for file in files:
        found = mx.load(str(file))
        assert all(index["weight_map"][name] == file.name for name in found)
        assert sum(a.nbytes for a in found.values()) <= limit or len(found) == 1
    assert index["weight_map"].keys() == read_tensors(one).keys()
    np.testing.assert_array_equal(
        logits(load_model(many, read_config(many))),
        logits(load_model(one, read_config(one))),
    )
    # progress counts every tensor to the end
    assert {name for name, _, _ in calls} == index["weight_map"].keys()
    done = [done for _, done, _ in calls]
    assert done == sorted(done) and done[-1] == converted.bytes
    assert {total for _, _, total in calls} == {converted.bytes}


# Numbers that are none, and bytes that changed


def changed_weight(tiny: Path, folder: Path, value: float) -> Path:
    """A copy of the checkpoint with one value changed."""
    copied(tiny, folder)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    name = f"{DECODER}layers.1.mlp.up_proj.weight"
    weights[name] = mx.array(weights[name])
    weights[name][3, 5] = value
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.mark.parametrize("mode", [None, "affine", "mxfp4"])
def test_values_that_are_no_numbers_are_refused_by_name(tiny, tmp_path, mode):
    how = {} if mode is None else {"quantize": True, "q_mode": mode}
    for number, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        source = changed_weight(tiny, tmp_path / str(number), value)
        message = refusal(convert, source, tmp_path / "out", **how)
        assert message.startswith(f"{DECODER}layers.1.mlp.up_proj.weight: 1 values")
        assert "NaN or infinite in the source" in message
    source = changed_weight(tiny, tmp_path / "large", 1e5)
    message = refusal(convert, source, tmp_path / "out", dtype="float16")
    assert "up_proj.weight: 1 values are too large for float16; use --dtype" in message
    convert(source, tmp_path / "out", dtype="bfloat16")


def test_weights_of_zeros_alone_are_named(tiny, tmp_path):
    source = copied(tiny, tmp_path / "source")
    weights = dict(mx.load(str(source / "model.safetensors")))
    name = f"{DECODER}layers.1.mlp.up_proj.weight"
    weights[name] = mx.zeros_like(weights[name])
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    with pytest.warns(UserWarning, match=f"all zeros, as after a torn .*: {name}$"):
        convert(source, tmp_path / "out", quantize=True)


def test_sums_tell_a_folder_that_changed_from_one_that_did_not(tiny, tmp_path):
    out = tmp_path / "out"
    convert(tiny, out, shard_bytes=20_000)
    names = [name for name in listing(out) if name != "SHA256SUMS"]
    assert sorted(verify(out)) == names
    lines = (out / "SHA256SUMS").read_text().splitlines()
    for line in lines:  # as `sha256sum -c` reads it
        digest, name = line.split("  ")
        assert sha256((out / name).read_bytes()).hexdigest() == digest
    shards = [name for name in names if name.endswith(".safetensors")]
    for name in ("config.json", shards[1], shards[-1]):
        before = (out / name).read_bytes()
        (out / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert refusal(verify, out).startswith(f"{out / name}: differs from what was")
        (out / name).unlink()
        assert refusal(verify, out).startswith(f"{out / name}: is missing")
        (out / name).write_bytes(before)
    (out / "more.safetensors").touch()
    assert "more.safetensors: has no sum" in refusal(verify, out)
    assert "has no SHA256SUMS" in refusal(verify, tiny)
    # a hub download: links to blobs that are called by their sum
    content = b"weights"
    blob = tmp_path / "blobs" / sha256(content).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(content)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert verify(tmp_path / "snapshot") == ["model.safetensors"]
    blob.write_bytes(b"torn")
    assert "model.safetensors: differs" in refusal(verify, tmp_path / "snapshot")


# Refused before a byte is written


def test_what_cannot_be_converted_is_refused(quantised, tiny, tmp_path, monkeypatch):
    def refused(source: Path, *named: str, **how: Any) -> None:
        before = listing(tmp_path)
        message = refusal(convert, source, tmp_path / "out", **how)
        for part in named:
            assert part in message
        assert listing(tmp_path) == before

    for how in ({"quantize": True}, {}, {"dtype": "float16"}):
        refused(quantised, str(quantised), "--dequantize", **how)
    refused(tiny, str(tiny), "not quantised", dequantize=True)
    broken = copied(tiny, tmp_path / "broken")
    (broken / "generation_config.json").write_text('{"t_max": 0}')
    refused(broken, "generation_config.json", "t_max")
    refused(tiny, "exclude", quantize=True, dequantize=True)
    refused(tiny, "'float64'; supported: float32, float16", dtype="float64")
    refused(tiny, "best", quantize=True, quant_predicate="best")
    refused(tiny, "--q-mode is given without --quantize", q_mode="mxfp4")
    refused(tiny, "--quant-predicate is given without", quant_predicate="mixed")
    refused(tiny, "int4", quantize=True, q_mode="int4")
    usage = shutil.disk_usage(tmp_path)._replace(free=1_234_567)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    needed = sum(info.nbytes for info in read_tensors(tiny).values()) + 64 * 2**20
    refused(tiny, f"{needed:,}", "1,234,567")
