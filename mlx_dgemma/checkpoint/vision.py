"""The vision tower of a checkpoint: its configuration, names, shapes and weights.

It is read when the first image comes.
"""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from ..files.json import Keys
from ..files.safetensors import Expected, check_tensors, load_tensors
from .config import MAX_HEAD_DIM, MAX_WIDTH, ModelConfig
from .weights import VISION, read_tensors

ROOT = "model.encoder."
LIMITS = ("input_min", "input_max", "output_min", "output_max")
ACTIVATION = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Every number the vision tower is built from.

    patch        side of a patch in pixels; a patch is 3 · patch² numbers
    pooling      pooling² patches become one soft token
    positions    size of the position table along each axis
    standardize  whether soft tokens are shifted and scaled at the end
    clipped      whether inputs and outputs of linear maps are clipped
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    patch: int
    pooling: int
    positions: int
    standardize: bool
    clipped: bool


@dataclass(frozen=True)
class ImageTokens:
    """Token ids of an image in a prompt: begin, one per soft token, end."""

    image: int
    begin: int
    end: int


def read_vision(config: ModelConfig, where: str) -> VisionConfig:
    """Return `vision_config` of config.json. Raises ConfigError naming the key."""
    top = Keys(config.raw, where)
    keys = top.mapping("vision_config")
    if keys is None:
        raise top.refuse("vision_config", "is missing; this checkpoint reads text only")
    keys.one_of("model_type", "gemma4_vision", ("gemma4_vision",))
    keys.one_of("hidden_activation", ACTIVATION, (ACTIVATION,))
    keys.one_of("attention_bias", False, (False,))
    theta = 100.0
    if rope := keys.mapping("rope_parameters"):
        rope.one_of("rope_type", "axial", ("axial", "default"))
        theta = rope.number("rope_theta", theta)
    heads = keys.integer("num_attention_heads", 12, 1, MAX_WIDTH)
    vision = VisionConfig(
        hidden_size=keys.integer("hidden_size", 768, 1, MAX_WIDTH),
        intermediate_size=keys.integer("intermediate_size", 3072, 1, MAX_WIDTH),
        layers=keys.integer("num_hidden_layers", 16, 1, 1000),
        heads=heads,
        kv_heads=keys.integer("num_key_value_heads", heads, 1, MAX_WIDTH),
        head_dim=keys.integer("head_dim", 64, 4, MAX_HEAD_DIM),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=keys.number("rope_theta", theta),
        patch=keys.integer("patch_size", 16, 1, 1024),
        pooling=keys.integer("pooling_kernel_size", 3, 1, 64),
        positions=keys.integer("position_embedding_size", 10240, 1, MAX_WIDTH),
        standardize=keys.boolean("standardize"),
        clipped=keys.boolean("use_clipped_linears"),
    )
    if vision.head_dim % 4:
        raise keys.refuse("head_dim", f"is {vision.head_dim}; must be a multiple of 4")
    if vision.heads % vision.kv_heads:
        why = f"is {vision.heads}, no multiple of num_key_value_heads {vision.kv_heads}"
        raise keys.refuse("num_attention_heads", why)
    return vision


def read_image_tokens(config: ModelConfig, where: str) -> ImageTokens:
    """Return the ids that stand for images. Raises ConfigError naming the key."""
    top, last = Keys(config.raw, where), config.vocab_size - 1
    return ImageTokens(
        image=top.integer("image_token_id", 258_880, 0, last),
        begin=top.integer("boi_token_id", 255_999, 0, last),
        end=top.integer("eoi_token_id", 258_882, 0, last),
    )


def vision_shapes(vision: VisionConfig, width: int) -> dict[str, tuple[int, ...]]:
    """Return every parameter of the tower and its projection to `width`, with shapes.

    Names are those on disk without `model.encoder.`.
    """
    hidden, inner = vision.hidden_size, vision.intermediate_size
    queries, keys = vision.heads * vision.head_dim, vision.kv_heads * vision.head_dim
    linear = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layer: dict[str, tuple[int, ...]] = {}
    for name, shape in linear.items():
        layer[f"{name}.linear.weight"] = shape
        if vision.clipped:
            layer |= {f"{name}.{limit}": () for limit in LIMITS}
    layer |= {f"self_attn.{n}_norm.weight": (vision.head_dim,) for n in "qk"}
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        layer[f"{norm}_layernorm.weight"] = (hidden,)
    tower: dict[str, tuple[int, ...]] = {
        "patch_embedder.input_proj.weight": (hidden, 3 * vision.patch**2),
        "patch_embedder.position_embedding_table": (2, vision.positions, hidden),
    }
    if vision.standardize:
        tower |= dict.fromkeys(("std_bias", "std_scale"), (hidden,))
    for index in range(vision.layers):
        tower |= {f"encoder.layers.{index}.{n}": s for n, s in layer.items()}
    shapes = {f"vision_tower.{name}": shape for name, shape in tower.items()}
    return shapes | {"embed_vision.embedding_projection.weight": (width, hidden)}


def read_vision_weights(
    folder: Path, shapes: dict[str, tuple[int, ...]]
) -> list[tuple[str, mx.array]]:
    """Return the tower's parameters, unevaluated.

    Raises CheckpointError naming tensors that are missing, unexpected, of the wrong
    shape or dtype, or quantised.
    """
    found = {
        name.removeprefix(ROOT): info
        for name, info in read_tensors(folder).items()
        if name.startswith(VISION)
    }
    why = None if found else "holds no vision tensors, so it reads text only"
    if scales := sorted(name for name in found if name.endswith(".scales")):
        why = f"{ROOT}{scales[0]}: a quantised vision tower is not supported"
    if why is not None:
        raise CheckpointError(f"{folder}: {why}; convert it again from the release")
    expected = {name: Expected(shape) for name, shape in shapes.items()}
    check_tensors(folder, found, expected, name_of=lambda name: ROOT + name)
    return list(load_tensors(found).items())
