"""Adapters saved by PEFT, as TRL and Unsloth do: one for each mode, read strictly.

transformers ties the weights of encoder and decoder, but PEFT gives each of the two
an adapter of its own. Where both are equal, the shared stack takes one; where they
differ, the encoder gets branches of its layers. Names and scales follow PEFT 0.21's
`tuners/lora`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import VISION, expected_shapes
from ..errors import AdapterError, ConfigError
from ..files.json import Keys, read_json
from ..files.safetensors import (
    Expected,
    TensorInfo,
    check_tensors,
    load_tensors,
    read_header,
)
from ..model.language import DiffusionGemma, copy_layer
from .lora import add_adapter, refuse_second

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
STACKS = {"model.decoder.": "decoder", "model.encoder.language_model.": "encoder"}
READ_KEYS = "peft_type bias r lora_alpha use_rslora rank_pattern alpha_pattern".split()
# keys that do not change what the saved tensors mean
IGNORED_KEYS = """
    auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules
    inference_mode layers_pattern layers_to_transform lora_dropout megatron_core
    peft_version qalora_group_size revision runtime_config target_modules task_type
""".split()
# values of init_lora_weights that leave the adapted weights as they were
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
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
class PeftAdapter:
    """The adapters of both modes by the layer's path; self-conditioning only decodes.

    An adapter that adds nothing is left out.
    """

    decoder: dict[str, LowRank]
    encoder: dict[str, LowRank]

    @property
    def shared(self) -> bool:
        """Whether the shared stack can take the decoder's: all equal the encoder's.

        A mode that lacks an adapter does not share it: it runs the bare weight.
        """
        stack = {p: low for p, low in self.decoder.items() if p.startswith("layers.")}
        return stack == self.encoder


def is_peft(folder: Path) -> bool:
    """Whether PEFT wrote the adapter in a folder, by its configuration."""
    try:
        return "peft_type" in Keys(read_json(folder / CONFIG), "")
    except ConfigError:
        return False  # the reader of our own format says what is wrong


def mismatch(message: str) -> AdapterError:
    """Return the error for a tensor that does not fit."""
    return AdapterError(f"{message}; was it trained on another model?")


def read(folder: Path, config: ModelConfig) -> PeftAdapter:
    """Return the adapters in a folder for a model.

    Raises AdapterError naming the file and the key or tensor that cannot be taken.
    """
    path, shapes = folder / WEIGHTS, expected_shapes(config)
    found: dict[str, dict[str, LowRank]] = {"decoder": {}, "encoder": {}}
    try:
        keys = Keys(read_json(folder / CONFIG), str(folder / CONFIG))
        _check_config(keys)
        infos = _read_header(folder)
        arrays = load_tensors(infos)
        for module in sorted(_modules(path, infos)):
            names = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
            if missing := [name for name in names if name not in infos]:
                raise AdapterError(f"{path}: missing tensors: {missing[0]}")
            if module.startswith(VISION):
                if mx.any(arrays[names[1]]).item():
                    why = "only text can be; train with the vision tower frozen"
                    raise AdapterError(f"{path}: {names[1]} adapts vision, but {why}")
                continue
            mode, layer = _mode_and_layer(path, module, shapes)
            rank, scale = _rank_and_scale(keys, module)
            outputs, inputs = shapes[f"{layer}.weight"]
            sides = zip(names, ((rank, inputs), (outputs, rank)), strict=True)
            expected = {n: Expected(s, source="rank and model") for n, s in sides}
            found_pair = {name: infos[name] for name in names}
            check_tensors(path, found_pair, expected, error=mismatch)
            a, b = (arrays[name].astype(mx.float32).T for name in names)
            found[mode][layer] = LowRank(a, b, scale)
    except ConfigError as error:
        raise AdapterError(str(error)) from None
    if not any(found.values()):
        raise AdapterError(f"{path}: holds no adapter for text")
    decoder, encoder = (
        {path: low for path, low in layers.items() if mx.any(low.b).item()}
        for layers in found.values()
    )
    return PeftAdapter(decoder, encoder)


def attach(model: DiffusionGemma, adapter: PeftAdapter) -> None:
    """Put adapters beside the layers of a frozen model that has none.

    Where the modes differ, the encoder gets layers of its own that share every weight
    with the decoder's. Raises AdapterError if the model has adapters.
    """
    refuse_second(model)
    if not adapter.shared:
        model.encoder_layers = tuple(copy_layer(layer) for layer in model.layers)
        for path, low in adapter.encoder.items():
            _, index, inside = path.split(".", 2)
            layer = model.encoder_layers[int(index)]
            add_adapter(layer, inside, low.a, low.b, low.scale)
    for path, low in adapter.decoder.items():
        add_adapter(model, path, low.a, low.b, low.scale)
    mx.eval(model.parameters(), [one.parameters() for one in model.encoder_layers])
    model.freeze()
    model.eval()


def _read_header(folder: Path) -> dict[str, TensorInfo]:
    path = folder / WEIGHTS
    if path.is_file():
        return read_header(path)
    if (folder / "adapter_model.bin").exists():
        raise AdapterError(
            f"{folder}: has only pickle weights (adapter_model.bin), which can run "
            "code; save the adapter with safe_serialization"
        )
    raise AdapterError(f"{path}: no such file")


def _check_config(keys: Keys) -> None:
    """Refuse whatever would make the tensors mean something else than plain LoRA."""
    keys.one_of("peft_type", None, ("LORA",))
    keys.one_of("bias", "none", ("none",))
    for name, value in keys.items():
        if name in READ_KEYS or name in IGNORED_KEYS or not value:
            continue
        why = REFUSED.get(name, f"is {value!r}; it is not supported")
        if name == "init_lora_weights":
            if value in PLAIN_STARTS:
                continue
            why = (
                f"is {value!r}, which changes the weights it adapts; save it with "
                "path_initial_model_for_weight_conversion"
            )
        raise keys.refuse(name, why)


def _modules(path: Path, infos: Mapping[str, TensorInfo]) -> set[str]:
    """Return the adapted modules of transformers' model."""
    modules = set()
    for name in infos:
        if not (match := TENSOR.fullmatch(name)):
            raise AdapterError(f"{path}: {name} is no tensor of a plain LoRA adapter")
        modules.add(match[1])
    return modules


