"""What may change the text does what its name says, and no more."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import load
from mlx_dgemma.diffusion import shortcuts
from mlx_dgemma.diffusion.canvas import Taken
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit, Step
from mlx_dgemma.diffusion.settings import Settings
from mlx_dgemma.diffusion.step import Manner, Stepper
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.model import vocab
from mlx_dgemma.text.chat import encode_prompt

PROMPT = [2, 7, 8, 9, 5, 11, 12, 13, 14, 15, 16]
LOOSE = Settings(
    canvas_length=32,
    max_tokens=64,
    steps=8,
    entropy_bound=40.0,
    confidence=2.5,
    stability=3,
    eos=frozenset({1}),
)
RNG = np.random.default_rng(0)


def run(model, settings, seed=0) -> list:
    engine = Engine(model)
    engine.admit(PROMPT, settings, seed)
    return list(engine.run())


def test_confident_positions_are_revealed_for_good(tiny_model):
    model, _ = tiny_model
    settings = LOOSE.but(sampler="confidence", min_probability=0.3, max_tokens=32)
    events = run(model, settings)
    steps = [e for e in events if isinstance(e, Step)]
    held = np.full(32, -1)
    for step in steps:
        draft, revealed = np.array(step.draft), np.array(step.accepted)
        known = held >= 0
        assert revealed[known].all() and (draft[known] == held[known]).all()
        assert revealed.sum() > known.sum()  # at least one more in every step
        assert (np.array(step.canvas)[revealed] == draft[revealed]).all()
        held[revealed] = draft[revealed]
    assert steps[-1].stopped == bool((held >= 0).all())
    assert events[-1].steps == len(steps) <= settings.steps


def test_what_is_revealed_is_likely_enough_or_the_likeliest(tiny_model, monkeypatch):
    model, _ = tiny_model
    peaks, read = [], vocab.read

    def spied(*given):
        found = read(*given)
        peaks.append(np.array(found.peak))
        return found

    monkeypatch.setattr(vocab, "read", spied)
    settings = LOOSE.but(sampler="confidence", min_probability=0.4, max_tokens=32)
    known = np.zeros(32, bool)
    for step, peak in zip(run(model, settings), peaks, strict=False):
        new = np.array(step.accepted) & ~known
        likely = ~known & (peak >= 0.4)
        if likely.any():
            assert (new == likely).all()
        else:
            assert new.sum() == 1 and peak[new] == peak[~known].max()
        known |= new


def test_a_canvas_ends_soon_behind_an_accepted_eos(tiny_model):
    model, _ = tiny_model
    settings = LOOSE.but(eos=frozenset(range(16)), trim_eos=True, confidence=0.0)
    trimmed = 0
    for seed in range(6):
        events = run(model, settings, seed)
        lengths = [e.draft.size for e in events if isinstance(e, Step)]
        for before, after, step in zip(lengths, lengths[1:], events, strict=False):
            ends = np.flatnonzero(
                np.array(step.accepted) & np.isin(np.array(step.canvas), range(16))
            )
            expected = before
            if len(ends):
                expected = min(before, -(-(ends[0] + 1) // 16) * 16)
            assert after == expected
            trimmed += after < before
        assert isinstance(events[-1], Commit)
    assert trimmed


def test_the_next_canvas_follows_a_trimmed_one(tiny_model, monkeypatch):
    """When the eos that a canvas was trimmed behind is gone again at its end."""
    model, _ = tiny_model

    def always(canvas, step):
        if step.draft.size > 16:
            canvas.state, canvas.row = canvas.state.row(canvas.row).at(slice(0, 16)), 0

    monkeypatch.setattr(shortcuts, "trim", always)
    events = run(model, LOOSE.but(eos=frozenset({99}), trim_eos=True, steps=3))
    commits = [e for e in events if isinstance(e, Commit)]
    assert [len(c.tokens) for c in commits] == [16] * 4
    assert [c.finish_reason for c in commits] == [None, None, None, "length"]


def test_what_is_frozen_is_seen_as_it_was(tiny_model):
    """The rest of a canvas, computed alone, is as it was among all positions."""
    model, _ = tiny_model
    for prompt in (PROMPT, PROMPT * 3):  # inside the window, and beyond it
        cache = model.make_cache()
        model.encode(mx.array([prompt]), cache)
        canvas = mx.array(RNG.integers(0, 32, (1, 32)).astype(np.int32))
        signal = mx.random.normal((1, 32, 64), key=mx.random.key(0))
        view, kept = model.view(cache, 32), []
        whole = np.array(model.denoise_hidden(canvas, view, signal, kept))
        sure = RNG.random(32) < 0.5
        outcome = type("Found", (), {"kept": kept})()
        taken = Taken(None, outcome, 0)  # type: ignore[arg-type]
        gone, left = np.flatnonzero(sure), np.flatnonzero(~sure)
        narrow = shortcuts._narrowed(view, taken, gone, left)
        some = mx.array(left.astype(np.int32))
        alone = model.denoise_hidden(canvas[:, some], narrow, signal[:, some])
        np.testing.assert_allclose(np.array(alone), whole[:, ~sure], atol=2e-5)


def test_freezing_looks_at_the_whole_canvas_before_the_commit(monkeypatch):
    model, tokenizer = load("sudoku4")
    settings = model.config.settings.but(freeze=True, stability=5, steps=9)
    widths, call = [], Stepper.__call__

    def spied(self, state, view, dials, pins):
        widths.append(state.canvas.shape[1])
        return call(self, state, view, dials, pins)

    monkeypatch.setattr(Stepper, "__call__", spied)
    narrowed = 0
    for seed in range(4):
        widths.clear()
        engine = Engine(model)
        puzzle = encode_prompt(tokenizer, "4000\n0310\n0430\n0000")
        engine.admit(puzzle, settings, seed)
        *steps, commit = engine.run()
        assert tokenizer.decode(commit.tokens).split() == "4123 2314 1432 3241".split()
        assert len(widths) == len(steps) <= settings.steps
        assert all(step.draft.size == 32 == step.entropy.size for step in steps)
        assert widths[0] == widths[-1] == 32
        narrowed += min(widths) < 32
        # once it is whole again it stays so
        back = widths.index(32, widths.index(min(widths)))
        assert set(widths[back:]) == {32}
    assert narrowed >= 2


def test_a_signal_of_few_tokens_is_the_dense_one_where_they_do_not_suffice(monkeypatch):
    monkeypatch.setattr(vocab, "BLOCK", 4)
    import mlx.nn as nn

    embedding = nn.Embedding(64, 32)
    embedding.weight = mx.array(RNG.normal(size=(64, 32)).astype(np.float32))
    hidden = mx.array((RNG.normal(size=(40, 32)) * 3).astype(np.float32))
    warmth = mx.array(np.geomspace(0.02, 8, 40).astype(np.float32))
    given = embedding, hidden, warmth, mx.full((40,), 0.5), 30.0
    dense, sparse = vocab.read(*given), vocab.read(*given, 4)
    x = np.array(vocab.head(embedding, hidden, 30.0)) / np.array(warmth)[:, None]
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    blocks = p.reshape(40, 16, 4)
    best = blocks.sum(axis=2).argmax(axis=1)
    tail = 1 - blocks.sum(axis=2).max(axis=1)
    few = np.zeros_like(blocks)
    few[np.arange(40), best] = blocks[np.arange(40), best]
    expected = few.reshape(40, 64) @ np.array(embedding.weight) * 32**0.5
    enough = tail <= vocab.TAIL
    assert 5 < enough.sum() < 35
    np.testing.assert_allclose(
        np.array(sparse.signal)[enough], expected[enough], rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(
        np.array(sparse.signal)[~enough],
        np.array(dense.signal)[~enough],
        rtol=1e-4,
        atol=1e-4,
    )
    for name in ("argmax", "entropy", "sample", "peak"):
        ours, theirs = getattr(sparse, name), getattr(dense, name)
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))


def test_shortcuts_that_cannot_be_are_refused():
    for changes, word in (
        ({"sampler": "greedy"}, "sampler"),
        ({"min_probability": -0.1}, "min_probability"),
        ({"signal_top_k": -1}, "signal_top_k"),
        ({"freeze": True, "sampler": "confidence"}, "freeze"),
        ({"freeze": True, "pinned": {0: 1}}, "pinned"),
        ({"trim_eos": True, "pinned": {0: 1}}, "pinned"),
    ):
        with pytest.raises(SettingsError, match=word):
            replace(LOOSE, **changes)


def test_no_shortcut_is_taken_unasked(tiny_model):
    settings = tiny_model[0].config.settings
    assert settings.sampler == "entropy-bound" and settings.signal_top_k == 0
    assert not settings.freeze and not settings.trim_eos
    assert Manner() == Manner("entropy-bound", 0, keep=False)
