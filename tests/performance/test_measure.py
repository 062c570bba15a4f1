"""Figures of a run: counted on the engine's events, timed by a clock of our own."""

from dataclasses import asdict
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_dgemma import load, stream_generate
from mlx_dgemma.checkpoint.quantize import Quantization
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit
from mlx_dgemma.performance import measure
from mlx_dgemma.performance.cost import Storage, floor_seconds, step_cost
from mlx_dgemma.performance.measure import Workload, random_prompts
from mlx_dgemma.performance.synthetic import config_tiny, synthetic_model
from mlx_dgemma.text.chat import chat_ids

TINY = config_tiny()
L = TINY.canvas_length
PUZZLE = "4000\n0310\n0430\n0000"


def build(q=None):
    return synthetic_model(TINY, quantization=q, dtype=mx.float32, seed=0)


@pytest.fixture(scope="module")
def model():
    return build()


def test_workload_changes_only_what_it_says(model):
    base = model.settings.replace(confidence=0.1)
    expected = base.replace(steps=5, max_tokens=3 * L)
    early = Workload([[1]], canvases=3, steps=5, early=True)
    assert early.settings(base) == expected
    fixed = Workload([[1]], canvases=3, steps=5).settings(base)
    assert fixed == expected.replace(confidence=0.0, eos=frozenset())


@pytest.mark.parametrize(("rows", "canvases", "steps"), [(1, 1, 3), (2, 3, 2)])
def test_run_takes_every_step_and_its_figures_agree(model, rows, canvases, steps):
    prompts = random_prompts(model, rows, 6)
    job = Workload(prompts, canvases=canvases, steps=steps, prefill_step_size=4)
    trial = measure.run(model, job)
    assert all(figure > 0 for figure in asdict(trial).values())
    assert trial.tokens == rows * canvases * L
    assert trial.tokens_per_forward == L / steps
    wall = trial.tokens / trial.wall_tps
    denoising = rows * canvases / trial.canvases_per_second
    assert rows * 6 / trial.prefill_tps + denoising <= wall * (1 + 1e-9)
    # half of the steps that end with no canvas encoded took the median or more
    timed = canvases * steps - (canvases - 1)
    assert trial.step_seconds * (timed // 2) <= denoising
    assert trial.peak_bytes >= Storage.of_model(model).weight_bytes


def commit(tokens, steps, reason):
    how = {"request": 0, "canvas_index": 0, "finish_reason": reason}
    return Commit(tokens=tuple(range(tokens)), steps=steps, **how)


def test_ticks_that_encode_a_canvas_are_no_steps_but_take_their_time(
    model, monkeypatch
):
    ends, goes_on = commit(6, 4, "stop"), commit(16, 2, None)
    clock = SimpleNamespace(seconds=0)
    clock.perf_counter = lambda: clock.seconds

    class ScriptedEngine:
        def __init__(self, model):
            self.running = [(1, []), (90, [goes_on]), (2, [])]
            self.running += [(80, [goes_on, ends]), (4, [ends])]

        def admit(self, prompt, settings, seed, chunk):
            clock.seconds += 3
            return SimpleNamespace(seconds=2.0)

        def tick(self):
            seconds, events = self.running.pop(0)
            clock.seconds += seconds
            return events

    monkeypatch.setattr(measure, "Engine", ScriptedEngine)
    monkeypatch.setattr(measure, "time", clock)
    trial = measure.run(model, Workload([[1] * 5, [2] * 5]))
    assert trial.step_seconds == 2  # of 1, 2 and 4
    assert trial.prefill_tps == 10 / 4
    assert trial.tokens == 16 + 16 + 6 + 6
    assert trial.tokens_per_forward == 44 / (2 + 2 + 4 + 4)
    assert trial.canvases_per_second == pytest.approx(4 / 177)
    assert trial.wall_tps == pytest.approx(44 / (6 + 177))


def test_real_prompt_ends_when_it_is_done():
    sudoku, tokenizer = load("sudoku4")
    ids = chat_ids(tokenizer, PUZZLE)
    trial = measure.run(sudoku, Workload([ids, ids], steps=16, early=True), seed=3)
    events = [
        event
        for seed in (3, 4)
        for event in stream_generate(sudoku, tokenizer, PUZZLE, seed=seed, steps=16)
    ]
    commits = [event for event in events if isinstance(event, Commit)]
    assert trial.tokens == sum(len(c.tokens) for c in commits)
    assert trial.tokens_per_forward == trial.tokens / sum(c.steps for c in commits)
    assert trial.tokens_per_forward > 32 / 16


def test_parts_are_timed_and_the_model_stays_as_it_was(model):
    def denoised():
        engine = Engine(model)
        engine.admit([1, 2, 3], model.settings.replace(steps=3, max_tokens=L), 5)
        return [e.tokens for e in engine.run() if isinstance(e, Commit)]

    before = denoised()
    for rows, tokens in ((1, 1), (3, 20)):
        job = Workload(random_prompts(model, rows, tokens), prefill_step_size=12)
        assert all(s > 0 for s in measure.time_parts(model, job).values())
    assert denoised() == before


def test_roofline_is_the_cost_of_a_step_at_the_measured_rates(monkeypatch, as_gpu):
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "MATRIX_SIZE", 64)
    monkeypatch.setattr(measure, "_median_seconds", lambda call: 0.5)
    model = build(Quantization(bits=4))
    found = measure.roofline(model, Workload(random_prompts(model, 2, 30)))
    rates = 2 * 64**3 / 0.5, 2 * (1 << 16) / 0.5
    assert (found["flops_per_second"], found["bytes_per_second"]) == rates
    costs = step_cost(TINY, Storage.of_model(model), 2, 30, L)
    assert found["floor_seconds"] == floor_seconds(costs, *rates)
    for part, cost in costs.items():
        seconds = max(cost.flops / rates[0], cost.bytes / rates[1])
        assert found["parts"][part] == cost._asdict() | {"seconds": seconds}
