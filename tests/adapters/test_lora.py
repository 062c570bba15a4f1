"""Adapters beside weights: what they compute, where they go, and their gradients."""

import copy
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoint.folders import logits
from mlx.utils import tree_flatten, tree_unflatten
from tiny import write_tiny

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
from mlx_dgemma.adapters.lora import delta as delta_from
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.errors import AdapterError, DGemmaError, SettingsError
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.model.layers import (
    ExpertLinear,
    Experts,
    Linear,
    QuantizedExpertLinear,
    QuantizedLinear,
    dequantize,
)
from mlx_dgemma.model.loading import find_layer
from mlx_dgemma.training import objective
from mlx_dgemma.training.objective import Batch, Sample, losses

EVERY = tuple(key for keys in TARGETS.values() for key in keys)
MODES = ["dense", "affine", "mxfp4"]
SPEC = {"affine": (32, 4, "affine"), "mxfp4": (32, 4, "mxfp4")}
FULL = 2  # the tiny model's last layer; it sees everything and has no v_proj


def delta_of(layer):
    return delta_from(layer.lora_a, layer.lora_b, layer.scale)


def fresh(folder: Path) -> DiffusionGemma:
    return load(folder)[0]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    rng = np.random.default_rng([seed, *shape])
    return mx.array((rng.normal(size=shape) * scale).astype(np.float32))


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random numbers for everything trainable, so that adapters do something."""
    model.update(
        tree_unflatten(
            [
                (name, random(*a.shape, seed=seed + i, scale=0.5 / a.shape[-1] ** 0.5))
                for i, (name, a) in enumerate(
                    flat(model.trainable_parameters()).items()
                )
            ]
        )
    )


def flat(tree) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def adapted(model: nn.Module) -> set[str]:
    kinds = LoRALinear | LoRAExpertLinear
    return {path for path, part in model.named_modules() if isinstance(part, kinds)}


def close(found: mx.array, expected: mx.array, allowed: float = 1e-5) -> None:
    """Within `allowed` of the largest."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    mine, other = (np.array(a.astype(mx.float32)) for a in (found, expected))
    np.testing.assert_allclose(mine, other, rtol=0, atol=allowed * np.abs(other).max())


@pytest.fixture(scope="module")
def bases(tiny, tmp_path_factory) -> dict[str, Path]:
    """The tiny checkpoint, dense and quantised."""
    folder = tmp_path_factory.mktemp("bases")
    for mode in SPEC:
        convert(tiny, folder / mode, quantize=True, q_mode=mode)
    return {"dense": tiny} | {mode: folder / mode for mode in SPEC}


# What one adapter computes


def linear(mode: str, *, bias: bool = False) -> tuple[nn.Module, mx.array]:
    """A layer from 64 to 48, and its dense weight."""
    layer = Linear(64, 48, bias=bias)
    layer.weight = random(48, 64, seed=1)
    if bias:
        layer.bias = random(48, seed=2)
    if mode == "dense":
        return layer, layer.weight
    group, bits, kind = SPEC[mode]
    quantised = QuantizedLinear(64, 48, bias, group, bits, kind)
    packed, scales, *biases = mx.quantize(layer.weight, group, bits, kind)
    quantised.weight, quantised.scales = packed, scales
    if biases:
        (quantised.biases,) = biases
    if bias:
        quantised.bias = layer.bias
    return quantised, dequantize(quantised, mx.float32)


def experts(mode: str, inputs: int = 64, outputs: int = 32):
    """Four expert layers, and their dense weight."""
    layer = ExpertLinear(4, inputs, outputs)
    layer.weight = random(4, outputs, inputs, seed=3, scale=inputs**-0.5)
    if mode == "dense":
        return layer, layer.weight
    group, bits, kind = SPEC[mode]
    quantised = QuantizedExpertLinear(4, inputs, outputs, group, bits, kind)
    packed, scales, *biases = mx.quantize(layer.weight, group, bits, kind)
    quantised.weight, quantised.scales = packed, scales
    if biases:
        (quantised.biases,) = biases
    return quantised, dequantize(quantised, mx.float32)


