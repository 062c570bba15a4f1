"""The model against transformers over random configurations of the architecture.

transformers in float64 is the truth. Our error against it may be at most 4 times that
of transformers in the same dtype, in the worst element and in the mean. In 16 bits
rounding can send a token to other experts than in the truth; such tokens, whose routing
is nearly tied in the truth, are left out, and routers are tested apart.
"""

import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.errors import SlowBlasWarning
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


def configuration(number: int, rng: np.random.Generator) -> dict:
    """Return configuration `number`; each axis has a period of its own."""
    window = WINDOWS[number % len(WINDOWS)]
    heads, kv, full_kv = HEADS[number % len(HEADS)]
    dim, full_dim = DIMS[rng.integers(len(DIMS))]
    experts, top = EXPERTS[rng.integers(len(EXPERTS))]
    return {
        "dtype": [*["float32"] * 3, "bfloat16", "float16"][number % 5],
        "prefix": [window - 1, window, window + 1, 3 * window + 5][number // 5 % 4],
        "rows": 1 + number % 3,
        "options": {
            "seed": number,
            "layout": ["release", "transformers"][number % 2],
            "text_only": number % 7 == 3,
            "canvas_length": [8, 32, 5][number % 3],
        },
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


RNG = np.random.default_rng(0)
CONFIGURATIONS = [configuration(number, RNG) for number in range(48)]
# wide enough for the kernels that a GPU has for real models
WIDE = [
    {
        "dtype": dtype,
        "prefix": 300,
        "rows": 1,
        "options": {"seed": 48, "canvas_length": 256},
        "text": {
            "layer_types": [S, S, S, F],
            "num_attention_heads": 4,
            "head_dim": 128,
            "global_head_dim": 256,
            "num_experts": 16,
            "top_k_experts": 4,
            "sliding_window": 128,
            "hidden_size": 512,
            "intermediate_size": 320,
            "moe_intermediate_size": 192,
            "vocab_size": 4096,
        },
    }
    for dtype in ("float32", "bfloat16")
]


def describe(c: dict) -> str:
    t = c["text"]
    kinds = "".join("S" if kind == S else "F" for kind in t["layer_types"])
    experts = f"{t['num_experts']}.{t['top_k_experts']}"
    return (
        f"{c['options']['seed']:02}-{c['dtype']}-{kinds}-e{experts}"
        f"-w{t['sliding_window']}-p{c['prefix']}-b{c['rows']}"
    )


class Case:
    """A configuration as our model and transformers in float64 and in its dtype."""

    def __init__(self, checkpoint, c: dict, dtype: str = "float32"):
        path = checkpoint(dtype=dtype, text=c["text"], **c["options"])
        self.model, self.truth, self.theirs = load_all(path, dtype)
        self.rng = np.random.default_rng(c["options"]["seed"])
        self.canvas_length = c["options"]["canvas_length"]
        self.vocab_size = c["text"]["vocab_size"]

    def ids(self, length: int, rows: int = 1) -> np.ndarray:
        return self.rng.integers(0, self.vocab_size, (rows, length))

    def canvas(self, rows: int = 1) -> np.ndarray:
        return self.ids(self.canvas_length, rows)


def load_all(path: Path, dtype: str = "float32") -> tuple:
    """Return our model, and transformers in float64 and in `dtype`."""
    from oracle import load_oracle

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every key of transformers' config is known
        warnings.simplefilter("ignore", SlowBlasWarning)
        ours = load_model(path, read_config(path))
    return ours, load_oracle(path, "float64"), load_oracle(path, dtype)


def ids(array: np.ndarray) -> mx.array:
    return mx.array(array.astype(np.int32))


def assert_as_exact(
    name: str,
    ours: mx.array,
    theirs: np.ndarray,
    truth: np.ndarray,
    tokens: np.ndarray | None = None,
) -> None:
    """Assert that our error is at most ALLOWED times transformers' in this dtype.

    `tokens` (B, L) selects what is compared; None compares all.
    """
    mine = np.abs(np.array(ours.astype(mx.float32)) - truth)
    reference = np.abs(theirs - truth)
    if tokens is not None:
        mine, reference = mine[tokens], reference[tokens]
    for what, measure in (("max", np.max), ("mean", np.mean)):
        assert measure(mine) <= ALLOWED * measure(reference), (
            f"{name}: {what} error {measure(mine):.2e}, "
            f"that of transformers {measure(reference):.2e}"
        )


@pytest.mark.parametrize("c", [*CONFIGURATIONS, *WIDE], ids=describe)
def test_logits(checkpoint, c):
    case = Case(checkpoint, c, c["dtype"])
    prompt, canvas = case.ids(c["prefix"], c["rows"]), case.canvas(c["rows"])
    true_hidden, true_cache = case.truth.encode(prompt)
    hidden, cache = case.theirs.encode(prompt)
    prefix = case.model.make_cache()
    mine = case.model.encode_hidden(ids(prompt), prefix)
    if c["dtype"] == "float32":
        assert_as_exact("hidden", mine, hidden, true_hidden)
    processed = (case.truth.denoise(canvas, true_cache) / 0.65).astype(np.float32)
    signal = case.model.self_condition(mx.array(processed))
    for name, given, embedded in (
        ("logits", None, None),
        ("self-conditioned logits", processed, signal),
    ):
        margins = case.truth.routing_margins(canvas, true_cache, given)
        clear = margins > TIED[c["dtype"]]
        assert clear.mean() > 0.4 or given is not None
        assert_as_exact(
            name,
            case.model.denoise(ids(canvas), prefix, embedded),
            case.theirs.denoise(canvas, cache, given),
            case.truth.denoise(canvas, true_cache, given),
            clear,
        )


@pytest.mark.parametrize("c", CONFIGURATIONS[::4], ids=describe)
def test_rows_of_different_prefix_length(checkpoint, c):
    """Each row of one pass is what transformers computes for it alone."""
    case, window = Case(checkpoint, c), c["text"]["sliding_window"]
    lengths = (max(1, window - 1), 2 * window + 3, window, 1)
    prompts = [case.ids(length) for length in lengths]
    canvas = case.canvas(len(lengths))
    caches = [case.model.make_cache() for _ in lengths]
    for prompt, cache in zip(prompts, caches, strict=True):
        case.model.encode(ids(prompt), cache)
    joined = PrefixCache.join(case.model.config, caches)
    assert joined.lengths == lengths
    logits = case.model.denoise(ids(canvas), joined)
    more = case.ids(4, len(lengths))
    hidden = case.model.encode_hidden(ids(more), joined)
    for row, prompt in enumerate(prompts):
        one = slice(row, row + 1)
        true_cache, cache = (o.encode(prompt)[1] for o in (case.truth, case.theirs))
        assert_as_exact(
            f"row {row}",
            logits[one],
            case.theirs.denoise(canvas[one], cache),
            case.truth.denoise(canvas[one], true_cache),
        )
        assert_as_exact(
            f"row {row}, encoded further",
            hidden[one],
            case.theirs.encode(more[one], cache)[0],
            case.truth.encode(more[one], true_cache)[0],
        )


@pytest.mark.parametrize("c", CONFIGURATIONS[1::6], ids=describe)
def test_routers(checkpoint, c):
    """Probabilities and choices of every router, apart from the layers behind it."""
    case, top = Case(checkpoint, c), c["text"]["top_k_experts"]
    residual = case.rng.normal(size=(64, c["text"]["hidden_size"])) * 3
    for number, layer in enumerate(case.model.layers):
        probabilities, chosen = case.truth.router(number, residual)
        indices, weights = layer.router(mx.array(residual.astype(np.float32)))
        order = np.argsort(np.array(indices), axis=-1)
        mine = np.take_along_axis(np.array(indices), order, axis=-1)
        ranked = -np.sort(-probabilities, axis=-1)
        clear = np.ones(len(ranked), bool)
        if top < ranked.shape[-1]:  # a tie may be broken either way
            clear = ranked[:, top - 1] - ranked[:, top] > 1e-5
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(mine[clear], chosen[clear])
        expected = np.take_along_axis(probabilities, chosen, axis=-1)
        expected /= expected.sum(axis=-1, keepdims=True)
        expected *= np.array(layer.router.per_expert_scale)[chosen]
        weights = np.take_along_axis(np.array(weights), order, axis=-1)
        np.testing.assert_allclose(weights[clear], expected[clear], rtol=2e-5)


@pytest.mark.parametrize("c", CONFIGURATIONS[2::8], ids=describe)
def test_canvas_after_canvas(checkpoint, c):
    """Committed canvases extend the prefix as in transformers, past the window."""
    case = Case(checkpoint, c)
    prefix, true_cache, cache = case.model.make_cache(), None, None
    for size in (c["prefix"], *[case.canvas_length] * 3):
        tokens = case.ids(size)
        true_cache = case.truth.encode(tokens, true_cache)[1]
        cache = case.theirs.encode(tokens, cache)[1]
        case.model.encode(ids(tokens), prefix)
        canvas = case.canvas()
        assert_as_exact(
            f"behind {prefix.length}",
            case.model.denoise(ids(canvas), prefix),
            case.theirs.denoise(canvas, cache),
            case.truth.denoise(canvas, true_cache),
        )


@pytest.mark.parametrize("seed", range(3))
def test_long_prompts_in_chunks(checkpoint, seed):
    """2,500 tokens, encoded 64 and 2,048 at a time, in tiles of bounded scores."""
    text = {"layer_types": [S, S, F, S, F], "sliding_window": 128}
    model, truth, theirs = load_all(checkpoint(seed=seed, text=text))
    rng = np.random.default_rng(seed)
    prompt, canvas = rng.integers(0, 32, (1, 2500)), rng.integers(0, 32, (1, 32))
    exact, reference = (
        one.denoise(canvas, one.encode(prompt)[1]) for one in (truth, theirs)
    )
    for size in (64, 2048):
        prefix = model.make_cache()
        for start in range(0, 2500, size):
            model.encode(ids(prompt[:, start : start + size]), prefix)
        logits = model.denoise(ids(canvas), prefix)
        assert_as_exact(f"{size} at a time", logits, reference, exact)
