"""Write an untrained checkpoint for the toy tasks, to be trained from scratch.

    python convert/new_model.py --out DIR [--canvas 32] [--width 96] [--layers 3] …

The architecture is the release's, small, with 32 tokens; weights are initialised as
transformers initialises them. Needs no torch.
"""

import zlib
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from toy import release_config, write_files

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.weights import disk_name, expected_shapes

DEVIATION = 0.02  # of every drawn weight: transformers' initializer_range


def initial_weight(name: str, shape: tuple[int, ...], seed: int) -> mx.array:
    """Return the untrained parameter of that name."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("_scalar"):
        values = rng.uniform(0.8, 1.2, shape)  # not trained; differs per mode
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        # heads have unit RMS and attention no scale: start it soft, not one-hot
        values = np.full(shape, shape[0] ** -0.25)
    elif "norm" in name or name.endswith("scale"):
        values = np.ones(shape)
    else:
        values = rng.normal(0, DEVIATION, shape)
    return mx.array(values.astype(np.float32))


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--canvas", type=click.IntRange(1), default=32, help="Canvas length.")
@click.option("--width", type=click.IntRange(32), default=96)
@click.option("--layers", type=click.IntRange(1), default=3)
@click.option("--experts", type=click.IntRange(2), default=4)
@click.option("--window", type=click.IntRange(2), default=16)
@click.option("--steps", type=click.IntRange(1), default=24, help="Step limit.")
@click.option("--seed", type=int, default=0)
def main(out, canvas, width, layers, experts, window, steps, seed):
    """Write an untrained toy checkpoint to the new folder OUT."""
    if out.exists():
        raise click.ClickException(f"{out} exists; choose another --out or remove it")
    out.mkdir(parents=True)
    text = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "head_dim": width // 4,
        "global_head_dim": width // 2,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width // 2,
        "num_experts": experts,
        "sliding_window": window,
    }
    config = release_config(text, canvas_length=canvas)
    write_files(out, config, text_only=True, steps=steps)
    weights = {
        disk_name(name): initial_weight(name, shape, seed)
        for name, shape in expected_shapes(read_config(out)).items()
    }
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    click.echo(str(out))


if __name__ == "__main__":
    main()