def beside(layer: nn.Module, *, rank: int = 3, scale: float = 0.7):
    """The layer with an adapter of random numbers."""
    if isinstance(layer, ExpertLinear | QuantizedExpertLinear):
        a, b = (4, rank, layer.inputs), (4, layer.outputs, rank)
        kind = LoRAExpertLinear
    else:
        kind, a, b = LoRALinear, (64, rank), (rank, 48)
    factors = random(*a, seed=9, scale=a[-1] ** -0.5), random(*b, seed=4)
    return kind(layer, *factors, scale)


@pytest.mark.parametrize(
    ("mode", "bias"), [("dense", True), ("affine", False), ("mxfp4", True)]
)
def test_an_adapted_layer_multiplies_with_the_sum_of_weight_and_delta(mode, bias):
    layer, weight = linear(mode, bias=bias)
    found = beside(layer)
    delta = 0.7 * (np.array(found.lora_a) @ np.array(found.lora_b)).T
    np.testing.assert_allclose(np.array(delta_of(found)), delta, atol=1e-6)
    x = random(2, 5, 64, seed=5)
    expected = x @ (weight + mx.array(delta)).T + (layer.bias if bias else 0)
    close(found(x), expected)
    assert np.abs(delta).max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_adapted_experts_multiply_with_the_sum_of_weight_and_delta(mode):
    layer, weight = experts(mode)
    found = beside(layer)
    pairs = zip(np.array(found.lora_b), np.array(found.lora_a), strict=True)
    delta = np.stack([0.7 * b @ a for b, a in pairs])
    np.testing.assert_allclose(np.array(delta_of(found)), delta, atol=1e-6)
    whole, rows = weight + mx.array(delta), random(3, 5, 64, seed=6)
    for number in range(4):
        close(found.one(rows[0], number), rows[0] @ whole[number].T)
    owner = mx.array([0, 2, 3])
    expected = mx.stack([rows[i] @ whole[n].T for i, n in enumerate([0, 2, 3])])
    close(found.gather(rows, owner), expected)


def mixture(mode: str, width: int = 64) -> tuple[Experts, Experts]:
    """A mixture of adapted experts, and a dense one that should say the same."""
    ours = Experts.__new__(Experts)
    nn.Module.__init__(ours)
    plain = copy.copy(ours)
    for name, shape in (("gate_up_proj", (width, 64)), ("down_proj", (32, width))):
        layer, weight = experts(mode, *shape)
        ours[name] = beside(layer)
        plain[name] = ExpertLinear(4, *shape)
        plain[name].weight = weight + delta_of(ours[name])
    return ours, plain


def choices(tokens: int) -> tuple[mx.array, mx.array, mx.array]:
    """Tokens, two experts for each, and what these weigh. The last has none."""
    rng = np.random.default_rng(tokens)
    indices = np.stack([rng.permutation(3)[:2] for _ in range(tokens)])
    weights = rng.uniform(0.2, 0.8, (tokens, 2)).astype(np.float32)
    return random(tokens, 64, seed=7), mx.array(indices), mx.array(weights)


@pytest.mark.parametrize(
    ("mode", "way"), [("dense", "loop"), ("affine", "blocks"), ("mxfp4", "sorted")]
)
def test_a_mixture_of_adapted_experts_is_that_of_dense_ones(experts_run, mode, way):
    ours, plain = mixture(mode)
    given = choices(21)
    expected = plain(*given)
    experts_run(way)
    close(ours(*given), expected)


@pytest.mark.parametrize(
    ("mode", "dtype"), [("dense", mx.float16), ("affine", mx.bfloat16)]
)
def test_sixteen_bit_inputs_keep_their_dtype_beside_a_float32_adapter(mode, dtype):
    layer, weight = linear(mode)
    layer.set_dtype(dtype)
    found, x = beside(layer), random(5, 64, seed=5).astype(dtype)
    assert found.lora_a.dtype == found.lora_b.dtype == mx.float32
    exact = x.astype(mx.float32) @ (weight + delta_of(found)).T
    close(found(x), exact.astype(dtype), 0.02)


