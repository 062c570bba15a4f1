"""Which tensor on disk is which parameter, and the strict loading of them all.

The name map is data: `DISK_PREFIXES`. On disk the names are the release's, and
mlx-vlm's conversions use them too; in the model the one backbone stands at the
root, and only `layer_scalar` exists once per mode.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from ..files.json import read_json
from ..files.safetensors import TensorInfo, read_header
from .config import ModelConfig
from .quantize import Quantization, quantizable, read_quantization

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
SHARD = re.compile(r"[^/\\\0]+\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

ENCODER_SCALAR = re.compile(
    r"model\.encoder\.language_model\.layers\.(\d+)\.layer_scalar"
)
DECODER_SCALAR = re.compile(r"layers\.(\d+)\.layer_scalar")
DECODER = "model.decoder."
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
ENCODER = "model.encoder.language_model."
HEAD = "lm_head.weight"
BARE_EXPERTS = re.compile(r"(.*\.experts\.(?:gate_up_proj|down_proj))$")


def parameter_name(disk_name: str) -> str | None:
    """The model parameter a tensor on disk fills; None when it fills none.

    Vision tensors and the tied copies of the encoder fill none.
    """
    if match := ENCODER_SCALAR.fullmatch(disk_name):
        return f"layers.{match[1]}.encoder_scalar"
    if not disk_name.startswith(DECODER):
        return None
    name = disk_name.removeprefix(DECODER)
    if match := DECODER_SCALAR.fullmatch(name):
        return f"layers.{match[1]}.decoder_scalar"
    if name.endswith(("encoder_scalar", "decoder_scalar")):
        return None  # our own names for them
    return BARE_EXPERTS.sub(r"\1.weight", name)


def disk_name(parameter: str) -> str:
    """The release's name of a dense parameter: experts have no `.weight` suffix."""
    layer, _, last = parameter.rpartition(".")
    if last == "encoder_scalar":
        return f"model.encoder.language_model.{layer}.layer_scalar"
    if last == "decoder_scalar":
        return f"{DECODER}{layer}.layer_scalar"
    if last == "weight" and ".experts." in layer:
        return DECODER + layer
    return DECODER + parameter


def layer_path(layer: str) -> str:
    """The path of a layer with a weight, as `config["quantization"]` names it."""
    return DECODER + layer


def tied_to(disk_name: str) -> str | None:
    """The tensor that `disk_name` is a tied copy of; None when it is no copy.

    Some exporters write the copies although the weights are one.
    """
    if disk_name == HEAD:
        return f"{DECODER}embed_tokens.weight"
    if disk_name.startswith(ENCODER):
        return DECODER + disk_name.removeprefix(ENCODER)
    return None


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the dense model and its shape, in file order."""
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
    shapes["norm.weight"] = (width,)
    shapes |= {
        "self_conditioning.pre_norm.weight": (width,),
        "self_conditioning.gate_proj.weight": (inner, width),
        "self_conditioning.up_proj.weight": (inner, width),
        "self_conditioning.down_proj.weight": (width, inner),
    }
    return shapes


LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
)


@dataclass(frozen=True)
class Files:
    """The tensors of a checkpoint folder, read from headers only."""

    folder: Path
    tensors: dict[str, TensorInfo]  # by name on disk

    def load(self, disk_name: str) -> mx.array:
        """One tensor, unevaluated: its bytes are read when it is used."""
        return self.load_file(self.tensors[disk_name].file)[disk_name]

    def load_file(self, file: Path) -> dict[str, mx.array]:
        """All tensors of one file, unevaluated."""
        try:
            arrays = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from None
        assert isinstance(arrays, dict)
        return arrays

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def open_files(folder: Path) -> Files:
    """Read and check the headers of all weight files of a checkpoint folder.

    Raises CheckpointError: pickles only, a shard missing, torn or escaping the
    folder, a tensor the index names that its shard lacks.
    """
    if (folder / INDEX).exists():
        return Files(folder, _indexed(folder))
    if (folder / SINGLE).exists():
        return Files(folder, read_header(folder / SINGLE))
    pickles = [p.name for pattern in PICKLES for p in sorted(folder.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{folder}: has only pickle weights ({pickles[0]}), which can run code; "
            "get the safetensors files"
        )
    if any(folder.glob("model*.safetensors")):
        raise CheckpointError(f"{folder / INDEX}: is missing; download it again")
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def _indexed(folder: Path) -> dict[str, TensorInfo]:
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must name the shard of each tensor")
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not SHARD.fullmatch(file):
            raise CheckpointError(
                f"{path}: {name} is said to lie in {file!r}; "
                "a shard must be a .safetensors file in the same folder"
            )
        if file not in headers:
            headers[file] = read_header(folder / file)
        if name not in headers[file]:
            raise CheckpointError(f"{folder / file}: lacks {name}, named by the index")
        tensors[name] = headers[file][name]
    for file, header in headers.items():
        if extra := sorted(set(header) - set(tensors)):
            raise CheckpointError(f"{path}: does not name {extra[0]} of {file}")
    return tensors


@dataclass(frozen=True)
class Layout:
    """A checkpoint whose names, shapes and dtypes were checked against its config."""

    files: Files
    names: dict[str, str]  # parameter -> name on disk
    quantized: dict[str, Quantization]  # layer -> how it is stored

    def info(self, parameter: str) -> TensorInfo:
        return self.files.tensors[self.names[parameter]]


def read_layout(folder: Path, config: ModelConfig) -> Layout:
    """Read all headers of a folder and check them against its configuration.

    Raises CheckpointError naming tensors that are missing, unexpected, of the
    wrong shape or dtype.
    """
    files = open_files(folder)
    names = _named_parameters(files, config)
    layout = Layout(files, names, _quantized_layers(files, names, config))
    _check_shapes(layout, config)
    return layout


def _named_parameters(files: Files, config: ModelConfig) -> dict[str, str]:
    """Parameter -> name on disk, for every tensor that fills one.

    Raises CheckpointError for tensors nobody knows.
    """
    found: dict[str, str] = {}
    strange = []
    for name in files.tensors:
        parameter = parameter_name(name)
        if parameter is not None and parameter not in found:
            found[parameter] = name
        elif config.has_vision and name.startswith(VISION):
            continue
        elif tied_to(name) not in files.tensors:
            strange.append(name)
    if strange:
        raise _name_them(files.folder, "unexpected tensors", strange)
    return found


def _check_names(folder: Path, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Raise CheckpointError naming parameters that are missing or too many."""
    wanted, found = set(wanted), set(found)
    if missing := wanted - found:
        raise _name_them(folder, "missing tensors", map(disk_name, missing))
    if extra := found - wanted:
        raise _name_them(folder, "unexpected tensors", map(disk_name, extra))


