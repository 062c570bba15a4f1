"""What is measured: counted on the engine's own events, timed by a clock of ours."""

from dataclasses import asdict, fields
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma import load
from mlx_dgemma.checkpoint.quantize import MODES, RECIPES, Quantization
from mlx_dgemma.checkpoint.weights import expected_shapes
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit, Prefilled, Step
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.performance import measure
from mlx_dgemma.performance.cost import (
    PARTS,
    Cost,
    Loaded,
    Storage,
    floor_seconds,
    step_cost,
    weight_bytes,
)
from mlx_dgemma.performance.measure import Trial, Workload, random_prompts
from mlx_dgemma.performance.synthetic import config_tiny, synthetic_model
from mlx_dgemma.text.chat import chat_ids

TINY = config_tiny()
L = TINY.canvas_length
PUZZLE = "4000\n0310\n0430\n0000"
CODES = [
    Quantization.with_defaults(mode, bits, None)
    for mode, known in MODES.items()
    for bits in known.bits
]


def build(q=None, *, recipe="uniform", dtype=mx.float32):
    return synthetic_model(TINY, quantization=q, recipe=recipe, dtype=dtype, seed=0)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def small(monkeypatch):
    """Ceilings of little work."""
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "PRODUCT", 64)


@pytest.fixture
def witness(monkeypatch):
    """Everything an engine was asked and said, and what was encoded behind what."""
    seen = SimpleNamespace(admitted=[], ticks=[], encoded=[], behind=[])
    admit, tick, encode = Engine.admit, Engine.tick, DiffusionGemma.encode

    def admitting(engine, prompt, settings, seed, chunk):
        seen.admitted.append((list(prompt), settings, seed, chunk))
        return admit(engine, prompt, settings, seed, chunk)

    def ticking(engine):
        seen.ticks.append(tick(engine))
        return seen.ticks[-1]

    def encoding(model, tokens, cache, images=()):
        seen.encoded.append(tokens.shape)
        seen.behind.append(cache.columns)
        return encode(model, tokens, cache, images)

    monkeypatch.setattr(Engine, "admit", admitting)
    monkeypatch.setattr(Engine, "tick", ticking)
    monkeypatch.setattr(DiffusionGemma, "encode", encoding)
    return seen


def events(seen, kind):
    return [event for tick in seen.ticks for event in tick if isinstance(event, kind)]


# Jobs


def test_random_prompts_are_the_same_each_time(model):
    prompts = random_prompts(model, 3, 50)
    assert prompts == random_prompts(build(Quantization()), 3, 50)
    assert [len(prompt) for prompt in prompts] == [50, 50, 50]
    assert len({tuple(prompt) for prompt in prompts}) == 3
    ids = {token for prompt in prompts for token in prompt}
    assert all(type(token) is int and 0 <= token < TINY.vocab_size for token in ids)
    assert len(ids) > 100


def test_a_job_changes_only_what_it_says():
    known = TINY.settings
    job = Workload([[1]], canvases=3, steps=5)
    wanted = known.replace(steps=5, max_tokens=3 * L)
    assert job.settings(known) == wanted.replace(confidence=0.0, eos=frozenset())
    early = Workload([[1]], canvases=3, steps=5, early=True)
    assert early.settings(known) == wanted
    assert known.eos and known.confidence > 0


# Runs


@pytest.mark.parametrize(("rows", "canvases", "steps"), [(1, 1, 1), (3, 2, 4)])
def test_a_run_takes_every_step_of_every_canvas_of_every_row(
    model, witness, rows, canvases, steps
):
    prompts = random_prompts(model, rows, 10)
    job = Workload(prompts, canvases=canvases, steps=steps, prefill_step_size=4)
    trial = measure.run(model, job, seed=7)
    commits, taken = events(witness, Commit), events(witness, Step)
    settings = job.settings(TINY.settings)
    assert witness.admitted == [
        (prompt, settings, 7 + row, 4) for row, prompt in enumerate(prompts)
    ]
    assert len(witness.ticks) == canvases * steps
    assert len(taken) == rows * canvases * steps
    assert len(commits) == rows * canvases
    assert {(len(c.tokens), c.steps) for c in commits} == {(L, steps)}
    assert not any(step.stopped for step in taken)
    # chunks of each prompt, and each canvas that another one follows
    whole = [(1, 4), (1, 4), (1, 2)] * rows
    assert witness.encoded == whole + [(1, 4)] * (4 * rows * (canvases - 1))
    assert trial.tokens_per_forward == L / steps


