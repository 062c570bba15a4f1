"""The engine equals the loop written plainly, whatever shares its batch."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from tiny import VOCABULARY

from mlx_dgemma.diffusion import canvas, sampler
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit, Prefilled, Step
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.model.cache import PrefixCache
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.settings import Settings

EOS = frozenset({1, 4})
PROMPT = [2, 7, 8, 9, 5, 11, 12, 13, 14, 15, 16]
# loose enough that some canvases stop early and others do not
LOOSE = Settings(
    canvas_length=16,
    max_tokens=48,
    steps=6,
    entropy_bound=8.0,
    confidence=2.0,
    eos=EOS,
)
ENDLESS = LOOSE.replace(confidence=0.0, eos={999})  # every canvas takes all its steps


def draw(seed: int, index: int, step: int, purpose: str) -> mx.array:
    return mx.array(sampler.fold(seed, index, step, purpose))


def plain_loop(model, prompt, s: Settings, seed: int):
    """The algorithm as a person would write it down, one canvas at a time."""
    V, L = model.config.vocab_size, s.canvas_length
    tokens, steps, drafts = [], [], []
    for index in range(s.canvases):
        cache = model.make_cache()
        model.encode(mx.array([[*prompt, *tokens]]), cache)
        first = len(tokens)
        pinned = {p - first: t for p, t in s.pinned.items() if first <= p < first + L}
        canvas = np.array(
            mx.random.randint(0, V, (L,), key=draw(seed, index, 0, "canvas"))
        )
        canvas[list(pinned)] = list(pinned.values())
        signal, history = None, []
        step, argmax = 0, []
        for step in range(s.steps):
            t = s.t_min + (s.t_max - s.t_min) * (s.steps - step) / s.steps
            logits = (
                np.array(model.denoise(mx.array(canvas[None]), cache, signal))[0] / t
            )
            logits[
                : max(0, s.min_tokens - first), sorted(s.eos & set(range(V)))
            ] = -np.inf
            for position, token in pinned.items():
                logits[position] = np.where(np.arange(V) == token, 0, -np.inf)
            p = np.array(mx.softmax(mx.array(logits), axis=-1), np.float64)
            h = -(p * np.log(np.where(p, p, 1))).sum(axis=-1)
            order = np.argsort(h)
            accepted = np.zeros(L, bool)
            accepted[order] = np.cumsum(h[order]) - h[order] <= s.entropy_bound
            u = mx.random.uniform(shape=(L,), key=draw(seed, index, step, "propose"))
            proposal = [
                int((np.cumsum(q) <= x).sum())
                for q, x in zip(p, np.array(u), strict=True)
            ]
            noise = mx.random.randint(
                0, V, (L,), key=draw(seed, index, step, "renoise")
            )
            canvas = np.where(accepted, proposal, np.array(noise))
            canvas[list(pinned)] = list(pinned.values())
            argmax = p.argmax(axis=-1).tolist()
            drafts.append(argmax)
            signal = model.self_condition(mx.array(logits[None]))
            recent = history[len(history) - s.stability :]
            stable = len(recent) == s.stability and all(a == argmax for a in recent)
            history.append(argmax)
            if stable and h.mean() < s.confidence:
                break
        steps.append(step + 1)
        tokens += argmax
        if s.eos & set(argmax):
            break
    end = next((i for i, t in enumerate(tokens) if t in s.eos), None)
    return tokens[: s.max_tokens][:end], steps, drafts


def run(model, prompt, settings, seed):
    engine = Engine(model)
    events = [engine.admit(prompt, settings, seed), *engine.run()]
    assert isinstance(events[0], Prefilled)
    return events


def committed(events, request=None):
    commits = [e for e in events if isinstance(e, Commit)]
    commits = [c for c in commits if request is None or c.request == request]
    return [t for c in commits for t in c.tokens], [c.steps for c in commits]


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {}),
        (0, {"stability": 0, "confidence": 2.6}),
        (1, {"stability": 2, "steps": 9}),
        (2, {"confidence": 0.0, "steps": 3}),
        (3, {"canvas_length": 7, "max_tokens": 20}),
        (0, {"entropy_bound": 0.1, "t_max": 2.0, "t_min": 2.0}),
        (1, {"pinned": {0: 9, 5: 10, 16: 11, 31: 12}, "eos": {30}}),
        (2, {"eos": set(range(7, 20)), "min_tokens": 1}),
        (3, {"eos": set(range(7, 20)), "min_tokens": 19}),
        (0, {"eos": set(range(7, 20)), "min_tokens": 5, "pinned": {0: 9, 3: 25}}),
    ],
    ids=str,
)
def test_engine_equals_the_plain_loop(tiny_model, seed, changes):
    model, _ = tiny_model
    settings = LOOSE.replace(**changes)
    events = run(model, PROMPT, settings, seed)
    tokens, steps, drafts = plain_loop(model, PROMPT, settings, seed)
    assert [e.draft.tolist() for e in events if isinstance(e, Step)] == drafts
    assert committed(events) == (tokens, steps)
    if not settings.pinned:
        assert len(tokens) >= settings.min_tokens


def test_pinned_tokens_are_fixed_and_condition_their_neighbours(tiny_model):
    model, _ = tiny_model
    free, fixed = (
        [
            e
            for e in run(model, PROMPT, ENDLESS.replace(pinned=p, max_tokens=16), 0)
            if isinstance(e, Step)
        ]
        for p in ({}, {8: 20})
    )
    for step in fixed:
        assert step.canvas[8].item() == step.draft[8].item() == 20
        assert step.accepted[8].item() and step.entropy[8].item() == 0
    others = [i for i in range(16) if i != 8]
    entropies = [np.array(steps[0].entropy)[others] for steps in (free, fixed)]
    assert np.abs(entropies[0] - entropies[1]).max() > 1e-3


# --- batches -------------------------------------------------------------------------

REQUESTS = [
    (PROMPT, LOOSE, 0),
    (PROMPT[:2], LOOSE.replace(steps=3), 1),
    (PROMPT * 3, LOOSE.replace(canvas_length=7, t_max=1.5), 2),
    (PROMPT[3:], LOOSE.replace(pinned={0: 9, 17: 8}), 3),
    (PROMPT, LOOSE.replace(max_tokens=9), 0),
    (PROMPT, LOOSE.replace(eos=set(range(7, 20)), min_tokens=3), 4),
]


def test_batch_row_equals_solo(tiny_model):
    model, _ = tiny_model
    engine = Engine(model)
    for request in REQUESTS:
        engine.admit(*request)
    together = list(engine.run())
    for number, request in enumerate(REQUESTS):
        solo = run(model, *request)
        assert committed(together, number) == committed(solo)
        mine = [e for e in together if isinstance(e, Step) and e.request == number]
        steps = [e for e in solo if isinstance(e, Step)]
        assert [e.draft.tolist() for e in mine] == [e.draft.tolist() for e in steps]
        assert [e.stopped for e in mine] == [e.stopped for e in steps]


def crowded(model, **options: bool) -> list[tuple]:
    """Events of requests that come, stop, go on and are cancelled side by side."""
    engine = Engine(model, **options)
    ticks: list[list] = []

    def admit(prompt: list[int], settings: Settings, seed: int) -> int:
        event = engine.admit(prompt, settings, seed)
        ticks.append([event])
        return event.request

    def tick(times: int) -> None:
        ticks.extend(engine.tick() for _ in range(times))

    admit(PROMPT, LOOSE, 0)
    tick(2)
    cancelled = admit(PROMPT * 2, LOOSE, 1)
    admit(PROMPT[4:], ENDLESS, 2)
    tick(3)
    engine.cancel(cancelled)
    admit(PROMPT, LOOSE.replace(canvas_length=7, t_max=1.5), 3)
    admit(PROMPT[:3], LOOSE.replace(pinned={0: 9, 17: 8}), 4)
    tick(4)
    admit(PROMPT, LOOSE.replace(stability=0, confidence=9.0), 5)
    while engine.running:
        tick(1)
    assert engine.tick() == []
    return [(number, event) for number, tick in enumerate(ticks) for event in tick]


def facts(tick: int, event) -> tuple:
    """Everything in an event but times and entropies."""
    if isinstance(event, Prefilled):
        return tick, event.request, event.seed, event.prompt_tokens
    if isinstance(event, Commit):
        return tick, event.request, event.canvas_index, event.tokens, event.steps
    arrays = event.draft, event.canvas, event.accepted
    place = tick, event.request, event.canvas_index, event.step, event.steps
    return (*place, event.temperature, event.stopped, *(a.tolist() for a in arrays))


@pytest.mark.parametrize(("far", "compiled"), [(10, True), (0, False), (0, True)])
def test_running_ahead_changes_no_event(
    tiny_model, monkeypatch, unfused, far, compiled
):
    """Also where nearly each canvas has a step started in vain: `far` is 0."""
    model, _ = tiny_model
    monkeypatch.setattr(canvas, "FAR_FROM_DONE", far)
    expected = crowded(model, compiled=compiled, ahead=False)
    found = crowded(model, compiled=compiled, ahead=True)
    assert [facts(*e) for e in found] == [facts(*e) for e in expected]
    steps = [(a, b) for (_, a), (_, b) in zip(found, expected, strict=True)]
    steps = [(a, b) for a, b in steps if isinstance(a, Step)]
    for a, b in steps:
        np.testing.assert_allclose(np.array(a.entropy), np.array(b.entropy), atol=5e-4)
    last = [a for a, _ in steps if a.last]
    assert {True, False} == {a.stopped for a in last}


def test_cancelled_neighbour_leaves_the_step_it_shared(tiny_model):
    model, _ = tiny_model
    engine = Engine(model, ahead=True)
    other = engine.admit(PROMPT, ENDLESS, 1).request
    request = engine.admit(PROMPT, ENDLESS, 0).request
    engine.tick()
    engine.cancel(other)
    events = list(engine.run())
    assert {e.request for e in events} == {request}
    assert committed(events) == committed(run(model, PROMPT, ENDLESS, 0))


def test_dropped_steps_leave_no_memory_behind(tiny_model, monkeypatch):
    model, _ = tiny_model
    monkeypatch.setattr(canvas, "FAR_FROM_DONE", 0)
    engine = Engine(model, ahead=True)
    settings = LOOSE.replace(stability=0, confidence=9.0, max_tokens=320, eos=set())
    engine.admit(PROMPT, settings, 0)
    sizes = []
    while engine.running:
        engine.tick()
        mx.synchronize()
        sizes.append(mx.get_active_memory())
    assert len(sizes) == 20
    assert sizes[-2] - sizes[5] < 2e6


def test_prefixes_are_joined_once_per_change(tiny_model, monkeypatch):
    """Also when canvases of several lengths run side by side."""
    joins, join = [], PrefixCache.join.__func__

    def counted(cls, config, caches):
        joins.append(len(caches))
        return join(cls, config, caches)

    monkeypatch.setattr(PrefixCache, "join", classmethod(counted))
    model, _ = tiny_model
    engine = Engine(model)
    for length in (16, 7, 16, 7, 5):
        engine.admit(PROMPT, ENDLESS.replace(canvas_length=length, steps=50), 0)
    for _ in range(4):
        engine.tick()
    assert joins == [2, 2]


# --- one request ---------------------------------------------------------------------


def test_seed_decides_the_text_and_global_random_state_does_not(tiny_model):
    model, _ = tiny_model
    texts = []
    for seed in (5, 5, 6):
        mx.random.seed(len(texts))
        expected = mx.random.uniform().item()
        mx.random.seed(len(texts))
        texts.append(committed(run(model, PROMPT, LOOSE, seed)))
        assert mx.random.uniform().item() == expected
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_of_the_prompt_change_nothing(tiny_model, chunk):
    model, _ = tiny_model
    engine = Engine(model)
    engine.admit(PROMPT, LOOSE, 0, prefill_step_size=chunk)
    assert committed(engine.run()) == committed(run(model, PROMPT, LOOSE, 0))


def test_max_tokens_cuts_text_but_not_the_canvas(tiny_model):
    model, _ = tiny_model
    settings = LOOSE.replace(eos={999}, max_tokens=40)
    whole, steps = committed(run(model, PROMPT, settings, 3))
    for maximum in (1, 16, 17):
        events = run(model, PROMPT, settings.replace(max_tokens=maximum), 3)
        tokens, fewer = committed(events)
        assert tokens == whole[:maximum]
        assert fewer == steps[: len(fewer)]
        assert events[-1].finish_reason == "length"
        assert all(len(e.draft) == 16 for e in events if isinstance(e, Step))


def test_eos_ends_the_text_and_is_left_out(tiny_model):
    model, _ = tiny_model
    whole, _ = committed(run(model, PROMPT, LOOSE.replace(eos={999}), 3))
    events = run(model, PROMPT, LOOSE.replace(eos={whole[5]}), 3)
    assert committed(events)[0] == whole[: whole.index(whole[5])]
    assert events[-1].finish_reason == "stop"


def test_last_canvas_is_not_encoded(tiny_model, monkeypatch):
    model, _ = tiny_model
    sizes, encode = [], DiffusionGemma.encode

    def counted(self, ids, *given):
        sizes.append(ids.shape[1])
        return encode(self, ids, *given)

    monkeypatch.setattr(DiffusionGemma, "encode", counted)
    run(model, PROMPT, ENDLESS.replace(steps=1), 0)
    assert sizes == [len(PROMPT), 16, 16]


@pytest.mark.parametrize(("compiled", "ahead"), [(False, False), (True, True)])
def test_commit_writes_the_prefix_in_place(
    tiny_model, monkeypatch, unfused, compiled, ahead
):
    """Its buffers, here 10 MB, are not copied while a canvas is encoded."""
    model, _ = tiny_model
    reserve, encode, growths = PrefixCache.reserve, DiffusionGemma.encode, []

    def measured(self, ids, cache, *given):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        encode(self, ids, cache, *given)
        cache.evaluate()
        growths.append(mx.get_peak_memory() - before)

    monkeypatch.setattr(PrefixCache, "reserve", lambda self, _: reserve(self, 65_536))
    monkeypatch.setattr(DiffusionGemma, "encode", measured)
    engine = Engine(model, compiled=compiled, ahead=ahead)
    engine.admit(PROMPT, ENDLESS.replace(steps=3), 0)
    list(engine.run())
    prompt, *commits = growths
    assert len(commits) == 2
    assert prompt > 10e6 and max(commits) < 1e6


def test_events_can_be_read_from_another_thread(tiny_model):
    """Lazy arrays would belong to the thread they came from."""
    model, _ = tiny_model
    steps = [e for e in run(model, PROMPT, LOOSE, 0) if isinstance(e, Step)]
    read: list[list] = []

    def reader() -> None:
        for e in steps:
            arrays = e.draft, e.canvas, e.accepted, e.entropy
            read.append([array.tolist() for array in arrays])

    thread = threading.Thread(target=reader)
    thread.start()
    thread.join()
    assert len(read) == len(steps)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "prompt is empty"),
        ([len(VOCABULARY)], {}, f"id {len(VOCABULARY)}; this model knows 0 to 31"),
        ([3, -1], {}, "id -1"),
        ([3], {"pinned": {0: 32}}, r"pinned\[0\] is 32"),
        ([3], {"pinned": {48: 3}}, "pinned position 48 lies behind max_tokens 48"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(tiny_model, prompt, changes, message):
    model, _ = tiny_model
    with pytest.raises(SettingsError, match=message):
        Engine(model).admit(prompt, LOOSE.replace(**changes), 0)
