"""The full-size model with random weights: written, loaded, timed, beside mlx-vlm.

    python tests/gpu/full.py "4 bit" [--tiny]

Its text means nothing; its memory and times are those of the released 26B. Every
engine reads the same files of a temporary folder. Prints JSON.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import peer
from devices import using

from mlx_dgemma import backends
from mlx_dgemma.checkpoint.config import ModelConfig, read_config
from mlx_dgemma.checkpoint.convert import released_config
from mlx_dgemma.checkpoint.quantize import (
    RECIPES,
    Quantization,
    QuantizationMap,
    quantizable,
)
from mlx_dgemma.checkpoint.weights import (
    disk_name,
    expected_shapes,
    layer_path,
)
from mlx_dgemma.files.atomic import write_json
from mlx_dgemma.model.loading import join_products, load_model
from mlx_dgemma.performance import measure
from mlx_dgemma.performance.synthetic import (
    config_26b,
    config_tiny,
    synthetic_model,
)

# the smallest tower, for engines that need one; no image is shown
TOWER = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "standardize": False,
}
FOUR_BIT = Quantization.with_defaults("affine", 4, None)
PRECISIONS: dict[str, tuple[Quantization | None, str]] = {
    "bf16": (None, "uniform"),
    "8 bit": (Quantization.with_defaults("affine", 8, None), "uniform"),
    "mixed": (FOUR_BIT, "mixed"),
    "4 bit": (FOUR_BIT, "uniform"),
    "nvfp4": (Quantization.with_defaults("nvfp4", None, None), "uniform"),
}


def measure_precision(precision: str, path: Path, *, tiny: bool) -> dict[str, Any]:
    """Write, load, encode 8K tokens, denoise 3 canvases; mlx-vlm on the same files."""
    config = config_tiny() if tiny else config_26b()
    steps, prompt_tokens = (2, 40) if tiny else (16, 8192)
    # a CPU gathers dense experts in float32 only
    write_checkpoint(path, config, precision, mx.float32 if tiny else mx.bfloat16)
    _free_memory()
    begun = time.perf_counter()
    model = load_model(path, read_config(path))
    join_products(model)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - begun}
    prompts = measure.random_prompts(model, 1, prompt_tokens)
    job = measure.Workload(prompts, canvases=3, steps=steps)
    measure.run(model, job)  # compiles the kernels
    trials = [measure.run(model, job, seed) for seed in range(3)]
    found |= asdict(measure.Trial.median(trials))
    parts = measure.time_parts(model, replace(job, canvases=1))
    found |= {f"{name}_seconds": seconds for name, seconds in parts.items()}
    found["floor_seconds"] = measure.roofline(model, job)["floor_seconds"]
    del model
    _free_memory()
    if importlib.util.find_spec("mlx_vlm") is None:
        return found | {"mlx_vlm": "not installed"}
    return found | side_by_side(path, prompts[0], steps)


def side_by_side(path: Path, prompt: list[int], steps: int) -> dict[str, Any]:
    """Time one canvas of ours and of mlx-vlm's, one engine loaded at a time."""
    found: dict[str, Any] = {}
    theirs = partial(peer.theirs, tower=False)
    engines = {"ours": (peer.ours, path), "mlx_vlm": (theirs, _with_tower(path))}
    for name, (make, folder) in engines.items():
        run = make(str(folder), prompt, steps)
        run()
        runs = [run() for _ in range(3)]
        prefill = statistics.median(r.prefill for r in runs)
        found[f"{name}_alone_prefill_tps"] = len(prompt) / prefill
        step = statistics.median(r.denoise for r in runs) / steps
        found[f"{name}_alone_step_seconds"] = step
        found[f"{name}_alone_peak_bytes"] = max(r.peak for r in runs)
        del run, runs
        _free_memory()
    ratio = found["ours_alone_step_seconds"] / found["mlx_vlm_alone_step_seconds"]
    return found | {"step_ours_over_mlx_vlm": ratio}


def write_checkpoint(
    path: Path, config: ModelConfig, precision: str, dtype: mx.Dtype
) -> None:
    """Write a checkpoint of random weights, made on the device."""
    quantization, recipe = PRECISIONS[precision]
    unjoined = replace(backends.current(), product_rows=1)
    with using(unjoined):  # layers as they are on disk
        model = synthetic_model(
            config, quantization=quantization, recipe=recipe, dtype=dtype, seed=0
        )
    path.mkdir()
    layers = None
    if quantization is not None:
        overrides = {}
        for name, shape in expected_shapes(config).items():
            layer = layer_path(name.removesuffix(".weight"))
            chosen = RECIPES[recipe](layer, quantization).fit_to_shape(shape)
            if quantizable(name, shape) and chosen not in (None, quantization):
                overrides[layer] = chosen
        layers = QuantizationMap(quantization, overrides)
    write_json(path / "config.json", released_config(config, layers, dtype))
    stored, parameters = {}, dict(tree_flatten(model.parameters()))
    for name, array in parameters.items():
        layer, _, part = name.rpartition(".")
        if f"{layer}.scales" in parameters:
            stored[f"{layer_path(layer)}.{part}"] = array
        else:
            stored[disk_name(name)] = array
    mx.save_safetensors(str(path / "model.safetensors"), stored, {"format": "mlx"})


def _with_tower(path: Path) -> Path:
    """Return the same weights beside a config that has the smallest vision tower."""
    other = path.with_name("with_tower")
    other.mkdir()
    (other / "model.safetensors").symlink_to(path / "model.safetensors")
    raw = json.loads((path / "config.json").read_text())
    write_json(other / "config.json", raw | {"vision_config": TOWER})
    return other


def _free_memory() -> None:
    gc.collect()  # a model and its compiled steps refer to one another
    mx.clear_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("precision", choices=PRECISIONS)
    parser.add_argument("--tiny", action="store_true", help="to try the script")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        found = measure_precision(given.precision, path, tiny=given.tiny)
    print(json.dumps({"precision": given.precision} | found, indent=1))


if __name__ == "__main__":
    main()
