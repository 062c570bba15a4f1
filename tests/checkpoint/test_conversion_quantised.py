"""What a conversion rounds: every mode, recipes, and the way back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.utils
import numpy as np
import pytest
from folders import logits, read_json, same, tensors
from tiny import write_tiny

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.checkpoint.weights import read_tensors
from mlx_dgemma.model.loading import load_model

DECODER = "model.decoder."
# How a weight of inner width 64 or 128 is stored, and one of 32: experts' down_proj.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    f"affine-{bits}": (
        {"q_bits": bits},
        {"group_size": 64, "bits": bits, "mode": "affine"},
        {"group_size": 32, "bits": bits, "mode": "affine"},
    )
    for bits in (2, 3, 4, 5, 6, 8)
}
for mode, size, bits in (("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)):
    spec = {"group_size": size, "bits": bits, "mode": mode}
    MODES[mode] = ({"q_mode": mode}, spec, spec)
EIGHT = {"group_size": 64, "bits": 8, "mode": "affine"}


@pytest.fixture(scope="module")
def quantised(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    convert(tiny, folder, quantize=True)
    return folder


def by_hand(tiny: Path, spec_of: Callable[[str, int], dict[str, Any]]) -> np.ndarray:
    """Logits of the dense model, its weights rounded by mlx as they would be."""
    model = load_model(tiny, read_config(tiny))
    rounded = []
    for name, weight in mlx.utils.tree_flatten(model.parameters()):
        if weight.ndim < 2:
            continue
        spec = spec_of(name, weight.shape[-1])
        parts = mx.quantize(weight, **spec)
        rounded.append((name, mx.dequantize(*parts, **spec, dtype=mx.float32)))
    model.load_weights(rounded, strict=False)
    return logits(model)


@pytest.mark.parametrize("name", MODES)
def test_quantised_logits_are_those_of_weights_rounded_by_hand(tiny, tmp_path, name):
    how, wide, narrow = MODES[name]
    converted = convert(tiny, tmp_path / "out", quantize=True, **how)
    model = load_model(tmp_path / "out", read_config(tmp_path / "out"))
    found = logits(model)
    wanted = by_hand(tiny, lambda _, width: narrow if width == 32 else wide)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    exact = logits(load_model(tiny, read_config(tiny)))
    assert np.abs(wanted - exact).max() > 0.02  # rounding shows, and alike
    assert converted.bits_per_weight < 32 / 2


def test_the_mixed_recipe_rounds_only_the_experts_further(tiny, tmp_path):
    out = tmp_path / "out"
    convert(tiny, out, quantize=True, q_bits=3, quant_predicate="mixed")
    _, wide, narrow = MODES["affine-3"]

    def spec(name: str, width: int) -> dict[str, Any]:
        if ".experts." in name:
            return narrow if width == 32 else wide
        return EIGHT

    found = logits(load_model(out, read_config(out)))
    np.testing.assert_allclose(found, by_hand(tiny, spec), atol=2e-4)


def test_overrides_are_written_by_path_on_disk_as_mlx_lm_does(tiny, tmp_path):
    out = tmp_path / "out"
    convert(tiny, out, quantize=True, q_bits=3, quant_predicate="mixed")
    written = read_json(out)
    assert written["quantization_config"] == written["quantization"]
    quantization = written["quantization"]
    _, wide, narrow = MODES["affine-3"]
    assert {k: quantization.pop(k) for k in wide} == wide
    layers = [f"{DECODER}layers.{i}" for i in range(3)]
    for layer in layers:
        assert quantization.pop(f"{layer}.experts.down_proj") == narrow
        assert f"{layer}.experts.gate_up_proj" not in quantization
    assert all(spec == EIGHT for spec in quantization.values())
    found = {n.removesuffix(".scales") for n in read_tensors(out) if "scales" in n}
    experts = {
        f"{x}.experts.{p}" for x in layers for p in ("down_proj", "gate_up_proj")
    }
    assert found - set(quantization) == experts
    assert set(quantization) <= found


def test_layers_no_group_divides_stay_dense_and_are_told(tmp_path):
    source = write_tiny(tmp_path / "source", intermediate_size=40)
    converted = convert(source, tmp_path / "out", quantize=True)
    dense = {f"{DECODER}layers.{i}.mlp.down_proj" for i in range(3)}
    assert set(converted.dense) == dense | {f"{DECODER}self_conditioning.down_proj"}
    regrouped = {f"{DECODER}layers.{i}.experts.down_proj": 32 for i in range(3)}
    assert converted.regrouped == regrouped
    model = load_model(tmp_path / "out", read_config(tmp_path / "out"))
    assert model.layers[0].mlp.down_proj.weight.shape == (64, 40)
    assert np.isfinite(logits(model)).all()


def test_attention_biases_survive_quantisation(tmp_path):
    source = write_tiny(tmp_path / "source", attention_bias=True)
    convert(source, tmp_path / "out", quantize=True, q_bits=8)
    name = "layers.0.self_attn.k_proj.bias"
    same(
        {name: tensors(tmp_path / "out")[name]},
        {name: tensors(source)[name]},
    )
    exact = logits(load_model(source, read_config(source)))
    found = logits(load_model(tmp_path / "out", read_config(tmp_path / "out")))
    assert np.abs(found - exact).max() < 1


@pytest.mark.parametrize("name", MODES)
def test_dequantizing_gives_back_what_was_rounded(tiny, tmp_path, name):
    how, wide, narrow = MODES[name]
    convert(tiny, tmp_path / "q", quantize=True, **how)
    convert(tmp_path / "q", tmp_path / "out", dequantize=True)
    wanted = {}
    for parameter, array in tensors(tiny).items():
        wanted[parameter] = array
        if array.ndim >= 2:
            spec = narrow if array.shape[-1] == 32 else wide
            parts = mx.quantize(array, **spec)
            wanted[parameter] = mx.dequantize(*parts, **spec, dtype=mx.float32)
    same(tensors(tmp_path / "out"), wanted)
    assert not {"quantization", "quantization_config"} & set(
        read_json(tmp_path / "out")
    )


def test_dequantizing_obeys_dtype(quantised, tmp_path):
    convert(quantised, tmp_path / "out", dequantize=True, dtype="bfloat16")
    found = tensors(tmp_path / "out").values()
    assert {array.dtype for array in found} == {mx.bfloat16}


def test_quantised_names_on_disk_are_mlx_vlms(quantised):
    names = read_tensors(quantised)
    for part in ("weight", "scales", "biases"):
        assert f"{DECODER}layers.0.experts.gate_up_proj.{part}" in names
        assert f"{DECODER}embed_tokens.{part}" in names
    assert "model.encoder.language_model.layers.0.layer_scalar" in names
