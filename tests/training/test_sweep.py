"""Whether training teaches to refine: more steps must give better canvases.

A known bug of other trainers hands the decoder pure noise, t = 1, whatever was asked.
The loss falls all the same; only the sweep over denoising steps shows it, by being
flat. The task: an order of four letters, each of them once. No position can know its
letter from the prompt, so a first guess repeats letters and later steps must fix it.
"""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from tiny import write_tiny

from mlx_dgemma import TrainSettings
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.weights import disk_name, expected_shapes
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit
from mlx_dgemma.model.loading import load_model
from mlx_dgemma.training.data import Dataset, Example
from mlx_dgemma.training.settings import Run
from mlx_dgemma.training.trainer import Trainer

pytestmark = pytest.mark.slow
LETTERS, COUNT = 4, 30
FIRST, END = 10, 1  # ids of the letters, and of <eos>


def orders(count):
    rng = np.random.default_rng(0)
    return [
        Example((2, 3), (*(rng.permutation(LETTERS) + FIRST).tolist(), END), END)
        for _ in range(count)
    ]


def sweep(folder, model, levels):
    """Share of canvases that are an order, by denoising steps allowed."""
    settings = TrainSettings(
        iters=150,
        batch_size=32,
        learning_rate=8e-3,
        warmup_steps=20,
        steps_per_report=1000,
        save_every=1000,
        levels=levels,
        encoder_loss_weight=0,
    )
    run = Run(model="", data="", adapter_path=folder, lora=None, train_router=True)
    run = replace(run, settings=settings)
    list(Trainer(run, model, Dataset(tuple(orders(2000)))).events())
    rates = []
    for steps in (1, 16):
        engine, right = Engine(model), 0
        for seed in range(COUNT):
            engine.admit([2, 3], model.settings.replace(steps=steps), seed)
        for event in engine.run():
            if isinstance(event, Commit):
                right += sorted(event.tokens) == list(range(FIRST, FIRST + LETTERS))
        rates.append(right / COUNT)
    return rates


def untrained(folder):
    """A model of one narrow layer, drawn small."""
    write_tiny(
        folder,
        hidden_size=32,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        global_head_dim=16,
        moe_intermediate_size=8,
        num_experts=2,
        top_k_experts=1,
    )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(raw | {"canvas_length": LETTERS + 1})
    )
    config = read_config(folder)
    rng, weights = np.random.default_rng(0), {}
    for name, shape in expected_shapes(config).items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            values = np.full(shape, shape[0] ** -0.25)
        elif "norm" in name or "scal" in name:
            values = np.ones(shape)
        else:
            values = rng.normal(0, 0.05, shape)
        weights[disk_name(name)] = mx.array(values.astype(np.float32))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return load_model(folder, config)


def test_more_steps_help_only_after_training_at_every_noise_level(tmp_path):
    first, last = sweep(tmp_path / "a", untrained(tmp_path / "1"), (1e-3, 1.0))
    assert last >= first + 0.4 and last >= 0.6
    flat = sweep(tmp_path / "b", untrained(tmp_path / "2"), (1.0, 1.0))
    assert abs(flat[1] - flat[0]) <= 0.1
    assert last >= flat[1] + 0.4
