"""Write small checkpoints of the real architecture, as Hugging Face folders.

    python convert/make_tiny.py --out DIR                  random weights, 1.2 MB
    python convert/make_tiny.py --out DIR --gigabytes 3    the same, large, in shards
    python convert/make_tiny.py --out DIR --train          `sudoku4`, trained

The random weights are drawn so that outputs are well conditioned (the residual
stream dominates every branch) and yet every formula shows: no two norms, scales or
layer scalars are alike, routing is decided clearly, attention is neither flat nor hard.
"""

import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
import train_sudoku
from click.core import ParameterSource
from safetensors.torch import save_file
from tiny_config import generation_config, release_config, write_config, write_json
from tiny_tokenizer import write_tokenizer

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BLOCK = 1 << 22  # random numbers drawn at once: bounds the memory of a large tensor


def _layer_shapes(text: dict, kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, experts = text["hidden_size"], text["num_experts"]
    wide, narrow = text["intermediate_size"], text["moe_intermediate_size"]
    full = kind == "full_attention"
    head = text["global_head_dim" if full else "head_dim"]
    kv_heads = text["num_key_value_heads"]
    if full and text["num_global_key_value_heads"] is not None:
        kv_heads = text["num_global_key_value_heads"]
    queries = text["num_attention_heads"] * head
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield f"{norm}_layernorm.weight", (hidden,)
    for norm in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1"):
        yield f"{norm}.weight", (hidden,)
    yield "post_feedforward_layernorm_2.weight", (hidden,)
    yield "layer_scalar", (1,)
    yield "self_attn.q_proj.weight", (queries, hidden)
    yield "self_attn.k_proj.weight", (kv_heads * head, hidden)
    if not full:  # full attention takes its values from k_proj
        yield "self_attn.v_proj.weight", (kv_heads * head, hidden)
    yield "self_attn.o_proj.weight", (hidden, queries)
    yield "self_attn.q_norm.weight", (head,)
    yield "self_attn.k_norm.weight", (head,)
    yield "mlp.gate_proj.weight", (wide, hidden)
    yield "mlp.up_proj.weight", (wide, hidden)
    yield "mlp.down_proj.weight", (hidden, wide)
    yield "router.proj.weight", (experts, hidden)
    yield "router.scale", (hidden,)
    yield "router.per_expert_scale", (experts,)
    yield "experts.gate_up_proj", (experts, 2 * narrow, hidden)
    yield "experts.down_proj", (experts, hidden, narrow)


def _vision_shapes(vision: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide, head = (
        vision[key] for key in ("hidden_size", "intermediate_size", "head_dim")
    )
    queries = vision["num_attention_heads"] * head
    keys = vision["num_key_value_heads"] * head
    yield "patch_embedder.input_proj.weight", (hidden, 3 * vision["patch_size"] ** 2)
    positions = (2, vision["position_embedding_size"], hidden)
    yield "patch_embedder.position_embedding_table", positions
    if vision["standardize"]:
        yield "std_bias", (hidden,)
        yield "std_scale", (hidden,)
    maps = [f"self_attn.{p}_proj" for p in "qkvo"]
    maps += [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    for i in range(vision["num_hidden_layers"]):
        layer = f"encoder.layers.{i}."
        if vision["use_clipped_linears"]:
            for limit in ("input_min", "input_max", "output_min", "output_max"):
                yield from ((f"{layer}{name}.{limit}", ()) for name in maps)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{layer}{norm}_layernorm.weight", (hidden,)
        yield f"{layer}self_attn.q_proj.linear.weight", (queries, hidden)
        yield f"{layer}self_attn.k_proj.linear.weight", (keys, hidden)
        yield f"{layer}self_attn.v_proj.linear.weight", (keys, hidden)
        yield f"{layer}self_attn.o_proj.linear.weight", (hidden, queries)
        yield f"{layer}self_attn.q_norm.weight", (head,)
        yield f"{layer}self_attn.k_norm.weight", (head,)
        yield f"{layer}mlp.gate_proj.linear.weight", (wide, hidden)
        yield f"{layer}mlp.up_proj.linear.weight", (wide, hidden)
        yield f"{layer}mlp.down_proj.linear.weight", (hidden, wide)


def tensor_shapes(config: dict, text_only: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a checkpoint with `config` (release layout) has."""
    text, vision = config["text_config"], config["vision_config"]
    hidden, wide = text["hidden_size"], text["intermediate_size"]
    condition = "model.decoder.self_conditioning."
    shapes = {
        "model.decoder.embed_tokens.weight": (text["vocab_size"], hidden),
        "model.decoder.norm.weight": (hidden,),
        f"{condition}pre_norm.weight": (hidden,),
        f"{condition}gate_proj.weight": (wide, hidden),
        f"{condition}up_proj.weight": (wide, hidden),
        f"{condition}down_proj.weight": (hidden, wide),
    }
    for i, kind in enumerate(text["layer_types"]):
        for name, shape in _layer_shapes(text, kind):
            shapes[f"model.decoder.layers.{i}.{name}"] = shape
        shapes[f"model.encoder.language_model.layers.{i}.layer_scalar"] = (1,)
    if not text_only:
        projection = "model.encoder.embed_vision.embedding_projection.weight"
        shapes[projection] = (hidden, vision["hidden_size"])
        for name, shape in _vision_shapes(vision):
            shapes[f"model.encoder.vision_tower.{name}"] = shape
    return shapes


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
    """The weight `name`, of `shape`: depends on the name and the seed alone."""
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


def write_weights(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    *,
    dtype: str,
    seed: int,
    shard_bytes: int | None,
) -> None:
    """Draw and write the tensors, one file in memory at a time, index beside shards."""
    width = DTYPES[dtype].itemsize
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * width
        if shard_bytes is not None:
            if shards[-1] and size > room:
                shards.append([])
                room = shard_bytes
            room -= size
        shards[-1].append(name)
    index = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        if shard_bytes is None:
            file = "model.safetensors"
        tensors = {
            name: random_tensor(name, shapes[name], seed, DTYPES[dtype])
            for name in names
        }
        save_file(tensors, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if shard_bytes is not None:
        total = sum(math.prod(shape) for shape in shapes.values()) * width
        document = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(path / "model.safetensors.index.json", document)


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

    `layout` is config.json's: "release" (`global_head_dim`,
    `num_global_key_value_heads`) or "transformers" (`per_layer_config`). `text` and
    `vision` override TEXT and VISION. `shard_bytes` splits the weights, with an index.
    `text_only` leaves out the vision tower and its config. The same seed gives the same
    weights whatever the layout, shards or dtype. Raises FileExistsError, ValueError.
    """
    if layout not in ("release", "transformers"):
        raise ValueError(f"layout must be release or transformers, not {layout!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    config = release_config(text, vision, canvas_length, dtype)
    path = Path(path)
    path.mkdir(parents=True)
    write_config(path, config, layout, text_only)
    write_json(path / "generation_config.json", generation_config(canvas_length))
    write_tokenizer(path)
    write_weights(
        path,
        tensor_shapes(config, text_only),
        dtype=dtype,
        seed=seed,
        shard_bytes=shard_bytes,
    )
    return path


def large_text(gigabytes: float) -> dict:
    """`text` overrides for a bfloat16 checkpoint of about `gigabytes` GB."""
    text = {
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
    sizes = []
    for layers in (1, 2):
        config = release_config(text | {"num_hidden_layers": layers})
        sizes.append(2 * sum(map(math.prod, tensor_shapes(config).values())))
    layers = 1 + round((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0]))
    return text | {"num_hidden_layers": max(layers, 1)}


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
@click.option("--train", is_flag=True, help="Train sudoku4 instead: about an hour.")
@click.option("--steps", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--minutes", type=float, help="End training by the clock, annealed.")
@click.option("--log", type=click.File("w", lazy=False), default="-", help="[stdout]")
@click.pass_context
def main(context, out, seed, train, steps, batch, minutes, log, **random):
    """Write a small checkpoint of the real architecture to the new folder OUT."""
    if out.exists():
        raise click.ClickException(f"{out} exists; choose another --out or remove it")
    only = ("layout", "dtype", "text_only", "shard_mb", "gigabytes")
    mixed = only if train else ("steps", "batch", "minutes", "log")
    for name in mixed:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = "--" + name.replace("_", "-")
            verb = "does not go with" if train else "needs"
            raise click.UsageError(f"{flag} {verb} --train")
    if train:

        def say(line: str) -> None:
            click.echo(line, file=log)

        train_sudoku.train(
            out, steps=steps, batch=batch, seed=seed, minutes=minutes, log=say
        )
    else:
        _make_random(out, seed, **random)
    click.echo(str(out))


def _make_random(out, seed, layout, dtype, text_only, shard_mb, gigabytes):
    if gigabytes is not None:
        shard_mb = shard_mb or 500
    make_checkpoint(
        out,
        layout=layout,
        dtype=dtype or ("float32" if gigabytes is None else "bfloat16"),
        seed=seed,
        shard_bytes=shard_mb and shard_mb * 1_000_000,
        text_only=text_only,
        text=None if gigabytes is None else large_text(gigabytes),
    )


if __name__ == "__main__":
    main()
