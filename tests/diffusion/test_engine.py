"""The engine equals the loop written plainly, whatever shares its batch."""

import mlx.core as mx
import numpy as np
import pytest
from exactly import exactly

from mlx_dgemma import Commit, Engine, Prefix, Settings, Step, load
from mlx_dgemma.diffusion import canvas, sampler
from mlx_dgemma.errors import NumericError, SettingsError

PROMPT = [2, 7, 8, 9, 5, 11, 12, 13, 14, 15, 16]
# loose enough that some canvases stop early and others do not
LOOSE = Settings(canvas_length=16, max_tokens=48, steps=6, entropy_bound=8.0)
LOOSE = LOOSE.replace(confidence=2.0, eos={1, 4})
DIGITS = set(range(7, 20))  # as eos, they end most answers at once


def plain_loop(model, prompt, s: Settings, seed: int):
    """The algorithm as a person would write it down, one canvas at a time."""
    V, L = model.config.vocab_size, s.canvas_length

    def draw(kind, index, step, purpose):
        key = mx.array(sampler.random_key(seed, index, step, purpose))
        return np.array(kind(shape=(L,), key=key))

    def ids(**of):
        return mx.random.randint(0, V, **of)

    tokens, steps, drafts = [], [], []
    for index in range(s.canvases):
        cache = model.make_cache()
        model.encode(mx.array([[*prompt, *tokens]]), cache)
        first = len(tokens)
        pinned = {p - first: t for p, t in s.pinned.items() if first <= p < first + L}
        canvas = draw(ids, index, 0, "canvas")
        canvas[list(pinned)] = list(pinned.values())
        signal, history, revealed = None, [], np.full(L, -1)
        for step in range(s.steps):
            t = s.t_min + (s.t_max - s.t_min) * (s.steps - step) / s.steps
            logits = model.denoise(mx.array(canvas[None]), cache, signal)
            logits = np.array(logits)[0] / t
            banned = [token for token in s.eos if token < V]
            logits[: max(0, s.min_tokens - first), banned] = -np.inf
            for position, token in pinned.items():
                logits[position] = np.where(np.arange(V) == token, 0, -np.inf)
            p = np.array(mx.softmax(mx.array(logits), axis=-1), np.float64)
            h = -(p * np.log(np.where(p, p, 1))).sum(axis=-1)
            u = draw(mx.random.uniform, index, step, "propose")[:, None]
            noise = draw(ids, index, step, "renoise")
            argmax = p.argmax(axis=-1)
            if s.sampler == "confidence":
                peak = np.where(revealed < 0, p.max(axis=-1), -1)
                likely = (peak >= s.min_probability) | (np.arange(L) == peak.argmax())
                revealed = np.where(likely & (revealed < 0), argmax, revealed)
                accepted = revealed >= 0
                argmax = proposal = np.where(accepted, revealed, argmax)
            else:
                order, accepted = np.argsort(h), np.zeros(L, bool)
                accepted[order] = np.cumsum(h[order]) - h[order] <= s.entropy_bound
                proposal = (np.cumsum(p, axis=-1) <= u).sum(axis=-1)
            canvas = np.where(accepted, proposal, noise)
            canvas[list(pinned)] = list(pinned.values())
            drafts.append(argmax.tolist())
            signal = model.self_condition(mx.array(logits[None]))
            recent = history[len(history) - s.stability :]
            stable = len(recent) == s.stability and all(a == drafts[-1] for a in recent)
            history.append(drafts[-1])
            done = s.sampler == "confidence" and accepted.all()
            if done or (stable and h.mean() < s.confidence):
                break
        steps.append(len(history))
        tokens += drafts[-1]
        if s.eos & set(drafts[-1]):
            break
    end = next((i for i, t in enumerate(tokens) if t in s.eos), None)
    reason = "length" if end is None or end > s.max_tokens else "stop"
    return tokens[: s.max_tokens][:end], steps, reason, drafts


def outcome(events):
    """Tokens, steps of each canvas, finish reason, and all drafts."""
    commits = [e for e in events if isinstance(e, Commit)]
    tokens = [token for c in commits for token in c.tokens]
    drafts = [e.draft.tolist() for e in events if isinstance(e, Step)]
    return tokens, [c.steps for c in commits], commits[-1].finish_reason, drafts


