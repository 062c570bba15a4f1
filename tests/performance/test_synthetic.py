"""Models with random weights: the right shape, finite, and no larger than they say."""

import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.checkpoint.quantize import MODES, Quantization
from mlx_dgemma.checkpoint.weights import expected_shapes
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.model.layers import ExpertLinear, QuantizedExpertLinear
from mlx_dgemma.performance.synthetic import (
    SHAPES,
    config_26b,
    config_tiny,
    synthetic_model,
)

TINY = config_tiny()
CODES = [None] + [
    Quantization.with_defaults(mode, bits, None)
    for mode, known in MODES.items()
    for bits in known.bits
]


def named(q: Quantization | None) -> str:
    return f"{q.mode}-{q.bits}" if q else "dense"


def build(q=None, *, recipe="uniform", dtype=mx.float32, seed=0):
    return synthetic_model(TINY, quantization=q, recipe=recipe, dtype=dtype, seed=seed)


def arrays(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def dense(layer) -> mx.array:
    """The weight a layer computes with, float32."""
    if isinstance(layer, nn.Linear | nn.Embedding | ExpertLinear):
        return layer.weight.astype(mx.float32)
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )


# Shapes


def test_the_shapes_have_names():
    assert SHAPES["26b"]() == config_26b()
    assert SHAPES["tiny"]() == TINY
    assert (TINY.hidden_size, len(TINY.layers)) == (64, 3)
    assert (TINY.num_experts, TINY.vocab_size) == (4, 512)


def test_the_release_is_read_as_its_files_are():
    config = config_26b()
    shapes = expected_shapes(config)
    assert shapes["embed_tokens.weight"] == (262144, 2816)
    assert shapes["layers.0.experts.gate_up_proj.weight"] == (128, 1408, 2816)
    assert shapes["layers.0.self_attn.k_proj.weight"] == (2048, 2816)
    assert shapes["layers.5.self_attn.q_proj.weight"] == (8192, 2816)
    assert shapes["layers.5.self_attn.k_proj.weight"] == (1024, 2816)
    full = [index for index, layer in enumerate(config.layers) if not layer.sliding]
    assert full == [5, 11, 17, 23, 29]
    assert config.layers[5].rope.rotated == 64
    settings = config.settings
    assert (settings.steps, settings.entropy_bound, settings.t_max) == (48, 0.1, 0.8)
    assert settings.eos == {1, 106, 50}
    assert (config.canvas_length, config.has_vision) == (256, False)


# Weights


@pytest.mark.parametrize("q", CODES, ids=named)
def test_logits_are_finite_and_not_all_alike(q):
    model = build(q)
    cache = model.make_cache()
    model.encode(mx.arange(11)[None], cache)
    logits = model.denoise(mx.arange(16)[None], cache)
    signal = model.self_condition(logits / 0.8)
    logits = model.denoise(mx.arange(16)[None], cache, signal)
    assert logits.shape == (1, 16, 512)
    assert mx.isfinite(logits).all().item()
    assert 0.1 < mx.std(logits).item() < 5


@pytest.mark.parametrize("q", CODES, ids=named)
def test_weights_have_mean_0_and_the_deviation_of_their_width(q):
    model, seen = build(q), 0
    for _, layer in model.named_modules():
        if "weight" not in layer or layer.weight.ndim < 2:
            continue
        weight = dense(layer)
        wanted = 1 / math.sqrt(weight.shape[-1])
        assert mx.isfinite(weight).all().item()
        chance = 5 / math.sqrt(weight.size)  # of so few numbers
        assert abs(mx.mean(weight).item()) < chance * wanted
        # where scales are powers of two the nearest is up to √2 off
        assert 0.65 * wanted < mx.std(weight).item() < 1.5 * wanted
        if q is None or q.mode == "affine":
            assert mx.std(weight).item() == pytest.approx(wanted, rel=chance)
        seen += 1
    assert seen >= 3 * 8 + 1 + 2  # layers, embedding, self-conditioning


def test_norms_and_scalars_are_one():
    for name, array in arrays(build()).items():
        if array.ndim < 2:
            assert mx.array_equal(array, mx.ones_like(array)).item(), name


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_every_float_has_the_dtype_asked_for(dtype):
    for model in (build(dtype=dtype), build(Quantization(), dtype=dtype)):
        kinds = {a.dtype for a in arrays(model).values()} - {mx.uint32}
        assert kinds == {dtype}
        assert model.dtype == dtype


@pytest.mark.parametrize("q", [None, Quantization(bits=3)], ids=named)
def test_a_seed_decides_every_weight(q):
    one, same, other = (arrays(build(q, seed=seed)) for seed in (5, 5, 6))
    changed = set()
    for name, array in one.items():
        assert mx.array_equal(array, same[name]).item()
        if not mx.array_equal(array, other[name]).item():
            changed.add(name)
    drawn = {n for n, a in one.items() if a.ndim > 1 and n.endswith(".weight")}
    assert changed == drawn


def test_no_two_layers_are_alike():
    layers = build(Quantization()).layers
    first, second = (layer.experts.down_proj.weight for layer in layers[:2])
    assert not mx.array_equal(first, second).item()
    assert not mx.array_equal(first[0], first[1]).item()


# Recipes


def test_uniform_quantises_every_layer_alike_in_groups_that_fit():
    model = build(Quantization(bits=4))
    experts = model.layers[0].experts
    assert isinstance(experts.gate_up_proj, QuantizedExpertLinear)
    assert isinstance(model.embed_tokens, nn.QuantizedEmbedding)
    assert isinstance(model.layers[2].self_attn.k_proj, nn.QuantizedLinear)
    bits = {m.bits for _, m in model.named_modules() if "scales" in m}
    assert bits == {4}
    assert experts.gate_up_proj.group_size == 64
    assert experts.down_proj.group_size == 32  # its inputs are 32


def test_mixed_keeps_all_but_the_experts_at_8_bits():
    model = build(Quantization.with_defaults("mxfp4", None, None), recipe="mixed")
    for path, layer in model.named_modules():
        if "scales" not in layer:
            continue
        wanted = ("mxfp4", 4) if ".experts." in path else ("affine", 8)
        assert (layer.mode, layer.bits) == wanted


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match="recipe is 'nosuch'; supported: uniform"):
        build(Quantization(), recipe="nosuch")


# Memory


@pytest.mark.parametrize("q", [None, Quantization(bits=4)], ids=named)
def test_memory_peaks_at_the_model_and_one_tensor(q):
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = build(q)
    sizes = [array.nbytes for array in arrays(model).values()]
    peak = mx.get_peak_memory() - before
    rounding = 1024 * len(sizes)  # small arrays take a little more than they hold
    assert sum(sizes) <= peak <= sum(sizes) + max(sizes) + rounding
