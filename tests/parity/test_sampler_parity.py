"""The engine against transformers' `generate`, both fed the same random draws."""

import numpy as np
import pytest
from replay import feed

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.generation_config import read_generation_config
from mlx_dgemma.checkpoint.hub import ASSETS
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit, Step
from mlx_dgemma.model.loading import load_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

# how transformers calls our settings
THEIRS = {
    "max_tokens": "max_new_tokens",
    "steps": "max_denoising_steps",
    "stability": "stability_threshold",
    "confidence": "confidence_threshold",
}


def _replay(model, trajectory, monkeypatch, settings) -> list:
    """Our engine over the draws transformers made."""
    steps = trajectory.steps
    noises, proposals = [s.noise for s in steps], [s.proposal for s in steps]
    feed(monkeypatch, noises, proposals, trajectory.starts)
    engine = Engine(model)
    engine.admit(trajectory.prompt, settings, seed=0)
    return list(engine.run())


def _compare(path, prompt, seed, monkeypatch, **changes) -> int:
    """Same canvases, decisions, stop step and tokens; returns the steps taken."""
    from oracle import load_oracle
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        EntropyBoundSamplerConfig,
    )

    model = load_model(path, read_config(path))
    settings = model.settings.replace(**changes)
    theirs = {THEIRS.get(k, k): v for k, v in changes.items()}
    if "entropy_bound" in theirs:
        bound = theirs.pop("entropy_bound")
        theirs["sampler_config"] = EntropyBoundSamplerConfig(entropy_bound=bound)
    trajectory = load_oracle(path).generate(prompt, seed, **theirs)
    events = _replay(model, trajectory, monkeypatch, settings)
    steps = [event for event in events if isinstance(event, Step)]
    commits = [event for event in events if isinstance(event, Commit)]
    assert len(steps) == len(trajectory.steps)
    for ours, recorded in zip(steps, trajectory.steps, strict=True):
        np.testing.assert_array_equal(np.array(ours.draft), recorded.argmax)
        np.testing.assert_array_equal(np.array(ours.accepted), recorded.accepted)
        np.testing.assert_allclose(
            np.array(ours.entropy), recorded.entropy, atol=2e-4, rtol=2e-4
        )
        assert ours.stopped == recorded.stopped
    assert [c.steps for c in commits] == [len(c) for c in trajectory.canvases]
    committed = [token for commit in commits for token in commit.tokens]
    assert committed == _before_eos(trajectory.tokens, settings)
    return len(steps)


def _before_eos(tokens, settings) -> list[int]:
    end = next((i for i, t in enumerate(tokens) if t in settings.eos), None)
    return tokens[: settings.max_tokens][:end]


SETTINGS = [
    {},
    {"steps": 6, "entropy_bound": 20.0, "confidence": 3.0},
    {"steps": 9, "entropy_bound": 1e9, "confidence": 50.0, "stability": 2},
    {"steps": 12, "entropy_bound": 8.0, "t_max": 0.2, "t_min": 0.05},
    {"steps": 5, "stability": 0, "confidence": 2.0},
    {"max_tokens": 20, "steps": 4, "entropy_bound": 3.0},
    {"max_tokens": 70, "steps": 3, "entropy_bound": 1.0, "t_max": 1.5, "t_min": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_weights(tmp_path, seed, settings, monkeypatch):
    from make_tiny import make_checkpoint

    path = make_checkpoint(
        tmp_path / "m",
        seed=seed,
        canvas_length=16,
        text={"layer_types": ["sliding_attention", "full_attention"]},
    )
    prompt = np.random.default_rng(seed).integers(0, 32, 11).tolist()
    _compare(path, prompt, seed, monkeypatch, **settings)


@pytest.mark.parametrize("seed", range(8))
def test_trained_weights_stop_early(seed, monkeypatch):
    """sudoku4 as shipped: canvases end when stable and confident, at the same step."""
    from sudoku import held_out

    from mlx_dgemma.text.chat import chat_ids
    from mlx_dgemma.text.tokenizer import Tokenizer

    path = ASSETS / "sudoku4"
    puzzle, _ = held_out(8, 0)[seed]
    prompt = chat_ids(Tokenizer.from_dir(path), puzzle)
    steps = _compare(path, prompt, seed, monkeypatch)
    assert steps < read_generation_config(read_config(path), path).steps
