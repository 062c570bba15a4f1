"""Ours beside mlx-vlm: one checkpoint, one prompt, the same steps, in turns.

    python tests/bench/peer.py --case vocabulary|body|long [--repeats 5] [--steps 4]

Both engines live in a process of their own, so that each one's peak memory is its
own, and take turns, so that a drift of the machine's speed falls on both. mlx-vlm
runs its own loop with its entropy-bound sampler at temperature 1, which is the
algorithm of transformers and ours; neither stops early. Every run must commit a
whole canvas of ids from the vocabulary. Prints Markdown.
"""

import argparse
import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "convert"))

HEADS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 1,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
}
VOCABULARY = HEADS | {  # the release's vocabulary and canvas on a small body
    "vocab_size": 262_144,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "num_experts": 8,
    "top_k_experts": 2,
}
BODY = HEADS | {  # the release's proportions, eleven times narrower
    "vocab_size": 16_384,
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
    "head_dim": 48,
    "global_head_dim": 96,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_experts": 32,
    "top_k_experts": 8,
}


# A checkpoint's text config, and tokens of prompt.
CASES = {
    "vocabulary": (VOCABULARY, 64),
    "body": (BODY, 64),
    "long": (BODY, 8_000),
    "memory": (BODY, 65_536),
}


@dataclass(frozen=True)
class Run:
    """One canvas: seconds to encode the prompt and to denoise, and memory in bytes."""

    prefill: float
    denoise: float
    peak: int  # most that MLX held
    resident: int  # most that the process held, since it began
    weights: int
    tokens: list[int]


def ours(path: str, prompt: list[int], steps: int):
    """A function that runs one canvas through this package."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_dgemma.checkpoint.config import read_config
    from mlx_dgemma.diffusion.engine import Engine
    from mlx_dgemma.diffusion.events import Commit
    from mlx_dgemma.model.loading import join_products, load_model

    config = read_config(Path(path))
    model = load_model(Path(path), config)
    join_products(model)
    settings = model.settings.replace(
        steps=steps, confidence=0, max_tokens=config.canvas_length, eos=frozenset()
    )

    weights = sum(a.nbytes for _, a in tree_flatten(model.parameters()))

    def run() -> Run:
        mx.clear_cache()
        mx.reset_peak_memory()
        engine = Engine(model)
        prefilled = engine.admit(prompt, settings, seed=0)
        started = time.perf_counter()
        events = list(engine.run())
        seconds = time.perf_counter() - started
        commit = events[-1]
        assert isinstance(commit, Commit) and commit.steps == steps
        tokens = list(commit.tokens)
        peak = mx.get_peak_memory()
        return Run(prefilled.seconds, seconds, peak, _resident(), weights, tokens)

    return run


def theirs(path: str, prompt: list[int], steps: int, *, tower: bool = True):
    """A function that runs one canvas through mlx-vlm's own loop.

    tower: whether the checkpoint has a vision tower; if not, theirs is left as made.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_vlm.generate.diffusion import stream_diffusion_generate
    from mlx_vlm.utils import load_model

    model = load_model(Path(path), strict=tower)
    length = model.config.canvas_length
    # what the loop looks for beside the model; no early stop, no end of text
    model.config.generation_config = {
        "max_denoising_steps": steps,
        "max_new_tokens": length,
        "confidence_threshold": 0.0,
        "sampler_config": {"entropy_bound": 0.1},
        "t_min": 0.4,
        "t_max": 0.8,
    }

    weights = sum(a.nbytes for _, a in tree_flatten(model.parameters()))

    def run() -> Run:
        mx.clear_cache()
        mx.reset_peak_memory()
        silent = _Silent()
        results = stream_diffusion_generate(
            model,
            silent,
            silent,
            mx.array([prompt]),
            None,
            None,
            max_tokens=length,
            skip_special_token_ids=[],
            temperature=1.0,
            diffusion_full_canvas=True,
            diffusion_sampler="entropy-bound",
            prefill_step_size=2048,
        )
        started = time.perf_counter()
        last = list(results)[-1]
        seconds = time.perf_counter() - started
        assert last.diffusion_denoising_steps == steps
        prefill = last.prompt_tokens / last.prompt_tps
        peak = mx.get_peak_memory()
        seconds -= prefill
        return Run(prefill, seconds, peak, _resident(), weights, silent.tokens)

    return run