def _mode_and_layer(
    path: Path, module: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, str]:
    """Return the mode that runs a module of transformers', and the layer's path."""
    for stack, mode in STACKS.items():
        layer = module.removeprefix(stack)
        roots = ("layers.", "self_conditioning.") if mode == "decoder" else ("layers.",)
        linear = len(shapes.get(f"{layer}.weight", ())) == 2
        if layer != module and linear and layer.startswith(roots):
            return mode, layer
    raise mismatch(
        f"{path}: base_model.model.{module} is no linear layer of this model"
    )


def _rank_and_scale(keys: Keys, module: str) -> tuple[int, float]:
    rank, alpha = keys.integer("r", None, 1, 2**16), keys.number("lora_alpha", None)
    if found := _matching(keys, "rank_pattern", module):
        rank = found[0].integer(found[1], None, 1, 2**16)
    if found := _matching(keys, "alpha_pattern", module):
        alpha = found[0].number(found[1], None)
    return rank, alpha / (math.sqrt(rank) if keys.boolean("use_rslora") else rank)


def _matching(keys: Keys, key: str, module: str) -> tuple[Keys, str] | None:
    """Return the first pattern that ends a module's name, as PEFT looks for it."""
    patterns = keys.mapping(key)
    if patterns is None:
        return None
    for pattern, _ in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return patterns, pattern
        except re.error as error:
            raise keys.refuse(key, f"holds {pattern!r}: {error}") from None
    return None
