"""Which tensor on disk is which parameter, and the strict check of them all.

On disk the names are the release's, which mlx-vlm's conversions use too. In the model
the one backbone stands at the root, and only `layer_scalar` exists once per mode.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files.json import read_json
from ..files.safetensors import (
    FLOATS,
    Expected,
    TensorInfo,
    check_tensors,
    read_header,
    shorten,
)
from .config import ModelConfig
from .quantize import Quantization, QuantizationMap, quantizable, read_quantization

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"[\w .+-]{1,200}\.safetensors", re.ASCII)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

DECODER = "model.decoder."
ENCODER = "model.encoder.language_model."
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
HEAD = "lm_head.weight"
SCALAR = re.compile(
    rf"({re.escape(DECODER)}|{re.escape(ENCODER)})layers\.(\d+)\.layer_scalar"
)
BARE_EXPERTS = re.compile(r"(.*\.experts\.(?:gate_up_proj|down_proj))$")
LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
)


def parameter_name(disk_name: str) -> str | None:
    """Return the parameter of the text model that a tensor holds, or None.

    None for the vision tower and for the encoder's copies of shared weights.
    """
    if match := SCALAR.fullmatch(disk_name):
        mode = "decoder" if match[1] == DECODER else "encoder"
        return f"layers.{match[2]}.{mode}_scalar"
    # encoder_scalar and decoder_scalar are named layer_scalar in files
    if not disk_name.startswith(DECODER) or disk_name.endswith("coder_scalar"):
        return None
    return BARE_EXPERTS.sub(r"\1.weight", disk_name.removeprefix(DECODER))


def disk_name(parameter: str) -> str:
    """Return the release's name of a dense parameter: experts lack `.weight`."""
    layer, _, last = parameter.rpartition(".")
    if last in ("encoder_scalar", "decoder_scalar"):
        return f"{ENCODER if last[0] == 'e' else DECODER}{layer}.layer_scalar"
    if last == "weight" and ".experts." in layer:
        return DECODER + layer
    return DECODER + parameter


def layer_path(layer: str) -> str:
    """Return the path of a layer as `config["quantization"]` names it."""
    return DECODER + layer


