"""Compiled steps: when they are traced, and that they follow the weights."""

import gc
import weakref

import numpy as np
import pytest

from mlx_dgemma import load
from mlx_dgemma.diffusion import step as steps
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Step
from mlx_dgemma.diffusion.step import FREE_MULTIPLE, Pinned
from mlx_dgemma.settings import Settings

# two steps of each of five canvases of 64 tokens
SHORT = Settings(canvas_length=64, max_tokens=320, steps=2, confidence=0, eos=set())
ONE = SHORT.replace(max_tokens=64)
PROMPT = [2, 7, 8, 9, 5, 11, 12, 13]


def traces(model) -> int:
    """How often steps of this model were traced so far."""
    return sum(stepper.traces for stepper in steps._STEPPERS[id(model)].values())


@pytest.fixture
def own_model(tiny, unfused):
    """A model for which nothing was compiled yet."""
    return load(tiny)[0]


def run(model, *requests) -> list[int]:
    """Traces after each tick of requests that run together."""
    engine, counts = Engine(model, compiled=True), []
    for seed, (prompt, settings) in enumerate(requests):
        engine.admit(prompt, settings, seed)
    while engine.running:
        engine.tick()
        counts.append(traces(model))
    return counts


def test_steps_are_traced_once_per_bucket_and_number_of_rows(own_model):
    # prefixes of 64, 128, 192 and 256 tokens fill one bucket, 320 is in the next
    assert run(own_model, (PROMPT * 8, SHORT)) == [1] * 8 + [2] * 2
    assert run(own_model, (PROMPT, ONE)) == [2, 2]
    for _ in range(2):
        assert run(own_model, (PROMPT, ONE), (PROMPT * 2, ONE))[-1] == 3


def test_other_pinned_positions_are_not_traced_again(own_model):
    for pinned in ({3: 5}, {4: 6, 9: 7}, {n: 8 for n in range(31)}, {0: 1, 63: 2}):
        # 63 to 33 free positions are padded to 64
        assert run(own_model, (PROMPT, ONE.replace(pinned=pinned))) == [1, 1]


def test_compiled_steps_use_the_weights_of_today(own_model):
    def entropies(compiled: bool) -> np.ndarray:
        engine = Engine(own_model, compiled=compiled)
        engine.admit(PROMPT, ONE, 0)
        steps = [e for e in engine.run() if isinstance(e, Step)]
        return np.array([np.array(e.entropy) for e in steps])

    before = entropies(True)
    np.testing.assert_allclose(before, entropies(False), atol=1e-5)
    weight = own_model.embed_tokens.weight
    own_model.update({"embed_tokens": {"weight": weight * 0.5}})
    after = entropies(True)
    np.testing.assert_allclose(after, entropies(False), atol=1e-5)
    assert np.abs(after - before).max() > 0.1


def test_model_is_freed_after_compiled_steps(tiny, unfused):
    model = load(tiny)[0]
    assert run(model, (PROMPT, ONE)) == [1, 1]
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_free_positions_are_padded_to_a_multiple():
    assert Pinned.of([np.full(40, -1)] * 2) is None
    rows = np.full((2, 40), -1)
    rows[0, 3], rows[1, :20] = 9, 7
    pinned = Pinned.of(rows)
    assert pinned is not None and pinned.tokens.tolist() == rows.tolist()
    expected = np.flatnonzero(rows < 0).tolist()  # 59
    free = pinned.free.tolist()
    assert free == expected + expected[-1:] * (2 * FREE_MULTIPLE - 59)
    exact = Pinned.of([np.array([5] * 8 + [-1] * FREE_MULTIPLE)])
    assert exact is not None and len(exact.free) == FREE_MULTIPLE
