"""The full-size model filled with noise: written, loaded, timed, beside the peers.

Nothing it writes means anything; what it takes and how long is that of the released
26B. The checkpoint lies in a scratch folder, so that every engine reads the same one.
"""

import gc
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from parts import GB, Setting

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bench"))

import peer  # noqa: E402

from mlx_dgemma import backends  # noqa: E402
from mlx_dgemma.checkpoint.config import ModelConfig, read_config  # noqa: E402
from mlx_dgemma.checkpoint.convert import released_config  # noqa: E402
from mlx_dgemma.checkpoint.quantize import (  # noqa: E402
    RECIPES,
    Quantization,
    QuantizationMap,
    quantizable,
)
from mlx_dgemma.checkpoint.weights import (  # noqa: E402
    INDEX,
    disk_name,
    expected_shapes,
    layer_path,
)
from mlx_dgemma.files.atomic import write_json  # noqa: E402
from mlx_dgemma.model.language import DiffusionGemma  # noqa: E402
from mlx_dgemma.model.loading import join_products, load_model  # noqa: E402
from mlx_dgemma.performance import measure  # noqa: E402
from mlx_dgemma.performance.cost import Storage, weight_bytes  # noqa: E402
from mlx_dgemma.performance.estimate import working_bytes  # noqa: E402
from mlx_dgemma.performance.synthetic import (  # noqa: E402
    config_26b,
    config_tiny,
    synthetic_model,
)

SHARD = 4 * GB
TOWER = {  # no image is shown: as small as can be, for those who cannot do without
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "standardize": False,
}
FOUR = Quantization.with_defaults("affine", 4, None)
PRECISIONS: dict[str, tuple[Quantization | None, str]] = {
    "bf16": (None, "uniform"),
    "8 bit": (Quantization.with_defaults("affine", 8, None), "uniform"),
    "mixed": (FOUR, "mixed"),
    "4 bit": (FOUR, "uniform"),
    "nvfp4": (Quantization.with_defaults("nvfp4", None, None), "uniform"),
}


def needed(precision: str) -> tuple[int, int]:
    """Bytes of device memory and of disk that a precision needs, at the full size."""
    coded, recipe = PRECISIONS[precision]
    config = config_26b()
    weights = weight_bytes(config, Storage(2, coded, recipe))
    return weights + working_bytes(config) + 2 * GB, weights


def measured(setting: Setting, precision: str) -> dict:
    """Write, load, encode 8K tokens, denoise 3 canvases; mlx-vlm on the same files."""
    config = config_tiny() if setting.rehearsal else config_26b()
    steps, prompt = (2, 40) if setting.rehearsal else (16, 8192)
    path, begun = setting.scratch / "model", time.perf_counter()
    # a CPU gathers dense experts in float32 only
    write(path, config, precision, mx.float32 if setting.rehearsal else mx.bfloat16)
    found: dict = {"precision": precision, "write_seconds": time.perf_counter() - begun}
    _free()
    begun = time.perf_counter()
    model = load_model(path, read_config(path))
    join_products(model)
    found["load_seconds"] = time.perf_counter() - begun
    prompts = measure.random_prompts(model, 1, prompt)
    job = measure.Workload(prompts, canvases=3, steps=steps)
    begun = time.perf_counter()
    measure.run(model, job)
    found["first_run_seconds"] = time.perf_counter() - begun  # makes its kernels
    trials = [measure.run(model, job, seed) for seed in range(3)]
    found["trial"] = asdict(measure.Trial.median(trials))
    found["parts"] = asdict(measure.dissect(model, replace(job, canvases=1)))
    found["roofline"] = measure.roofline(model, job)
    del model
    _free()
    if importlib.util.find_spec("mlx_vlm") is None:
        return found | {"beside": "mlx-vlm is not installed"}
    return found | {"beside": side_by_side(path, prompts[0], steps)}


def side_by_side(path: Path, prompt: list[int], steps: int) -> dict:
    """One canvas each of ours and mlx-vlm's, one engine loaded at a time."""
    found = {}
    theirs = partial(peer.theirs, tower=False)
    engines = {"ours": (peer.ours, path), "mlx-vlm": (theirs, _with_tower(path))}
    for name, (make, folder) in engines.items():
        run = make(str(folder), prompt, steps)
        run()
        runs = [run() for _ in range(3)]
        found[name] = {
            "prefill_tps": len(prompt) / statistics.median(r.prefill for r in runs),
            "step_seconds": statistics.median(r.denoise for r in runs) / steps,
            "peak_bytes": max(r.peak for r in runs),
        }
        del run, runs
        _free()
    ratio = found["ours"]["step_seconds"] / found["mlx-vlm"]["step_seconds"]
    return found | {"steps": steps, "ours_over_theirs": ratio}