@pytest.mark.parametrize(("rows", "canvases", "steps"), [(1, 1, 3), (2, 3, 2)])
def test_the_figures_of_a_run_are_of_one_time(model, rows, canvases, steps):
    job = Workload(random_prompts(model, rows, 6), canvases=canvases, steps=steps)
    trial = measure.run(model, job)
    assert all(figure > 0 for figure in asdict(trial).values())
    wall = rows * canvases * L / trial.wall_tps
    denoising = rows * canvases / trial.canvases_per_second
    prefill = rows * 6 / trial.prefill_tps
    assert prefill + denoising <= wall * (1 + 1e-9)
    # half of the steps that end with no canvas encoded took the median or more
    timed = canvases * steps - (canvases - 1)
    assert trial.step_seconds * (timed // 2) <= denoising
    assert trial.peak_bytes >= weight_bytes(TINY, Loaded.of(model))


class Scripted:
    """Stands for the engine: what happens in each tick is written down."""

    clock = 0.0
    script = ()

    def __init__(self, model):
        self.left = list(self.script)

    @classmethod
    def now(cls):
        return cls.clock

    @property
    def running(self):
        return self.left

    def admit(self, prompt, settings, seed, chunk):
        Scripted.clock += 3
        return Prefilled(request=0, seed=seed, prompt_tokens=len(prompt), seconds=2.0)

    def tick(self):
        seconds, events = self.left.pop(0)
        Scripted.clock += seconds
        return events


def commit(tokens, steps, reason):
    return Commit(
        request=0,
        canvas_index=0,
        tokens=tuple(range(tokens)),
        steps=steps,
        finish_reason=reason,
    )


def test_ticks_that_encode_a_canvas_are_no_steps_but_take_their_time(
    model, monkeypatch
):
    ends, goes_on = commit(6, 4, "stop"), commit(16, 2, None)
    script = [(1, []), (90, [goes_on]), (2, []), (80, [goes_on, ends]), (4, [ends])]
    monkeypatch.setattr(Scripted, "script", script)
    monkeypatch.setattr(measure, "Engine", Scripted)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=Scripted.now))
    trial = measure.run(model, Workload([[1] * 5, [2] * 5]))
    assert trial.step_seconds == 2  # of 1, 2 and 4
    assert trial.prefill_tps == 10 / 4
    assert trial.tokens_per_forward == (16 + 16 + 6 + 6) / (2 + 2 + 4 + 4)
    assert trial.canvases_per_second == pytest.approx(4 / 177)
    assert trial.wall_tps == pytest.approx(44 / (6 + 177))


def test_a_real_prompt_ends_when_it_is_done(witness):
    sudoku, tokenizer = load("sudoku4")
    ids = chat_ids(tokenizer, PUZZLE)
    trial = measure.run(sudoku, Workload([ids, ids], steps=16, early=True), seed=3)
    commits = events(witness, Commit)
    assert [c.finish_reason for c in commits] == ["stop", "stop"]
    assert all(c.steps < 16 for c in commits)
    tokens = sum(len(c.tokens) for c in commits)
    assert trial.tokens_per_forward == tokens / sum(c.steps for c in commits)
    assert trial.tokens_per_forward > 32 / 16
    assert [seed for _, _, seed, _ in witness.admitted] == [3, 4]


def test_the_median_is_that_of_each_figure_alone():
    names = [f.name for f in fields(Trial)]
    trials = [
        Trial(**dict(zip(names, numbers, strict=True)))
        for numbers in ([1, 9, 5, 2, 8, 40], [3, 7, 4, 1, 6, 10], [2, 8, 6, 3, 7, 20])
    ]
    assert list(asdict(Trial.median(trials)).values()) == [2, 8, 5, 2, 7, 20]
    assert Trial.median(trials[:1]) == trials[0]
    assert Trial.median(trials[:2]).peak_bytes == 25


# LayerKV


def denoised(model):
    """The tokens of a canvas: what a change of the model would change."""
    engine = Engine(model)
    settings = TINY.settings.replace(steps=3, max_tokens=L)
    engine.admit([1, 2, 3], settings, 5)
    return [e.tokens for e in engine.run() if isinstance(e, Commit)]


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 40), (3, 7)])
def test_a_step_is_taken_apart_and_the_model_stays_as_it_was(model, rows, tokens):
    before, known = denoised(model), dict(tree_flatten(model.parameters()))
    job = Workload(random_prompts(model, rows, tokens), prefill_step_size=16)
    parts = asdict(measure.dissect(model, job))
    assert list(parts) == ["body", "vocabulary", "commit"]
    assert all(seconds > 0 for seconds in parts.values())
    after = dict(tree_flatten(model.parameters()))
    assert list(after) == list(known)
    assert all(after[name] is array for name, array in known.items())
    assert denoised(model) == before


