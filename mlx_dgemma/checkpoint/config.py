"""config.json, read strictly into frozen records.

Two layouts of the text configuration exist and mean the same: the release gives the
shape of full-attention layers by `global_head_dim` and `num_global_key_value_heads`;
transformers from 5.23 writes `per_layer_config`.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..files.json import Keys, read_json
from ..settings import MAX_CANVAS_LENGTH, MAX_TOKEN

MODEL_TYPE = "diffusion_gemma"
SLIDING_PATTERN = 6  # without layer_types, every sixth layer is full
WIDTHS = (
    "hidden_size intermediate_size moe_intermediate_size num_experts top_k_experts "
    "num_attention_heads".split()
)
MAX_WIDTH = 2**20
MAX_HEAD_DIM = 4096
MAX_VOCABULARY = 2**24
# Keys that other tools write and that change nothing this package computes.
IGNORED_KEYS = frozenset(
    "architectures torch_dtype dtype transformers_version initializer_range "
    "model_type _name_or_path quantization quantization_config pad_token_id "
    "bos_token_id eos_token_id attention_dropout "
    "tie_word_embeddings vision_config audio_config use_cache "
    "vision_soft_tokens_per_image chunk_size_feed_forward is_encoder_decoder "
    "output_attentions output_hidden_states return_dict problem_type id2label "
    "label2id text_config generation_config image_token_id boi_token_id "
    "eoi_token_id eoa_token_id boa_token_id audio_token_id video_token_id "
    "enable_moe_block attention_k_eq_v".split()
)


_WARNED: dict[Any, Any] = {}  # in which `warnings` keeps what it has shown


class UnknownKeyWarning(UserWarning):
    """A configuration holds keys this package does not know."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of one kind of layer: the first `rotated` of head_dim / 2 pairs.

    Pair i is rotated by position · theta^(-2i / head_dim) / factor, the others by 0
    (transformers' "default" and "proportional" rope).
    """

    theta: float
    rotated: int
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Attention shape of one layer."""

    kind: Literal["sliding", "full"]
    head_dim: int
    kv_heads: int
    rope: Rope

    @property
    def sliding(self) -> bool:
        return self.kind == "sliding"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every number the model is built from, and the config.json they come from."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    num_attention_heads: int
    layers: tuple[LayerConfig, ...]
    sliding_window: int
    rms_norm_eps: float
    final_logit_softcapping: float
    attention_bias: bool
    canvas_length: int
    max_positions: int | None  # of a prompt and its answer; None: not said
    has_vision: bool
    raw: dict[str, Any]


def read_config(folder: Path) -> ModelConfig:
    """Return the model that a checkpoint folder declares.

    Raises ConfigError, one line naming file and key. Warns once, naming them, of
    unknown keys.
    """
    path = folder / "config.json"
    raw = read_json(path)
    top = Keys(raw, str(path))
    if raw.get("model_type") != MODEL_TYPE:
        why = f"is {raw.get('model_type')!r}; only {MODEL_TYPE!r} is supported"
        raise top.refuse("model_type", why)
    if "auto_map" in raw:
        raise top.refuse("auto_map", "asks to run remote code, which is never done")
    text = top.mapping("text_config")
    if text is None:
        raise top.refuse("text_config", "is missing")
    for keys in (top, text):
        keys.one_of("tie_word_embeddings", True, (True,))
    text.one_of("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    text.one_of("hidden_size_per_layer_input", 0, (0,))  # such layers are not built
    # "all" would make the encoder bidirectional
    text.one_of("use_bidirectional_attention", "vision", ("vision",))
    if raw["text_config"].get("final_logit_softcapping", 0) is None:
        raise text.refuse("final_logit_softcapping", "is null; it must be a number")
    layers = _layers(text)
    config = ModelConfig(
        vocab_size=text.integer("vocab_size", None, 2, MAX_VOCABULARY),
        **{key: text.integer(key, None, 1, MAX_WIDTH) for key in WIDTHS},
        layers=layers,
        # transformers keeps the last window - 1 positions; of 1 it would keep them all
        sliding_window=text.integer("sliding_window", None, 2, MAX_TOKEN),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        final_logit_softcapping=text.number("final_logit_softcapping", 30.0),
        attention_bias=text.boolean("attention_bias"),
        canvas_length=top.integer("canvas_length", 256, 1, MAX_CANVAS_LENGTH),
        max_positions=text.integer("max_position_embeddings", 0, 0, MAX_TOKEN) or None,
        has_vision=top.mapping("vision_config") is not None,
        raw=raw,
    )
    if config.top_k_experts > config.num_experts:
        why = f"is {config.top_k_experts}, above num_experts {config.num_experts}"
        raise text.refuse("top_k_experts", why)
    heads = config.num_attention_heads
    for index, layer in enumerate(layers):
        if heads % layer.kv_heads:
            own = f"the {layer.kv_heads} key/value heads of layer {index}"
            why = f"is {heads}, no multiple of {own}"
            raise text.refuse("num_attention_heads", why)
    nested = [f"text_config.{key}" for key in text.unknown(IGNORED_KEYS)]
    warn_of_unknown(str(path), top.unknown(IGNORED_KEYS) + nested)
    return config


def _layers(text: Keys) -> tuple[LayerConfig, ...]:
    count = text.integer("num_hidden_layers", None, 1, 1000)
    kv_heads = text.integer("num_key_value_heads", None, 1, MAX_WIDTH)
    full_heads = text.integer("num_global_key_value_heads", kv_heads, 1, MAX_WIDTH)
    common = text.integer("head_dim", 256, 2, MAX_HEAD_DIM), kv_heads
    full = text.integer("global_head_dim", 512, 2, MAX_HEAD_DIM), full_heads
    per_layer = _per_layer_shapes(text, count, common)
    layers = []
    for index, kind in enumerate(_layer_kinds(text, count)):
        if per_layer is not None:
            dim, heads = per_layer.get(index, common)
        else:
            dim, heads = common if kind == "sliding" else full
        if dim % 2:
            raise text.refuse("head_dim", f"is {dim} in layer {index}; must be even")
        rope = _rope(text, kind, dim)
        layers.append(LayerConfig(kind=kind, head_dim=dim, kv_heads=heads, rope=rope))
    return tuple(layers)


def _layer_kinds(text: Keys, count: int) -> list[Literal["sliding", "full"]]:
    sliding, full = "sliding_attention", "full_attention"
    names = text.array("layer_types")
    if names is None:
        names = [sliding if i % SLIDING_PATTERN else full for i in range(1, count)]
        names.append(full)
    if len(names) != count:
        why = f"names {len(names)} layers but num_hidden_layers is {count}"
        raise text.refuse("layer_types", why)
    for index, name in enumerate(names):
        if name not in (sliding, full):
            why = f"is {name!r}; supported: {sliding!r}, {full!r}"
            raise text.refuse(f"layer_types[{index}]", why)
    if names[-1] != full:
        raise text.refuse("layer_types", f"must end with {full!r}")
    return ["full" if name == full else "sliding" for name in names]


def _per_layer_shapes(
    text: Keys, count: int, common: tuple[int, int]
) -> dict[int, tuple[int, int]] | None:
    """Return `per_layer_config` as layer -> (head_dim, kv heads); None if absent."""
    keys = text.mapping("per_layer_config")
    if keys is None:
        return None
    shapes = {}
    numbers = {str(index): index for index in range(count)}
    for name, _ in keys.items():
        if name not in numbers:
            raise keys.refuse(name, f"is no layer; they are 0 to {count - 1}")
        layer = keys.mapping(name)
        if layer is not None:
            shapes[numbers[name]] = (
                layer.integer("head_dim", common[0], 2, MAX_HEAD_DIM),
                layer.integer("num_key_value_heads", common[1], 1, MAX_WIDTH),
            )
            layer.refuse_unknown("is not supported per layer")
    return shapes


def _rope(text: Keys, kind: str, head_dim: int) -> Rope:
    keys = None
    if kinds := text.mapping("rope_parameters"):
        known = frozenset(["sliding_attention", "full_attention"])
        why = "is not supported; parameters are given per kind of layer"
        kinds.refuse_unknown(why, known)
        keys = kinds.mapping(f"{kind}_attention")
    if keys is None:
        if kind == "sliding":
            return Rope(theta=10_000.0, rotated=head_dim // 2)
        return Rope(theta=1_000_000.0, rotated=int(0.25 * head_dim // 2))
    rope_type = keys.one_of("rope_type", "default", ("default", "proportional"))
    theta = keys.number("rope_theta", None)
    part = keys.number("partial_rotary_factor", 1.0)
    factor = keys.number("factor", 1.0) if rope_type == "proportional" else 1.0
    if part > 1 or (rope_type == "default" and part != 1):
        raise keys.refuse("partial_rotary_factor", f"is {part} for {rope_type!r} rope")
    keys.refuse_unknown("is not supported")
    return Rope(theta=theta, rotated=int(part * head_dim // 2), factor=factor)


def warn_of_unknown(where: str, keys: list[str]) -> None:
    if keys:
        message = f"{where}: ignoring unknown keys {', '.join(keys)}"
        # shown once, as of the user's file and not of a line of this one
        warnings.warn_explicit(message, UnknownKeyWarning, where, 1, registry=_WARNED)
