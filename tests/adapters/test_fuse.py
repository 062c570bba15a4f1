"""What a fused model says, which bits it keeps, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters.adapter_files import EVERY, SMALL, factors, write_adapter, write_peft
from checkpoint.folders import (
    copied,
    listing,
    logits,
    read_json,
    refusal,
    same,
    tensors,
)
from mlx.utils import tree_flatten
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.adapters.fuse import fuse
from mlx_dgemma.adapters.lora import LoRA
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.checkpoint.quantize import read_quantization
from mlx_dgemma.checkpoint.weights import expected_shapes, layer_path
from mlx_dgemma.model.loading import load_model

ALLOWED = 1e-4  # relative, of the largest logit


@pytest.fixture(scope="module")
def bases(tiny, quantised, tmp_path_factory) -> dict[str, Path]:
    """The tiny checkpoint, dense and quantised in several ways."""
    folder = tmp_path_factory.mktemp("bases")
    convert(tiny, folder / "mxfp4", quantize=True, q_mode="mxfp4")
    convert(tiny, folder / "mixed", quantize=True, q_bits=3, quant_predicate="mixed")
    mixed = {name: folder / name for name in ("mxfp4", "mixed")}
    return {"dense": tiny, "affine": quantised} | mixed


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """One of every kind of layer there is."""
    return write_adapter(tmp_path_factory.mktemp("every") / "a", read_config(tiny))


@pytest.fixture(scope="module")
def some(tiny, tmp_path_factory) -> Path:
    """One of a few layers."""
    folder = tmp_path_factory.mktemp("some") / "a"
    return write_adapter(folder, read_config(tiny), SMALL, seed=1)


def said(folder: Path, adapter: Path | None = None) -> np.ndarray:
    model = load_model(folder, read_config(folder))
    if adapter is not None:
        adapters.load(model, adapter)
    return logits(model)


def far(ours: np.ndarray, theirs: np.ndarray) -> float:
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def by_hand(base: Path, adapter: Path, lora: LoRA) -> dict[str, mx.array]:
    """The tensors of the base, those with an adapter changed as is promised."""
    config = read_config(base)
    found, saved = tensors(base), mx.load(str(adapter / adapters.WEIGHTS))
    quantization = read_quantization(config.raw, "")
    for layer in lora.layers(config):
        a, b = saved[f"{layer}.lora_a"], saved[f"{layer}.lora_b"]
        delta = b @ a if a.ndim > 2 else (a @ b).T
        dtype = found["norm.weight"].dtype
        if quantization is None:
            weight = found[f"{layer}.weight"].astype(mx.float32)
            found[f"{layer}.weight"] = (weight + lora.scale * delta).astype(dtype)
            continue
        q = quantization.of(layer_path(layer))
        packed = q.packed_shapes(expected_shapes(config)[f"{layer}.weight"])
        parts = {part: found[f"{layer}.{part}"] for part in packed}
        weight = q.dequantize(parts, mx.float32) + lora.scale * delta
        for part, array in q.quantize(weight.astype(dtype)).items():
            found[f"{layer}.{part}"] = array
    return found


# Values


@pytest.mark.parametrize("name", ["dense", "affine", "mixed"])
def test_the_fused_dense_model_says_what_model_and_adapter_say(
    bases, adapter, tmp_path, name
):
    base = bases[name]
    fuse(base, adapter, tmp_path / "out", dequantize=name != "dense")
    wanted = said(base, adapter)
    assert far(said(tmp_path / "out"), wanted) < ALLOWED
    assert far(said(base), wanted) > 100 * ALLOWED
    written = read_json(tmp_path / "out")
    assert not {"quantization", "quantization_config"} & set(written)


@pytest.mark.parametrize(
    ("name", "which"),
    [("dense", "adapter"), ("affine", "some"), ("mxfp4", "adapter"), ("mixed", "some")],
)
def test_a_layer_with_an_adapter_is_rounded_again_and_all_else_kept(
    bases, adapter, some, tmp_path, name, which
):
    lora = {"adapter": EVERY, "some": SMALL}[which]
    adapter = {"adapter": adapter, "some": some}[which]
    fuse(bases[name], adapter, tmp_path / "out")
    found = tensors(tmp_path / "out")
    same(found, by_hand(bases[name], adapter, lora))
    base = tensors(bases[name])
    changed = {f"{layer}.weight" for layer in lora.layers(read_config(bases[name]))}
    kept = {n for n in base if mx.array_equal(base[n], found[n]).item()}
    assert not changed & kept
    assert kept >= {n for n in base if f"{n.rpartition('.')[0]}.weight" not in changed}
    if which == "some" and name != "dense":
        exact, ours = said(bases[name], some), said(tmp_path / "out")
        assert 0 < far(ours, exact) < 1
        raw = read_json(tmp_path / "out")
        assert raw["quantization"] == read_json(bases[name])["quantization"]
        assert raw["quantization_config"] == raw["quantization"]


def test_a_half_weight_stays_one_and_is_added_to_in_float32(tiny, adapter, tmp_path):
    base = copied(tiny, tmp_path / "base", dtype=mx.float16)
    convert(base, tmp_path / "q", quantize=True)
    for folder in (base, tmp_path / "q"):
        fuse(folder, adapter, tmp_path / "out", overwrite=True)
        same(tensors(tmp_path / "out"), by_hand(folder, adapter, EVERY))


def fine_tuned(base: Path, folder: Path) -> Path:
    """Some of the weights, trained themselves."""
    rng = np.random.default_rng(0)
    model = load_model(base, read_config(base))
    weights = {
        name: array * mx.array(rng.uniform(0.5, 1.5, array.shape).astype(np.float32))
        for name, array in tree_flatten(model.parameters())
        if "layers.0" not in name
    }
    adapters.save(folder, weights, adapters.config_of(None, 2))
    return folder


def test_fine_tuned_weights_take_the_place_of_the_models(tiny, bases, tmp_path):
    tuned = fine_tuned(tiny, tmp_path / "a")
    fuse(tiny, tuned, tmp_path / "out")
    wanted = tensors(tiny) | dict(mx.load(str(tuned / adapters.WEIGHTS)))
    same(tensors(tmp_path / "out"), wanted)
    np.testing.assert_array_equal(said(tmp_path / "out"), said(tiny, tuned))
    # and are rounded as the layers they replace
    base = bases["mixed"]
    fuse(base, tuned, tmp_path / "q")
    wanted, quantization = tensors(base), read_quantization(read_json(base), "")
    for name, array in mx.load(str(tuned / adapters.WEIGHTS)).items():
        layer, _, last = name.rpartition(".")
        if last == "weight" and array.ndim > 1:
            q = quantization.of(layer_path(layer))
            parts = q.quantize(array)
            wanted |= {f"{layer}.{part}": parts[part] for part in parts}
        else:
            wanted[name] = array
    same(tensors(tmp_path / "q"), wanted)


def test_an_adapter_of_peft_that_both_modes_share_is_fused(tiny, bases, tmp_path):
    config = read_config(tiny)
    layers = factors(config, ("layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"))
    alone = factors(config, ("self_conditioning.up_proj",))
    modes = {"decoder": layers | alone, "encoder": layers}
    adapter = write_peft(tmp_path / "a", modes)
    fuse(tiny, adapter, tmp_path / "out")
    wanted = said(tiny, adapter)
    assert far(said(tmp_path / "out"), wanted) < ALLOWED
    assert far(said(tiny), wanted) > 100 * ALLOWED
    fuse(bases["affine"], adapter, tmp_path / "q", dequantize=True)
    assert far(said(tmp_path / "q"), said(bases["affine"], adapter)) < ALLOWED


# The folder


def test_the_folder_is_a_model_like_any_other(quantised, some, tmp_path):
    calls: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    fused = fuse(quantised, some, out, progress=lambda *call: calls.append(call))
    assert listing(out) == listing(quantised)
    assert read_json(out) == read_json(quantised)
    assert "mlx_dgemma.fuse" in (out / "README.md").read_text()
    assert (fused.path, fused.shards) == (out, 1)
    assert fused.bytes == fused.source_bytes == calls[-1][1] == calls[-1][2]
    model, tokenizer = load(out)
    assert tokenizer.chat_template is not None and model.config.canvas_length == 16
    many = fuse(quantised, some, tmp_path / "many", shard_bytes=20_000)
    assert many.shards > 3
    same(tensors(tmp_path / "many"), tensors(out))


# Refused


def refused(tmp_path: Path, base: Path, adapter: Path, *named: str, **how: Any) -> None:
    before = listing(tmp_path)
    message = refusal(fuse, base, adapter, tmp_path / "out", **how)
    for part in named:
        assert part in message
    assert listing(tmp_path) == before


def test_neither_model_nor_adapter_is_replaced(tiny, some, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "out")
    inside = shutil.copytree(some, base / "adapters")
    refused(tmp_path, base, some, "the model to convert", overwrite=True)
    refused(tmp_path, tiny, inside, "holds the adapter", overwrite=True)
    refused(tmp_path, tiny, some, "--overwrite")


def test_an_adapter_that_does_not_fit_is_refused(tiny, quantised, tmp_path):
    wide = write_tiny(tmp_path / "wide", hidden_size=96)
    folder = write_adapter(tmp_path / "a", read_config(wide))
    for other in (folder, fine_tuned(wide, tmp_path / "tuned")):
        where = str(other / adapters.WEIGHTS)
        refused(tmp_path, quantised, other, where, "has shape [")
    refused(tmp_path, tiny, tiny, "adapter_config.json")


def test_modes_that_differ_cannot_be_one_weight(tiny, tmp_path):
    layers = factors(read_config(tiny), ("layers.1.self_attn.o_proj",))
    other = factors(read_config(tiny), ("layers.1.self_attn.o_proj",), seed=1)
    cases = {"decoder": layers}, {"decoder": layers, "encoder": other}
    for number, modes in enumerate(cases):
        folder = write_peft(tmp_path / str(number), modes)
        refused(tmp_path, tiny, folder, str(folder), "--adapter-path")
