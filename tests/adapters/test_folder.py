"""Adapter folders: written and read back to the bit, or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters.adapter_files import EVERY, SMALL, write_adapter
from checkpoint.folders import listing, logits, refusal, same
from mlx.utils import tree_flatten, tree_unflatten
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.adapters.folder import CONFIG, WEIGHTS
from mlx_dgemma.adapters.lora import LoRA, adapt, unfreeze
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.errors import AdapterError
from mlx_dgemma.model.language import DiffusionGemma


@pytest.fixture
def small(tiny, tmp_path) -> Path:
    """An adapter folder that may be broken."""
    return write_adapter(tmp_path / "adapter", read_config(tiny), SMALL)


def stored(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / WEIGHTS)))


def randomise(model: DiffusionGemma, size: float = 0.2) -> None:
    """Add noise to everything that is trained."""
    rng = np.random.default_rng(1)
    weights = [
        (name, a + mx.array((rng.normal(size=a.shape) * size).astype(np.float32)))
        for name, a in adapters.trained(model).items()
    ]
    model.update(tree_unflatten(weights))


# There and back


def test_a_saved_adapter_gives_the_same_logits_when_it_is_loaded(quantised, tmp_path):
    model, _ = load(quantised)
    before = logits(model)
    adapt(model, EVERY, seed=3)
    randomise(model)
    trained = adapters.trained(model)
    adapters.save(tmp_path / "a", trained, adapters.config_of(EVERY, -1))
    expected = logits(model)
    assert np.abs(expected - before).max() > 0.1
    other, _ = load(quantised, adapter_path=str(tmp_path / "a"))
    np.testing.assert_array_equal(logits(other), expected)
    assert not adapters.trained(other) and not other.training
    same(stored(tmp_path / "a"), trained)


@pytest.mark.parametrize("num_layers", [-1, 1])
def test_saved_weights_give_the_same_logits_when_they_are_loaded(
    tiny, tmp_path, num_layers
):
    model, _ = load(tiny)
    before = logits(model)
    unfreeze(model, num_layers, router=True)
    randomise(model, 0.02)
    weights = adapters.trained(model)
    adapters.save(tmp_path, weights, adapters.config_of(None, num_layers))
    assert np.abs(logits(model) - before).max() > 0.01
    other, _ = load(tiny, adapter_path=tmp_path)
    np.testing.assert_array_equal(logits(other), logits(model))
    assert not adapters.trained(other)
    every: Any = dict(tree_flatten(model.parameters()))
    if num_layers == -1:  # one scalar a layer and mode
        assert adapters.count(every) - adapters.count(weights) == 2 * 3


def test_the_configuration_is_mlx_lms_and_is_read_as_written(tmp_path):
    adapters.save(tmp_path, {}, {"model": "m", **adapters.config_of(SMALL, -1)})
    assert listing(tmp_path) == [CONFIG, WEIGHTS]
    keys = ["mlp.up_proj", "experts.down_proj"]
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "model": "m",
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": keys},
    }
    full = adapters.config_of(None, 4)
    assert full == {"fine_tune_type": "full", "num_layers": 4}
    for lora in (LoRA(), SMALL, EVERY, LoRA(rank=1, scale=1e-3, num_layers=1)):
        adapters.save(tmp_path, {}, adapters.config_of(lora, lora.num_layers))
        assert adapters.read_config(tmp_path) == lora
    adapters.save(tmp_path, {}, full)
    assert adapters.read_config(tmp_path) is None
    write_config(tmp_path, {"lora_parameters": {"rank": 4, "scale": 20}})
    assert adapters.read_config(tmp_path) == LoRA(rank=4, scale=20.0)


def test_saving_again_replaces_both_files(tiny, small, monkeypatch):
    before = stored(small)
    mx.eval(before)
    (small / ".partial-0123abcd").write_bytes(b"torn")  # of a killed run
    louder = {name: array + 1 for name, array in before.items()}
    adapters.save(small, louder, adapters.config_of(replace(SMALL, scale=9.0), 2))
    assert adapters.read_config(small) == replace(SMALL, scale=9.0)
    same(stored(small), louder)
    assert listing(small) == [CONFIG, WEIGHTS]
    monkeypatch.setenv("HOME", str(small.parent))
    load(tiny, adapter_path="~/adapter")


# Tensors that do not fit

A, B = "layers.2.mlp.up_proj.lora_a", "layers.1.experts.down_proj.lora_b"
MISFITS = [
    (A, None, f"missing tensors: {A}"),
    (B, None, f"missing tensors: {B}"),
    ("layers.0.mlp.up_proj.lora_a", mx.zeros((64, 2)), "unexpected tensors: layers.0"),
    ("layers.3.mlp.up_proj.lora_a", mx.zeros((64, 2)), "unexpected tensors: layers.3"),
    ("layers.2.mlp.up_proj.linear.weight", mx.zeros((64, 64)), "unexpected tensors"),
    (A, mx.zeros((64, 3)), f"{A} has shape [64, 3], but this model needs [64, 2]"),
    (A, mx.zeros((2, 64)), "has shape [2, 64]"),
    (A, mx.zeros((128,)), "has shape [128]"),
    (B, mx.zeros((3, 64, 2)), "has shape [3, 64, 2]"),
    (A, mx.zeros((64, 2), dtype=mx.int32), "not floats"),
]


def test_tensors_that_do_not_fit_are_named(tiny_model, small):
    whole, (model, _) = stored(small), tiny_model
    mx.eval(whole)
    before = dict(tree_flatten(model.parameters()))
    for name, array, why in MISFITS:
        arrays = {n: a for n, a in (whole | {name: array}).items() if a is not None}
        mx.save_safetensors(str(small / WEIGHTS), arrays)
        said = refusal(adapters.load, model, small)
        assert said.startswith(f"{small / WEIGHTS}: ") and why in said
        assert said.endswith("; was it trained on another model?")
        assert refusal(adapters.check, model, small) == said
    after = dict(tree_flatten(model.parameters()))
    assert all(after[key] is before[key] for key in before)  # nothing was put in


def test_an_adapter_or_weights_of_another_model_are_refused(tiny, quantised, tmp_path):
    wider = write_tiny(tmp_path / "wider", intermediate_size=96)
    write_adapter(tmp_path / "a", read_config(wider), SMALL)
    said = refusal(load, tiny, adapter_path=tmp_path / "a")
    assert "layers.1.mlp.up_proj.lora_b has shape [2, 96]" in said
    assert "needs [2, 64]" in said
    model, _ = load(tiny)
    unfreeze(model, -1, router=False)
    weights = adapters.trained(model)
    adapters.save(tmp_path / "full", weights, adapters.config_of(None, -1))
    said = refusal(load, quantised, adapter_path=tmp_path / "full")
    assert said.startswith(f"{tmp_path / 'full' / WEIGHTS}: ") and "has shape" in said


def test_a_model_takes_one_adapter(tiny, small):
    model, _ = load(tiny)
    before = logits(model)
    adapters.check(model, str(small))
    np.testing.assert_array_equal(logits(model), before)
    adapters.load(model, small)
    adapted = logits(model)
    assert np.abs(adapted - before).max() > 0
    assert "already" in refusal(adapters.load, model, small)
    np.testing.assert_array_equal(logits(model), adapted)
    write_config(small, adapters.config_of(None, -1))
    said = refusal(load, tiny, adapter_path=small)
    assert "unexpected tensors: layers.1.experts.down_proj.lora_a" in said


def test_torn_and_missing_files_are_named(tiny, small, tmp_path):
    path = small / WEIGHTS
    content = path.read_bytes()
    for torn in (b"", b"nonsense" * 9, content[: len(content) // 2], content[:-1]):
        path.write_bytes(torn)
        assert str(path) in refusal(load, tiny, adapter_path=small)
    nowhere = tmp_path / "nowhere"
    assert refusal(load, tiny, adapter_path=nowhere) == f"{nowhere}: no such folder"
    said = refusal(load, tiny, adapter_path=small / CONFIG)
    assert said == f"{small / CONFIG}: is a file; give the adapter's folder"
    path.unlink()
    assert refusal(load, tiny, adapter_path=small) == f"{path}: no such file"
    (small / CONFIG).unlink()
    assert str(small / CONFIG) in refusal(load, tiny, adapter_path=small)


# Configurations


def write_config(folder: Path, config: Any) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / CONFIG).write_text(text)


def top(**changes: Any) -> dict[str, Any]:
    config = adapters.config_of(SMALL, 2) | changes
    return {name: value for name, value in config.items() if value is not ...}


def parameters(**changes: Any) -> dict[str, Any]:
    given = adapters.config_of(SMALL, 2)["lora_parameters"] | changes
    return top(lora_parameters={k: v for k, v in given.items() if v is not ...})


BAD = [
    ('{"fine_tune_type": "lora"', "broken JSON"),
    ("[]", "not an object"),
    ({}, "lora_parameters"),
    *[(top(fine_tune_type=kind), "fine_tune_type") for kind in ("dora", ["lora"], 1)],
    *[(top(lora_parameters=p), "lora_parameters") for p in (..., None, [1])],
    *[(top(num_layers=n), "num_layers") for n in (1.5, "all", True, -2, 10**6)],
    *[(parameters(rank=r), "rank") for r in (..., None, 0, -1, 2.0, "2", True, 10**6)],
    *[(parameters(scale=s), "scale") for s in (..., None, 0, -1.5, "2", True, 10**400)],
    *[(parameters(keys=keys), "keys") for keys in ("mlp.up_proj", {})],
    (parameters(keys=["mlp.up_proj", "a\nb"]), r"'a\nb'"),
    (parameters(keys=[["mlp.up_proj"]]), "keys hold ['mlp.up_proj']"),
    (parameters(keys=["mlp.up_proj"] * 2), "twice"),
    (parameters(keys=[]), "no layers to adapt"),
]


def test_impossible_configurations_are_refused_by_file_and_key(tiny_model, small):
    for config, why in BAD:
        write_config(small, config)
        with pytest.raises(AdapterError) as caught:
            adapters.read_config(small)
        said = str(caught.value)
        assert said.startswith(f"{small / CONFIG}: ") and why in said
        assert "\n" not in said and said.count(str(small)) == 1
        assert refusal(adapters.load, tiny_model[0], small) == said
    for num_layers in (0, 4, 65536):
        write_config(small, top(num_layers=num_layers))
        said = refusal(adapters.load, tiny_model[0], small)
        assert said.startswith(f"{small / CONFIG}: num-layers is {num_layers};")
