"""Counted operations and bytes, against other ways of counting them."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.checkpoint.quantize import MODES, RECIPES, Quantization
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.performance.cost import (
    PARTS,
    Cost,
    Storage,
    bits_per_weight,
    encode_cost,
    floor_seconds,
    prefill_cost,
    prefix_bytes,
    step_cost,
    total,
    weight_bytes,
)
from mlx_dgemma.performance.synthetic import config_26b, config_tiny, synthetic_model

TINY, RELEASE = config_tiny(), config_26b()
BF16 = Storage.dense(mx.bfloat16)
MIXED = Storage.quantized(Quantization(bits=4), "mixed")
CODES = [
    Quantization(mode=mode, bits=bits, group_size=size)
    for mode, known in MODES.items()
    for bits in known.bits
    for size in known.group_sizes
]


def named(q: Quantization) -> str:
    return f"{q.mode}-{q.bits}-{q.group_size}"


def parameters() -> dict[str, tuple[int, ...]]:
    """Shapes of a real model's matrices, by path: its own word, not the count's."""
    flat = tree_flatten(DiffusionGemma(TINY).parameters())
    return {name: array.shape for name, array in flat if array.ndim > 1}


def entries(*words: str) -> int:
    """Numbers in all matrices whose path holds one of `words`."""
    found = [s for n, s in parameters().items() if any(w in n for w in words)]
    assert found
    return sum(int(np.prod(shape)) for shape in found)


def visible(query: int, key: int, sliding: bool) -> bool:
    return not sliding or key > query - TINY.sliding_window


def flops(costs) -> dict[str, float]:
    return {part: cost.flops for part, cost in costs.items()}


# Operations


def test_a_step_multiplies_every_token_with_every_matrix():
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


@pytest.mark.parametrize("prefix", [0, 3, 7, 8, 30])
def test_a_canvas_sees_itself_and_the_window_of_its_prefix(prefix):
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
    counted = flops(encode_cost(TINY, BF16, rows, prefix, new))
    assert counted["scores"] == rows * 2 * 2 * TINY.num_attention_heads * pairs
    tokens, first = rows * new, ("layers.0.", "layers.1.")
    attention = entries(*(f"{layer}self_attn." for layer in first))
    attention += entries("layers.2.self_attn.k_proj")
    assert counted["attention"] == 2 * tokens * attention
    assert counted["feed_forward"] == 2 * tokens * entries(*(f"{n}mlp." for n in first))
    experts = entries(*(f"{n}experts." for n in first))
    assert counted["experts"] == 2 * tokens * experts / 2
    assert not {"head", "signal", "self_conditioning"} & set(counted)


@pytest.mark.parametrize("tokens", [1, 7, 8, 29])
def test_chunks_of_a_prefill_multiply_as_much_as_one_pass(tokens):
    whole = encode_cost(TINY, BF16, 1, 0, tokens)
    for chunk in (1, 4, 8, 100):
        chunked = prefill_cost(TINY, BF16, tokens, chunk)
        assert flops(chunked) == pytest.approx(flops(whole))


def test_a_causal_prompt_costs_half_the_scores_of_an_open_one():
    full = RELEASE.layers[5]
    assert not full.sliding
    tokens = 200_000
    counted = prefill_cost(RELEASE, BF16, tokens, 2048)["scores"].flops
    halves = 4 * 2 * tokens**2 * RELEASE.num_attention_heads * full.head_dim
    sliding = 4 * 25 * tokens * 1024 * RELEASE.num_attention_heads * 256
    # the last of the five full layers is not attended in
    assert counted == pytest.approx(halves + sliding, rel=0.01)


# Bytes


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("q", CODES, ids=named)
def test_weight_bytes_are_those_of_a_real_model(q, recipe):
    model = synthetic_model(
        TINY, quantization=q, recipe=recipe, dtype=mx.bfloat16, seed=0
    )
    real = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert weight_bytes(TINY, Storage.quantized(q, recipe)) == real


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("q", [None, Quantization(bits=3)])
def test_weight_bytes_follow_the_dtype(q, dtype):
    model = synthetic_model(TINY, quantization=q, dtype=dtype, seed=0)
    real = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    storage = Storage.dense(dtype) if q is None else Storage.quantized(q, dtype=dtype)
    assert weight_bytes(TINY, storage) == real


def test_bits_per_weight_are_told_by_kind():
    assert bits_per_weight(TINY, BF16) == dict.fromkeys(
        ("experts", "embedding", "rest"), 16
    )
    bits = bits_per_weight(RELEASE, MIXED)
    # 16 bits of scale and of bias for 64 weights are half a bit each
    assert (bits["experts"], bits["embedding"]) == (4.5, 8.5)
    assert 8.5 < bits["rest"] < 8.51  # norms are dense


@pytest.mark.parametrize("tokens", [0, 1, 6, 7, 8, 100])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_a_prefix_is_what_layers_keep_of_all_a_later_token_sees(tokens, dtype):
    held = 0
    for layer in TINY.layers:
        seen = sum(visible(tokens, key, layer.sliding) for key in range(tokens))
        part = mx.zeros((1, layer.kv_heads, seen, layer.head_dim), dtype)
        # keys and values, or the projection that both are made from
        held += (2 if layer.sliding else 1) * part.nbytes
    turns = {layer.rope.rotated for layer in TINY.layers if not layer.sliding}
    held += sum(2 * mx.zeros((tokens, rotated)).nbytes for rotated in turns)
    assert prefix_bytes(TINY, tokens, Storage.dense(dtype)) == held


@pytest.mark.parametrize("storage", [BF16, MIXED, Storage.dense(mx.float32)])
def test_a_large_step_reads_every_weight_once_and_every_prefix(storage):
    read = total(step_cost(TINY, storage, 3, 20, 64)).bytes
    assert read == pytest.approx(
        weight_bytes(TINY, storage) + 3 * prefix_bytes(TINY, 20, storage)
    )


def test_few_tokens_hit_few_experts():
    chosen, everyone = RELEASE.top_k_experts, RELEASE.num_experts
    all_of_them = step_cost(RELEASE, BF16, 1, 0, 256)["experts"].bytes
    assert all_of_them == pytest.approx(2 * 30 * 128 * 3 * 704 * 2816)
    rng = np.random.default_rng(0)
    for tokens in (1, 4, 24):
        counted = step_cost(RELEASE, BF16, 1, 0, tokens)["experts"].bytes
        picks = rng.random((300, tokens, everyone)).argpartition(chosen)
        hit = np.mean([len(np.unique(p)) for p in picks[..., :chosen]])
        assert counted / all_of_them == pytest.approx(hit / everyone, rel=0.02)


def test_every_chunk_of_a_prefill_reads_the_weights_and_the_prefix_so_far():
    chunked = prefill_cost(TINY, BF16, 20, 8)
    passes = [
        encode_cost(TINY, BF16, 1, start, min(8, 20 - start)) for start in (0, 8, 16)
    ]
    assert set(chunked) == set(passes[0])
    for part, cost in chunked.items():
        parts = [one[part] for one in passes]
        assert cost.bytes == pytest.approx(sum(one.bytes for one in parts))
    # three reads of what two sliding layers hold: nothing, then their full windows
    assert chunked["scores"].bytes == 2 * 2 * (2 * 7 * 2 * 16 * 2)


# The release, against figures known from its files


def test_a_step_of_the_release_is_as_known():
    costs = step_cost(RELEASE, MIXED, 1, 0, 256)
    assert costs["experts"].flops == pytest.approx(0.73e12, rel=0.01)
    assert costs["head"].flops == pytest.approx(0.38e12, rel=0.01)
    products = total(costs).flops - costs["scores"].flops
    assert products - costs["signal"].flops == pytest.approx(1.96e12, rel=0.01)
    assert products == pytest.approx(2.34e12, rel=0.01)
    assert costs["experts"].bytes == pytest.approx(12.85e9, rel=0.001)
    assert total(costs).bytes == pytest.approx(15.4e9, rel=0.001)


def test_the_weights_of_the_release_are_as_known():
    text = 51_647_562_456 - 1.15e9  # all files less the vision tower
    assert weight_bytes(RELEASE, BF16) == pytest.approx(text, rel=0.001)
    # half of the 20,480 bytes of its keys and values, and 64 turning pairs
    assert prefix_bytes(RELEASE, 1, BF16) == 10_240 + 512 + 25 * 8192
    window = prefix_bytes(RELEASE, 2**18, BF16) - 2**18 * (10_240 + 512)
    assert window == pytest.approx(210e6, rel=0.01)


# Time


def test_a_floor_waits_for_the_slower_of_computing_and_reading_part_by_part():
    costs = {"computes": Cost(100, 1), "reads": Cost(1, 100)}
    assert floor_seconds(costs, 10, 20) == 100 / 10 + 100 / 20
    assert total(costs) == Cost(101, 101)


# What cannot be


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(SettingsError, match="recipe is 'nosuch'; supported: uniform"):
        Storage(2, Quantization(), "nosuch")
    with pytest.raises(SettingsError, match="value_bytes is 1; it must be 2 or 4"):
        Storage.dense(mx.uint8)
    with pytest.raises(SettingsError, match="chunk is 0"):
        prefill_cost(TINY, BF16, 10, 0)
