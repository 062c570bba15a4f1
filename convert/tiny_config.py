"""Configurations of small checkpoints, in the release's layout or transformers'."""

import json
from pathlib import Path

from tiny_tokenizer import (
    BOS,
    EOS,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    PAD,
    TURN_END,
    VOCAB_SIZE,
)

# The release's keys with small sizes.
TEXT = {
    "model_type": "diffusion_gemma_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "layer_types": None,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_global_key_value_heads": 1,
    "global_head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "top_k_experts": 2,
    "sliding_window": 8,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
    "use_bidirectional_attention": "vision",
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 64,
    "default_output_length": 280,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
    "standardize": True,
    "use_clipped_linears": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 131_072,
}


def _override(defaults: dict, given: dict | None, what: str) -> dict:
    if unknown := sorted(set(given or {}) - set(defaults)):
        raise ValueError(f"unknown {what} keys: {', '.join(unknown)}")
    return defaults | (given or {})


def release_config(
    text: dict | None = None,
    vision: dict | None = None,
    canvas_length: int = 32,
    dtype: str = "float32",
) -> dict:
    """Return config.json in the release's layout; `text`, `vision` override defaults.

    Without `layer_types` every fourth layer and the last have full attention; with
    them `num_hidden_layers` follows. Raises ValueError for keys the release lacks.
    """
    config = _override(TEXT, text, "text_config")
    if config["layer_types"] is None:
        last = config["num_hidden_layers"] - 1
        config["layer_types"] = [
            "full_attention" if i % 4 == 3 or i == last else "sliding_attention"
            for i in range(last + 1)
        ]
    config["num_hidden_layers"] = len(config["layer_types"])
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": canvas_length,
        "dtype": dtype,
        "boi_token_id": IMAGE_START,
        "eoi_token_id": IMAGE_END,
        "image_token_id": IMAGE,
        "eos_token_id": [EOS, TURN_END],
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "vision_soft_tokens_per_image": 280,
        "text_config": config | {"dtype": dtype},
        "vision_config": _override(VISION, vision, "vision_config") | {"dtype": dtype},
    }


def write_json(file: Path, document: dict) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n")


def write_config(path: Path, config: dict, layout: str, text_only: bool) -> None:
    """Write `config`, which is in the release's layout, as config.json in `layout`."""
    if layout == "transformers":
        from transformers import DiffusionGemmaConfig

        DiffusionGemmaConfig.from_dict(config).save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
    if text_only:
        config = {key: value for key, value in config.items() if key != "vision_config"}
    write_json(path / "config.json", config)


def generation_config(canvas_length: int, steps: int = 48) -> dict:
    """Return generation_config.json: the release's sampler, at most `steps` steps."""
    return {
        "bos_token_id": BOS,
        "confidence_threshold": 0.005,
        "eos_token_id": [EOS, TURN_END],
        "max_denoising_steps": steps,
        "max_new_tokens": canvas_length,
        "pad_token_id": PAD,
        "sampler_config": {
            "_cls_name": "EntropyBoundSamplerConfig",
            "entropy_bound": 0.1,
        },
        "stability_threshold": 1,
        "t_max": 0.8,
        "t_min": 0.4,
    }
