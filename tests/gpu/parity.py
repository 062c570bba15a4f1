"""Logits on the GPU against transformers on torch, and against MLX on the CPU.

Dense: transformers in float64 is the truth. Our error may be at most 4 times that of
transformers in the same dtype on the same card (float32 without TF32 on either side).

Quantised: the same weights made dense, in float32 on the CPU, are the truth. Our error
may be at most 4 times that of our own bfloat16 run on the CPU.

In 16 bits rounding can send a token to another expert. Tokens whose routing is nearly
tied in the truth are left out.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from parts import ROOT, Setting

sys.path.insert(0, str(ROOT / "convert"))
sys.path.insert(0, str(ROOT / "tests"))

from mlx_dgemma import backends, convert
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.model.layers import Router
from mlx_dgemma.model.loading import join_products, load_model

ALLOWED = 4.0
# relative gap of two experts below which a rounding error may exchange them
TIED = {"float32": 1e-5, "bfloat16": 5e-2}
SMALL = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
# wide enough for the kernels of real models: joined gate and up of 640, an expert's of
# 384, inner widths in steps of 64, at least 4 rows per expert
MIDDLE = SMALL | {
    "vocab_size": 4096,
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
SIZES = {"tiny": (SMALL, 32, 50), "mid": (MIDDLE, 256, 300)}  # config, canvas, prefix
LAYOUTS = ("release", "transformers")
RECIPES: dict[str, dict[str, Any]] = {
    "8 bit": {"q_bits": 8},
    "6 bit": {"q_bits": 6},
    "4 bit": {"q_bits": 4},
    "3 bit": {"q_bits": 3},
    "2 bit": {"q_bits": 2},
    "mixed": {"quant_predicate": "mixed"},
    "mxfp4": {"q_mode": "mxfp4"},
    "mxfp8": {"q_mode": "mxfp8"},
    "nvfp4": {"q_mode": "nvfp4"},
}
Logits = list[np.ndarray]  # of a first step, and of a step conditioned on its logits


def dense(setting: Setting, size: str, dtype: str, layout: str) -> dict[str, Any]:
    """Compare two denoising steps behind a prompt longer than the sliding window."""
    from make_tiny import make_checkpoint
    from oracle import load_oracle

    text, length, prefix = SIZES[size]
    path = make_checkpoint(
        setting.scratch / "m",
        text=text,
        canvas_length=length,
        dtype=dtype,
        layout=layout,
    )
    prompt, canvas = _random_ids(text.get("vocab_size", 32), prefix, length)
    truth = load_oracle(path, "float64", setting.torch_device)
    theirs = load_oracle(path, dtype, setting.torch_device)
    _, true_cache = truth.encode(prompt)
    _, cache = theirs.encode(prompt)
    processed = (truth.denoise(canvas, true_cache) / 0.65).astype(np.float32)
    signals = (None, processed)
    gaps = [truth.routing_margins(canvas, true_cache, given) for given in signals]
    ours = _two_steps(_load(path), prompt, canvas, processed)
    with backends.using(backends.BACKENDS["cpu"]):
        on_cpu = _two_steps(_load(path), prompt, canvas, processed)
    return judge(
        [truth.denoise(canvas, true_cache, given) for given in signals],
        [gap > TIED[dtype] for gap in gaps],
        ours,
        transformers=[theirs.denoise(canvas, cache, given) for given in signals],
        cpu=on_cpu,
    )


def quantized(setting: Setting, recipe: str) -> dict[str, Any]:
    """Compare the same steps from quantised weights in bfloat16, without torch."""
    from tiny import write_tiny

    text, length, prefix = SIZES["mid"]
    config = {k: v for k, v in text.items() if k != "vocab_size"}
    source = write_tiny(setting.scratch / "source", **config, num_hidden_layers=4)
    coded, plain = setting.scratch / "coded", setting.scratch / "dense"
    convert(source, coded, quantize=True, dtype="bfloat16", **RECIPES[recipe])
    convert(coded, plain, dequantize=True, dtype="float32")
    prompt, canvas = _random_ids(32, prefix, length)
    with backends.using(backends.BACKENDS["cpu"]):
        with routing_gaps() as gaps:
            truth = _two_steps(_load(plain), prompt, canvas)
        processed = truth[0] / 0.65
        on_cpu = _two_steps(_load(coded), prompt, canvas, processed)
    model = _load(coded)
    join_products(model)
    ours = _two_steps(model, prompt, canvas, processed)
    rows = [gap for gap in gaps if len(gap) == length]  # not those of the prompt
    half = len(rows) // 2
    clear = [
        np.min(one, axis=0)[None] > TIED["bfloat16"]
        for one in (rows[:half], rows[half:])
    ]
    return judge(truth, clear, ours, cpu=on_cpu)


def judge(truth: Logits, clear: Logits, ours: Logits, **others: Logits) -> dict:
    """Return the largest errors, and our worst error over that of the first other."""
    judge = next(iter(others))
    worst, largest = 0.0, dict.fromkeys(["gpu", *others], 0.0)
    for step, exact in enumerate(truth):
        errors = {
            name: np.abs(logits[step] - exact)[clear[step]]
            for name, logits in {"gpu": ours, **others}.items()
        }
        for measure in (np.max, np.mean):
            ratio = measure(errors["gpu"]) / measure(errors[judge])
            worst = max(worst, float(ratio))
        for name, error in errors.items():
            largest[name] = max(largest[name], float(error.max()))
    share = float(np.mean(clear))
    found: dict[str, Any] = {"judge": judge, "worst_ratio": worst, "compared": share}
    found |= {f"{name}_max_error": error for name, error in largest.items()}
    return found | {"passed": worst <= ALLOWED and share > 0.25}


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


def _two_steps(
    model: DiffusionGemma,
    prompt: np.ndarray,
    canvas: np.ndarray,
    processed: np.ndarray | None = None,
) -> Logits:
    """Denoise alone, then conditioned on `processed`, by default the first logits."""
    cache = model.make_cache()
    model.encode(_ids(prompt), cache)
    first = np.array(model.denoise(_ids(canvas), cache))
    given = first / 0.65 if processed is None else processed
    signal = model.self_condition(mx.array(given))
    return [first, np.array(model.denoise(_ids(canvas), cache, signal))]


def _load(path: Path) -> DiffusionGemma:
    return load_model(path, read_config(path))


def _random_ids(vocabulary: int, prefix: int, length: int) -> list[np.ndarray]:
    """Return a prompt and a canvas, (1, T) and (1, L)."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, (1, size)) for size in (prefix, length)]


def _ids(array: np.ndarray) -> mx.array:
    return mx.array(array.astype(np.int32))
