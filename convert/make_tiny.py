"""Write small checkpoints of the real architecture, as Hugging Face folders.

    python convert/make_tiny.py --out DIR                  random weights, 1.2 MB
    python convert/make_tiny.py --out DIR --gigabytes 3    the same, large, in shards

The random weights are well conditioned (the residual stream dominates every branch)
and yet every formula shows: no two norms, scales or layer scalars are alike, routing
is clear, attention is neither flat nor one-hot.
"""

import math
import re
import zlib
from pathlib import Path

import click
import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from toy import release_config, write_files
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BLOCK = 1 << 22  # random numbers drawn at once: bounds the memory of a large tensor

# the text_config of `--gigabytes`, which chooses the number of layers
LARGE = {
    "vocab_size": 131_072,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_global_key_value_heads": 2,
    "global_head_dim": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "top_k_experts": 8,
    "sliding_window": 1024,
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that transformers stores for `config`."""
    with torch.device("meta"):  # no memory is allocated
        model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(config))
    tied = model.all_tied_weights_keys
    stored = model.state_dict().items()
    return {name: tuple(t.shape) for name, t in stored if name not in tied}


# First match decides. "normal" takes the scale of its fan-in, times the number.
RULES = [
    (r"decoder\.norm\.weight", "signed", 0.7, 1.3),  # or every token predicts itself
    (r"post_(attention|feedforward)_layernorm\.weight", "uniform", 0.05, 0.2),
    (r"\.[qk]_norm\.weight", "head", 0.7, 1.3),
    (r"layer_scalar", "uniform", 0.8, 1.2),
    (r"router\.(scale|per_expert_scale)|std_scale", "uniform", 0.5, 1.5),
    (r"std_bias", "uniform", -0.5, 0.5),
    (r"(in|out)put_min", "uniform", -1.5, -0.8),
    (r"(in|out)put_max", "uniform", 0.8, 1.5),
    (r"norm(_\d)?\.weight", "uniform", 0.7, 1.3),
    (r"router\.proj\.weight", "normal", 2.0, "unscaled"),
    (r"embed_tokens\.weight", "normal", 2.5, None),
    (r"position_embedding_table", "normal", 0.5, "unscaled"),
    (r"", "normal", 1.0, None),
]


def random_tensor(
    name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> torch.Tensor:
    """Draw the weight `name`; it depends on the name, shape and seed alone."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    _, kind, low, high = next(rule for rule in RULES if re.search(rule[0], name))
    if kind == "normal":
        scale = low if high == "unscaled" else low * shape[-1] ** -0.5
        flat = torch.empty(math.prod(shape), dtype=dtype)
        for start in range(0, len(flat), BLOCK):
            block = rng.standard_normal(min(BLOCK, len(flat) - start), dtype=np.float32)
            flat[start : start + BLOCK] = torch.from_numpy(block) * scale
        return flat.view(shape)
    values = rng.uniform(low, high, shape)
    if kind == "signed":
        values *= rng.choice([-1.0, 1.0], shape)
    elif kind == "head":  # q·k of unit-RMS heads then has a deviation of about 1.5
        values *= (1.5 * shape[-1] ** -0.5) ** 0.5
    return torch.tensor(values).to(dtype)


def make_checkpoint(
    path: str | Path,
    *,
    layout: str = "release",
    dtype: str = "float32",
    seed: int = 0,
    shard_bytes: int | None = None,
    text_only: bool = False,
    text: dict | None = None,
    canvas_length: int = 32,
    vision: dict | None = None,
) -> Path:
    """Write a random checkpoint to the new folder `path` and return it.

    `layout` is config.json's: "release" (`global_head_dim`) or "transformers"
    (`per_layer_config`). `text` and `vision` override the defaults of toy.py.
    `shard_bytes` splits the weights, with an index. `text_only` leaves out the vision
    tower. A seed gives the same weights in any layout and shards. Raises
    FileExistsError, ValueError for keys that the release lacks.
    """
    config = release_config(text, vision, canvas_length, dtype)
    path = Path(path)
    path.mkdir(parents=True)
    write_files(path, config, layout=layout, text_only=text_only)
    weights = {
        name: random_tensor(name, shape, seed, DTYPES[dtype])
        for name, shape in tensor_shapes(config).items()
        if not (text_only and "vision" in name)
    }
    save_torch_state_dict(weights, path, max_shard_size=shard_bytes or 1 << 60)
    return path


def large_text(gigabytes: float) -> dict:
    """Return `text` overrides for a bfloat16 checkpoint of about `gigabytes` GB."""
    one, two = (
        2 * sum(map(math.prod, tensor_shapes(release_config(config)).values()))
        for config in (LARGE | {"num_hidden_layers": n} for n in (1, 2))
    )
    layers = 1 + round((gigabytes * 1e9 - one) / (two - one))
    return LARGE | {"num_hidden_layers": max(layers, 1)}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option(
    "--layout", type=click.Choice(["release", "transformers"]), default="release"
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="[float32, or bfloat16]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--text-only", is_flag=True, help="Leave out the vision tower.")
@click.option("--shard-mb", type=click.IntRange(min=1), help="[500 when large]")
@click.option("--gigabytes", type=click.FloatRange(min=0.5), help="A large one.")
def main(out, layout, dtype, seed, text_only, shard_mb, gigabytes):
    """Write a small random checkpoint to the new folder OUT."""
    if out.exists():
        raise click.ClickException(f"{out} exists; choose another --out or remove it")
    text = None
    if gigabytes is not None:
        dtype, shard_mb = dtype or "bfloat16", shard_mb or 500
        text = large_text(gigabytes)
    make_checkpoint(
        out,
        layout=layout,
        dtype=dtype or "float32",
        seed=seed,
        shard_bytes=shard_mb and shard_mb * 1_000_000,
        text_only=text_only,
        text=text,
    )
    click.echo(str(out))


if __name__ == "__main__":
    main()
