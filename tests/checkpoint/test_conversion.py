"""What a conversion writes: values, configuration, shards, carried files."""

import shutil
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import copied, listing, logits, read_json, same, tensors
from tiny import tiny_config, write_tiny

from mlx_dgemma import load
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.checkpoint.weights import read_tensors
from mlx_dgemma.errors import CheckpointError, ConversionError
from mlx_dgemma.model.loading import load_model

DECODER = "model.decoder."
INDEX = "model.safetensors.index.json"
VISION = {
    "model.encoder.vision_tower.patch.weight": mx.arange(6).reshape(2, 3) / 7,
    "model.encoder.embed_vision.projection.weight": mx.ones((4, 2)).astype(mx.bfloat16),
}


@pytest.fixture(scope="module")
def quantised(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    convert(tiny, folder, quantize=True)
    return folder


# Dense


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_dense_conversion_keeps_every_value_bit_for_bit(tiny, tmp_path, dtype):
    source = copied(tiny, tmp_path / "source", dtype=dtype)
    convert(source, tmp_path / "out")
    same(tensors(tmp_path / "out"), tensors(source))


def test_a_conversion_is_the_same_whatever_was_converted_before(tiny, tmp_path):
    convert(tiny, tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two")
    for name in listing(tmp_path / "one"):
        one, two = (tmp_path / which / name for which in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name


def test_dense_names_on_disk_are_the_releases(tiny, tmp_path):
    convert(tiny, tmp_path / "out")
    assert set(read_tensors(tmp_path / "out")) == set(read_tensors(tiny))


def test_a_tied_copy_is_not_written(tiny, tmp_path):
    copies = {"lm_head.weight": mx.zeros((32, 64))}
    source = copied(tiny, tmp_path / "source", more=copies)
    convert(source, tmp_path / "out")
    same(tensors(tmp_path / "out"), tensors(tiny))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_of_every_dense_tensor_and_said_in_the_config(tiny, tmp_path, dtype):
    text = tiny_config()["text_config"] | {"dtype": "float32"}
    config = {"dtype": "float32", "torch_dtype": "float32", "text_config": text}
    source = copied(tiny, tmp_path / "source", config=config)
    convert(source, tmp_path / "out", dtype=dtype)
    wanted = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    found = tensors(tmp_path / "out")
    same(found, {n: a.astype(wanted[dtype]) for n, a in tensors(tiny).items()})
    written = read_json(tmp_path / "out")
    assert (written["dtype"], written["torch_dtype"]) == (dtype, dtype)
    assert written["text_config"]["dtype"] == dtype


def test_without_dtype_the_sources_own_is_kept_in_what_stays_dense(tiny, tmp_path):
    source = copied(tiny, tmp_path / "source", dtype=mx.bfloat16)
    convert(source, tmp_path / "out", quantize=True)
    found = tensors(tmp_path / "out")
    assert found["norm.weight"].dtype == mx.bfloat16
    assert found["embed_tokens.scales"].dtype == mx.bfloat16
    assert load_model(tmp_path / "out", read_config(tmp_path / "out")).dtype == (
        mx.bfloat16
    )


@pytest.mark.parametrize(
    "how", [{}, {"dtype": "float16"}, {"quantize": True}], ids=["as", "half", "q"]
)
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


# Configuration and files


def test_transformers_layout_becomes_the_releases(tiny, tmp_path):
    text = tiny_config()["text_config"]
    del text["global_head_dim"], text["num_global_key_value_heads"]
    text["per_layer_config"] = {"2": {"head_dim": 32, "num_key_value_heads": 1}}
    source = copied(tiny, tmp_path / "source", config={"text_config": text})
    convert(source, tmp_path / "out")
    assert read_json(tmp_path / "out") == tiny_config()
    theirs = read_config(source)
    assert read_config(tmp_path / "out").layers == theirs.layers


def test_shapes_the_releases_layout_cannot_say_keep_their_own(tmp_path):
    layers = {"0": {"head_dim": 8}, "2": {"head_dim": 32, "num_key_value_heads": 1}}
    source = write_tiny(tmp_path / "source", per_layer_config=layers)
    convert(source, tmp_path / "out")
    ours, theirs = read_config(tmp_path / "out"), read_config(source)
    assert ours.layers == theirs.layers
    assert [one.head_dim for one in ours.layers] == [8, 16, 32]


def test_keys_of_others_are_kept(tiny, tmp_path):
    config = {"architectures": ["X"], "image_token_id": 9}
    source = copied(tiny, tmp_path / "source", config=config)
    convert(source, tmp_path / "out")
    assert read_json(tmp_path / "out").items() >= config.items()


def test_what_belongs_to_a_model_is_carried_and_nothing_else(tiny, tmp_path):
    source = shutil.copytree(tiny, tmp_path / "source")
    carried = {
        "generation_config.json": b'{"t_max": 0.9}',
        "special_tokens_map.json": b'{"bos_token": "<bos>"}',
        "LICENSE": b"terms\r\n\xff",
    }
    left = {"README.md": b"x", "pytorch_model.bin": b"x", "modeling.py": b"x"}
    for name, content in (carried | left).items():
        (source / name).write_bytes(content)
    convert(source, tmp_path / "out")
    assert listing(tmp_path / "out") == sorted(
        [
            *carried,
            "README.md",  # our own card, not the source's
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ]
    )
    for name in (*carried, "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert "library_name: mlx" in (tmp_path / "out" / "README.md").read_text()
    model, tokenizer = load(tmp_path / "out")
    assert tokenizer.chat_template is not None
    assert model.settings.t_max == 0.9


@pytest.mark.parametrize("how", [{}, {"quantize": True}], ids=["dense", "quantised"])
def test_shards_and_their_index_hold_what_one_file_would(tiny, tmp_path, how):
    one, many = tmp_path / "one", tmp_path / "many"
    convert(tiny, one, **how)
    limit = 20_000
    converted = convert(tiny, many, shard_bytes=limit, **how)
    same(tensors(many), tensors(one))
    files = sorted(many.glob("*.safetensors"))
    assert len(files) == converted.shards > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = read_json(many, INDEX)
    assert index["metadata"]["total_size"] == converted.bytes
    for file in files:
        held = mx.load(str(file))
        assert all(index["weight_map"][name] == file.name for name in held)
        assert sum(a.nbytes for a in held.values()) <= limit or len(held) == 1
    assert len(index["weight_map"]) == len(read_tensors(one))
    np.testing.assert_array_equal(
        logits(load_model(many, read_config(many))),
        logits(load_model(one, read_config(one))),
    )


def test_a_limit_below_every_tensor_gives_each_its_file(tiny, tmp_path):
    converted = convert(tiny, tmp_path / "out", shard_bytes=1)
    assert converted.shards == len(read_tensors(tiny))
    load_model(tmp_path / "out", read_config(tmp_path / "out"))


def test_a_sharded_source_is_converted_like_a_single_file(tiny, tmp_path):
    convert(tiny, tmp_path / "many", shard_bytes=50_000)
    convert(tmp_path / "many", tmp_path / "one")
    same(tensors(tmp_path / "one"), tensors(tiny))
    assert not (tmp_path / "one" / INDEX).exists()


def test_progress_counts_every_tensor_to_the_end(tiny, tmp_path):
    calls: list[tuple[str, int, int]] = []
    converted = convert(tiny, tmp_path / "out", progress=lambda *a: calls.append(a))
    assert {name for name, _, _ in calls} == set(read_tensors(tmp_path / "out"))
    done = [done for _, done, _ in calls]
    assert done == sorted(done)
    assert done[-1] == converted.bytes
    assert {total for _, _, total in calls} == {converted.bytes}


def test_the_numbers_told_are_those_of_the_files(tiny, tmp_path):
    converted = convert(tiny, tmp_path / "out", quantize=True)
    file = tmp_path / "out" / "model.safetensors"
    with file.open("rb") as opened:
        (header,) = struct.unpack("<Q", opened.read(8))
    assert converted.bytes == file.stat().st_size - 8 - header
    assert converted.source_bytes == sum(a.nbytes for a in tensors(tiny).values())
    weights = sum(array.size for array in tensors(tiny).values())
    assert converted.bits_per_weight == pytest.approx(8 * converted.bytes / weights)
    assert (converted.path, converted.shards) == (tmp_path / "out", 1)


# Refused before a byte is written


def refused(tmp_path: Path, source: Path, *named: str, **how: Any) -> None:
    with pytest.raises((ConversionError, CheckpointError)) as caught:
        convert(source, tmp_path / "out", **how)
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message
    assert listing(tmp_path) == []


def test_quantising_what_is_quantised_is_refused(quantised, tmp_path):
    for how in ({"quantize": True}, {}, {"dtype": "float16"}):
        refused(tmp_path, quantised, str(quantised), "--dequantize", **how)


def test_dequantising_what_is_dense_is_refused(tiny, tmp_path):
    refused(tmp_path, tiny, str(tiny), "not quantised", dequantize=True)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"quantize": True, "dequantize": True}, "exclude"),
        ({"dtype": "float64"}, "float64"),
        ({"quantize": True, "quant_predicate": "best"}, "best"),
        ({"q_bits": 4}, "--q-bits is given without --quantize"),
        ({"q_mode": "mxfp4"}, "--q-mode is given without --quantize"),
        ({"quant_predicate": "mixed"}, "--quant-predicate is given without"),
        ({"quantize": True, "q_mode": "int4"}, "int4"),
        ({"quantize": True, "q_bits": 7}, "q-bits is 7"),
        ({"quantize": True, "q_mode": "mxfp4", "q_group_size": 64}, "q-group-size"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tiny, tmp_path, how, named):
    refused(tmp_path, tiny, named, **how)


def test_too_little_disk_names_what_is_needed_and_what_is_there(
    tiny, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_234_567)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    needed = read_tensors(tiny).nbytes + 64 * 2**20
    refused(tmp_path, tiny, f"{needed:,}", "1,234,567")
