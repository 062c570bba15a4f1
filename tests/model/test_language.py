"""Properties of the model that hold for any weights."""

import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.model import layers
from mlx_dgemma.model.cache import PrefixCache
from mlx_dgemma.model.language import copy_layer

RNG = np.random.default_rng(7)
PROMPT = RNG.integers(0, 32, 40)
CANVAS = mx.array(RNG.integers(0, 32, (1, 16)).astype(np.int32))
CLOSE = {"atol": 2e-5}  # float32 sums in another order


def ids(values) -> mx.array:
    return mx.array(np.asarray(values, dtype=np.int32).reshape(1, -1))


def encoded(model, tokens, sizes=()) -> PrefixCache:
    """A prefix encoded in chunks of `sizes`, the rest at once."""
    cache = model.make_cache()
    start = 0
    for size in (*sizes, len(tokens)):
        if chunk := list(tokens[start : start + size]):
            model.encode(ids(chunk), cache)
        start += size
    return cache


@given(sizes=st.lists(st.integers(1, 15), max_size=12))
@settings(max_examples=10, deadline=None)
def test_any_chunking_gives_the_same_prefix(tiny_model, sizes):
    model, _ = tiny_model
    whole, parts = model.make_cache(), encoded(model, PROMPT, sizes)
    assert model.encode_hidden(ids(PROMPT), whole).shape == (1, 40, 64)
    found, wanted = (np.array(model.denoise(CANVAS, c)) for c in (parts, whole))
    np.testing.assert_allclose(found, wanted, **CLOSE)


def test_denoise_never_writes_the_cache(tiny_model):
    model, _ = tiny_model
    cache = encoded(model, PROMPT)
    before = [(*map(np.array, layer.buffers), layer.end) for layer in cache.layers]
    first = model.denoise(CANVAS, cache)
    mx.eval(model.denoise(CANVAS, cache, model.self_condition(first)))
    for layer, known in zip(cache.layers, before, strict=True):
        for mine, wanted in zip((*layer.buffers, layer.end), known, strict=True):
            np.testing.assert_array_equal(np.array(mine), wanted)


def test_a_refused_or_empty_encode_leaves_the_cache_as_it_was(tiny_model):
    model, _ = tiny_model
    cache = encoded(model, PROMPT)
    before = np.array(model.denoise(CANVAS, cache))
    for tokens, message in (
        (ids([3, 32]), "ids run from 3 to 32; this model knows 0 to 31"),
        (ids([3, -1]), "ids run from -1 to 3"),
        (mx.zeros((2, 3), dtype=mx.int32), "2 rows of tokens for 1 prefixes"),
    ):
        with pytest.raises(SettingsError, match=message):
            model.encode(tokens, cache)
    with pytest.raises(ValueError):
        model.encode(mx.array([[1.0, 2.0]]), cache)
    model.encode(ids([]), cache)
    assert model.encode_hidden(ids([]), cache).shape == (1, 0, 64)
    with pytest.raises(SettingsError, match=r"ids run from -1 to 32; .*knows 0 to 31"):
        model.denoise(ids([-1, 32]), cache)
    assert cache.lengths == (40,)
    np.testing.assert_array_equal(np.array(model.denoise(CANVAS, cache)), before)


def test_encode_is_causal_and_denoise_is_not(tiny_model):
    model, _ = tiny_model
    other = PROMPT.copy()
    other[25] = (other[25] + 1) % 32
    first, second = (
        np.array(model.encode_hidden(ids(p), model.make_cache()))
        for p in (PROMPT, other)
    )
    np.testing.assert_allclose(first[:, :25], second[:, :25], atol=1e-6)
    assert np.abs(first[:, 25:] - second[:, 25:]).max() > 1e-2
    cache = encoded(model, PROMPT)
    before = np.array(model.denoise(CANVAS, cache))
    for changed in (0, 7, 15):
        tokens = np.array(CANVAS)
        tokens[0, changed] = (tokens[0, changed] + 1) % 32
        after = np.array(model.denoise(mx.array(tokens), cache))
        assert (np.abs(after - before).max(axis=-1) > 1e-5).all()