# Where adapters go


@pytest.mark.parametrize("mode", MODES)
def test_a_fresh_adapter_changes_no_bit(bases, mode):
    model = fresh(bases[mode])
    before = logits(model)
    adapt(model, LoRA(keys=EVERY))
    np.testing.assert_array_equal(logits(model), before)
    for name, array in flat(model.trainable_parameters()).items():
        assert mx.any(array).item() == name.endswith("lora_a")
    fill(model)
    assert np.abs(logits(model) - before).max() > 0.1


INSIDE = {
    "attention": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
    "mlp": "mlp.gate_proj mlp.up_proj mlp.down_proj",
    "experts": "experts.gate_up_proj experts.down_proj",
    "router": "router.proj",
}


@pytest.mark.parametrize("num_layers", [-1, 1, 2])
def test_each_target_is_adapted_in_the_last_layers(tiny, num_layers):
    last = {-1: [0, 1, 2], 1: [2], 2: [1, 2]}[num_layers]
    for target in TARGETS:
        model = fresh(tiny)
        adapt(model, LoRA(keys=TARGETS[target], num_layers=num_layers))
        if target == "self_conditioning":  # belongs to no layer
            parts = "gate_proj up_proj down_proj".split()
            wanted = {f"self_conditioning.{part}" for part in parts}
        else:
            wanted = {
                f"layers.{i}.{key}" for i in last for key in INSIDE[target].split()
            }
        assert adapted(model) == wanted - {f"layers.{FULL}.self_attn.v_proj"}


def test_by_default_all_but_experts_and_routers_are_adapted(tiny):
    model = fresh(tiny)
    adapt(model, LoRA())
    found = adapted(model)
    assert not [path for path in found if "experts" in path or "router" in path]
    assert len(found) == 2 * 4 + 3 + 3 * 3 + 3


@pytest.mark.parametrize("mode", MODES)
def test_adapters_alone_are_trained(bases, mode):
    model, lora = fresh(bases[mode]), LoRA(rank=5, keys=EVERY)
    adapt(model, lora)
    found = flat(model.trainable_parameters())
    paths = {
        f"{path}.{side}" for path in adapted(model) for side in ("lora_a", "lora_b")
    }
    assert found.keys() == paths
    assert {a.dtype for a in found.values()} == {mx.float32}
    assert {name: a.shape for name, a in found.items()} == shapes(model.config, lora)
    assert not model.training


def test_shapes_are_known_without_a_model(tiny):
    """By hand: 64 wide, four heads of 16 and of 32, two experts' halves of 32."""
    found = shapes(read_config(tiny), LoRA(rank=5, keys=EVERY))
    assert found["layers.0.self_attn.k_proj.lora_a"] == (64, 5)
    assert found["layers.0.self_attn.k_proj.lora_b"] == (5, 32)
    assert found["layers.2.self_attn.o_proj.lora_a"] == (128, 5)
    assert found["layers.1.experts.gate_up_proj.lora_a"] == (4, 5, 64)
    assert found["layers.1.experts.gate_up_proj.lora_b"] == (4, 64, 5)
    assert found["layers.1.experts.down_proj.lora_a"] == (4, 5, 32)
    assert found["layers.0.router.proj.lora_b"] == (5, 4)
    assert found["self_conditioning.down_proj.lora_b"] == (5, 64)
    assert "layers.2.self_attn.v_proj.lora_a" not in found


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
    heads = {tuple(np.array(a).flatten()[:4].tolist()) for a in found.values()}
    assert len(heads) == len(found)
    for name, array in found.items():
        inputs = array.shape[-1] if "experts" in name else array.shape[0]
        values, bound = np.array(array), inputs**-0.5
        assert 0.99 * bound < np.abs(values).max() <= bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(values.mean()) < 0.06 * bound


def test_a_model_is_adapted_once(tiny):
    model = fresh(tiny)
    adapt(model, LoRA(keys=("mlp.up_proj",)))
    with pytest.raises(AdapterError, match="already"):
        adapt(model, LoRA(keys=("mlp.down_proj",)))
    assert adapted(model) == {f"layers.{i}.mlp.up_proj" for i in range(3)}


