"""The engine equals the loop written plainly, whoever shares the batch."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import VOCABULARY

from mlx_dgemma.diffusion import sampler
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


def plain_loop(model, prompt, s: Settings, seed: int):
    """The algorithm as a person would write it down, one canvas at a time."""
    vocab, length = model.config.vocab_size, s.canvas_length
    tokens, steps, drafts = [], [], []
    for index in range(s.canvases):
        cache = model.make_cache()
        model.encode(mx.array([[*prompt, *tokens]]), cache)
        canvas = mx.random.randint(
            0, vocab, (length,), key=mx.array(sampler.fold(seed, index, 0, "canvas"))
        )
        signal, history = None, []
        step, argmax = 0, []
        for step in range(s.steps):
            t = s.t_min + (s.t_max - s.t_min) * (s.steps - step) / s.steps
            logits = model.denoise(canvas[None], cache, signal)[0] / t
            p = np.array(mx.softmax(logits, axis=-1), np.float64)
            h = -(p * np.log(p)).sum(axis=-1)
            order = np.argsort(h)
            accepted = np.zeros(length, bool)
            accepted[order] = np.cumsum(h[order]) - h[order] <= s.entropy_bound
            u = np.array(
                mx.random.uniform(
                    shape=(length,),
                    key=mx.array(sampler.fold(seed, index, step, "propose")),
                )
            )
            proposal = [
                int((np.cumsum(q) <= x).sum()) for q, x in zip(p, u, strict=True)
            ]
            noise = mx.random.randint(
                0,
                vocab,
                (length,),
                key=mx.array(sampler.fold(seed, index, step, "renoise")),
            )
            canvas = mx.array(np.where(accepted, proposal, np.array(noise)))
            argmax = p.argmax(axis=-1).tolist()
            drafts.append(argmax)
            signal = model.self_condition(logits[None])
            recent = history[len(history) - s.stability :]
            stable = len(recent) == s.stability and all(a == argmax for a in recent)
            history.append(argmax)
            if stable and h.mean() < s.confidence:
                break
        steps.append(step + 1)
        tokens += argmax
        if EOS & set(argmax):
            break
    end = next((i for i, t in enumerate(tokens) if t in EOS), None)
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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stability": 0, "confidence": 2.6},
        {"stability": 2, "steps": 9},
        {"confidence": 0.0, "steps": 3},
        {"canvas_length": 7, "max_tokens": 20},
        {"entropy_bound": 0.1, "t_max": 2.0, "t_min": 2.0},
    ],
    ids=str,
)
def test_the_engine_is_the_plain_loop(tiny_model, seed, changes):
    model, _ = tiny_model
    settings = LOOSE.replace(**changes)
    events = run(model, PROMPT, settings, seed)
    tokens, steps, drafts = plain_loop(model, PROMPT, settings, seed)
    assert [e.draft.tolist() for e in events if isinstance(e, Step)] == drafts
    assert committed(events) == (tokens, steps)


REQUESTS = [
    (PROMPT, LOOSE, 0),
    (PROMPT[:2], LOOSE.replace(steps=3), 1),
    (PROMPT * 3, LOOSE.replace(canvas_length=7, t_max=1.5), 2),
    (PROMPT[3:], LOOSE.replace(pinned={0: 9, 17: 8}), 3),
    (PROMPT, LOOSE.replace(max_tokens=9), 0),
]


def test_batch_neighbours_change_nothing(tiny_model):
    model, _ = tiny_model
    engine = Engine(model)
    for request in REQUESTS:
        engine.admit(*request)
    together = list(engine.run())
    for number, request in enumerate(REQUESTS):
        alone = run(model, *request)
        assert committed(together, number) == committed(alone)
        drafts = [e for e in together if isinstance(e, Step) and e.request == number]
        steps = [e for e in alone if isinstance(e, Step)]
        for a, b in zip(drafts, steps, strict=True):
            assert a.draft.tolist() == b.draft.tolist()
            assert a.stopped == b.stopped


def test_requests_come_and_go_between_ticks(tiny_model):
    """Late admission and cancellation of others leave a request's text as it was."""
    model, _ = tiny_model
    engine = Engine(model)
    first = engine.admit(*REQUESTS[0])
    events = engine.tick() + engine.tick()
    other = engine.admit(*REQUESTS[2])
    events += engine.tick() + engine.tick()
    engine.cancel(other.request)
    engine.admit(*REQUESTS[1])
    events += list(engine.run())
    assert committed(events, first.request) == committed(run(model, *REQUESTS[0]))
    assert committed(events, 2) == committed(run(model, *REQUESTS[1]))
    assert not any(isinstance(e, Commit) and e.request == other.request for e in events)


def test_prefixes_are_joined_once_per_change(tiny_model, monkeypatch):
    """Also when canvases of several lengths run side by side."""
    joins = []
    join = PrefixCache.join.__func__

    def counted(cls, config, caches):
        joins.append(len(caches))
        return join(cls, config, caches)

    monkeypatch.setattr(PrefixCache, "join", classmethod(counted))
    model, _ = tiny_model
    engine = Engine(model)
    never = {"confidence": 0.0, "steps": 50}
    for length in (16, 7, 16, 7, 5):
        engine.admit(PROMPT, LOOSE.replace(canvas_length=length, **never), 0)
    for _ in range(9):
        engine.tick()
    assert joins == [2, 2]
    engine.running.clear()
    engine.tick()
    assert engine._views == {}  # an idle engine holds no prefixes


def test_cancelled_requests_leave_the_engine(tiny_model):
    model, _ = tiny_model
    engine = Engine(model)
    request = engine.admit(*REQUESTS[0]).request
    engine.tick()
    engine.cancel(request)
    assert engine.tick() == [] and not engine.running