def test_sliding_layers_see_the_last_window_less_one(tmp_path):
    model, _ = load(write_tiny(tmp_path / "m", sliding_window=8))
    keys = encoded(model, PROMPT).layers[0].read()[0]
    assert keys.shape[2] == 7
    for back in (7, 8):
        other = PROMPT.copy()
        other[-back] = (other[-back] + 1) % 32
        changed = encoded(model, other).layers[0].read()[0]
        differs = np.abs(np.array(keys - changed)).max(axis=(0, 1, 3)) > 1e-6
        assert differs.sum() == (1 if back == 7 else 0)


def test_the_signal_of_nothing_of_zeros_and_of_certain_logits(tiny_model):
    model, _ = tiny_model
    cache = encoded(model, PROMPT)
    nothing = model.denoise(CANVAS, cache)
    zeros = model.denoise(CANVAS, cache, mx.zeros((1, 16, 64)))
    np.testing.assert_array_equal(np.array(zeros), np.array(nothing))
    # a softmax over zeros is the mean embedding, which is something
    uniform = model.self_condition(mx.zeros((1, 16, 32)))
    assert np.abs(np.array(model.denoise(CANVAS, cache, uniform) - nothing)).max() > 0.1
    certain = mx.where(mx.arange(32) == CANVAS[..., None], 0.0, -mx.inf)
    signal, embedded = model.self_condition(certain), model.embed(CANVAS)
    np.testing.assert_allclose(np.array(signal), np.array(embedded), rtol=1e-6)


def test_logits_are_capped(tmp_path):
    model, _ = load(write_tiny(tmp_path / "m", final_logit_softcapping=0.5))
    logits = model.denoise(CANVAS, encoded(model, PROMPT))
    assert logits.dtype == mx.float32
    assert 0.45 < mx.abs(logits).max().item() <= 0.5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bit_weights_run_on_this_device(tiny, dtype):
    """MLX's CPU cannot gather products in 16 bits: the loop over experts does."""
    model, _ = load(tiny)
    exact = np.array(model.denoise(CANVAS, encoded(model, PROMPT)))
    model.set_dtype(dtype)
    rounded = np.array(model.denoise(CANVAS, encoded(model, PROMPT)))
    # a token sent to another expert by rounding may differ more than rounding does
    assert np.median(np.abs(rounded - exact)) < (0.01 if dtype == mx.float16 else 0.08)


def test_all_ways_through_the_experts_agree(tiny_model, monkeypatch, experts_run):
    model, _ = tiny_model
    for way, count in (("blocks", 600), ("blocks", 16), ("loop", 40)):
        tokens = ids(RNG.integers(0, 32, count))
        experts_run("sorted")
        plain = np.array(model.encode_hidden(tokens, model.make_cache()))
        experts_run(way)
        found = np.array(model.encode_hidden(tokens, model.make_cache()))
        np.testing.assert_allclose(found, plain, **CLOSE)
        with monkeypatch.context() as patch, pytest.raises(KeyError, match=way):
            patch.delitem(layers.PATHS, way)  # it was that way that was taken
            model.encode_hidden(tokens, model.make_cache())


def test_encoder_layers_are_no_parameters_of_their_own(tiny):
    model, _ = load(tiny)

    def hidden() -> np.ndarray:
        return np.array(model.encode_hidden(ids(PROMPT), model.make_cache()))

    weights = tree_flatten(model.parameters())
    assert not any("encoder_layers" in name for name, _ in weights)
    model.load_weights(weights, strict=True)
    before, norm = hidden(), model.layers[1].input_layernorm
    model.layers[1].input_layernorm = nn.RMSNorm(64)  # encoding runs the same layer
    after = hidden()
    assert np.abs(after - before).max() > 1e-2
    model.encoder_layers = tuple(copy_layer(layer) for layer in model.layers)
    model.layers[1].input_layernorm = norm  # encoding runs a branch of it
    np.testing.assert_array_equal(hidden(), after)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_deleted_model_is_freed_at_once(tiny, unfused, compiled):
    model, _ = load(tiny)
    engine = Engine(model, compiled=compiled)
    engine.admit([2, 7, 8], model.settings.replace(steps=2, max_tokens=16), 0)
    assert list(engine.run())
    gone = weakref.ref(model)
    gc.disable()
    try:
        del engine, model
        assert gone() is None
    finally:
        gc.enable()