IMPOSSIBLE = {
    "rank": [0, -1, 1.5, "4", None],
    "scale": [0, -1.0, math.nan, math.inf, "2", None],
    "keys": [("q_proj",), ("mlp.up_proj", "lm_head"), (1,), ([1],), (), EVERY * 2],
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in IMPOSSIBLE.items() for v in values]
)
def test_impossible_adapters_are_refused(name, value):
    with pytest.raises(SettingsError) as caught:
        LoRA(**{name: value})
    said = str(caught.value)
    assert "\n" not in said and isinstance(caught.value, DGemmaError)
    assert name in said or "layer" in said


def test_more_layers_than_there_are_are_refused(tiny):
    model, why = fresh(tiny), r"num-layers is .* this model has 3"
    for num_layers in (0, -2, 4, 10**6, 1.5, "2"):
        with pytest.raises(SettingsError, match=why):
            adapt(model, LoRA(num_layers=num_layers))
        with pytest.raises(SettingsError, match=why):
            unfreeze(model, num_layers, router=False)
    assert not adapted(model)


# Whole models


@pytest.mark.parametrize("mode", MODES)
def test_an_adapted_model_is_the_dense_one_with_other_weights(bases, tmp_path, mode):
    model = fresh(bases[mode])
    adapt(model, LoRA(rank=3, scale=1.5, keys=EVERY))
    fill(model)
    folder = bases[mode]
    if mode != "dense":
        folder = tmp_path / "dense"
        convert(bases[mode], folder, dequantize=True)
    plain = fresh(folder)
    before = logits(plain)
    for path in adapted(model):
        parent, name = find_layer(model, path)
        other, _ = find_layer(plain, path)
        other[name].weight = other[name].weight + delta_of(parent[name])
    expected = logits(plain)
    assert np.abs(expected - before).max() > 0.1
    largest = np.abs(expected).max()
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-4 * largest)


# All weights


def names(model: DiffusionGemma) -> set[str]:
    return set(flat(model.trainable_parameters()))


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("num_layers", [-1, 1, 2])
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


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_the_weights_of_a_quantised_model_are_not_trained(bases, mode):
    model = fresh(bases[mode])
    with pytest.raises(SettingsError, match="--dequantize"):
        unfreeze(model, -1, router=False)


# Gradients


def slope(of, at: dict[str, mx.array], direction: dict[str, mx.array], eps: float):
    """The central difference along a direction."""
    values = []
    for step in (eps, -eps):
        moved = {name: array + step * direction[name] for name, array in at.items()}
        values.append(of(moved).item())
    return (values[0] - values[1]) / (2 * eps)


def along(at: dict[str, mx.array], seed: int) -> dict[str, mx.array]:
    """A random direction of length 1."""
    found = {name: random(*a.shape, seed=seed + 9) for name, a in at.items()}
    return scaled(found, 1 / length(found))


def scaled(tree: dict[str, mx.array], factor: float) -> dict[str, mx.array]:
    return {name: array * factor for name, array in tree.items()}


def length(tree: dict[str, mx.array]) -> float:
    return math.sqrt(sum(mx.sum(mx.square(a)).item() for a in tree.values()))


