"""The built-in checkpoint follows trajectories recorded from transformers.

Teacher-forced: the canvases transformers denoised go in, and its logits, entropies,
accepted positions, argmax and stop flags must come out; then its draws are replayed
through the whole engine. `convert/export_golden.py` made the files.
"""

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from replay import feed, ids

from mlx_dgemma import load
from mlx_dgemma.checkpoint.hub import ASSETS
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit, Step
from mlx_dgemma.diffusion.step import State, StepInputs, Stepper

GOLDEN = Path(__file__).parent / "golden"
PROVENANCE = json.loads((GOLDEN / "PROVENANCE.json").read_text())
RUNS = sorted(PROVENANCE["runs"])
# transformers' names of our settings
OURS = {"max_denoising_steps": "steps", "max_new_tokens": "max_tokens"}
OURS |= {"stability_threshold": "stability", "confidence_threshold": "confidence"}
OURS |= {"eos_token_id": "eos"}


@pytest.fixture(scope="module")
def model():
    return load(ASSETS / PROVENANCE["model"])[0]


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def settings_of(model, name: str):
    settings = PROVENANCE["runs"][name]["settings"]
    return model.settings.replace(**{OURS.get(k, k): v for k, v in settings.items()})


def assert_same(found: mx.array, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.array(found), expected)


def assert_close(found: mx.array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found), expected, atol=5e-4)


def test_files_are_those_that_were_recorded():
    files = {GOLDEN / f"{n}.npz": PROVENANCE["runs"][n]["sha256"] for n in RUNS}
    weights = ASSETS / PROVENANCE["model"] / "model.safetensors"
    for file, digest in (files | {weights: PROVENANCE["model_sha256"]}).items():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_each_step_decides_as_transformers_did(model, name, bucketed, monkeypatch):
    record, settings = golden(name), settings_of(model, name)
    feed(monkeypatch, record["noise"])
    stepper, step = Stepper(model, compiled=False), 0
    for index, length in enumerate(record["lengths"]):
        cache = model.make_cache()
        before = record["tokens"][: index * settings.canvas_length]
        model.encode(ids(np.concatenate([record["prompt"], before])[None]), cache)
        view = model.view(cache, settings.canvas_length, bucketed=bucketed)
        canvas = ids(record["canvas"][step])
        state = State.first(canvas, model.config.hidden_size, model.dtype)
        for number in range(length):
            canvas = ids(record["canvas"][step][None])
            logits = model.denoise(canvas, cache, state.signal)
            assert_close(logits[0], record["logits"][step])
            numbers = settings.temperature(number), settings.entropy_bound, 1, 0, 0, 0
            keys = mx.zeros((1, 2, 2), dtype=mx.uint32)
            inputs = StepInputs(keys, *(mx.array([n], mx.float32) for n in numbers))
            state, stats = stepper(state._replace(canvas=canvas), view, inputs, None)
            assert_close(stats.entropy[0], record["entropy"][step])
            assert_same(stats.accepted[0], record["accepted"][step])
            assert_same(state.draft[0], record["argmax"][step])
            step += 1


@pytest.mark.parametrize("name", RUNS)
def test_engine_follows_the_same_draws(model, name, monkeypatch):
    record, settings = golden(name), settings_of(model, name)
    feed(monkeypatch, record["noise"], record["proposal"], record["starts"])
    engine = Engine(model)
    engine.admit(record["prompt"].tolist(), settings, seed=0)
    events = list(engine.run())
    steps = [e for e in events if isinstance(e, Step)]
    commits = [e for e in events if isinstance(e, Commit)]
    assert [c.steps for c in commits] == record["lengths"].tolist()
    assert [s.stopped for s in steps] == record["stopped"].tolist()
    for number, step in enumerate(steps):
        assert_same(step.draft, record["argmax"][number])
        assert_same(step.accepted, record["accepted"][number])
        assert_close(step.entropy, record["entropy"][number])
    tokens = record["tokens"].tolist()
    end = next((i for i, t in enumerate(tokens) if t in settings.eos), None)
    expected = tokens[: settings.max_tokens][:end]
    assert [t for c in commits for t in c.tokens] == expected
