"""A small random checkpoint of the real architecture, written without torch."""

import json
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.weights import disk_name, expected_shapes

VOCABULARY = [
    *["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "\n", " "],
    *"0123456789abcdefghijklmno",
]
TEMPLATE = (
    "<bos>{% for m in messages %}<|turn>{{ m['content'] }}<turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn>{% endif %}"
)


def tiny_config(**text: Any) -> dict[str, Any]:
    """config.json in the release's layout; `text` overrides its text_config."""
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": 16,
        "tie_word_embeddings": True,
        "eos_token_id": [1, 4],
        "text_config": {
            "vocab_size": len(VOCABULARY),
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_global_key_value_heads": 1,
            "global_head_dim": 32,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "top_k_experts": 2,
            "sliding_window": 8,
            "final_logit_softcapping": 30.0,
        }
        | text,
    }


def write_tokenizer(folder: Path, pieces=VOCABULARY, special=VOCABULARY[:5]) -> None:
    """One token a character, written as tokenizer.json and a chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel

    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(p, special=True) for p in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> mx.array:
    """Well conditioned and different for every name: the residual dominates."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if "scalar" in name:
        values = rng.uniform(0.8, 1.2, shape)
    elif "post_" in name:
        values = rng.uniform(0.05, 0.2, shape)
    elif "norm" in name or "scale" in name:
        values = rng.uniform(0.5, 1.5, shape)
        if name == "norm.weight":  # or every token predicts itself
            values *= rng.choice([-1.0, 1.0], shape)
    elif "router" in name:
        values = rng.normal(size=shape) * 2
    else:
        values = rng.normal(size=shape) * 2 / shape[-1] ** 0.5
    return mx.array(values.astype(np.float32))


def write_tiny(folder: Path, *, seed: int = 0, **text: Any) -> Path:
    """A complete dense float32 checkpoint in `folder`, in the release's layout."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(**text)))
    config = read_config(folder)
    weights = {
        disk_name(name): random_weight(name, shape, seed)
        for name, shape in expected_shapes(config).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    write_tokenizer(folder)
    return folder