def tied_to(disk_name: str) -> str | None:
    """Return the tensor of which `disk_name` is a tied copy; None if it is no copy.

    Some exporters write the copies although the weights are one.
    """
    if disk_name == HEAD:
        return f"{DECODER}embed_tokens.weight"
    if disk_name.startswith(ENCODER):
        return DECODER + disk_name.removeprefix(ENCODER)
    return None


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every parameter of the dense model and its shape, in file order."""
    width, experts = config.hidden_size, config.num_experts
    inner, expert_inner = config.intermediate_size, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, width)
    }
    for index, layer in enumerate(config.layers):
        queries = config.num_attention_heads * layer.head_dim
        keys = layer.kv_heads * layer.head_dim
        projections = {"q_proj": (queries, width), "k_proj": (keys, width)}
        if layer.sliding:
            projections["v_proj"] = (keys, width)
        projections["o_proj"] = (width, queries)
        one: dict[str, tuple[int, ...]] = {}
        for name, shape in projections.items():
            one[f"self_attn.{name}.weight"] = shape
            if config.attention_bias:
                one[f"self_attn.{name}.bias"] = shape[:1]
        one |= {
            "self_attn.q_norm.weight": (layer.head_dim,),
            "self_attn.k_norm.weight": (layer.head_dim,),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
            "router.proj.weight": (experts, width),
            "router.scale": (width,),
            "router.per_expert_scale": (experts,),
            "experts.gate_up_proj.weight": (experts, 2 * expert_inner, width),
            "experts.down_proj.weight": (experts, width, expert_inner),
            "encoder_scalar": (1,),
            "decoder_scalar": (1,),
        }
        one |= {f"{norm}.weight": (width,) for norm in LAYER_NORMS}
        shapes |= {f"layers.{index}.{name}": shape for name, shape in one.items()}
    return shapes | {
        "norm.weight": (width,),
        "self_conditioning.pre_norm.weight": (width,),
        "self_conditioning.gate_proj.weight": (inner, width),
        "self_conditioning.up_proj.weight": (inner, width),
        "self_conditioning.down_proj.weight": (width, inner),
    }


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint folder by name, from checked headers.

    Raises CheckpointError: pickles only, a shard missing, torn or outside the folder,
    a tensor the index names that its shard lacks.
    """
    if (folder / INDEX).exists():
        return _indexed(folder)
    if os.path.lexists(folder / SINGLE):  # a link may lead nowhere
        return read_header(folder / SINGLE)
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards and [path.name for path in shards] == shard_names(len(shards)):
        headers = [read_header(path) for path in shards]  # whole without an index
        return {name: info for header in headers for name, info in header.items()}
    pickles = [p.name for pattern in PICKLES for p in sorted(folder.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{folder}: has only pickle weights ({pickles[0]}), which can run code; "
            "get the safetensors files"
        )
    if shards:
        why = f"{len(shards)} shards are there, not all, and no {INDEX}"
        raise CheckpointError(f"{folder}: {why}; download it again")
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def shard_names(count: int) -> list[str]:
    """Return the names of the files of a checkpoint in so many shards."""
    numbers = range(1, count + 1)
    return [f"model-{n:05}-of-{count:05}.safetensors" for n in numbers]


def _indexed(folder: Path) -> dict[str, TensorInfo]:
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must name the shard of each tensor")
    files = [
        f for f in weight_map.values() if isinstance(f, str) and SHARD.fullmatch(f)
    ]
    gone = not any((folder / file).exists() for file in files)
    if (folder / SINGLE).exists() and gone and len(files) == len(weight_map):
        return read_header(folder / SINGLE)  # the index is an older model's
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not SHARD.fullmatch(file):
            why = "a shard must be a .safetensors file in the same folder"
            raise CheckpointError(f"{path}: {name} is said to lie in {file!r}; {why}")
        if file not in headers:
            headers[file] = read_header(folder / file)
        if name not in headers[file]:
            raise CheckpointError(f"{folder / file}: lacks {name}, named by the index")
        tensors[name] = headers[file][name]
    for file, header in headers.items():
        if extra := sorted(header.keys() - tensors.keys()):
            raise CheckpointError(f"{path}: does not name {extra[0]} of {file}")
    return tensors


@dataclass(frozen=True)
class Layout:
    """What a checkpoint folder holds, checked against config.json, no data read.

    tensors        every tensor by its name in the file, vision and tied copies too
    parameters     the text model's tensors by the name of the parameter they hold
    quantized      quantised layers by their path in the model, and how each is stored
    quantization   what config.json declares; None for a dense checkpoint
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, TensorInfo]
    parameters: dict[str, TensorInfo]
    quantized: dict[str, Quantization]
    quantization: QuantizationMap | None

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def read_layout(folder: Path, config: ModelConfig) -> Layout:
    """Read all headers of a folder and check them against its configuration.

    Raises CheckpointError naming tensors that are missing, unexpected, of the
    wrong shape or dtype.
    """
    tensors = read_tensors(folder)
    parameters: dict[str, TensorInfo] = {}
    unknown = []
    for name, info in tensors.items():
        parameter = parameter_name(name)
        if parameter is not None and parameter not in parameters:
            parameters[parameter] = info
        elif config.has_vision and name.startswith(VISION):
            continue
        elif tied_to(name) not in tensors:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{folder}: unexpected tensors: {shorten(unknown)}")
    path = folder / "config.json"
    declared = read_quantization(config.raw, str(path))
    quantized: dict[str, Quantization] = {}
    expected: dict[str, Expected] = {}
    for parameter, shape in expected_shapes(config).items():
        layer = parameter.removesuffix(".weight")
        if f"{layer}.scales" not in parameters or not quantizable(parameter, shape):
            expected[parameter] = Expected(shape)
            continue
        if declared is None:
            raise CheckpointError(
                f"{path}: quantization is missing, but {layer_path(layer)} is quantised"
            )
        q = quantized[layer] = declared.of(layer_path(layer))
        said = f"{q.bits}-bit {q.mode} in groups of {q.group_size} (config.json:"
        for part, packed in q.packed_shapes(shape).items():
            dtype = q.storage_dtype(part)
            dtypes = FLOATS if dtype is None else (dtype,)
            expected[f"{layer}.{part}"] = Expected(
                packed, dtypes, f"{said} quantization)"
            )
    check_tensors(folder, parameters, expected, name_of=disk_name)
    return Layout(
        folder, config, tensors, parameters, quantized, declared if quantized else None
    )