def _with_tower(path: Path) -> Path:
    """The same files for an engine that must have a vision tower: the smallest."""
    other = path.with_name("with_tower")
    other.mkdir()
    for file in path.iterdir():
        (other / file.name).symlink_to(file)
    (other / "config.json").unlink()
    raw = json.loads((path / "config.json").read_text())
    write_json(other / "config.json", raw | {"vision_config": TOWER})
    return other


def transformers(setting: Setting) -> dict:
    """transformers in bfloat16 on torch: seconds of a step and of the prefill.

    Timed as two whole `generate` of few and of more steps, whose difference is steps.
    """
    import torch
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    config = config_tiny() if setting.rehearsal else config_26b()
    few, more, prompt = (1, 3, 40) if setting.rehearsal else (4, 20, 8192)
    raw = released_config(config, None, mx.bfloat16) | {"vision_config": TOWER}
    with torch.device(setting.torch_device):
        model = DiffusionGemmaForBlockDiffusion._from_config(
            DiffusionGemmaConfig.from_dict(raw), dtype=torch.bfloat16
        ).eval()
        ids = torch.randint(10, config.vocab_size, (1, prompt))

    def seconds(steps: int) -> float:
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        begun = time.perf_counter()
        model.generate(
            ids,
            max_new_tokens=config.canvas_length,
            max_denoising_steps=steps,
            confidence_threshold=1e-9,
            stability_threshold=more,
            eos_token_id=config.vocab_size - 1,
        )
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        return time.perf_counter() - begun

    seconds(few)
    short, long = (statistics.median(seconds(n) for _ in range(3)) for n in (few, more))
    step = (long - short) / (more - few)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "step_seconds": step,
        "prefill_seconds": short - few * step,
        "peak_bytes": peak,
        "attention": model.config._attn_implementation,
    }


def _free() -> None:
    """Give back what a model held that nobody uses any more."""
    gc.collect()  # a model and its compiled steps hold one another
    mx.clear_cache()


def write(path: Path, config: ModelConfig, precision: str, dtype: mx.Dtype) -> None:
    """A checkpoint of that shape and precision, every weight made on the device."""
    coded, recipe = PRECISIONS[precision]
    device = backends.current()
    apart = type(device)(replace(device.choices, product_rows=1))
    with backends.using(apart):  # layers as on disk
        model = synthetic_model(
            config, quantization=coded, recipe=recipe, dtype=dtype, seed=0
        )
    path.mkdir()
    whole = None if coded is None else _map(config, coded, recipe)
    write_json(path / "config.json", released_config(config, whole, dtype))
    _write_shards(path, model)


def _map(
    config: ModelConfig, coded: Quantization, recipe: str
) -> QuantizationMap | None:
    """How each layer is coded, by its path on disk."""
    overrides = {}
    for name, shape in expected_shapes(config).items():
        if quantizable(name, shape):
            layer = layer_path(name.removesuffix(".weight"))
            chosen = RECIPES[recipe](layer, coded).fit_to_shape(shape)
            if chosen is not None and chosen != coded:
                overrides[layer] = chosen
    return QuantizationMap(coded, overrides)


def _write_shards(path: Path, model: DiffusionGemma) -> None:
    parameters = tree_flatten(model.parameters())
    assert isinstance(parameters, list)
    coded = {name.rpartition(".")[0] for name, _ in parameters if "scales" in name}
    shards: list[dict[str, mx.array]] = [{}]
    for name, array in parameters:
        layer, _, part = name.rpartition(".")
        stored = f"{layer_path(layer)}.{part}" if layer in coded else disk_name(name)
        if sum(a.nbytes for a in shards[-1].values()) + array.nbytes > SHARD:
            shards.append({})
        shards[-1][stored] = array
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        mx.save_safetensors(str(path / file), shard, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(path / INDEX, {"metadata": {}, "weight_map": weight_map})