def test_the_same_seed_gives_the_same_text_and_another_another(tiny_model):
    model, _ = tiny_model
    texts = [committed(run(model, PROMPT, LOOSE, seed)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_global_random_state_is_neither_read_nor_written(tiny_model):
    model, _ = tiny_model
    mx.random.seed(1)
    first = committed(run(model, PROMPT, LOOSE, 5))
    drawn = mx.random.uniform().item()
    mx.random.seed(1)
    assert mx.random.uniform().item() == drawn
    assert committed(run(model, PROMPT, LOOSE, 5)) == first


@pytest.mark.parametrize("chunk", [1, 4, 5000])
def test_chunks_of_the_prompt_change_nothing(tiny_model, chunk):
    model, _ = tiny_model
    engine = Engine(model)
    engine.admit(PROMPT, LOOSE, 0, prefill_step_size=chunk)
    assert committed(engine.run()) == committed(run(model, PROMPT, LOOSE, 0))


def test_max_tokens_cuts_text_but_not_the_canvas(tiny_model):
    model, _ = tiny_model
    settings = LOOSE.replace(eos=frozenset({999}), max_tokens=40)
    whole, steps = committed(run(model, PROMPT, settings, 3))
    for most in (1, 16, 17, 39):
        events = run(model, PROMPT, settings.replace(max_tokens=most), 3)
        tokens, fewer = committed(events)
        assert tokens == whole[:most]
        assert fewer == steps[: len(fewer)]
        assert events[-1].finish_reason == "length"
        assert all(len(e.draft) == 16 for e in events if isinstance(e, Step))


def test_the_last_canvas_is_not_encoded(tiny_model, monkeypatch):
    model, _ = tiny_model
    sizes, encode = [], DiffusionGemma.encode
    monkeypatch.setattr(
        DiffusionGemma,
        "encode",
        lambda self, ids, *given: (
            sizes.append(ids.shape[1]) or encode(self, ids, *given)
        ),
    )
    settings = LOOSE.replace(eos=frozenset({999}))
    run(model, PROMPT, settings, 0)
    assert sizes == [len(PROMPT), 16, 16]
    sizes.clear()
    run(model, PROMPT, settings.replace(max_tokens=16), 0)
    assert sizes == [len(PROMPT)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_commit_writes_the_prefix_in_place(
    tiny_model, monkeypatch, unfused, compiled, ahead
):
    """Nobody holds the prefix then: its buffers, here 10 MB, are not copied."""
    model, _ = tiny_model
    reserve, append, growths = PrefixCache.reserve, Engine._append, []

    def measured(self, *given):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        append(self, *given)
        growths.append(mx.get_peak_memory() - before)

    monkeypatch.setattr(PrefixCache, "reserve", lambda self, _: reserve(self, 65_536))
    monkeypatch.setattr(Engine, "_append", measured)
    engine = Engine(model, compiled=compiled, ahead=ahead)
    settings = LOOSE.replace(eos=frozenset({999}), confidence=0.0, steps=3)
    engine.admit(PROMPT, settings, 0)
    list(engine.run())
    prompt, *commits = growths
    assert len(commits) == 2
    assert prompt > 10e6 and max(commits) < 1e6


def test_eos_ends_the_text_and_is_left_out(tiny_model):
    model, _ = tiny_model
    whole, _ = committed(run(model, PROMPT, LOOSE.replace(eos=frozenset({999})), 3))
    end = whole.index(whole[5])
    events = run(model, PROMPT, LOOSE.replace(eos=frozenset({whole[5]})), 3)
    assert committed(events)[0] == whole[:end]
    assert events[-1].finish_reason == "stop"


def test_pinned_tokens_stand_and_the_rest_is_free(tiny_model):
    model, _ = tiny_model
    pinned = {0: 9, 5: 10, 16: 11, 31: 12}
    settings = LOOSE.replace(pinned=pinned, max_tokens=32, eos=frozenset({999}))
    events = run(model, PROMPT, settings, 0)
    tokens, _ = committed(events)
    assert {p: tokens[p] for p in pinned} == pinned
    for event in events:
        if isinstance(event, Step):
            for position, token in pinned.items():
                if position // 16 == event.canvas_index:
                    assert event.canvas[position % 16].item() == token
                    assert event.accepted[position % 16].item()


def test_pinned_tokens_condition_their_neighbours(tiny_model):
    model, _ = tiny_model
    settings = LOOSE.replace(max_tokens=16)
    free = run(model, PROMPT, settings, 0)
    held = run(model, PROMPT, settings.replace(pinned={8: 20}), 0)
    first = [next(e for e in es if isinstance(e, Step)) for es in (free, held)]
    others = [i for i in range(16) if i != 8]
    entropies = [np.array(e.entropy)[others] for e in first]
    assert np.abs(entropies[0] - entropies[1]).max() > 1e-3


def test_events_can_be_read_from_another_thread(tiny_model):
    """Arrays in events are evaluated; lazy ones belong to the thread they came from."""
    import threading

    model, _ = tiny_model
    events = run(model, PROMPT, LOOSE, 0)
    read: list[list] = []

    def reader() -> None:
        for e in events:
            if isinstance(e, Step):
                arrays = (e.draft, e.canvas, e.accepted, e.entropy)
                read.append([array.tolist() for array in arrays])

    thread = threading.Thread(target=reader)
    thread.start()
    thread.join()
    assert len(read) == sum(isinstance(e, Step) for e in events)


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
def test_ids_the_model_lacks_are_refused(tiny_model, prompt, changes, message):
    model, _ = tiny_model
    with pytest.raises(SettingsError, match=message):
        Engine(model).admit(prompt, LOOSE.replace(**changes), 0)
