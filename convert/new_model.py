"""Write an untrained checkpoint for the toy tasks, to be trained from scratch.

    python convert/new_model.py --out DIR [--canvas 32] [--width 96] [--layers 3] …

The architecture is the release's, small, with the toys' 32 tokens; weights are drawn
as transformers draws them. Needs no torch.
"""

import json
import zlib
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from tiny_tokenizer import BOS, EOS, PAD, TURN_END, VOCAB_SIZE, write_tokenizer

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.weights import disk_name, expected_shapes

DEVIATION = 0.02  # of every drawn weight: transformers' initializer_range


def text_config(width: int, layers: int, experts: int, window: int) -> dict:
    """text_config of a toy: every fourth layer and the last attend to everything."""
    kinds = [
        "full_attention" if i % 4 == 3 or i == layers - 1 else "sliding_attention"
        for i in range(layers)
    ]
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "num_global_key_value_heads": 1,
        "global_head_dim": width // 2,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width // 2,
        "num_experts": experts,
        "top_k_experts": 2,
        "sliding_window": window,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
    }


def initial(name: str, shape: tuple[int, ...], seed: int) -> mx.array:
    """The untrained parameter of that name."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("_scalar"):
        values = rng.uniform(0.8, 1.2, shape)  # not trained; unlike per mode
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        # heads have unit RMS and attention no scale: start it soft, not one-hot
        values = np.full(shape, shape[0] ** -0.25)
    elif "norm" in name or name.endswith("scale"):
        values = np.ones(shape)
    else:
        values = rng.normal(0, DEVIATION, shape)
    return mx.array(values.astype(np.float32))


def write_new(
    out: Path,
    *,
    canvas: int = 32,
    width: int = 96,
    layers: int = 3,
    experts: int = 4,
    window: int = 16,
    steps: int = 24,
    seed: int = 0,
) -> Path:
    """Write the checkpoint to the new folder `out`. Raises FileExistsError."""
    out.mkdir(parents=True)
    config = {
        "model_type": "diffusion_gemma",
        "canvas_length": canvas,
        "dtype": "float32",
        "tie_word_embeddings": True,
        "eos_token_id": [EOS, TURN_END],
        "text_config": text_config(width, layers, experts, window),
    }
    generation = {
        "bos_token_id": BOS,
        "eos_token_id": [EOS, TURN_END],
        "pad_token_id": PAD,
        "max_new_tokens": canvas,
        "max_denoising_steps": steps,
        "confidence_threshold": 0.005,
        "stability_threshold": 1,
        "t_max": 0.8,
        "t_min": 0.4,
        "sampler_config": {
            "_cls_name": "EntropyBoundSamplerConfig",
            "entropy_bound": 0.1,
        },
    }
    for file, document in (("config", config), ("generation_config", generation)):
        text = json.dumps(document, indent=2) + "\n"
        (out / f"{file}.json").write_text(text)
    write_tokenizer(out)
    weights = {
        disk_name(name): initial(name, shape, seed)
        for name, shape in expected_shapes(read_config(out)).items()
    }
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    return out


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path, exists=False), required=True)
@click.option("--canvas", type=click.IntRange(1), default=32, help="Canvas length.")
@click.option("--width", type=click.IntRange(32), default=96)
@click.option("--layers", type=click.IntRange(1), default=3)
@click.option("--experts", type=click.IntRange(2), default=4)
@click.option("--window", type=click.IntRange(2), default=16)
@click.option("--steps", type=click.IntRange(1), default=24, help="Step cap.")
@click.option("--seed", type=int, default=0)
def main(out: Path, **given: int) -> None:
    """Write an untrained toy checkpoint to the new folder OUT."""
    if out.exists():
        raise click.ClickException(f"{out} exists; choose another --out or remove it")
    click.echo(str(write_new(out, **given)))


if __name__ == "__main__":
    main()
