"""Adapter folders with random weights, as `mlx_dgemma.lora` and PEFT write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.adapters.lora import TARGETS, LoRA, shapes
from mlx_dgemma.checkpoint.config import ModelConfig
from mlx_dgemma.checkpoint.weights import expected_shapes

EVERY = LoRA(
    rank=3, scale=0.7, keys=tuple(k for keys in TARGETS.values() for k in keys)
)
SMALL = LoRA(rank=2, scale=1.5, num_layers=2, keys=("mlp.up_proj", "experts.down_proj"))
PREFIX = "base_model.model.model."
STACKS = {"decoder": "decoder.", "encoder": "encoder.language_model."}
Factors = dict[str, tuple[np.ndarray, np.ndarray]]  # path -> A (r, in), B (out, r)


def write_adapter(
    folder: Path, config: ModelConfig, lora: LoRA = EVERY, *, seed: int = 0
) -> Path:
    """One of ours that clearly changes what the model says."""
    rng = np.random.default_rng(seed)
    weights = {
        name: mx.array(rng.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5)
        for name, shape in shapes(config, lora).items()
    }
    adapters.save(folder, weights, adapters.config_of(lora, lora.num_layers))
    return folder


def factors(
    config: ModelConfig, paths: tuple[str, ...], *, rank: int = 3, seed: int = 0
) -> Factors:
    """Random A and B of some layers, by their path in our model."""
    rng = np.random.default_rng(seed)
    found = {}
    for path in paths:
        outputs, inputs = expected_shapes(config)[f"{path}.weight"]
        a = rng.normal(size=(rank, inputs)) / inputs**0.5
        b = rng.normal(size=(outputs, rank)) / rank**0.5
        found[path] = a.astype(np.float32), b.astype(np.float32)
    return found


def write_peft(
    folder: Path,
    modes: Mapping[str, Factors],
    *,
    more: Mapping[str, mx.array] | None = None,
    **config: Any,
) -> Path:
    """A folder as PEFT saves it; modes are "decoder" and "encoder"."""
    folder.mkdir(parents=True)
    tensors: dict[str, mx.array] = {}
    for mode, layers in modes.items():
        for path, pair in layers.items():
            name = f"{PREFIX}{STACKS[mode]}{path}"
            for side, array in zip("AB", pair, strict=True):
                tensors[f"{name}.lora_{side}.weight"] = mx.array(array)
    tensors |= more or {}
    metadata = {"format": "pt"}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, metadata)
    written = WRITTEN | config
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2))
    return folder


# what PEFT 0.21 writes for a plain adapter
WRITTEN: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "DiffusionGemmaForBlockDiffusion"},
    "base_model_name_or_path": "google/diffusiongemma-26B-A4B-it",
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 3,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}
WRITTEN |= {key: {} for key in ("alpha_pattern", "loftq_config", "rank_pattern")}
WRITTEN |= dict.fromkeys("fan_in_fan_out lora_bias use_dora use_rslora".split(), False)
WRITTEN |= dict.fromkeys(
    "corda_config eva_config layers_to_transform megatron_config modules_to_save "
    "target_parameters revision "
    "trainable_token_indices use_bdlora velora_config".split()
)
