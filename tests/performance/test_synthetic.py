"""Models with random weights: the right shape, finite, and no larger than they say."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.checkpoint.generation_config import read_generation_config
from mlx_dgemma.checkpoint.quantize import Quantization
from mlx_dgemma.checkpoint.weights import expected_shapes
from mlx_dgemma.performance.synthetic import config_26b, config_tiny, synthetic_model

FORMATS = [
    None,
    *map(Quantization.with_defaults, ("affine", "mxfp4", "mxfp8", "nvfp4")),
]


def build(q=None, *, recipe="uniform", dtype=mx.float32, seed=0):
    shape = config_tiny()
    return synthetic_model(shape, quantization=q, recipe=recipe, dtype=dtype, seed=seed)


def arrays(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def test_release_has_the_numbers_of_its_files():
    config = config_26b()
    shapes = expected_shapes(config)
    assert shapes["embed_tokens.weight"] == (262144, 2816)
    assert shapes["layers.0.experts.gate_up_proj.weight"] == (128, 1408, 2816)
    assert shapes["layers.0.self_attn.k_proj.weight"] == (2048, 2816)
    assert shapes["layers.5.self_attn.q_proj.weight"] == (8192, 2816)
    assert shapes["layers.5.self_attn.k_proj.weight"] == (1024, 2816)
    full = [index for index, layer in enumerate(config.layers) if not layer.sliding]
    assert full == [5, 11, 17, 23, 29]
    ropes = config.layers[0].rope, config.layers[5].rope
    assert [(rope.theta, rope.rotated) for rope in ropes] == [(1e4, 128), (1e6, 64)]
    assert (config.rms_norm_eps, config.final_logit_softcapping) == (1e-6, 30)
    assert (config.canvas_length, config.has_vision) == (256, False)
    settings = read_generation_config(config)
    assert (settings.steps, settings.entropy_bound) == (48, 0.1)
    assert (settings.t_max, settings.t_min) == (0.8, 0.4)
    assert (settings.stability, settings.confidence) == (1, 0.005)
    assert settings.eos == {1, 106, 50}


@pytest.mark.parametrize("q", FORMATS, ids=lambda q: q.mode if q else "dense")
def test_logits_are_finite_and_weights_scaled_to_their_width(q):
    model = build(q)
    cache = model.make_cache()
    model.encode(mx.arange(11)[None], cache)
    logits = model.denoise(mx.arange(16)[None], cache)
    logits = model.denoise(
        mx.arange(16)[None], cache, model.self_condition(logits / 0.8)
    )
    assert logits.shape == (1, 16, 512)
    assert mx.isfinite(logits).all().item()
    assert 0.1 < mx.std(logits).item() < 5
    deviation = mx.std(model.embed_tokens(mx.arange(512))).item() * 64**0.5
    assert 0.4 < deviation < 2.5
    for name, array in arrays(model).items() if q is None else ():
        if array.ndim < 2:
            assert mx.array_equal(array, mx.ones_like(array)).item(), name
            continue
        deviation = mx.std(array).item() * array.shape[-1] ** 0.5
        assert deviation == pytest.approx(1, rel=5 / array.size**0.5), name
        assert abs(mx.mean(array).item()) < 5 / array.size**0.5, name


@pytest.mark.parametrize("q", [None, Quantization(bits=3)], ids=["dense", "3 bit"])
def test_seed_decides_every_weight_and_dtype_every_float(q):
    one, same, other = (
        arrays(build(q, seed=seed, dtype=mx.bfloat16)) for seed in (5, 5, 6)
    )
    assert {array.dtype for array in one.values()} - {mx.uint32} == {mx.bfloat16}
    for name, array in one.items():
        assert mx.array_equal(array, same[name]).item()
        drawn = array.ndim > 1 and name.endswith(".weight")
        assert not drawn or not mx.array_equal(array, other[name]).item()


def test_recipes_choose_layers_and_groups_fit_them():
    experts = build(Quantization(bits=4)).layers[0].experts
    assert experts.gate_up_proj.group_size == 64
    assert experts.down_proj.group_size == 32  # its inputs are 32
    model = build(Quantization.with_defaults("mxfp4"), recipe="mixed")
    for path, layer in model.named_modules():
        if "scales" in layer:
            expected = ("mxfp4", 4) if ".experts." in path else ("affine", 8)
            assert (layer.mode, layer.bits) == expected