def test_a_commit_is_one_row_behind_its_prompt_in_the_chunks_of_the_job(model, witness):
    job = Workload(random_prompts(model, 2, 20), prefill_step_size=12)
    measure.dissect(model, job)
    commits = [(1, 12), (1, 4)] * (measure.REPEATS + 1)
    assert witness.encoded == [(1, 12), (1, 8)] * 2 + commits
    assert witness.behind == [0, 12] * 2 + [20, 32] * (measure.REPEATS + 1)


def test_a_step_is_read_behind_all_rows(model, monkeypatch):
    shapes = []
    denoise_hidden = DiffusionGemma.denoise_hidden

    def watching(model, canvas, view, signal):
        shapes.append((canvas.shape, view.prefixes[-1][0].shape[0]))
        return denoise_hidden(model, canvas, view, signal)

    monkeypatch.setattr(DiffusionGemma, "denoise_hidden", watching)
    measure.dissect(model, Workload(random_prompts(model, 3, 5)))
    assert set(shapes) == {((3, L), 3)}


# Ceilings and floors


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_ceilings_are_positive(small, dtype):
    found = measure.ceilings(build(dtype=dtype))
    assert found.bytes_per_second > 0
    assert found.flops_per_second > 0


def test_ceilings_count_what_is_read_and_written_and_multiplied(
    model, small, monkeypatch, as_gpu
):
    monkeypatch.setattr(measure, "_median", lambda call: 0.5)
    found = measure.ceilings(model)
    assert found.bytes_per_second == 2 * (1 << 16) / 0.5
    assert found.flops_per_second == 2 * 64**3 / 0.5


@pytest.mark.parametrize("q", [None, Quantization(bits=4)], ids=["dense", "4 bit"])
def test_the_floor_is_that_of_a_step_under_the_ceilings_found(small, q):
    model = build(q)
    found = measure.roofline(model, Workload(random_prompts(model, 2, 30)))
    limits = found["flops_per_second"], found["bytes_per_second"]
    costs = step_cost(TINY, Loaded.of(model), 2, 30, L)
    assert found["floor_seconds"] == floor_seconds(costs, *limits)
    assert list(found["parts"]) == list(PARTS)
    for part, shown in found["parts"].items():
        assert Cost(shown["flops"], shown["bytes"]) == costs[part]
        bounds = shown["flops"] / limits[0], shown["bytes"] / limits[1]
        assert shown["seconds"] == max(bounds)
    seconds = sum(shown["seconds"] for shown in found["parts"].values())
    assert seconds == pytest.approx(found["floor_seconds"])


# Weights in memory


def agree(model, storage):
    """Parameter by parameter: what lies in memory is what a conversion would leave."""
    loaded, shapes = Loaded.of(model), expected_shapes(TINY)
    assert set(loaded.sizes) == set(shapes)
    for name, shape in shapes.items():
        assert loaded.nbytes(name, shape) == storage.nbytes(name, shape), name
    assert loaded.value_bytes == storage.value_bytes
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert weight_bytes(TINY, loaded) == weight_bytes(TINY, storage) == held
    assert step_cost(TINY, loaded, 2, 9, L) == step_cost(TINY, storage, 2, 9, L)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("q", CODES, ids=lambda q: f"{q.mode}-{q.bits}")
def test_what_is_loaded_lies_as_it_was_quantised(q, recipe):
    model = build(q, recipe=recipe, dtype=mx.bfloat16)
    agree(model, Storage.quantized(q, recipe, mx.bfloat16))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_what_is_loaded_lies_in_its_dtype(dtype):
    agree(build(dtype=dtype), Storage.dense(dtype))
    q = Quantization(bits=3)
    agree(build(q, dtype=dtype), Storage.quantized(q, dtype=dtype))


def test_a_checkpoint_is_weighed_as_well():
    sudoku, _ = load("sudoku4")
    held = sum(array.nbytes for _, array in tree_flatten(sudoku.parameters()))
    assert weight_bytes(sudoku.config, Loaded.of(sudoku)) == held
