"""Steps started before the host has read the one before change no event."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.diffusion import canvas
from mlx_dgemma.diffusion.canvas import Canvas
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit, Event, Prefilled, Step
from mlx_dgemma.diffusion.step import Stepper
from mlx_dgemma.settings import Settings

PROMPT = [2, 7, 8, 9, 5, 11, 12, 13, 14, 15, 16]
# loose enough that some canvases stop early and others do not
LOOSE = Settings(
    canvas_length=16,
    max_tokens=48,
    steps=6,
    entropy_bound=8.0,
    confidence=2.0,
    eos=frozenset({1, 4}),
)
NEVER = LOOSE.replace(confidence=0.0, eos=frozenset({999}))  # stops at its last step
SURE = {"stability": 0, "confidence": 9.0}  # stops at its first


def plain(event: Event) -> tuple:
    """All of an event that does not depend on the clock."""
    match event:
        case Step():
            arrays = event.draft, event.canvas, event.accepted
            found = [np.array(array).tolist() for array in arrays]
            where = event.request, event.canvas_index, event.step, event.steps
            return (*where, event.temperature, event.stopped, *found)
        case Commit():
            return (event.request, event.canvas_index, event.tokens, event.steps)
        case Prefilled():
            return (event.request, event.seed, event.prompt_tokens)


def told_alike(ticks: list[list[Event]], wanted: list[list[Event]]) -> None:
    """The same events in the same ticks."""
    assert [[plain(e) for e in tick] for tick in ticks] == [
        [plain(e) for e in tick] for tick in wanted
    ]
    for tick, other in zip(ticks, wanted, strict=True):
        for ours, theirs in zip(tick, other, strict=True):
            if isinstance(ours, Step) and isinstance(theirs, Step):
                np.testing.assert_allclose(
                    np.array(ours.entropy), np.array(theirs.entropy), atol=5e-4
                )


def alone(model, settings: Settings, seed: int, **ways: bool) -> list[list[Event]]:
    engine = Engine(model, **ways)
    ticks: list[list[Event]] = [[engine.admit(PROMPT, settings, seed)]]
    while engine.running:
        ticks.append(engine.tick())
    return ticks


def crowded(model, **ways: bool) -> list[list[Event]]:
    """Requests that come, stop, go on and are cancelled side by side."""
    engine = Engine(model, **ways)
    ticks: list[list[Event]] = []

    def admit(prompt: list[int], settings: Settings, seed: int) -> int:
        event = engine.admit(prompt, settings, seed)
        ticks.append([event])
        return event.request

    def tick(times: int) -> None:
        ticks.extend(engine.tick() for _ in range(times))

    admit(PROMPT, LOOSE, 0)
    tick(2)
    cancelled = admit(PROMPT * 2, LOOSE, 1)
    admit(PROMPT[4:], NEVER, 2)
    tick(3)
    engine.cancel(cancelled)
    admit(PROMPT, LOOSE.replace(canvas_length=7, t_max=1.5), 3)
    admit(PROMPT[:3], LOOSE.replace(pinned={0: 9, 17: 8}), 4)
    tick(4)
    admit(PROMPT, LOOSE.replace(**SURE), 5)
    while engine.running:
        tick(1)
    return ticks


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """When steps are started and when their flags are read."""
    told: list[str] = []
    start, report = Stepper.__call__, Canvas.report
    monkeypatch.setattr(
        Stepper, "__call__", lambda self, *a: told.append("start") or start(self, *a)
    )
    monkeypatch.setattr(
        Canvas, "report", lambda self, taken: told.append("read") or report(self, taken)
    )
    return told


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("far", [canvas.FAR, 0])
@pytest.mark.parametrize("seed", range(3))
def test_running_ahead_changes_no_event(
    tiny_model, monkeypatch, unfused, log, seed, far, compiled
):
    """Also where nearly each canvas has a step started in vain: FAR is 0."""
    model, _ = tiny_model
    monkeypatch.setattr(canvas, "FAR", far)
    wanted = alone(model, LOOSE, seed, compiled=compiled, ahead=False)
    steps = log.count("start")
    assert log == ["start", "read"] * steps
    log.clear()
    told_alike(alone(model, LOOSE, seed, compiled=compiled, ahead=True), wanted)
    assert log.count("read") == steps
    told = [e for tick in wanted for e in tick if isinstance(e, Step)]
    vain = sum(e.stopped and e.step + 1 < e.steps for e in told)
    assert log.count("start") == steps + (0 if far else vain)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("far", [canvas.FAR, 0])
def test_running_ahead_changes_no_event_of_a_crowd(
    tiny_model, monkeypatch, unfused, far, compiled
):
    model, _ = tiny_model
    monkeypatch.setattr(canvas, "FAR", far)
    wanted = crowded(model, compiled=compiled, ahead=False)
    told_alike(crowded(model, compiled=compiled, ahead=True), wanted)
    steps = [e for tick in wanted for e in tick if isinstance(e, Step)]
    assert any(e.stopped for e in steps) and any(not e.stopped for e in steps if e.last)
    assert {e.canvas_index for e in steps} == {0, 1, 2}


def test_the_next_step_is_started_before_the_last_is_read(tiny_model, log):
    model, _ = tiny_model
    alone(model, NEVER.replace(steps=5, max_tokens=16), 0, ahead=True)
    assert log == [*["start", "start", "read"], *["start", "read"] * 3, "read"]


def test_each_canvas_begins_with_nothing_ahead(tiny_model, log):
    model, _ = tiny_model
    alone(model, NEVER.replace(steps=2, max_tokens=48), 0, ahead=True)
    assert log == ["start", "start", "read", "read"] * 3


def test_a_step_after_the_stop_is_never_told(tiny_model, log):
    """The second step runs when the first turns out to be the last."""
    model, _ = tiny_model
    settings = LOOSE.replace(**SURE, max_tokens=32, eos=frozenset({999}))
    ticks = alone(model, settings, 0, ahead=True)
    assert log == ["start", "start", "read"] * 2
    told = [e for tick in ticks for e in tick if isinstance(e, Step)]
    assert [(e.canvas_index, e.step) for e in told] == [(0, 0), (1, 0)]
    told_alike(ticks, alone(model, settings, 0, ahead=False))


def test_near_the_end_no_step_is_started_in_vain(tiny_model, log):
    """Once the mean entropy comes near `confidence`, flags are read first."""
    model, _ = tiny_model
    alone(model, NEVER.replace(confidence=1e-6, max_tokens=16), 0, ahead=True)
    far = list(log)
    log.clear()
    alone(
        model, NEVER.replace(confidence=5.0, stability=9, max_tokens=16), 0, ahead=True
    )
    assert far == [*["start", "start", "read"], *["start", "read"] * 4, "read"]
    assert log == [*["start", "start", "read", "read"], *["start", "read"] * 4]


def test_a_neighbour_near_its_end_holds_back_the_batch(tiny_model, log):
    model, _ = tiny_model
    engine = Engine(model, ahead=True)
    engine.admit(PROMPT, NEVER, 0)
    engine.admit(PROMPT, NEVER.replace(confidence=5.0, stability=9), 0)
    while engine.running and len(log) < 9:
        engine.tick()
    assert log == [*["start"] * 2, *["read"] * 4, "start", "read", "read"]


def test_a_cancelled_neighbour_leaves_the_step_it_shared(tiny_model):
    """What was started for two is told for the one that stays."""
    model, _ = tiny_model
    engine = Engine(model, ahead=True)
    gone = engine.admit(PROMPT, NEVER, 1).request
    kept = engine.admit(PROMPT, NEVER, 0).request
    engine.tick()
    engine.cancel(gone)
    told = [e for e in engine.run() if isinstance(e, Step)]
    assert {e.request for e in told} == {kept}
    wanted = [e for tick in alone(model, NEVER, 0, ahead=False) for e in tick]
    steps = [plain(e)[1:] for e in wanted if isinstance(e, Step)]
    assert [plain(e)[1:] for e in told] == steps[1:]


def test_a_dropped_step_leaves_nothing_behind(tiny_model, monkeypatch):
    """Memory after many canvases with a step in vain is what it was after few."""
    model, _ = tiny_model
    monkeypatch.setattr(canvas, "FAR", 0)
    engine = Engine(model, ahead=True)
    engine.admit(PROMPT, LOOSE.replace(**SURE, max_tokens=16 * 30, eos=frozenset()), 0)
    sizes = []
    while engine.running:
        engine.tick()
        mx.synchronize()
        sizes.append(mx.get_active_memory())
    assert len(sizes) == 30
    assert sizes[-2] - sizes[5] < 2e6
