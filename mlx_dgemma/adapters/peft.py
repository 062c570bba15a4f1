"""Adapters saved by PEFT, as TRL and Unsloth do: one for each mode, read strictly.

transformers ties the weights of encoder and decoder, but PEFT gives each of the two
an adapter of its own. Where both are equal, the shared stack takes one; where they
differ, the encoder runs branches of its layers. Names and scales follow PEFT 0.21's
`tuners/lora`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import FLOATS, VISION, expected_shapes
from ..errors import AdapterError, ConfigError
from ..files.json import Keys, read_json
from ..files.safetensors import TensorInfo, read_header
from ..model.language import DiffusionGemma, branch
from ..model.loading import find_layer
from .lora import LoRAExpertLinear, LoRALinear

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
MODULE = re.compile(r"model\.(decoder|encoder\.language_model)\.(.+)")
KNOWN = "peft_type bias r lora_alpha use_rslora rank_pattern alpha_pattern".split()
# keys that say nothing of what the saved tensors mean
IDLE = """
    auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules
    inference_mode layers_pattern layers_to_transform lora_dropout megatron_core
    peft_version qalora_group_size revision runtime_config target_modules task_type
""".split()
UNCHANGED = (True, False, "gaussian", "eva", "orthogonal")  # W stays as it was
REFUSED = {
    "use_dora": "is set; DoRA is not supported",
    "modules_to_save": "is set; only adapters can be read, not trained weights",
    "fan_in_fan_out": "is set; no layer of this model is stored that way",
    "target_parameters": (
        "is set; adapters of experts cannot be read from PEFT: train without them"
    ),
}


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to one weight: scale · (a · b)ᵀ."""

    a: mx.array  # (in, r) float32
    b: mx.array  # (r, out) float32
    scale: float

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LowRank) or self.scale != other.scale:
            return False
        pairs = (self.a, other.a), (self.b, other.b)
        return all(mx.array_equal(mine, theirs).item() for mine, theirs in pairs)


@dataclass(frozen=True)
class Imported:
    """The adapters of both modes by the layer's path; self-conditioning only decodes.

    One that adds nothing is left out.
    """

    decoder: dict[str, LowRank]
    encoder: dict[str, LowRank]

    @property
    def shared(self) -> bool:
        """Whether the shared stack can take the decoder's: all equal the encoder's.

        Not where one mode lacks an adapter: its weight is the other's without it.
        """
        stack = {p: low for p, low in self.decoder.items() if p.startswith("layers.")}
        return stack == self.encoder


def is_peft(folder: Path) -> bool:
    """Whether PEFT wrote the adapter in a folder, as its configuration tells."""
    try:
        return "peft_type" in Keys(read_json(folder / CONFIG), "")
    except ConfigError:
        return False  # nobody's: the reader of our own format says what is wrong


def read(folder: Path, config: ModelConfig) -> Imported:
    """The adapters in a folder for a model.

    Raises AdapterError naming the file and the key or tensor that cannot be taken.
    """
    path, shapes = folder / WEIGHTS, expected_shapes(config)
    found: dict[str, dict[str, LowRank]] = {"decoder": {}, "encoder": {}}
    try:
        keys = Keys(read_json(folder / CONFIG), str(folder / CONFIG))
        _check_config(keys)
        held = _held(folder)
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        for module, (name_a, name_b) in _pairs(path, held).items():
            a, b = (arrays[name].astype(mx.float32).T for name in (name_a, name_b))
            if module.startswith(VISION):
                if mx.any(b).item():
                    raise AdapterError(
                        f"{path}: {name_b} adapts vision, but this package reads text "
                        "alone; train with the vision tower frozen"
                    )
                continue
            mode, layer = _layer(path, name_a, module, shapes)
            rank, scale = _strength(keys, module)
            outputs, inputs = shapes[f"{layer}.weight"]
            _check_shape(path, name_a, held[name_a], (rank, inputs))
            _check_shape(path, name_b, held[name_b], (outputs, rank))
            found[mode][layer] = LowRank(a, b, scale)
    except ConfigError as error:
        raise AdapterError(str(error)) from None
    if not any(found.values()):
        raise AdapterError(f"{path}: holds no adapter for text")
    return Imported(**{mode: _busy(layers) for mode, layers in found.items()})


def put(model: DiffusionGemma, imported: Imported) -> None:
    """Put adapters beside the layers of a frozen model that has none.

    Where the modes differ, the encoder gets layers of its own that share every weight
    with the decoder's. Raises AdapterError if the model has adapters.
    """
    modules = [m for one in (model, *model.encoder_layers) for m in one.modules()]
    if any(isinstance(m, LoRALinear | LoRAExpertLinear) for m in modules):
        raise AdapterError("the model has an adapter already; load it anew")
    if not imported.shared:
        model.encoder_layers = tuple(branch(layer) for layer in model.layers)
        for path, low in imported.encoder.items():
            _, index, inside = path.split(".", 2)
            _wrap(model.encoder_layers[int(index)], inside, low)
    for path, low in imported.decoder.items():
        _wrap(model, path, low)
    mx.eval(model.parameters(), [one.parameters() for one in model.encoder_layers])
    model.freeze()
    model.eval()