def product(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    return sum(mx.sum(one[name] * other[name]).item() for name in one)


def check_gradient(of, at: dict[str, mx.array], eps: float = 0.02) -> None:
    """Of each array apart, along random directions."""
    gradient = mx.grad(of)(at)
    for name in at:
        for seed in range(2):
            own = {name: at[name]}
            direction = along(own, seed)
            found = product(direction, gradient)
            measured = slope(lambda moved: of(at | moved), own, direction, eps)
            allowed = 2e-3 * length({name: gradient[name]})
            assert found == pytest.approx(measured, rel=1e-2, abs=allowed / 5), name
            assert measured


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_gradients_pass_a_quantised_layer_and_reach_its_adapter(mode):
    found = beside(linear(mode)[0])
    given, weigh = random(6, 64, seed=5), random(6, 48, seed=8)

    def of(arrays):
        found.lora_a, found.lora_b = arrays["a"], arrays["b"]
        return mx.sum(mx.tanh(found(arrays["x"]) / 8) * weigh)

    check_gradient(of, {"a": found.lora_a, "b": found.lora_b, "x": given})


@pytest.mark.parametrize(
    ("mode", "way"), [("dense", "loop"), ("affine", "blocks"), ("mxfp4", "sorted")]
)
def test_gradients_reach_the_adapters_of_the_experts_that_were_chosen(
    experts_run, mode, way
):
    ours, _ = mixture(mode)
    x, indices, weights = choices(9)
    weigh = random(9, 64, seed=8)
    experts_run(way)
    parts = {"up": ours.gate_up_proj, "down": ours.down_proj}

    def of(arrays):
        for name, part in parts.items():
            part.lora_a, part.lora_b = arrays[name + ".a"], arrays[name + ".b"]
        return mx.sum(ours(arrays["x"], indices, arrays["weights"]) * weigh)

    at = {"x": x, "weights": weights}
    for name, part in parts.items():
        at |= {name + ".a": part.lora_a, name + ".b": part.lora_b}
    check_gradient(of, at)
    gradient = mx.grad(of)(at)
    for name in ("up.a", "up.b", "down.a", "down.b"):
        largest = np.abs(np.array(gradient[name])).max(axis=(1, 2))
        assert (largest > 0).tolist() == [True, True, True, False]  # the last is idle


def sample(size: int, *, conditioned: bool = False) -> Sample:
    rng = np.random.default_rng(size)
    canvas, noise = rng.integers(5, 32, (2, 16))
    return Sample(
        prefix=rng.integers(5, 32, size).tolist(),
        prompt=size,
        canvas=canvas.tolist(),
        noisy=np.where(rng.random(16) < 0.5, noise, canvas).tolist(),
        conditioned=conditioned,
    )


@pytest.fixture(scope="module", params=["affine", "mxfp4"])
def trained(request, tmp_path_factory):
    """A 4-bit model with every adapter, both losses of a batch, and their gradient.

    All experts are chosen: where the choice changes, a loss has no gradient. The guess
    is a constant, as the gradient takes it.
    """
    folder = tmp_path_factory.mktemp("smooth")
    write_tiny(folder / "dense", top_k_experts=4)
    convert(folder / "dense", folder / "q", quantize=True, q_mode=request.param)
    model = fresh(folder / "q")
    adapt(model, LoRA(rank=2, scale=1.5, keys=EVERY))
    fill(model)
    batch = Batch.of(model.config, [sample(3), sample(9, conditioned=True)])

    def of(arrays):
        model.update(tree_unflatten(list(arrays.items())))
        found = losses(model, batch, encoding=True, again=False)
        return found.denoising + found.encoding

    guess = random(2, 16, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "_signal", lambda model, hidden: guess)
        at = flat(model.trainable_parameters())
        gradient = mx.grad(of)(at)
        mx.eval(gradient)
        yield of, at, gradient


@pytest.mark.slow
@pytest.mark.parametrize("side", ["lora_a", "lora_b"])
@pytest.mark.parametrize("target", TARGETS)
def test_both_losses_have_the_gradient_of_every_kind_of_adapter(trained, target, side):
    """Along the gradient and a random direction at once: along one that is random
    alone, a loss of thousands of weights barely moves."""
    of, at, gradient = trained
    ends = tuple(f"{key}.{side}" for key in TARGETS[target])
    own = {name: array for name, array in at.items() if name.endswith(ends)}
    mine = {name: gradient[name] for name in own}
    assert len(own) > 2 and all(mx.any(array).item() for array in mine.values())
    aligned, other = scaled(mine, 1 / length(mine)), along(own, 0)
    direction = {name: aligned[name] + other[name] for name in own}
    measured = slope(lambda moved: of(at | moved), own, direction, eps=0.03)
    assert product(direction, mine) == pytest.approx(measured, rel=5e-3)
