"""Counted operations and bytes, against other ways of counting them."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma import load
from mlx_dgemma.checkpoint.quantize import Quantization
from mlx_dgemma.checkpoint.weights import expected_shapes
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.performance.cost import (
    PARTS,
    Cost,
    Loaded,
    Storage,
    encode_cost,
    floor_seconds,
    prefix_bytes,
    step_cost,
    weight_bytes,
)
from mlx_dgemma.performance.synthetic import config_26b, config_tiny, synthetic_model

TINY, RELEASE = config_tiny(), config_26b()
BF16 = Storage.dense(mx.bfloat16)
MIXED = Storage.quantized(Quantization(bits=4), "mixed")


def entries(*words: str) -> int:
    """Numbers in all matrices of a real model whose path holds one of `words`."""
    flat = tree_flatten(DiffusionGemma(TINY).parameters())
    found = [a for name, a in flat if a.ndim > 1 and any(w in name for w in words)]
    assert found
    return sum(array.size for array in found)


def visible(query: int, key: int, sliding: bool) -> bool:
    return not sliding or key > query - TINY.sliding_window


def flops(costs) -> dict[str, float]:
    return {part: cost.flops for part, cost in costs.items()}


def total(costs) -> Cost:
    return sum(costs.values(), Cost())


# Operations


def test_step_multiplies_every_token_with_every_matrix():
    rows, canvas = 3, 5
    tokens = rows * canvas
    counted = flops(step_cost(TINY, BF16, rows, 0, canvas))
    assert list(counted) == list(PARTS)
    assert counted["attention"] == 2 * tokens * entries(".self_attn.")
    assert counted["feed_forward"] == 2 * tokens * entries(".mlp.")
    assert counted["router"] == 2 * tokens * entries(".router.")
    assert counted["self_conditioning"] == 2 * tokens * entries("self_conditioning.")
    assert counted["head"] == 2 * tokens * entries("embed_tokens.")
    assert counted["signal"] == counted["head"]
    assert counted["experts"] == 2 * tokens * entries(".experts.") * 2 / 4


@pytest.mark.parametrize("prefix", [0, 7, 8, 30])
def test_canvas_sees_itself_and_the_window_of_its_prefix(prefix):
    rows, canvas, pairs = 2, 5, 0
    for layer in TINY.layers:
        # every position of the canvas sees what the first one does
        seen = sum(visible(prefix, key, layer.sliding) for key in range(prefix))
        pairs += canvas * (seen + canvas) * layer.head_dim
    counted = step_cost(TINY, BF16, rows, prefix, canvas)["scores"].flops
    assert counted == rows * 2 * 2 * TINY.num_attention_heads * pairs


@pytest.mark.parametrize(("prefix", "new"), [(0, 1), (0, 30), (5, 4), (20, 11)])
def test_encoding_is_causal_and_leaves_out_the_last_layers_output(prefix, new):
    rows, pairs = 2, 0
    for layer in TINY.layers[:-1]:
        for query in range(prefix, prefix + new):
            seen = sum(visible(query, key, layer.sliding) for key in range(query + 1))
            pairs += seen * layer.head_dim
    costs = encode_cost(TINY, BF16, rows, prefix, new)
    counted = flops(costs)
    assert counted["scores"] == rows * 2 * 2 * TINY.num_attention_heads * pairs
    tokens, first = rows * new, ("layers.0.", "layers.1.")
    attention = entries(*(f"{layer}self_attn." for layer in first))
    attention += entries("layers.2.self_attn.k_proj")
    assert counted["attention"] == 2 * tokens * attention
    assert counted["feed_forward"] == 2 * tokens * entries(*(f"{n}mlp." for n in first))
    experts = entries(*(f"{n}experts." for n in first))
    assert counted["experts"] == 2 * tokens * experts / 2
    assert not {"head", "signal", "self_conditioning"} & set(counted)
    # two sliding layers of 2 heads of 16 read keys and values of the window
    assert costs["scores"].bytes == rows * 2 * min(prefix, 7) * 2 * (2 * 16 * 2)


# Bytes


def loads_as(storage: Storage, model) -> None:
    """Assert, by parameter, that a model lies in memory as `storage` says."""
    loaded, shapes = Loaded.of(model), expected_shapes(TINY)
    assert set(loaded.sizes) == set(shapes)
    for name, shape in shapes.items():
        assert loaded.nbytes(name, shape) == storage.nbytes(name, shape), name
    assert loaded.value_bytes == storage.value_bytes
    real = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert weight_bytes(TINY, loaded) == weight_bytes(TINY, storage) == real


@pytest.mark.parametrize(
    ("q", "recipe"),
    [
        (Quantization(bits=4), "uniform"),
        (Quantization(bits=3, group_size=32), "mixed"),
        (Quantization(bits=8, group_size=128), "uniform"),
        (Quantization.with_defaults("mxfp4", None, None), "mixed"),
        (Quantization.with_defaults("mxfp8", None, None), "uniform"),
        (Quantization.with_defaults("nvfp4", None, None), "uniform"),
    ],
    ids=str,
)
def test_quantised_bytes_are_those_of_a_real_model(q, recipe):
    made = {"quantization": q, "recipe": recipe, "dtype": mx.bfloat16, "seed": 0}
    loads_as(Storage.quantized(q, recipe), synthetic_model(TINY, **made))


def test_bytes_follow_the_dtype():
    for dtype in (mx.bfloat16, mx.float32):
        model = synthetic_model(TINY, quantization=None, dtype=dtype, seed=0)
        loads_as(Storage.dense(dtype), model)
    q = Quantization(bits=3)
    model = synthetic_model(TINY, quantization=q, dtype=mx.float32, seed=0)
    loads_as(Storage.quantized(q, dtype=mx.float32), model)
    sudoku, _ = load("sudoku4")
    real = sum(array.nbytes for _, array in tree_flatten(sudoku.parameters()))
    assert weight_bytes(sudoku.config, Loaded.of(sudoku)) == real


@pytest.mark.parametrize("tokens", [0, 7, 8, 100])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_prefix_is_what_later_tokens_see(tokens, dtype):
    stored = 0
    for layer in TINY.layers:
        seen = sum(visible(tokens, key, layer.sliding) for key in range(tokens))
        part = mx.zeros((1, layer.kv_heads, seen, layer.head_dim), dtype)
        # keys and values, or the projection that both are made from
        stored += (2 if layer.sliding else 1) * part.nbytes
    rotated = {layer.rope.rotated for layer in TINY.layers if not layer.sliding}
    stored += sum(2 * mx.zeros((tokens, width)).nbytes for width in rotated)
    assert prefix_bytes(TINY, tokens, Storage.dense(dtype)) == stored


@pytest.mark.parametrize("storage", [BF16, MIXED])
def test_large_step_reads_every_weight_once_and_every_prefix(storage):
    read = total(step_cost(TINY, storage, 3, 20, 64)).bytes
    assert read == pytest.approx(
        weight_bytes(TINY, storage) + 3 * prefix_bytes(TINY, 20, storage)
    )


def test_few_tokens_hit_few_experts():
    chosen, experts = RELEASE.top_k_experts, RELEASE.num_experts
    all_bytes = step_cost(RELEASE, BF16, 1, 0, 256)["experts"].bytes
    assert all_bytes == pytest.approx(2 * 30 * 128 * 3 * 704 * 2816)
    rng = np.random.default_rng(0)
    for tokens in (1, 4, 24):
        counted = step_cost(RELEASE, BF16, 1, 0, tokens)["experts"].bytes
        picks = rng.random((300, tokens, experts)).argpartition(chosen)
        hit = np.mean([len(np.unique(p)) for p in picks[..., :chosen]])
        assert counted / all_bytes == pytest.approx(hit / experts, rel=0.02)


# The release, against figures known from its files


def test_costs_of_the_release_are_as_known():
    costs = step_cost(RELEASE, MIXED, 1, 0, 256)
    assert costs["experts"].flops == pytest.approx(0.73e12, rel=0.01)
    assert costs["head"].flops == pytest.approx(0.38e12, rel=0.01)
    products = total(costs).flops - costs["scores"].flops
    assert products == pytest.approx(2.34e12, rel=0.01)
    assert costs["experts"].bytes == pytest.approx(12.85e9, rel=0.001)
    assert total(costs).bytes == pytest.approx(15.4e9, rel=0.001)
    text = 51_647_562_456 - 1.15e9  # all files less the vision tower
    assert weight_bytes(RELEASE, BF16) == pytest.approx(text, rel=0.001)
    # half of the 20,480 bytes of its keys and values, and 64 rotated pairs
    assert prefix_bytes(RELEASE, 1, BF16) == 10_240 + 512 + 25 * 8192


def test_floor_takes_the_slower_of_computing_and_reading_by_part():
    costs = {"computes": Cost(100, 1), "reads": Cost(1, 100)}
    assert floor_seconds(costs, 10, 20) == 100 / 10 + 100 / 20
