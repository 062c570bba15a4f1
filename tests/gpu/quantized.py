"""Logits from quantised weights on the GPU against MLX on the CPU, without torch.

The same weights made dense, in float32 on the CPU, are the truth. Our error may be at
most 4 times that of our own bfloat16 run on the CPU. In 16 bits rounding can send a
token to another expert: tokens whose routing is nearly tied in the truth are left out.
Dense weights are compared with transformers by tests/parity.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from devices import using
from tiny import write_tiny

from mlx_dgemma import backends, convert
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.model.layers import Router
from mlx_dgemma.model.loading import join_products, load_model

ALLOWED = 4.0
TIED = 5e-2  # relative gap of two experts below which rounding may exchange them
# wide enough for the kernels of real models: joined gate and up of 640, an expert's of
# 384, inner widths in steps of 64, at least 4 rows per expert
TEXT = {
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 320,
    "moe_intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_global_key_value_heads": 1,
    "global_head_dim": 256,
    "num_experts": 16,
    "top_k_experts": 4,
    "sliding_window": 128,
}
SIZES = (300, 256)  # tokens of the prompt and of the canvas
RECIPES: dict[str, dict[str, Any]] = {
    **{f"{bits} bit": {"q_bits": bits} for bits in (8, 6, 4, 3, 2)},
    "mixed": {"quant_predicate": "mixed"},
    **{mode: {"q_mode": mode} for mode in ("mxfp4", "mxfp8", "nvfp4")},
}
Logits = list[np.ndarray]  # of a first step, and of a step conditioned on its logits


def compare(folder: Path, recipe: str) -> tuple[float, float]:
    """Compare two denoising steps behind a prompt longer than the sliding window.

    Returns our worst error over that of the CPU, and the share of tokens compared.
    """
    source = write_tiny(folder / "source", **TEXT)
    coded, plain = folder / "coded", folder / "dense"
    convert(source, coded, quantize=True, dtype="bfloat16", **RECIPES[recipe])
    convert(coded, plain, dequantize=True, dtype="float32")
    with using(backends.BACKENDS["cpu"]):
        with routing_gaps() as gaps:
            truth = _two_steps(_load(plain))
        processed = truth[0] / 0.65
        on_cpu = _two_steps(_load(coded), processed)
    model = _load(coded)
    join_products(model)
    ours = _two_steps(model, processed)
    rows = [gap for gap in gaps if len(gap) == SIZES[1]]  # not those of the prompt
    half = len(rows) // 2
    clear = [np.min(step, axis=0)[None] > TIED for step in (rows[:half], rows[half:])]
    return worst_ratio(truth, clear, ours, on_cpu), float(np.mean(clear))


def worst_ratio(truth: Logits, clear: Logits, ours: Logits, cpu: Logits) -> float:
    """Return our worst error over the CPU's, of largest and mean errors of a step."""
    worst = 0.0
    for exact, which, mine, other in zip(truth, clear, ours, cpu, strict=True):
        error, allowed = (np.abs(one - exact)[which] for one in (mine, other))
        worst = max(worst, *(float(f(error) / f(allowed)) for f in (np.max, np.mean)))
    return worst


@contextmanager
def routing_gaps() -> Iterator[list[np.ndarray]]:
    """Record per router call the relative gap between the last expert and the next."""
    gaps: list[np.ndarray] = []
    route = Router.__call__

    def record(router: Router, residual: mx.array):
        x = mx.fast.rms_norm(residual, None, router.eps) * router.scale * router.root
        ranked = -np.sort(-np.array(mx.softmax(router.proj(x), axis=-1)), axis=-1)
        gaps.append(1 - ranked[:, router.top_k] / ranked[:, router.top_k - 1])
        return route(router, residual)

    with mock.patch.object(Router, "__call__", record):
        yield gaps


def _two_steps(model: DiffusionGemma, processed: np.ndarray | None = None) -> Logits:
    """Denoise alone, then conditioned on `processed`, by default the first logits."""
    rng = np.random.default_rng(0)
    prompt, canvas = (
        mx.array(rng.integers(0, 32, (1, size)).astype(np.int32)) for size in SIZES
    )
    cache = model.make_cache()
    model.encode(prompt, cache)
    first = np.array(model.denoise(canvas, cache))
    given = first / 0.65 if processed is None else processed
    signal = model.self_condition(mx.array(given))
    return [first, np.array(model.denoise(canvas, cache, signal))]


def _load(path: Path) -> DiffusionGemma:
    return load_model(path, read_config(path))
