"""Adapters beside weights: what they compute and where they go."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoint.folders import logits
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dgemma import load
from mlx_dgemma.adapters.lora import (
    TARGETS,
    LoRA,
    LoRAExpertLinear,
    LoRALinear,
    adapt,
    shapes,
    unfreeze,
)
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.errors import AdapterError, SettingsError
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.model.loading import find_layer

EVERY = tuple(key for keys in TARGETS.values() for key in keys)
MODES = ["dense", "affine", "mxfp4"]


def fresh(folder: Path) -> DiffusionGemma:
    return load(folder)[0]


def adapted(model: nn.Module) -> set[str]:
    kinds = LoRALinear | LoRAExpertLinear
    return {path for path, part in model.named_modules() if isinstance(part, kinds)}


def flat(tree) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def fill(model: nn.Module) -> None:
    """Random numbers for everything trainable, so that adapters do something."""
    rng = np.random.default_rng(0)
    weights = {
        name: mx.array(rng.normal(size=a.shape) * 0.5 / a.shape[-1] ** 0.5)
        for name, a in flat(model.trainable_parameters()).items()
    }
    model.update(
        tree_unflatten([(n, a.astype(mx.float32)) for n, a in weights.items()])
    )


@pytest.fixture(scope="module")
def bases(tiny, quantised, tmp_path_factory) -> dict[str, Path]:
    """The tiny checkpoint, dense and quantised."""
    folder = tmp_path_factory.mktemp("bases") / "mxfp4"
    convert(tiny, folder, quantize=True, q_mode="mxfp4")
    return {"dense": tiny, "affine": quantised, "mxfp4": folder}


# What adapters compute


@pytest.mark.parametrize(
    ("mode", "way"), [("dense", "loop"), ("affine", "blocks"), ("mxfp4", "sorted")]
)
def test_an_adapted_model_is_the_dense_one_with_other_weights(
    bases, tmp_path, experts_run, mode, way
):
    model, folder = fresh(bases[mode]), bases[mode]
    adapt(model, LoRA(rank=3, scale=1.5, keys=EVERY))
    fill(model)
    if mode != "dense":
        folder = tmp_path / "dense"
        convert(bases[mode], folder, dequantize=True)
    plain = fresh(folder)
    before = logits(plain)
    for path in adapted(model):
        layer = find_layer(model, path)[0][path.rpartition(".")[2]]
        a, b = np.array(layer.lora_a), np.array(layer.lora_b)
        delta = 1.5 * (b @ a if a.ndim > 2 else (a @ b).T)
        parent, name = find_layer(plain, path)
        parent[name].weight = parent[name].weight + mx.array(delta)
    expected = logits(plain)
    assert np.abs(expected - before).max() > 0.1
    experts_run(way)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-4 * largest)


def test_each_way_experts_run_gives_the_same_gradients(bases, experts_run):
    model = fresh(bases["affine"])
    adapt(model, LoRA(rank=3, keys=TARGETS["experts"]))
    fill(model)
    view = model.view(model.make_cache(), 16)

    def of(adapters) -> mx.array:
        model.update(adapters)
        hidden = model.denoise_hidden(mx.array([[*range(7, 23)]]), view)
        return mx.sum(mx.sin(hidden))

    found = []
    for way in ("loop", "blocks", "sorted"):
        experts_run(way)
        found.append(flat(mx.grad(of)(model.trainable_parameters())))
    for name, array in found[0].items():
        largest = mx.max(mx.abs(array)).item()
        assert largest > 0
        for other in found[1:]:
            assert mx.allclose(other[name], array, rtol=0, atol=1e-3 * largest), name


def test_adapters_are_float32_beside_a_bfloat16_model(tiny, tmp_path):
    convert(tiny, tmp_path / "half", dtype="bfloat16")
    model = fresh(tmp_path / "half")
    adapt(model, LoRA(keys=EVERY))
    fill(model)
    dtypes = {a.dtype for a in flat(model.trainable_parameters()).values()}
    assert dtypes == {mx.float32}
    view = model.view(model.make_cache(), 16)
    assert model.denoise_hidden(mx.array([[3] * 16]), view).dtype == mx.bfloat16


# Where adapters go


@pytest.mark.parametrize("mode", MODES)
def test_a_fresh_adapter_changes_no_bit_and_is_trained_alone(bases, mode):
    model, lora = fresh(bases[mode]), LoRA(rank=5, keys=EVERY)
    before = logits(model)
    adapt(model, lora)
    np.testing.assert_array_equal(logits(model), before)
    found = flat(model.trainable_parameters())
    assert {name: a.shape for name, a in found.items()} == shapes(model.config, lora)
    assert {name.rpartition(".")[0] for name in found} == adapted(model)
    for name, array in found.items():
        assert array.dtype == mx.float32
        assert mx.any(array).item() == name.endswith("lora_a")
    assert not model.training
    fill(model)
    assert np.abs(logits(model) - before).max() > 0.1


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_is_adapted_in_the_last_layers(tiny, target):
    for num_layers, last in ((-1, [0, 1, 2]), (2, [1, 2])):
        model, wanted = fresh(tiny), set(TARGETS[target])
        adapt(model, LoRA(keys=TARGETS[target], num_layers=num_layers))
        if target != "self_conditioning":  # belongs to no layer
            wanted = {f"layers.{i}.{key}" for i in last for key in wanted}
        assert adapted(model) == wanted - {"layers.2.self_attn.v_proj"}


def begun(tiny, seed: int = 0, **options: Any) -> dict[str, mx.array]:
    model = fresh(tiny)
    adapt(model, LoRA(**options), seed)
    found = flat(model.trainable_parameters())
    return {name: a for name, a in found.items() if name.endswith("lora_a")}


def test_the_start_depends_on_seed_and_path_alone(tiny):
    every = begun(tiny, 7, keys=EVERY)
    few = begun(tiny, 7, keys=("mlp.up_proj", "experts.down_proj"), num_layers=2)
    assert len(few) == 4
    for name, array in few.items():
        assert mx.array_equal(array, every[name]), name
    for other in (1, 2**16, 2**31, 2**32 - 1):
        found = begun(tiny, other, keys=("mlp.up_proj",))
        assert not any(mx.array_equal(found[name], every[name]) for name in found)


def test_every_layer_starts_elsewhere_within_its_bounds(tiny):
    found = begun(tiny, rank=64, keys=EVERY)
    starts = {tuple(np.array(a).flatten()[:4].tolist()) for a in found.values()}
    assert len(starts) == len(found)
    for name, array in found.items():
        inputs = array.shape[-1] if "experts" in name else array.shape[0]
        values, bound = np.array(array), inputs**-0.5
        assert 0.99 * bound < np.abs(values).max() <= bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05)


IMPOSSIBLE = {
    "rank": [0, -1, 1.5, "4", None],
    "scale": [0, -1.0, math.nan, math.inf, "2", None],
    "keys": [("q_proj",), ("mlp.up_proj", "lm_head"), (1,), ([1],), (), EVERY * 2],
}


def test_impossible_adapters_are_refused():
    for name, values in IMPOSSIBLE.items():
        for value in values:
            with pytest.raises(SettingsError, match=rf"^.*({name}|layer).*$"):
                LoRA(**{name: value})


def test_too_many_layers_and_second_adapters_are_refused(tiny):
    model, why = fresh(tiny), r"num-layers is .* this model has 3"
    for num_layers in (0, -2, 4, 10**6, 1.5, "2"):
        with pytest.raises(SettingsError, match=why):
            adapt(model, LoRA(num_layers=num_layers))
        with pytest.raises(SettingsError, match=why):
            unfreeze(model, num_layers, router=False)
    assert not adapted(model)
    adapt(model, LoRA(keys=("mlp.up_proj",)))
    with pytest.raises(AdapterError, match="already"):
        adapt(model, LoRA(keys=("mlp.down_proj",)))
    assert adapted(model) == {f"layers.{i}.mlp.up_proj" for i in range(3)}


# All weights


@pytest.mark.parametrize(
    ("num_layers", "router"), [(-1, True), (-1, False), (2, False)]
)
def test_all_weights_are_trained_but_routers_and_scalars(tiny, num_layers, router):
    model = fresh(tiny)
    unfreeze(model, num_layers, router=router)
    wanted = {
        name
        for name in flat(model.parameters())
        if not name.endswith("coder_scalar") and (router or ".router." not in name)
    }
    if num_layers > 0:
        last = tuple(f"layers.{i}." for i in range(3 - num_layers, 3))
        wanted = {name for name in wanted if name.startswith(last)}
    assert set(flat(model.trainable_parameters())) == wanted and wanted


def test_the_weights_of_a_quantised_model_are_not_trained(quantised):
    model = fresh(quantised)
    with pytest.raises(SettingsError, match="--dequantize"):
        unfreeze(model, -1, router=False)