def _name_them(folder: Path, what: str, names: Iterable[str]) -> CheckpointError:
    names = sorted(names)
    shown = ", ".join(names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return CheckpointError(f"{folder}: {what}: {shown}{more}")


def _quantized_layers(
    files: Files, names: dict[str, str], config: ModelConfig
) -> dict[str, Quantization]:
    """Path in the model -> its quantisation, for layers stored with scales."""
    path = files.folder / "config.json"
    declared = read_quantization(config.raw, str(path))
    layers = [
        name.removesuffix(".scales") for name in names if name.endswith(".scales")
    ]
    if not layers:
        return {}
    if declared is None:
        raise CheckpointError(
            f"{path}: quantization is missing, but {layer_path(layers[0])} is quantised"
        )
    return {layer: declared.of(layer_path(layer)) for layer in layers}


def _check_shapes(layout: Layout, config: ModelConfig) -> None:
    files, names, quantized = layout.files, layout.names, layout.quantized
    shapes = expected_shapes(config)
    wanted = set(shapes)
    for layer, quantization in quantized.items():
        weight = f"{layer}.weight"
        if weight not in shapes or not quantizable(weight, shapes[weight]):
            raise CheckpointError(
                f"{files.folder}: {layer_path(layer)}.scales: no layer to quantise"
            )
        wanted |= {f"{layer}.{part}" for part in quantization.packed(shapes[weight])}
    _check_names(files.folder, wanted, names)
    for parameter, shape in shapes.items():
        layer = parameter.removesuffix(".weight")
        if layer in quantized and parameter.endswith(".weight"):
            _check_parts(layout, layer, shape)
            continue
        info = layout.info(parameter)
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: {names[parameter]} has shape {list(info.shape)}, but "
                f"config.json needs {list(shape)}"
            )
        _check_dtype(info, names[parameter], FLOATS)


def _check_parts(layout: Layout, layer: str, shape: tuple[int, ...]) -> None:
    """Check a layer that is stored quantised; `shape` is its dense weight's."""
    q = layout.quantized[layer]
    for part, wanted in q.packed(shape).items():
        info, name = layout.info(f"{layer}.{part}"), layout.names[f"{layer}.{part}"]
        if info.shape != wanted:
            raise CheckpointError(
                f"{info.file}: {name} has shape {list(info.shape)}, but {q.bits}-bit "
                f"{q.mode} in groups of {q.group_size}, which config.json says under "
                f"quantization, needs {list(wanted)}"
            )
        coded = q.coded(part)
        _check_dtype(info, name, FLOATS if coded is None else (coded,))


def _check_dtype(info: TensorInfo, name: str, allowed: tuple[mx.Dtype, ...]) -> None:
    if info.dtype not in allowed:
        kind = "floats" if allowed == FLOATS else str(allowed[0])
        raise CheckpointError(f"{info.file}: {name} holds {info.dtype}, not {kind}")