class _Silent:
    """A tokenizer and detokenizer that only collect ids."""

    def __init__(self):
        self.tokens: list[int] = []
        self.last_segment = ""

    @property
    def detokenizer(self) -> "_Silent":
        return self

    def __copy__(self) -> "_Silent":
        return self

    def reset(self) -> None:
        self.tokens = []

    def stopping_criteria(self, token: int) -> bool:
        return False

    def add_token(self, token: int, skip_special_token_ids=None) -> None:
        self.tokens.append(token)

    def finalize(self) -> None:
        pass


def _resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held at the fork
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _serve(pipe, engine: str, path: str, prompt: list[int], steps: int) -> None:
    """Run a canvas each time the pipe asks for one."""
    run = {"ours": ours, "mlx-vlm": theirs}[engine](path, prompt, steps)
    while pipe.recv():
        pipe.send(run())


def compare(
    path: Path, vocab_size: int, prompt_tokens: int, options: argparse.Namespace
) -> dict[str, list[Run]]:
    """Runs of each engine in turns, after those that warm up."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(10, vocab_size, prompt_tokens).tolist()
    context = multiprocessing.get_context("spawn")
    pipes, runs = {}, {"mlx-vlm": [], "ours": []}
    for engine in runs:
        pipes[engine], far = context.Pipe()
        how = (far, engine, str(path), prompt, options.steps)
        context.Process(target=_serve, args=how, daemon=True).start()
        far.close()  # so that `recv` ends if the process does
    for repeat in range(-options.warmup, options.repeats):
        for engine, pipe in pipes.items():
            pipe.send(True)
            run = pipe.recv()
            assert len(run.tokens) == 256
            assert min(run.tokens) >= 0 and max(run.tokens) < vocab_size
            if repeat >= 0:
                runs[engine].append(run)
    for pipe in pipes.values():
        pipe.send(False)
    return runs


def report(name: str, runs: dict[str, list[Run]], steps: int) -> None:
    """A table of medians, and ours over theirs."""
    print(f"| {name} | mlx-vlm | ours | ours ÷ theirs |")
    print("| --- | --- | --- | --- |")
    for label, unit, value in (
        ("prefill", "ms", lambda run: 1e3 * run.prefill),
        ("denoising step", "ms", lambda run: 1e3 * run.denoise / steps),
        ("canvas with prefill", "ms", lambda run: 1e3 * (run.prefill + run.denoise)),
        ("peak memory, MLX", "MB", lambda run: run.peak / 1e6),
        ("peak memory, process", "MB", lambda run: run.resident / 1e6),
        ("of it weights", "MB", lambda run: run.weights / 1e6),
    ):
        cells, medians = [], []
        for found in runs.values():
            values = [value(run) for run in found]
            medians.append(statistics.median(values))
            spread = f"{min(values):,.1f}–{max(values):,.1f}"
            cells.append(f"{medians[-1]:,.1f} ({spread}) {unit}")
        theirs, ours = medians
        print(f"| {label} | {' | '.join(cells)} | {ours / theirs:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpoint", type=Path, help="kept here between runs")
    options = parser.parse_args()
    text, prompt_tokens = CASES[options.case]
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or Path(folder) / "checkpoint"
        if not path.exists():
            from make_tiny import make_checkpoint

            make_checkpoint(path, text=text, canvas_length=256)
        runs = compare(path, text["vocab_size"], prompt_tokens, options)
    report(options.case, runs, options.steps)
    print(f"\n{options.repeats} runs of {options.steps} steps each: median (min–max)")


if __name__ == "__main__":
    main()
