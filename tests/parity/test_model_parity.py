"""The model against transformers over random configurations of the architecture.

transformers in float64 is the truth. Our error against it may be at most 4 times
transformers' own error in the same dtype, in the worst element and in the mean. In
16 bits rounding can send a token to other experts than in the truth; such tokens,
whose routing is nearly tied in the truth, are left out, and routers tested apart.
"""

import itertools
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.model.cache import PrefixCache
from mlx_dgemma.model.loading import load_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ALLOWED = 4.0
# relative gap below which a rounding error of the dtype may flip a routing choice
TIED = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
S, F = "sliding_attention", "full_attention"
PATTERNS = [[S, S, S, F], [S, F], [F, F], [S, F, S, F], [F], [S, S, F]]
HEADS = [(4, 2, 1), (4, 4, 2), (6, 3, 1), (8, 2, 2), (2, 1, 1), (4, 1, 4)]
DIMS = [(16, 32), (8, 16), (32, 64), (16, 16), (24, 48)]
EXPERTS = [(4, 2), (8, 2), (8, 8), (16, 4), (5, 1), (3, 3)]
WINDOWS = [2, 3, 8, 16, 33]


def _configurations() -> list[dict]:
    """48 configurations; each axis runs through its values at its own pace."""
    rng = np.random.default_rng(0)
    configurations = []
    for number in range(48):
        window = WINDOWS[number % len(WINDOWS)]
        heads, kv, full_kv = HEADS[number % len(HEADS)]
        dim, full_dim = DIMS[rng.integers(len(DIMS))]
        experts, top = EXPERTS[rng.integers(len(EXPERTS))]
        # shorter than the window by one, equal, longer by one, much longer
        prefix = [window - 1, window, window + 1, 3 * window + 5][number // 5 % 4]
        configurations.append(
            {
                "seed": number,
                "layout": ["release", "transformers"][number % 2],
                "dtype": ["float32"] * 3 + ["bfloat16", "float16"],
                "text_only": number % 7 == 3,
                "prefix": prefix,
                "rows": 1 + number % 3,
                "canvas_length": [8, 32, 5][number % 3],
                "text": {
                    "layer_types": PATTERNS[number // 2 % len(PATTERNS)],
                    "num_attention_heads": heads,
                    "num_key_value_heads": kv,
                    "num_global_key_value_heads": full_kv,
                    "head_dim": dim,
                    "global_head_dim": full_dim,
                    "num_experts": experts,
                    "top_k_experts": top,
                    "sliding_window": window,
                    "hidden_size": [64, 48, 96][number % 3],
                    "vocab_size": [32, 100, 257][number // 3 % 3],
                    "attention_bias": False,
                    "final_logit_softcapping": [30.0, 6.0][number % 2],
                    "rms_norm_eps": [1e-6, 1e-3][number // 4 % 2],
                },
            }
        )
        configurations[-1]["dtype"] = configurations[-1]["dtype"][number % 5]
    return configurations


CONFIGURATIONS = _configurations()


def _describe(c: dict) -> str:
    t = c["text"]
    kinds = "".join("S" if k == S else "F" for k in t["layer_types"])
    return (
        f"{c['seed']:02}-{c['layout'][:2]}-{c['dtype'][:4]}-{kinds}"
        f"-h{t['num_attention_heads']}.{t['num_key_value_heads']}"
        f".{t['num_global_key_value_heads']}-d{t['head_dim']}.{t['global_head_dim']}"
        f"-e{t['num_experts']}.{t['top_k_experts']}-w{t['sliding_window']}"
        f"-p{c['prefix']}-b{c['rows']}{'-text' if c['text_only'] else ''}"
    )


def _checkpoint(folder: Path, c: dict, **extra) -> Path:
    from make_tiny import make_checkpoint

    keys = ("seed", "layout", "dtype", "text_only", "text", "canvas_length")
    return make_checkpoint(folder / "m", **{k: c[k] for k in keys} | extra)


def _ours(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing transformers writes may be unknown
        return load_model(path, read_config(path))


def ids(array: np.ndarray) -> mx.array:
    return mx.array(array.astype(np.int32))


def assert_as_exact(
    name: str,
    ours: mx.array,
    theirs: np.ndarray,
    truth: np.ndarray,
    tokens: np.ndarray | None = None,
) -> None:
    """Our error is at most ALLOWED times transformers' error in the same dtype.

    `tokens` (B, L) says which tokens to compare; all of them when None.
    """
    mine = np.abs(np.array(ours.astype(mx.float32)) - truth)
    reference = np.abs(theirs - truth)
    if tokens is not None:
        mine, reference = mine[tokens], reference[tokens]
    for what, measure in (("max", np.max), ("mean", np.mean)):
        assert measure(mine) <= ALLOWED * measure(reference), (
            f"{name}: {what} error {measure(mine):.2e}, "
            f"transformers' own {measure(reference):.2e}"
        )


@pytest.mark.parametrize("c", CONFIGURATIONS, ids=_describe)
def test_as_exact_as_transformers(tmp_path, c):
    from oracle import load_oracle

    path = _checkpoint(tmp_path, c)
    model = _ours(path)
    rng = np.random.default_rng(c["seed"])
    vocab, length = c["text"]["vocab_size"], c["canvas_length"]
    prompt = rng.integers(0, vocab, (c["rows"], c["prefix"]))
    canvas = rng.integers(0, vocab, (c["rows"], length))

    truth, theirs = load_oracle(path, "float64"), load_oracle(path, c["dtype"])
    true_hidden, true_cache = truth.encode(prompt)
    hidden, cache = theirs.encode(prompt)
    prefix = model.make_cache()
    mine = model.encode_hidden(ids(prompt), prefix)
    if c["dtype"] == "float32":
        assert_as_exact("hidden", mine, hidden, true_hidden)
    true_first = truth.denoise(canvas, true_cache)
    clear = truth.routing_margins(canvas, true_cache) > TIED[c["dtype"]]
    assert clear.mean() > 0.4
    assert_as_exact(
        "logits",
        model.denoise(ids(canvas), prefix),
        theirs.denoise(canvas, cache),
        true_first,
        clear,
    )
    processed = (true_first / 0.65).astype(np.float32)
    clear = truth.routing_margins(canvas, true_cache, processed) > TIED[c["dtype"]]
    signal = model.self_condition(mx.array(processed))
    assert_as_exact(
        "self-conditioned logits",
        model.denoise(ids(canvas), prefix, signal),
        theirs.denoise(canvas, cache, processed),
        truth.denoise(canvas, true_cache, processed),
        clear,
    )


@pytest.mark.parametrize("c", CONFIGURATIONS[::4], ids=_describe)
def test_ragged_prefixes_in_one_denoise(tmp_path, c):
    """Rows of different prefix length, each as transformers sees it alone."""
    from oracle import load_oracle

    path = _checkpoint(tmp_path, c, dtype="float32")
    model, truth, theirs = (
        _ours(path),
        load_oracle(path, "float64"),
        load_oracle(path, "float32"),
    )
    rng = np.random.default_rng(c["seed"])
    vocab, window = c["text"]["vocab_size"], c["text"]["sliding_window"]
    lengths = [window - 1, 2 * window + 3, window, 1]
    prompts = [rng.integers(0, vocab, (1, max(1, n))) for n in lengths]
    canvas = rng.integers(0, vocab, (len(lengths), c["canvas_length"]))
    caches = []
    for prompt in prompts:
        caches.append(model.make_cache())
        model.encode(ids(prompt), caches[-1])
    joined = PrefixCache.join(model.config, caches)
    assert joined.lengths == tuple(p.shape[1] for p in prompts)
    logits = model.denoise(ids(canvas), joined)
    more = rng.integers(0, vocab, (len(lengths), 4))
    hidden = model.encode_hidden(ids(more), joined)
    for row, prompt in enumerate(prompts):
        one = canvas[row : row + 1]
        true_cache, cache = truth.encode(prompt)[1], theirs.encode(prompt)[1]
        assert_as_exact(
            f"row {row}",
            logits[row : row + 1],
            theirs.denoise(one, cache),
            truth.denoise(one, true_cache),
        )
        assert_as_exact(
            f"row {row}, encoded on",
            hidden[row : row + 1],
            theirs.encode(more[row : row + 1], cache)[0],
            truth.encode(more[row : row + 1], true_cache)[0],
        )


@pytest.mark.parametrize("c", CONFIGURATIONS[1::6], ids=_describe)
def test_routing_alone(tmp_path, c):
    """Probabilities and choices of every router, apart from everything behind it."""
    from oracle import load_oracle

    path = _checkpoint(tmp_path, c, dtype="float32")
    model, oracle = _ours(path), load_oracle(path, "float64")
    rng = np.random.default_rng(c["seed"])
    residual = rng.normal(size=(64, c["text"]["hidden_size"])) * 3
    for number, layer in enumerate(model.layers):
        probabilities, chosen = oracle.router(number, residual)
        indices, weights = layer.router(mx.array(residual.astype(np.float32)))
        order = np.argsort(np.array(indices), axis=-1)
        mine = np.take_along_axis(np.array(indices), order, axis=-1)
        ranked = -np.sort(-probabilities, axis=-1)
        top = c["text"]["top_k_experts"]
        clear = np.ones(len(ranked), bool)
        if top < ranked.shape[-1]:  # a tie may be broken either way
            clear = ranked[:, top - 1] - ranked[:, top] > 1e-5
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(mine[clear], chosen[clear])
        expected = np.take_along_axis(probabilities, chosen, axis=-1)
        expected /= expected.sum(axis=-1, keepdims=True)
        scale = np.array(layer.router.per_expert_scale)
        np.testing.assert_allclose(
            np.take_along_axis(np.array(weights), order, axis=-1)[clear],
            (expected * scale[chosen])[clear],
            rtol=2e-5,
        )


@pytest.mark.parametrize("c", CONFIGURATIONS[2::8], ids=_describe)
def test_canvas_after_canvas(tmp_path, c):
    """Committed canvases extend the prefix as in transformers, past the window."""
    from oracle import load_oracle

    path = _checkpoint(tmp_path, c, dtype="float32")
    model, truth, theirs = (
        _ours(path),
        load_oracle(path, "float64"),
        load_oracle(path, "float32"),
    )
    rng = np.random.default_rng(c["seed"])
    vocab, length = c["text"]["vocab_size"], c["canvas_length"]
    prefix, true_cache, cache = model.make_cache(), None, None
    for size in (c["prefix"], length, length, length):
        tokens = rng.integers(0, vocab, (1, size))
        true_cache = truth.encode(tokens, true_cache)[1]
        cache = theirs.encode(tokens, cache)[1]
        model.encode(ids(tokens), prefix)
        canvas = rng.integers(0, vocab, (1, length))
        assert_as_exact(
            f"behind {prefix.length}",
            model.denoise(ids(canvas), prefix),
            theirs.denoise(canvas, cache),
            truth.denoise(canvas, true_cache),
        )


@pytest.mark.parametrize("seed", range(3))
def test_long_prompts_in_chunks(tmp_path, seed):
    """2,500 tokens, encoded 64 and 2,048 at a time, in tiles of bounded scores."""
    from make_tiny import make_checkpoint
    from oracle import load_oracle

    text = {"layer_types": [S, S, F, S, F], "sliding_window": 128}
    path = make_checkpoint(tmp_path / "m", seed=seed, text=text, canvas_length=32)
    rng = np.random.default_rng(seed)
    prompt, canvas = rng.integers(0, 32, (1, 2500)), rng.integers(0, 32, (1, 32))
    model, exact = _ours(path), []
    for dtype in ("float64", "float32"):
        oracle = load_oracle(path, dtype)
        exact.append(oracle.denoise(canvas, oracle.encode(prompt)[1]))
    for size in (64, 2048):
        prefix = model.make_cache()
        for start in range(0, 2500, size):
            model.encode(ids(prompt[:, start : start + size]), prefix)
        logits = model.denoise(ids(canvas), prefix)
        assert_as_exact(f"{size} at a time", logits, exact[1], exact[0])


def test_configurations_cover_every_axis():
    """48 of them, and no value of an axis is left out."""
    assert len(CONFIGURATIONS) >= 40
    for key, values in {
        "sliding_window": WINDOWS,
        "num_experts": [e for e, _ in EXPERTS],
        "head_dim": [d for d, _ in DIMS],
    }.items():
        assert {c["text"][key] for c in CONFIGURATIONS} == set(values)
    around = {c["prefix"] - c["text"]["sliding_window"] for c in CONFIGURATIONS}
    assert {-1, 0, 1} <= around
    axes = [(c["layout"], c["dtype"]) for c in CONFIGURATIONS]
    every = itertools.product(
        ("release", "transformers"), ("float32", "bfloat16", "float16")
    )
    assert set(every) <= set(axes)
