"""Compiled steps: when they are traced, and that they follow the weights."""

import numpy as np
import pytest

from mlx_dgemma import DiffusionGemma, Engine, Settings, Step, load

# two steps of each of five canvases of 64 tokens
SHORT = Settings(canvas_length=64, max_tokens=320, steps=2, confidence=0, eos=set())
ONE = SHORT.replace(max_tokens=64)
PROMPT = [2, 7, 8, 9, 5, 11, 12, 13]


@pytest.fixture
def traces(tiny, unfused, monkeypatch):
    """`traces(*requests)`: traces so far, after each tick of requests run together."""
    model, calls, denoise = load(tiny)[0], [], DiffusionGemma.denoise_hidden

    def traced(*given):
        calls.append(given)
        return denoise(*given)

    def run(*requests) -> list[int]:
        engine, counts = Engine(model, compiled=True), []
        for seed, (prompt, settings) in enumerate(requests):
            engine.admit(prompt, settings, seed)
        while engine.running:
            engine.tick()
            counts.append(len(calls))
        return counts

    monkeypatch.setattr(DiffusionGemma, "denoise_hidden", traced)
    return run


def test_steps_are_traced_once_per_bucket_and_number_of_rows(traces):
    # prefixes of 64, 128, 192 and 256 tokens fill one bucket, 320 is in the next
    assert traces((PROMPT * 8, SHORT)) == [1] * 8 + [2] * 2
    assert traces((PROMPT, ONE)) == [2, 2]
    for _ in range(2):
        assert traces((PROMPT, ONE), (PROMPT * 2, ONE))[-1] == 3


def test_other_pinned_positions_are_not_traced_again(traces):
    for pinned in ({3: 5}, {4: 6, 9: 7}, {n: 8 for n in range(31)}, {0: 1, 63: 2}):
        # 63 to 33 free positions are padded to 64
        assert traces((PROMPT, ONE.replace(pinned=pinned))) == [1, 1]


def test_compiled_steps_use_the_weights_of_today(tiny, unfused):
    model, found = load(tiny)[0], []
    for scale in (1.0, 0.5):
        weight = model.embed_tokens.weight
        model.update({"embed_tokens": {"weight": weight * scale}})
        for compiled in (True, False):
            engine = Engine(model, compiled=compiled)
            engine.admit(PROMPT, ONE, 0)
            steps = [e for e in engine.run() if isinstance(e, Step)]
            found.append(np.array([np.array(step.entropy) for step in steps]))
        np.testing.assert_allclose(found[-2], found[-1], atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 0.1
