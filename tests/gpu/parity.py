"""The model on the GPU against the judges: transformers on torch, and MLX on the CPU.

Dense: transformers in float64 is the truth, and our error against it may be at most 4
times transformers' own error in the same dtype on the same card. float32 is multiplied
in float32 there (no TF32 on either side).

Quantised: the same weights made dense, run in float32 on the CPU, are the truth; our
error on the GPU may be at most 4 times that of our own run on the CPU with the same
16-bit activations: a GPU kernel also rounds the weights it has made dense.

In 16 bits rounding may send a token to another expert than in the truth. Tokens whose
routing is nearly tied in the truth are left out.
"""

import sys
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from parts import Setting

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "convert"), str(ROOT / "tests")]

from mlx_dgemma import backends, convert  # noqa: E402
from mlx_dgemma.checkpoint.config import read_config  # noqa: E402
from mlx_dgemma.model.language import DiffusionGemma  # noqa: E402
from mlx_dgemma.model.layers import Router  # noqa: E402
from mlx_dgemma.model.loading import join_products, load_model  # noqa: E402

ALLOWED = 4.0
# relative gap of two experts below which a rounding error may exchange them
TIED = {"float32": 1e-5, "bfloat16": 5e-2}
SMALL = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
# widths at which the kernels for real models are taken: joined gate and up of 640, an
# expert's of 384, inner widths in steps of 64, 4 rows and more per expert
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
SHAPES = {"tiny": (SMALL, 32, 50), "mid": (MIDDLE, 256, 300)}
RECIPES = {
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


def dense(setting: Setting, size: str, dtype: str, layout: str) -> dict:
    """Logits of two denoising steps behind a prompt longer than the window."""
    from make_tiny import make_checkpoint
    from oracle import load_oracle

    text, length, prefix = SHAPES[size]
    path = make_checkpoint(
        setting.scratch / "m",
        text=text,
        canvas_length=length,
        dtype=dtype,
        layout=layout,
    )
    prompt, canvas = _ids(text, prefix, length)
    truth, theirs = (
        load_oracle(path, kind, setting.torch_device) for kind in ("float64", dtype)
    )
    _, true_cache = truth.encode(prompt)
    _, cache = theirs.encode(prompt)
    first = truth.denoise(canvas, true_cache)
    processed = (first / 0.65).astype(np.float32)
    exact = [first, truth.denoise(canvas, true_cache, processed)]
    reference = [
        theirs.denoise(canvas, cache),
        theirs.denoise(canvas, cache, processed),
    ]
    clear = [
        truth.routing_margins(canvas, true_cache, given) > TIED[dtype]
        for given in (None, processed)
    ]
    ours = _logits(_load(path), prompt, canvas, processed)
    with backends.using(backends.BACKENDS["cpu"]):
        on_cpu = _logits(_load(path), prompt, canvas, processed)
    return _judged(exact, clear, ours, transformers=reference, cpu=on_cpu)


def coded(setting: Setting, recipe: str) -> dict:
    """The same of quantised weights in bfloat16, without torch."""
    from tiny import write_tiny

    text, length, prefix = SHAPES["mid"]
    config = {k: v for k, v in text.items() if k != "vocab_size"}
    source = write_tiny(setting.scratch / "source", **config, num_hidden_layers=4)
    made = setting.scratch / "coded"
    convert(source, made, quantize=True, dtype="bfloat16", **RECIPES[recipe])
    plain = setting.scratch / "dense"
    convert(made, plain, dequantize=True, dtype="float32")
    prompt, canvas = _ids({"vocab_size": 32}, prefix, length)
    with backends.using(backends.BACKENDS["cpu"]):
        exact, gaps, processed = _truth(_load(plain), prompt, canvas)
        on_cpu = _logits(_load(made), prompt, canvas, processed)
    model = _load(made)
    join_products(model)
    ours = _logits(model, prompt, canvas, processed)
    clear = [gap > TIED["bfloat16"] for gap in gaps]
    return _judged(exact, clear, ours, cpu=on_cpu)


def _truth(
    model: DiffusionGemma, prompt: np.ndarray, canvas: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Logits of both steps, how clearly tokens are routed in each, and the signal's."""
    first, gap = _watched(model, prompt, canvas, None)
    processed = first / 0.65
    second, other = _watched(model, prompt, canvas, processed)
    return [first, second], [gap, other], processed


def _watched(
    model: DiffusionGemma,
    prompt: np.ndarray,
    canvas: np.ndarray,
    processed: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    gaps: list[np.ndarray] = []
    route = Router.__call__

    def note(router: Router, residual: mx.array):
        x = mx.fast.rms_norm(residual, None, router.eps) * router.scale * router.root
        ranked = -np.sort(-np.array(mx.softmax(router.proj(x), axis=-1)), axis=-1)
        gaps.append(1 - ranked[:, router.top_k] / ranked[:, router.top_k - 1])
        return route(router, residual)

    cache = model.make_cache()
    model.encode(_given(prompt), cache)
    signal = None if processed is None else model.self_condition(mx.array(processed))
    with mock.patch.object(Router, "__call__", note):
        logits = np.array(model.denoise(_given(canvas), cache, signal))
    return logits, np.min(gaps, axis=0).reshape(canvas.shape)


def _logits(
    model: DiffusionGemma,
    prompt: np.ndarray,
    canvas: np.ndarray,
    processed: np.ndarray,
) -> list[np.ndarray]:
    """Of a first step, and of one conditioned on the truth's first."""
    cache = model.make_cache()
    model.encode(_given(prompt), cache)
    signal = model.self_condition(mx.array(processed))
    return [
        np.array(model.denoise(_given(canvas), cache, given))
        for given in (None, signal)
    ]


def _judged(
    exact: list[np.ndarray],
    clear: list[np.ndarray],
    ours: list[np.ndarray],
    **others: list[np.ndarray],
) -> dict:
    """Largest and mean errors of each, and ours over the first other's: the verdict."""
    found: dict = {"clear": float(np.mean(clear)), "steps": []}
    judge = next(iter(others))
    worst = 0.0
    for step, truth in enumerate(exact):
        errors = {}
        for name, logits in {"gpu": ours, **others}.items():
            error = np.abs(logits[step] - truth)[clear[step]]
            errors[name] = {"max": float(error.max()), "mean": float(error.mean())}
        for measure in ("max", "mean"):
            worst = max(worst, errors["gpu"][measure] / errors[judge][measure])
        found["steps"].append(errors)
    passed = worst <= ALLOWED and found["clear"] > 0.25
    return found | {"judge": judge, "worst": worst, "passed": bool(passed)}


def _load(path: Path) -> DiffusionGemma:
    return load_model(path, read_config(path))


def _ids(text: dict, prefix: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A prompt and a canvas of random ids."""
    rng = np.random.default_rng(0)
    size = text.get("vocab_size", 32)
    return rng.integers(0, size, (1, prefix)), rng.integers(0, size, (1, length))


def _given(ids: np.ndarray) -> mx.array:
    return mx.array(ids.astype(np.int32))
