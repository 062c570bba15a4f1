"""The built-in checkpoint follows trajectories recorded from transformers.

Teacher-forced: the canvases transformers denoised go in, and its logits, entropies,
accepted positions, argmax and stop flags must come out; then its draws are replayed
through the whole engine. `convert/export_golden.py` made the files.
"""

import hashlib
import json
from dataclasses import replace
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


@pytest.fixture(scope="module")
def model():
    return load(ASSETS / PROVENANCE["model"])[0]


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def settings_of(model, name: str):
    changes = {
        OURS.get(k, k): v for k, v in PROVENANCE["runs"][name]["settings"].items()
    }
    if "eos_token_id" in changes:
        changes["eos"] = frozenset(changes.pop("eos_token_id"))
    return model.settings.replace(**changes)


def test_files_are_those_that_were_recorded():
    for name in RUNS:
        digest = hashlib.sha256((GOLDEN / f"{name}.npz").read_bytes()).hexdigest()
        assert digest == PROVENANCE["runs"][name]["sha256"]
    weights = ASSETS / PROVENANCE["model"] / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert digest == PROVENANCE["model_sha256"]


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
        state = State.first(
            ids(record["canvas"][step]), model.config.hidden_size, model.dtype
        )
        for number in range(length):
            canvas = ids(record["canvas"][step][None])
            logits = model.denoise(canvas, cache, state.signal)
            np.testing.assert_allclose(
                np.array(logits)[0], record["logits"][step], atol=5e-4
            )
            dials = StepInputs(
                mx.zeros((1, 2, 2), dtype=mx.uint32),
                mx.array(
                    [[settings.temperature(number), settings.entropy_bound, 1, 0]]
                ),
            )
            state, found = stepper(replace(state, canvas=canvas), view, dials, None)
            np.testing.assert_allclose(
                np.array(found.entropy)[0], record["entropy"][step], atol=5e-4
            )
            for ours, theirs in (
                (found.accepted, record["accepted"]),
                (state.draft, record["argmax"]),
            ):
                np.testing.assert_array_equal(np.array(ours)[0], theirs[step])
            step += 1


@pytest.mark.parametrize("name", RUNS)
def test_the_engine_follows_the_same_draws(model, name, monkeypatch):
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
        np.testing.assert_array_equal(np.array(step.draft), record["argmax"][number])
        np.testing.assert_array_equal(
            np.array(step.accepted), record["accepted"][number]
        )
        np.testing.assert_allclose(
            np.array(step.entropy), record["entropy"][number], atol=5e-4
        )
    tokens = record["tokens"].tolist()
    end = next((i for i, t in enumerate(tokens) if t in settings.eos), None)
    expected = tokens[: settings.max_tokens][:end]
    assert [t for c in commits for t in c.tokens] == expected


def test_trajectories_cover_the_stop_rule():
    """Some canvases stop early, some run to the end, one text has several."""
    lengths = {name: golden(name)["lengths"].tolist() for name in RUNS}
    assert lengths["solved"][0] < PROVENANCE["runs"]["solved"].get("cap", 24)
    assert len(lengths["canvases"]) == 3
    assert golden("solved")["stopped"][-1] and not golden("canvases")["stopped"].all()
