"""Adapter folders: written whole or not at all, read back to the bit, or refused."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoint.folders import bits, logits
from mlx.utils import tree_flatten, tree_unflatten
from tiny import write_tiny
from adapters.adapter_files import EVERY, write_adapter

from mlx_dgemma import load
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.adapters.folder import CONFIG, WEIGHTS
from mlx_dgemma.adapters.lora import LoRA, adapt, unfreeze
from mlx_dgemma.checkpoint.config import read_config as read_model_config
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.errors import AdapterError, DGemmaError
from mlx_dgemma.files.safetensors import read_header
from mlx_dgemma.model.language import DiffusionGemma

SMALL = LoRA(rank=2, scale=1.5, num_layers=2, keys=("mlp.up_proj", "experts.down_proj"))


def fresh(folder: Path) -> DiffusionGemma:
    return load(folder)[0]


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(DGemmaError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def bases(tiny, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for mode in ("affine", "mxfp4"):
        convert(tiny, folder / mode, quantize=True, q_mode=mode)
    return {"dense": tiny, "affine": folder / "affine", "mxfp4": folder / "mxfp4"}


@pytest.fixture
def small(tiny, tmp_path) -> Path:
    """An adapter folder that may be broken."""
    return write_adapter(tmp_path / "adapter", read_model_config(tiny), SMALL)


def held(folder: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(folder / WEIGHTS))
    assert isinstance(arrays, dict)
    return arrays


def randomise(model: DiffusionGemma, size: float = 0.2) -> None:
    """Add noise to everything that is trained."""
    rng = np.random.default_rng(1)
    weights = [
        (name, a + mx.array((rng.normal(size=a.shape) * size).astype(np.float32)))
        for name, a in adapters.trained(model).items()
    ]
    model.update(tree_unflatten(weights))


# There and back


@pytest.mark.parametrize("mode", ["dense", "affine", "mxfp4"])
def test_a_saved_adapter_says_the_same_when_it_is_loaded(bases, tmp_path, mode):
    model = fresh(bases[mode])
    before = logits(model)
    adapt(model, EVERY, seed=3)
    randomise(model)
    config = adapters.config_of(EVERY, -1)
    adapters.save(tmp_path / "a", adapters.trained(model), config)
    expected = logits(model)
    assert np.abs(expected - before).max() > 0.1
    other, _ = load(bases[mode], adapter_path=str(tmp_path / "a"))
    np.testing.assert_array_equal(logits(other), expected)
    assert not adapters.trained(other)  # ready to use, nothing is trained
    assert not other.training


@pytest.mark.parametrize("num_layers", [-1, 1])
def test_saved_weights_say_the_same_when_they_are_loaded(tiny, tmp_path, num_layers):
    model = fresh(tiny)
    before = logits(model)
    unfreeze(model, num_layers, router=True)
    randomise(model, 0.02)
    config = adapters.config_of(None, num_layers)
    adapters.save(tmp_path, adapters.trained(model), config)
    assert np.abs(logits(model) - before).max() > 0.01
    other, _ = load(tiny, adapter_path=tmp_path)
    np.testing.assert_array_equal(logits(other), logits(model))
    assert not adapters.trained(other)


def test_what_is_saved_are_the_trained_tensors_by_their_paths(tiny, tmp_path):
    model = fresh(tiny)
    adapt(model, SMALL)
    trained = adapters.trained(model)
    adapters.save(tmp_path, trained, adapters.config_of(SMALL, 2))
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    infos = read_header(tmp_path / WEIGHTS)
    paths = [f"layers.{i}.{key}" for i in (1, 2) for key in SMALL.keys]
    assert infos.keys() == {f"{p}.lora_{side}" for p in paths for side in "ab"}
    for name, array in held(tmp_path).items():
        assert array.dtype == mx.float32 and bits(array) == bits(trained[name])
    assert adapters.count(trained) == sum(a.size for a in trained.values())


def test_the_configuration_is_mlx_lms(tmp_path):
    config = {"model": "m", **adapters.config_of(SMALL, -1)}
    adapters.save(tmp_path, {}, config)
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "model": "m",
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {
            "rank": 2,
            "scale": 1.5,
            "dropout": 0.0,
            "keys": ["mlp.up_proj", "experts.down_proj"],
        },
    }
    full = adapters.config_of(None, 4)
    assert full == {"fine_tune_type": "full", "num_layers": 4}


LORAS = [LoRA(), SMALL, EVERY, LoRA(rank=1, scale=1e-3, num_layers=1)]


@pytest.mark.parametrize("lora", LORAS, ids=lambda lora: str(lora.rank))
def test_a_configuration_is_read_as_it_was_written(tmp_path, lora):
    described = {"iters": 7, "data": "somewhere", "levels": [0.1, 1.0]}
    adapters.save(tmp_path, {}, described | adapters.config_of(lora, lora.num_layers))
    assert adapters.read_config(tmp_path) == lora
    adapters.save(tmp_path, {}, described | adapters.config_of(None, -1))
    assert adapters.read_config(tmp_path) is None


def test_what_a_configuration_leaves_out_is_as_usual(tmp_path):
    write_config(tmp_path, {"lora_parameters": {"rank": 4, "scale": 20}})
    assert adapters.read_config(tmp_path) == LoRA(rank=4, scale=20.0)


def test_metadata_says_mlx_and_what_else_it_should(tmp_path):
    path = tmp_path / "state.safetensors"
    adapters.save_arrays(path, {"a": mx.ones((2,))}, {"iteration": "7"})
    _, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx", "iteration": "7"}


def test_saving_again_replaces_both_files(tiny, small):
    before = held(small)
    weights = {name: array + 1 for name, array in before.items()}
    louder = replace(SMALL, scale=9.0)
    adapters.save(small, weights, adapters.config_of(louder, 2))
    assert adapters.read_config(small) == louder
    for name, array in held(small).items():
        assert bits(array) == bits(before[name] + 1)
    assert {p.name for p in small.iterdir()} == {WEIGHTS, CONFIG}


def test_a_folder_may_begin_with_the_home(tiny, small, monkeypatch):
    monkeypatch.setenv("HOME", str(small.parent))
    there, _ = load(tiny, adapter_path="~/adapter")
    here, _ = load(tiny, adapter_path=small)
    np.testing.assert_array_equal(logits(there), logits(here))


# Tensors that do not fit


def change(folder: Path, **tensors: mx.array | None) -> None:
    """Put tensors into the weights; None takes one out. `__` stands for a dot."""
    arrays = held(folder)
    mx.eval(arrays)
    for key, array in tensors.items():
        name = key.replace("__", ".")
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array
    mx.save_safetensors(str(folder / WEIGHTS), arrays)


A = "layers__2__mlp__up_proj__lora_a"
EXPERT = "layers__1__experts__down_proj__lora_b"
MISFITS = {
    "missing": ({A: None}, "lacks layers.2.mlp.up_proj.lora_a"),
    "missing expert": ({EXPERT: None}, "lacks layers.1.experts.down_proj.lora_b"),
    "of a layer not adapted": (
        {"layers__0__mlp__up_proj__lora_a": mx.zeros((64, 2))},
        "layers.0.mlp.up_proj.lora_a is no parameter",
    ),
    "of a layer that is not": (
        {"layers__3__mlp__up_proj__lora_a": mx.zeros((64, 2))},
        "layers.3.mlp.up_proj.lora_a is no parameter",
    ),
    "a weight of the base": (
        {"layers__2__mlp__up_proj__linear__weight": mx.zeros((64, 64))},
        "is no parameter",
    ),
    "another rank": ({A: mx.zeros((64, 3))}, "has shape [64, 3]"),
    "turned": ({A: mx.zeros((2, 64))}, "has shape [2, 64]"),
    "flat": ({A: mx.zeros((128,))}, "has shape [128]"),
    "fewer experts": ({EXPERT: mx.zeros((3, 64, 2))}, "has shape [3, 64, 2]"),
    "whole numbers": ({A: mx.zeros((64, 2), dtype=mx.int32)}, "not floats"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_named(tiny, small, case):
    tensors, why = MISFITS[case]
    change(small, **tensors)
    model = fresh(tiny)
    before = logits(model)
    said = refusal(adapters.load, model, small)
    assert said.startswith(f"{small / WEIGHTS}: ") and why in said
    np.testing.assert_array_equal(logits(model), before)  # and nothing was put in
    assert refusal(load, tiny, adapter_path=small) == said
    assert refusal(adapters.check, model, small) == said


def test_a_check_of_what_fits_puts_nothing_in(tiny, small):
    model = fresh(tiny)
    before = logits(model)
    adapters.check(model, str(small))
    np.testing.assert_array_equal(logits(model), before)
    adapters.load(model, small)


def test_an_adapter_of_another_model_is_refused(tiny, tmp_path):
    wider = write_tiny(tmp_path / "wider", intermediate_size=96)
    write_adapter(tmp_path / "a", read_model_config(wider), SMALL)
    said = refusal(load, tiny, adapter_path=tmp_path / "a")
    assert "layers.1.mlp.up_proj.lora_b has shape [2, 96]" in said
    assert "needs [2, 64]" in said


def test_fine_tuned_weights_do_not_fit_a_quantised_model(bases, tmp_path):
    model = fresh(bases["dense"])
    unfreeze(model, -1, router=False)
    config = adapters.config_of(None, -1)
    adapters.save(tmp_path, adapters.trained(model), config)
    for mode in ("affine", "mxfp4"):
        said = refusal(load, bases[mode], adapter_path=tmp_path)
        assert said.startswith(f"{tmp_path / WEIGHTS}: ") and "has shape" in said


def test_fine_tuned_weights_of_unknown_names_are_refused(tiny, small):
    write_config(small, adapters.config_of(None, -1))
    said = refusal(load, tiny, adapter_path=small)
    assert "lora_a is no parameter of this model" in said


def test_a_model_that_has_an_adapter_takes_no_other(tiny, small):
    model, _ = load(tiny, adapter_path=small)
    before = logits(model)
    assert "already" in refusal(adapters.load, model, small)
    np.testing.assert_array_equal(logits(model), before)


@pytest.mark.parametrize(
    "content", [b"", b"\x10", b"nonsense" * 9, b"\xff" * 40, "half", "no end"]
)
def test_torn_weights_are_refused_by_name(tiny, small, content):
    path = small / WEIGHTS
    whole = path.read_bytes()
    cut = {"half": whole[: len(whole) // 2], "no end": whole[:-1]}
    path.write_bytes(cut[content] if isinstance(content, str) else content)
    assert str(path) in refusal(load, tiny, adapter_path=small)


def test_missing_files_and_folders_are_named(tiny, small, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert refusal(load, tiny, adapter_path=nowhere) == f"{nowhere}: no such folder"
    said = refusal(load, tiny, adapter_path=small / CONFIG)
    assert said == f"{small / CONFIG}: no such folder"
    (small / WEIGHTS).unlink()
    said = refusal(load, tiny, adapter_path=small)
    assert said == f"{small / WEIGHTS}: no such file"
    (small / CONFIG).unlink()
    assert str(small / CONFIG) in refusal(load, tiny, adapter_path=small)


# Configurations


def write_config(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / CONFIG).write_text(text)
    return folder


def with_parameters(**changes: Any) -> dict[str, Any]:
    config = adapters.config_of(SMALL, 2)
    parameters = config["lora_parameters"] | changes
    given = {name: value for name, value in parameters.items() if value is not ...}
    return config | {"lora_parameters": given}


def with_top(**changes: Any) -> dict[str, Any]:
    config = adapters.config_of(SMALL, 2) | changes
    return {name: value for name, value in config.items() if value is not ...}


BAD = [
    ("", "broken JSON"),
    ('{"fine_tune_type": "lora"', "broken JSON"),
    ("[]", "JSON object"),
    ('{"num_layers": NaN}', "NaN"),
    ({}, "lora_parameters"),
    (with_top(fine_tune_type="dora"), "fine_tune_type"),
    (with_top(fine_tune_type=["lora"]), "fine_tune_type"),
    (with_top(fine_tune_type=1), "fine_tune_type"),
    (with_top(lora_parameters=...), "lora_parameters"),
    (with_top(lora_parameters=None), "lora_parameters"),
    (with_top(lora_parameters=[1]), "lora_parameters"),
    *[(with_top(num_layers=n), "num_layers") for n in (1.5, "all", True, -2, 10**6)],
    *[(with_parameters(rank=r), "rank") for r in (..., None, 0, -1, 2.0, "2", True)],
    (with_parameters(rank=10**6), "rank"),
    (with_parameters(rank=10**400), "rank"),
    *[(with_parameters(scale=s), "scale") for s in (..., None, 0, -1.5, "2", True)],
    (with_parameters(scale=10**400), "scale"),
    (json.dumps(with_parameters(scale=7)).replace("7", "1e999"), "scale"),
    (with_parameters(keys="mlp.up_proj"), "keys"),
    (with_parameters(keys={}), "keys"),
    (with_parameters(keys=["lm_head"]), "'lm_head'"),
    (with_parameters(keys=["mlp.up_proj", "a\nb"]), r"'a\nb'"),
    (with_parameters(keys=[1]), "keys hold 1"),
    (with_parameters(keys=[["mlp.up_proj"]]), "keys hold ['mlp.up_proj']"),
    (with_parameters(keys=[{}]), "keys hold {}"),
    (with_parameters(keys=["mlp.up_proj"] * 2), "twice"),
    (with_parameters(keys=[]), "no layers to adapt"),
]


@pytest.mark.parametrize(("config", "why"), BAD)
def test_impossible_configurations_are_refused_by_file_and_key(
    tiny, small, config, why
):
    write_config(small, config)
    with pytest.raises(AdapterError) as caught:
        adapters.read_config(small)
    said = str(caught.value)
    assert said.startswith(f"{small / CONFIG}: ") and why in said
    assert "\n" not in said and said.count(str(small)) == 1
    assert refusal(load, tiny, adapter_path=small) == said


@pytest.mark.parametrize("num_layers", [0, 4, 65536])
def test_layers_the_model_lacks_are_refused_by_file(tiny, small, num_layers):
    write_config(small, with_top(num_layers=num_layers))
    said = refusal(load, tiny, adapter_path=small)
    assert said.startswith(f"{small / CONFIG}: num-layers is {num_layers};")


# Writes that fail


def half(path: Path) -> None:
    """Write some bytes, and no more."""
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, half)
    assert everything(tmp_path) == {"file.json": b"old"}
    write_atomically(path, lambda partial: partial.write_text("new"))
    assert everything(tmp_path) == {"file.json": b"new"}


def test_a_first_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file.json", half)
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_weights_that_cannot_be_written_leave_the_old_ones(small, monkeypatch, error):
    before = everything(small)

    def torn(path: str, arrays: dict, metadata: dict) -> None:
        Path(path).write_bytes(before[WEIGHTS][:100])
        raise error("[write] Unable to write")

    weights = {name: array + 1 for name, array in held(small).items()}
    mx.eval(weights)
    monkeypatch.setattr(mx, "save_safetensors", torn)
    with pytest.raises(error):
        adapters.save_arrays(small / WEIGHTS, weights)
    assert everything(small) == before


def test_weights_get_their_name_only_when_they_are_durable(small, monkeypatch):
    before, synced = everything(small), []

    def fsync(handle: int) -> None:
        found = everything(small)
        synced.append([name for name in found if name not in before])
        assert found.items() >= before.items()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        adapters.save_arrays(small / WEIGHTS, {"a": mx.ones((3,))})
    assert synced == [[f".partial-{WEIGHTS}"]]
    assert everything(small) == before


def test_what_a_killed_run_left_half_is_no_obstacle(tiny, small):
    (small / f".partial-{WEIGHTS}").write_bytes(b"torn")
    load(tiny, adapter_path=small)
    adapters.save(small, held(small), adapters.config_of(SMALL, 2))
    assert {p.name for p in small.iterdir()} == {WEIGHTS, CONFIG}


def test_trained_numbers_are_counted(tiny):
    model = fresh(tiny)
    every: Any = dict(tree_flatten(model.parameters()))
    unfreeze(model, -1, router=True)
    scalars = 2 * 3  # one a layer and mode
    assert adapters.count(every) - adapters.count(adapters.trained(model)) == scalars
    assert adapters.count({"a": mx.ones((2, 3)), "b": mx.ones((4,))}) == 10