def _wrap(root: nn.Module, path: str, low: LowRank) -> None:
    parent, name = find_layer(root, path)
    rank = low.b.shape[0]
    adapted = LoRALinear(parent[name], rank, low.scale, mx.random.key(0))
    adapted.lora_a, adapted.lora_b = low.a, low.b
    parent[name] = adapted


def _busy(layers: dict[str, LowRank]) -> dict[str, LowRank]:
    """Those that add something."""
    return {path: low for path, low in layers.items() if mx.any(low.b).item()}


def _held(folder: Path) -> dict[str, TensorInfo]:
    """What the weight file says it holds; floats only."""
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{folder}: has only pickle weights (adapter_model.bin), which can run "
                "code; save the adapter with safe_serialization"
            )
        raise AdapterError(f"{path}: no such file")
    held = read_header(path)
    for name, info in held.items():
        if info.dtype not in FLOATS:
            raise AdapterError(f"{path}: {name} holds {info.dtype}, not floats")
    return held


def _check_config(keys: Keys) -> None:
    """Refuse whatever would make the tensors mean something else than plain LoRA."""
    keys.one_of("peft_type", None, ("LORA",))
    keys.one_of("bias", "none", ("none",))
    for name, value in keys.items():
        if name in KNOWN or name in IDLE or not value:
            continue
        if name != "init_lora_weights":
            why = REFUSED.get(name, f"is {value!r}; it is not supported")
            raise keys.refuse(name, why)
        if value not in UNCHANGED:
            raise keys.refuse(
                name,
                f"is {value!r}, which changes the weights it adapts; save it with "
                "path_initial_model_for_weight_conversion",
            )


def _pairs(path: Path, held: dict[str, TensorInfo]) -> dict[str, tuple[str, str]]:
    """Module of transformers' -> names of its lora_A and lora_B."""
    sides: dict[str, dict[str, str]] = {}
    for name in held:
        match = TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(f"{path}: {name} is no tensor of a plain LoRA adapter")
        sides.setdefault(match[1], {})[match[2]] = name
    for module, names in sides.items():
        if missing := {"A", "B"} - set(names):
            raise AdapterError(
                f"{path}: lacks base_model.model.{module}.lora_{missing.pop()}.weight"
            )
    return {module: (names["A"], names["B"]) for module, names in sides.items()}


def _layer(
    path: Path, name: str, module: str, shapes: dict[str, tuple[int, ...]]
) -> tuple[str, str]:
    """The mode that runs a module of transformers', and the path of our layer."""
    if match := MODULE.fullmatch(module):
        mode, layer = match[1].partition(".")[0], match[2]
        stacked = layer.startswith("layers.")
        conditioning = mode == "decoder" and layer.startswith("self_conditioning.")
        linear = len(shapes.get(f"{layer}.weight", ())) == 2
        if linear and (stacked or conditioning):
            return mode, layer
    raise AdapterError(
        f"{path}: {name} adapts no linear layer of this model; "
        "was it trained on another?"
    )


def _check_shape(
    path: Path, name: str, info: TensorInfo, wanted: tuple[int, int]
) -> None:
    if info.shape != wanted:
        raise AdapterError(
            f"{path}: {name} has shape {list(info.shape)}, but rank and model need "
            f"{list(wanted)}; was it trained on another model?"
        )


def _strength(keys: Keys, module: str) -> tuple[int, float]:
    """Rank and scale of a module's adapter."""
    rank, alpha = keys.integer("r", None, 1, 2**16), keys.number("lora_alpha", None)
    for own, name in _matching(keys, "rank_pattern", module):
        rank = own.integer(name, None, 1, 2**16)
    for own, name in _matching(keys, "alpha_pattern", module):
        alpha = own.number(name, None)
    rooted = keys.one_of("use_rslora", False, (False, True))
    return rank, alpha / (math.sqrt(rank) if rooted else rank)


def _matching(keys: Keys, key: str, module: str) -> Iterator[tuple[Keys, str]]:
    """The first of the patterns that ends a module's name, as PEFT looks for it."""
    patterns = keys.mapping(key)
    for pattern, _ in patterns.items() if patterns is not None else ():
        assert patterns is not None
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise keys.refuse(key, f"holds {pattern!r}: {error}") from None
        if found:
            yield patterns, pattern
            return
