"""A token-by-token model through mlx-lm, timed as ours is: is denoising worth it here?

The only file that imports mlx_lm; doing so takes seconds.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..text.chat import chat_ids
from ..text.tokenizer import Tokenizer

# What mlx-lm raises for files it cannot read: it has no errors of its own.
REFUSALS = (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError)


def run_beside(
    folder: Path, prompt: int | str, tokens: int, trials: int, prefill_step_size: int
) -> dict[str, Any]:
    """Generate exactly `tokens` tokens with another model and return its figures.

    prompt    text, read by the model's own tokenizer; or how many random ids

    An end of text is ignored. Figures are medians over the trials, after one trial
    to warm up. Raises CheckpointError in one line for a model mlx-lm cannot load.
    """
    try:
        from mlx_lm.utils import load_model

        model, config = load_model(folder)
    except REFUSALS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"--beside {folder}: mlx-lm cannot load it ({reason})"
        ) from None
    if isinstance(prompt, str):
        ids = chat_ids(Tokenizer.from_dir(folder), prompt)
    else:
        size = config.get("text_config", config).get("vocab_size", 256)
        ids = np.random.default_rng(0).integers(0, size, prompt).tolist()
    runs = [_run(model, ids, tokens, prefill_step_size) for _ in range(trials + 1)][1:]
    return {
        "prompt_tokens": len(ids),
        "tokens": tokens,
        "median": {k: statistics.median(run[k] for run in runs) for k in runs[0]},
        "trials": runs,
    }


def _run(
    model: Any, ids: list[int], tokens: int, prefill_step_size: int
) -> dict[str, float]:
    from mlx_lm.generate import generate_step

    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    first = started
    steps = generate_step(
        mx.array(ids), model, max_tokens=tokens, prefill_step_size=prefill_step_size
    )
    for count, _ in enumerate(steps):
        if count == 0:
            first = time.perf_counter()
    ended = time.perf_counter()
    return {
        "prompt_tps": len(ids) / (first - started),  # to the first token
        "generation_tps": (tokens - 1) / (ended - first),
        "wall_tps": tokens / (ended - started),
        "peak_bytes": mx.get_peak_memory(),
    }