def solo(model, *request, **options):
    engine = Engine(model, compiled=False, ahead=False)
    engine.admit(*request, **options)
    return list(engine.run())


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (1, {}),
        (0, {"stability": 0, "confidence": 2.6}),
        (1, {"stability": 2, "steps": 9}),
        (0, {"entropy_bound": 0.1, "t_max": 2.0, "t_min": 2.0}),
        (1, {"pinned": {0: 9, 5: 10, 16: 11, 31: 12}, "eos": {30}}),
        (3, {"eos": DIGITS, "min_tokens": 19}),
        (0, {"eos": DIGITS, "min_tokens": 5, "pinned": {5: 9, 3: 25}}),
        (1, {"sampler": "confidence", "min_probability": 0.3, "steps": 12}),
        (2, {"sampler": "confidence", "min_probability": 2.0, "pinned": {3: 9}}),
    ],
    ids=str,
)
def test_engine_equals_the_plain_loop(tiny_model, seed, changes):
    settings = LOOSE.replace(**changes)
    expected = plain_loop(tiny_model[0], PROMPT, settings, seed)
    assert outcome(solo(tiny_model[0], PROMPT, settings, seed)) == expected


# --- batches -------------------------------------------------------------------------

REQUESTS = [
    (PROMPT, LOOSE, 0, 4),
    (PROMPT * 2, LOOSE, 1, 4),  # is cancelled
    (PROMPT[4:], LOOSE.replace(confidence=0.0, eos={999}), 2, 4),  # takes all steps
    (PROMPT, LOOSE.replace(canvas_length=7, t_max=1.5), 3, 4),
    (PROMPT[:3], LOOSE.replace(pinned={0: 9, 17: 8}), 4, 4),
    (PROMPT, LOOSE.replace(stability=0, confidence=9.0, eos={999}), 5, 4),  # goes on
    (PROMPT, LOOSE.replace(eos=DIGITS, min_tokens=3), 6, 4),
]
TICKS = 2, 1, 3, 0, 4, 0, 2  # behind the admission of each


@pytest.mark.parametrize(
    ("ahead", "compiled", "far"),
    [(False, False, 10), (True, True, 10), (True, False, 0)],
)
def test_request_equals_solo_whatever_shares_the_batch(
    tiny_model, monkeypatch, unfused, ahead, compiled, far
):
    """Also run ahead; where `far` is 0, most canvases have a step started in vain."""
    monkeypatch.setattr(canvas, "RUN_AHEAD_FACTOR", far)
    engine, events = Engine(tiny_model[0], ahead=ahead, compiled=compiled), []
    prefixes = [Prefix(tiny_model[0]) for _ in REQUESTS]
    prefixes[5] = prefixes[1]
    for request, ticks, prefix in zip(REQUESTS, TICKS, prefixes, strict=True):
        admitted = engine.admit(*request, prefix=prefix)
        assert admitted.reused == (8 if admitted.request == 5 else 0)
        for _ in range(ticks):
            events += engine.tick()
        if admitted.request == 2:
            engine.cancel(1)
    events += engine.run()
    last = {e.stopped for e in events if isinstance(e, Step) and e.last}
    assert last == {True, False}
    for number, request in enumerate(REQUESTS):
        mine = exactly(e for e in events if e.request == number)
        expected = exactly(solo(tiny_model[0], *request))
        if number == 1:
            assert 0 < len(mine) < len(expected)
            expected = expected[: len(mine)]
        # all but entropies, which a batch may round otherwise
        assert [e[:3] for e in mine] == [e[:3] for e in expected]


def test_text_depends_on_the_seed_and_not_on_global_random_state_or_chunks(tiny_model):
    texts = []
    for seed, chunk in ((5, 2048), (5, 4), (5, 1), (6, 4)):
        mx.random.seed(chunk)
        expected = mx.random.uniform().item()
        mx.random.seed(chunk)
        events = solo(tiny_model[0], PROMPT, LOOSE, seed, prefill_step_size=chunk)
        texts.append(outcome(events))
        assert mx.random.uniform().item() == expected
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_a_step_of_no_numbers_ends_its_request_in_one_line(tiny):
    model, _ = load(tiny)
    model.norm.weight = mx.full(model.norm.weight.shape, float("nan"))
    engine = Engine(model)
    engine.admit(PROMPT, model.settings, 0)
    with pytest.raises(NumericError, match="canvas 0, step 0: the model computes NaN"):
        list(engine.run())
    assert engine.running == []


def test_ids_outside_the_vocabulary_are_refused(tiny_model):
    for prompt, changes, message in (
        ([], {}, "prompt is empty"),
        ([32], {}, "id 32; this model knows 0 to 31"),
        ([3, -1], {}, "id -1"),
        ([3], {"pinned": {0: 32}}, r"pinned\[0\] is 32"),
        ([3], {"pinned": {48: 3}}, "pinned position 48 lies behind max_tokens 48"),
    ):
        with pytest.raises(SettingsError, match=message):
            Engine(tiny_model[0]).admit(prompt, LOOSE.replace(**changes), 0)
