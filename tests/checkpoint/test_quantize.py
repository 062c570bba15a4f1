"""Which layers are quantised how, and what config.json says of it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoint.folders import copied, read_json, refusal, tensors

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.quantize import (
    MODES,
    Quantization,
    QuantizationMap,
    read_quantization,
)
from mlx_dgemma.errors import ConversionError
from mlx_dgemma.model.loading import load_model

DECODER = "model.decoder."
EVERY = [
    Quantization(mode=mode, bits=bits, group_size=size)
    for mode, known in MODES.items()
    for bits in known.bits
    for size in known.group_sizes
]
WIDTHS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 33)
with_defaults = Quantization.with_defaults


def weight(*shape: int) -> mx.array:
    values = np.random.default_rng(0).normal(size=shape)
    return mx.array(values.astype(np.float32))


def named(q: Quantization) -> str:
    return f"{q.mode}-{q.bits}-{q.group_size}"


# Against mlx itself


def test_the_modes_are_those_of_mlx():
    assert len(EVERY) == 6 * 3 + 3
    for bits in range(1, 10):
        for size in (8, 16, 32, 64, 128, 256):
            for mode, known in MODES.items():
                if bits not in known.bits or size not in known.group_sizes:
                    with pytest.raises(ConversionError, match=mode):
                        Quantization(mode=mode, bits=bits, group_size=size)
    for change, named in (
        ({"mode": "int4"}, "q-mode is 'int4'; supported: affine, mxfp4, mxfp8, nvfp4"),
        ({"bits": 7}, "q-bits is 7; affine supports 2, 3, 4, 5, 6, 8"),
        ({"group_size": 16}, "q-group-size is 16; affine supports 32, 64, 128"),
    ):
        with pytest.raises(ConversionError, match=named):
            Quantization(**change)
    with pytest.raises(ConversionError, match="nosuch"):
        with_defaults("nosuch")


def test_defaults_are_the_modes_own_and_mlxs():
    modes = ("affine", 4, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)
    for mode, bits, size in modes:
        found = with_defaults(mode)
        assert found == Quantization(mode=mode, bits=bits, group_size=size)
        theirs = mx.quantize(weight(4, 64), mode=mode)
        ours = found.quantize(weight(4, 64)).values()
        for part, array in zip(ours, theirs, strict=True):
            assert mx.array_equal(part, array).item()
    assert with_defaults("affine", 3, 128) == Quantization(bits=3, group_size=128)


@pytest.mark.parametrize("q", EVERY, ids=named)
def test_a_fitting_quantisation_packs_as_mlx_does(q):
    for width in WIDTHS:
        fitting = q.fit_to_shape((2, 6, width))
        assert (fitting is None) == (width % 32 != 0)
        if fitting is None:
            continue
        assert (fitting.bits, fitting.mode) == (q.bits, q.mode)
        # groups shrink only as far as a width needs
        allowed = [s for s in MODES[q.mode].group_sizes if s <= q.group_size]
        assert fitting.group_size == max(s for s in allowed if width % s == 0)
        dense = weight(2, 6, width)
        parts = fitting.quantize(dense)
        shapes = {name: array.shape for name, array in parts.items()}
        assert shapes == fitting.packed_shapes((2, 6, width))
        for name, array in parts.items():
            assert array.dtype == (fitting.storage_dtype(name) or mx.float32)
        for dtype in (mx.float32, mx.bfloat16):
            theirs = mx.dequantize(*parts.values(), **asdict(fitting), dtype=dtype)
            ours = fitting.dequantize(parts, dtype)
            assert ours.dtype == dtype and mx.array_equal(ours, theirs).item()


# config.json


def test_what_is_written_is_read_again():
    other = Quantization(bits=8, group_size=32)
    for q in EVERY:
        written = QuantizationMap(q, {f"{DECODER}embed_tokens": other})
        raw = json.loads(json.dumps({"quantization": written.to_config()}))
        read = read_quantization(raw, "config.json")
        assert read == written
        assert read.of(f"{DECODER}embed_tokens") == other
        assert read.of(f"{DECODER}layers.0.mlp.up_proj") == q


def test_either_key_declares_and_the_first_wins():
    key, second = "quantization", "quantization_config"
    for raw in ({}, {key: None}, {key: {}}):
        assert read_quantization(raw, "c") is None
    for raw, default in (
        ({key: {"mode": "nvfp4"}}, with_defaults("nvfp4")),
        ({key: {"bits": 8, "vision": False}}, Quantization(bits=8)),
        ({second: {"bits": 8}}, Quantization(bits=8)),
        ({key: {"bits": 3}, second: {"bits": 8}}, Quantization(bits=3)),
    ):
        assert read_quantization(raw, "c") == QuantizationMap(default)


IMPOSSIBLE: list[tuple[Any, str]] = [
    ("4bit", "must be an object"),
    *(({"bits": bits}, f"bits is {bits!r}") for bits in (7, 4.0, True, "4")),
    ({"group_size": 16}, "group_size is 16"),
    ({"mode": "mxfp4", "bits": 8}, "bits is 8"),
    ({"mode": "int8"}, "mode is 'int8'"),
    ({"mode": []}, "mode is []"),
    ({"bits": 4, "a.b": {"bits": 9}}, "a.b: bits is 9"),
    ({"bits": 4, "a.b": True}, "a.b is True"),
    ({"bits": 4, "desc_act": 1}, "desc_act is 1"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "not MLX's; convert from"),
    ({"quant_method": "fp8", "weight_block_size": [8, 8]}, "the bfloat16 release"),
]


@pytest.mark.parametrize(("value", "named"), IMPOSSIBLE)
def test_impossible_declarations_are_refused_by_key(value, named):
    message = refusal(read_quantization, {"quantization_config": value}, "config.json")
    assert message.startswith("config.json: quantization_config") and named in message


# Folders whose weights and declaration disagree


def refused(folder: Path, *named: str) -> None:
    message = refusal(load_model, folder, read_config(folder))
    for part in named:
        assert part in message


def test_weights_stored_otherwise_than_declared_are_refused(quantised, tmp_path):
    for q, *named in (
        (Quantization(bits=8), "needs [32, 16]", "8-bit affine", "[32, 8]"),
        (Quantization(group_size=32), DECODER, "groups of 32", "quantization"),
        (with_defaults("mxfp4"), "unexpected", DECODER, "biases"),
    ):
        declared = {"quantization": asdict(q)}
        folder = copied(quantised, tmp_path / named[1][:5], config=declared)
        refused(folder, *named)


def test_declarations_that_are_forgotten_are_refused(quantised, tiny, tmp_path):
    declared = read_json(quantised)["quantization"]
    layer = f"{DECODER}layers.0.experts.down_proj"
    assert declared.pop(layer)["group_size"] == 32
    one = copied(quantised, tmp_path / "1", config={"quantization": declared})
    refused(one, layer, "groups of 64")
    nothing = {"quantization": None, "quantization_config": None}
    two = copied(quantised, tmp_path / "2", config=nothing)
    refused(two, "quantization is missing", DECODER)
    # one that is not needed makes nothing quantised
    idle = copied(tiny, tmp_path / "3", config={"quantization": declared})
    assert load_model(idle, read_config(idle)).embed_tokens.weight.dtype == mx.float32


EMBEDDING = f"{DECODER}embed_tokens"


def test_parts_that_are_missing_or_of_another_dtype_are_named(quantised, tmp_path):
    for number, (name, dtype, named) in enumerate(
        (
            (f"{EMBEDDING}.weight", None, "missing"),
            (f"{EMBEDDING}.biases", None, "missing"),
            # without scales the other two look like a dense layer
            (f"{EMBEDDING}.scales", None, f"unexpected tensors: {EMBEDDING}.b"),
            (f"{EMBEDDING}.weight", mx.float32, "float32, not mlx.core.uint32"),
            (f"{EMBEDDING}.scales", mx.uint8, "uint8, not floats"),
            (f"{DECODER}norm.scales", mx.float32, f"{DECODER}norm.scales"),
        )
    ):
        array = None
        if dtype is not None:
            array = tensors(quantised).get(name.removeprefix(DECODER), mx.ones((64, 1)))
            array = array.astype(dtype)
        folder = tmp_path / str(number)
        refused(copied(quantised, folder, more={name: array}), named)
