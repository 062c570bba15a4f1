"""Texts that may not end before they have begun."""

import numpy as np
import pytest

from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit, Step
from mlx_dgemma.errors import SettingsError

PROMPT = [2, 7, 11, 13]


def run(model, prompts=(PROMPT,), **changes) -> dict[int, list]:
    """Events of requests that run together, by request; seed is its number."""
    engine = Engine(model)
    found = {}
    for seed, prompt in enumerate(prompts):
        settings = model.settings.replace(**changes)
        found[engine.admit(prompt, settings, seed).request] = []
    for event in engine.run():
        found[event.request].append(event)
    return found


def text(events) -> list[int]:
    return [token for e in events if isinstance(e, Commit) for token in e.tokens]


@pytest.fixture
def ends_at_once(tiny_model):
    """A model, and the ids of eos that make its answer to PROMPT empty."""
    model, _ = tiny_model
    whole = text(run(model, eos=[31], steps=4, max_tokens=48)[0])
    eos = frozenset(whole[:3])  # what its answer begins with
    assert text(run(model, eos=eos, steps=4, max_tokens=48)[0]) == []
    return model, eos


@pytest.mark.parametrize("least", [1, 3, 16, 20])
def test_a_text_does_not_end_before_its_time(ends_at_once, least):
    """Also where that is in the second canvas of 16 tokens."""
    model, eos = ends_at_once
    found = text(run(model, eos=eos, steps=4, max_tokens=48, min_tokens=least)[0])
    assert len(found) >= least and not set(found) & eos


def test_only_the_first_positions_are_forbidden(ends_at_once):
    """Behind them the drafts hold what ends a text, as without it."""
    model, eos = ends_at_once
    steps = run(model, eos=eos, steps=4, max_tokens=16, min_tokens=2)[0]
    drafts = np.array([np.array(e.draft) for e in steps if isinstance(e, Step)])
    canvases = np.array([np.array(e.canvas) for e in steps if isinstance(e, Step)])
    assert not np.isin(drafts[:, :2], list(eos)).any()
    assert np.isin(drafts[:, 2], list(eos)).any()
    accepted = np.array([np.array(e.accepted) for e in steps if isinstance(e, Step)])
    assert not (np.isin(canvases[:, :2], list(eos)) & accepted[:, :2]).any()


def test_what_is_left_of_them_is_forbidden_in_the_next_canvas(ends_at_once):
    model, eos = ends_at_once
    steps = run(model, eos=eos, steps=4, max_tokens=32, min_tokens=17)[0]
    found = np.array(
        [
            np.array(e.draft)
            for e in steps
            if isinstance(e, Step) and e.canvas_index == 1
        ]
    )
    ends = np.isin(found, list(eos))
    assert not ends[:, :1].any() and ends[:, 1:16].any()


def test_the_signal_of_the_next_step_is_without_them(ends_at_once, monkeypatch):
    """Or the canvas would go on hoping for its end."""
    model, eos = ends_at_once
    signals = []
    denoise = type(model).denoise_hidden

    def watch(self, canvas, view, signal, *given):
        signals.append(np.array(signal)[0])
        return denoise(self, canvas, view, signal, *given)

    monkeypatch.setattr(type(model), "denoise_hidden", watch)
    for least in (0, 1):
        signals.clear()
        run(model, eos=eos, steps=2, max_tokens=16, min_tokens=least)
        first = signals[1][0]
        rows = np.array(model.embed_tokens.weight) * 8  # sqrt(64)
        share = np.linalg.lstsq(rows.T, first, rcond=None)[0] if least else None
    assert share is not None and np.abs(share[sorted(eos)]).max() < 1e-3


def test_it_changes_nothing_where_it_is_not_asked_for(tiny_model):
    model, _ = tiny_model
    plain, zero = (run(model, steps=5, **c)[0] for c in ({}, {"min_tokens": 0}))
    assert text(plain) == text(zero)


def test_neighbours_are_not_touched(ends_at_once):
    model, eos = ends_at_once
    engine = Engine(model)
    shared = model.settings.replace(eos=eos, steps=4, max_tokens=32)
    alone = {
        s: text(run(model, eos=eos, steps=4, max_tokens=32, min_tokens=s)[0])
        for s in (0, 1)
    }
    requests = {}
    for least in (0, 1):
        settings = shared.replace(min_tokens=least)
        requests[engine.admit(PROMPT, settings, seed=0).request] = least
    together = {least: [] for least in (0, 1)}
    for event in engine.run():
        if isinstance(event, Commit):
            together[requests[event.request]] += event.tokens
    assert together == alone


def test_given_tokens_stay_given(ends_at_once):
    model, eos = ends_at_once
    token = min(eos)
    found = run(model, eos=eos, steps=4, max_tokens=16, min_tokens=4, pinned={0: token})
    assert text(found[0]) == []  # who asks for an eos gets it


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 300}, "above max_tokens 256"),
        ({"min_tokens": 1, "freeze": True}, "does not go with min_tokens"),
    ],
)
def test_what_cannot_be_is_refused(tiny_model, changes, told):
    model, _ = tiny_model
    with pytest.raises(SettingsError, match=told):
        model.settings.replace(max_tokens=256, **changes)
