"""A tiny checkpoint that can see: one character a token, and images among them."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image
from tiny import tiny_config, write_tiny

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.vision import ROOT, read_vision, vision_shapes

VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "patch_size": 4,
    "position_embedding_size": 840,
}
# ids of the tiny vocabulary, so written "0", "1" and "2"
TOKENS = {"boi_token_id": 7, "eoi_token_id": 8, "image_token_id": 9}
TEMPLATE = (
    "<bos>{% for m in messages %}<|turn>{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ '2' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}<turn|>"
    "{% endfor %}{% if add_generation_prompt %}<|turn>{% endif %}"
)


def write_tiny_vision(folder: Path, vision: dict | None = None, **text) -> Path:
    """The tiny checkpoint with a small tower; pictures take at most 70 soft tokens."""
    write_tiny(folder, **text)
    raw = tiny_config(**text) | {"vision_config": vision or VISION} | TOKENS
    (folder / "config.json").write_text(json.dumps(raw))
    processor = {"image_processor": {"max_soft_tokens": 70, "patch_size": 4}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config, rng, weights = read_config(folder), np.random.default_rng(1), {}
    shapes = vision_shapes(read_vision(config, "config.json"), config.hidden_size)
    for name, shape in shapes.items():
        values = rng.normal(size=shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)
        if name.endswith(("_min", "_max")):  # limits that some values reach
            values = (1 + np.abs(values)) * (-1 if name.endswith("_min") else 1)
        elif "norm" in name or "scale" in name:
            values = 1 + values
        weights[ROOT + name] = mx.array(values.astype(np.float32))
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, weights | dict(mx.load(file)))
    return folder


def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def asked(*parts) -> list[dict]:
    """One message of these parts."""
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def picture(source) -> dict:
    return {"type": "image", "image": source}
