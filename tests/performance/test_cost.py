"""Counted operations and bytes, against other ways of counting them."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma import load
from mlx_dgemma.checkpoint.quantize import Quantization
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.performance.cost import (
    PARTS,
    Cost,
    Storage,
    encode_cost,
    floor_seconds,
    prefix_bytes,
    step_cost,
)
from mlx_dgemma.performance.synthetic import config_26b, config_tiny, synthetic_model

TINY, RELEASE = config_tiny(), config_26b()
BF16 = Storage.planned(TINY, 2)
MIXED = Storage.planned(TINY, 2, Quantization(bits=4), "mixed")
BIG = Storage.planned(RELEASE, 2)
BIG_MIXED = Storage.planned(RELEASE, 2, Quantization(bits=4), "mixed")
SCORE_FLOPS = 2 * 2 * TINY.num_attention_heads  # per pair and number of a head


def entries(*words: str) -> int:
    """Numbers in all matrices of a real model whose path holds one of `words`."""
    flat = tree_flatten(DiffusionGemma(TINY).parameters())
    found = [a for name, a in flat if a.ndim > 1 and any(w in name for w in words)]
    assert found
    return sum(array.size for array in found)


def visible(query: int, layer, keys: int) -> int:
    """How many of the first `keys` keys a query sees."""
    near = [k for k in range(keys) if k > query - TINY.sliding_window]
    return len(near) if layer.sliding else keys


def total(costs) -> Cost:
    return Cost(*map(sum, zip(*costs.values(), strict=True)))


# Operations


def test_step_multiplies_every_token_with_every_matrix():
    counted = step_cost(TINY, BF16, 3, 0, 5)
    assert list(counted) == list(PARTS)
    for part, numbers in (
        ("attention", entries(".self_attn.")),
        ("feed_forward", entries(".mlp.")),
        ("router", entries(".router.")),
        ("self_conditioning", entries("self_conditioning.")),
        ("head", entries("embed_tokens.")),
        ("signal", entries("embed_tokens.")),
        ("experts", entries(".experts.") * 2 / 4),
    ):
        assert counted[part].flops == 2 * 3 * 5 * numbers, part


@pytest.mark.parametrize("prefix", [0, 7, 8, 30])
def test_canvas_sees_itself_and_the_window_of_its_prefix(prefix):
    rows, canvas, pairs = 2, 5, 0
    for layer in TINY.layers:  # every position sees what the first one does
        pairs += canvas * (visible(prefix, layer, prefix) + canvas) * layer.head_dim
    counted = step_cost(TINY, BF16, rows, prefix, canvas)["scores"].flops
    assert counted == rows * SCORE_FLOPS * pairs


@pytest.mark.parametrize(("prefix", "new"), [(0, 1), (0, 30), (5, 4), (20, 11)])
def test_encoding_is_causal_and_leaves_out_the_last_layers_output(prefix, new):
    rows, pairs = 2, 0
    for layer in TINY.layers[:-1]:
        for query in range(prefix, prefix + new):
            pairs += visible(query, layer, query + 1) * layer.head_dim
    costs = encode_cost(TINY, BF16, rows, prefix, new)
    assert costs["scores"].flops == rows * SCORE_FLOPS * pairs
    tokens, first = rows * new, ("layers.0.", "layers.1.")
    attention = [f"{layer}self_attn." for layer in first]
    attention.append("layers.2.self_attn.k_proj")
    assert costs["attention"].flops == 2 * tokens * entries(*attention)
    feed_forward = entries(*(f"{layer}mlp." for layer in first))
    assert costs["feed_forward"].flops == 2 * tokens * feed_forward
    experts = entries(*(f"{layer}experts." for layer in first))
    assert costs["experts"].flops == 2 * tokens * experts / 2
    assert not {"head", "signal", "self_conditioning"} & set(costs)
    # two sliding layers of 2 heads of 16 read keys and values of the window
    assert costs["scores"].bytes == rows * 2 * min(prefix, 7) * 2 * (2 * 16 * 2)


# Bytes


@pytest.mark.parametrize(
    ("q", "recipe", "dtype"),
    [
        (None, "uniform", mx.bfloat16),
        (None, "uniform", mx.float32),
        (Quantization(bits=3), "uniform", mx.float32),
        (Quantization(bits=3, group_size=32), "mixed", mx.bfloat16),
        (Quantization(bits=8, group_size=128), "uniform", mx.bfloat16),
        (Quantization.with_defaults("mxfp4"), "mixed", mx.bfloat16),
        (Quantization.with_defaults("mxfp8"), "uniform", mx.bfloat16),
        (Quantization.with_defaults("nvfp4"), "uniform", mx.bfloat16),
    ],
    ids=str,
)
def test_bytes_of_each_parameter_are_those_of_a_real_model(q, recipe, dtype):
    made = {"quantization": q, "recipe": recipe, "dtype": dtype, "seed": 0}
    model, planned = synthetic_model(TINY, **made), Storage.planned
    stored = Storage.of_model(model)
    assert stored == planned(TINY, dtype.size, q, recipe)
    real = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert stored.weight_bytes == real


def test_bytes_of_a_loaded_checkpoint_are_counted():
    sudoku, _ = load("sudoku4")
    real = sum(array.nbytes for _, array in tree_flatten(sudoku.parameters()))
    assert Storage.of_model(sudoku).weight_bytes == real


@pytest.mark.parametrize("size", [2, 4])
def test_prefix_is_what_later_tokens_see(size):
    for tokens in (0, 7, 8, 100):
        stored = 0
        for layer in TINY.layers:
            # keys and values, or the projection that both are made from
            arrays = 2 if layer.sliding else 1
            seen = visible(tokens, layer, tokens)
            stored += arrays * seen * layer.kv_heads * layer.head_dim * size
        (rotated,) = {layer.rope.rotated for layer in TINY.layers if not layer.sliding}
        stored += tokens * 2 * 4 * rotated  # cos and sin in float32
        assert prefix_bytes(TINY, tokens, size) == stored


@pytest.mark.parametrize("storage", [BF16, MIXED])
def test_large_step_reads_every_weight_once_and_every_prefix(storage):
    read = total(step_cost(TINY, storage, 3, 20, 64)).bytes
    assert read == pytest.approx(storage.weight_bytes + 3 * prefix_bytes(TINY, 20, 2))


def test_few_tokens_hit_few_experts():
    chosen, experts = RELEASE.top_k_experts, RELEASE.num_experts
    all_bytes = step_cost(RELEASE, BIG, 1, 0, 256)["experts"].bytes
    assert all_bytes == pytest.approx(2 * 30 * 128 * 3 * 704 * 2816)
    rng = np.random.default_rng(0)
    for tokens in (1, 4, 24):
        counted = step_cost(RELEASE, BIG, 1, 0, tokens)["experts"].bytes
        picks = rng.random((300, tokens, experts)).argpartition(chosen)
        hit = np.mean([len(np.unique(p)) for p in picks[..., :chosen]])
        assert counted / all_bytes == pytest.approx(hit / experts, rel=0.02)


def test_costs_of_the_release_are_as_known_from_its_files():
    costs = step_cost(RELEASE, BIG_MIXED, 1, 0, 256)
    assert costs["experts"].flops == pytest.approx(0.73e12, rel=0.01)
    assert costs["head"].flops == pytest.approx(0.38e12, rel=0.01)
    products = total(costs).flops - costs["scores"].flops
    assert products == pytest.approx(2.34e12, rel=0.01)
    assert costs["experts"].bytes == pytest.approx(12.85e9, rel=0.001)
    assert total(costs).bytes == pytest.approx(15.4e9, rel=0.001)
    text = 51_647_562_456 - 1.15e9  # all files less the vision tower
    assert BIG.weight_bytes == pytest.approx(text, rel=0.001)
    # half of the 20,480 bytes of its keys and values, and 64 rotated pairs
    assert prefix_bytes(RELEASE, 1, 2) == 10_240 + 512 + 25 * 8192


def test_floor_takes_the_slower_of_computing_and_reading_by_part():
    costs = {"computes": Cost(100, 1), "reads": Cost(1, 100)}
    assert floor_seconds(costs, 10, 20) == 100 / 10 + 100 / 20
