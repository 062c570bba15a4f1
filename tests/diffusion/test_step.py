"""One step of several canvases is the sampler's plain functions on all logits."""

import gc
import weakref
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import load
from mlx_dgemma.diffusion import sampler
from mlx_dgemma.diffusion import step as step_module
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.step import ROUND, Pinned, State, StepInputs, Stepper
from mlx_dgemma.model import vocab
from mlx_dgemma.model.cache import PrefixCache
from mlx_dgemma.settings import Settings

LENGTH = 40
RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, 32, (1, length)).astype(np.int32) for length in (30, 5, 17)]
PINNED = {
    "none": [],
    "some": [(0, 3, 9), (0, 20, 1), (1, 0, 4)],
    "a row": [(1, position, 7) for position in range(LENGTH)],
    "all": [(row, position, 5) for row in range(3) for position in range(LENGTH)],
}


def prefixes(model, rows: int) -> PrefixCache:
    caches = []
    for prompt in PROMPTS[:rows]:
        caches.append(model.make_cache())
        model.encode(mx.array(prompt), caches[-1])
    return PrefixCache.join(model.config, caches) if rows > 1 else caches[0]


def a_state(rows: int) -> State:
    """In the middle of denoising: a signal, and a draft of the step before."""
    rng = np.random.default_rng(rows)
    ids = rng.integers(0, 32, (2, rows, LENGTH)).astype(np.int32)
    first = State.join([State.first(mx.array(row), 64, mx.float32) for row in ids[0]])
    signal = mx.array(rng.normal(size=(rows, LENGTH, 64)).astype(np.float32))
    return replace(first, signal=signal, draft=mx.array(ids[1]))


def some_dials(*numbers: tuple[float, float, float, float]) -> StepInputs:
    """Of rows of temperature, entropy bound, stability, confidence."""
    keys = [
        [sampler.fold(7, row, 0, purpose) for purpose in ("propose", "renoise")]
        for row in range(len(numbers))
    ]
    rows = [[*row, 0.9] for row in numbers]
    return StepInputs(mx.array(np.array(keys)), mx.array(np.array(rows, np.float32)))


def some_pins(name: str, rows: int) -> tuple[np.ndarray, Pinned | None]:
    tokens = np.full((rows, LENGTH), -1, np.int32)
    for row, position, token in PINNED[name]:
        if row < rows:
            tokens[row, position] = token
    return tokens, Pinned.of(list(tokens))


def close(found: mx.array, wanted, atol: float) -> None:
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=atol)


def same(found: mx.array, wanted) -> None:
    np.testing.assert_array_equal(np.array(found), np.array(wanted))


@pytest.mark.parametrize("name", PINNED)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_refines_all_logits(tiny_model, rows, name):
    """Each row with its own temperature, entropy bound and random keys."""
    model, _ = tiny_model
    numbers = [(0.7, 3.0, 1, 0.1), (1.6, 20.0, 1, 0.1), (0.3, 0.5, 1, 0.1)][:rows]
    cache, state, dials = prefixes(model, rows), a_state(rows), some_dials(*numbers)
    tokens, pins = some_pins(name, rows)
    stepper = Stepper(model, compiled=False)
    after, found = stepper(state, model.view(cache, LENGTH), dials, pins)
    uniforms, noise = stepper.draw(dials.keys, LENGTH)
    refined = sampler.refine(
        model.denoise(state.canvas, cache, state.signal),
        temperatures=dials.numbers[:, 0],
        bounds=dials.numbers[:, 1],
        uniforms=uniforms,
        noise=noise,
        pinned=None if pins is None else mx.array(tokens),
    )
    same(found.accepted, refined.accepted)
    same(after.draft, refined.argmax)
    same(after.canvas, refined.canvas)
    close(found.entropy, refined.entropy, 1e-5)
    close(found.mean, mx.mean(refined.entropy, axis=-1), 1e-5)
    close(after.signal, model.self_condition(refined.processed), 2e-4)
    if name != "all":
        accepted = np.array(found.accepted)[tokens < 0]
        assert accepted.any() and not accepted.all()


@pytest.mark.parametrize(
    ("stability", "confidence", "stopped"),
    [
        # the second row's draft changes, the third row's is less sure
        ((1, 1, 1), (9.0, 9.0, 0.0), [True, False, False]),
        ((0, 0, 0), (9.0, 9.0, 0.0), [True, True, False]),
        ((3, 0, 5), (9.0, 0.0, 9.0), [False, False, False]),
        ((2, 1, 4), (9.0, 9.0, 9.0), [True, False, True]),
    ],
)
def test_a_row_stops_when_it_is_stable_and_confident(
    tiny_model, stability, confidence, stopped
):
    model, _ = tiny_model
    stepper, view = Stepper(model, compiled=False), model.view(prefixes(model, 3), 40)
    numbers = [(0.5, 1.0, s, c) for s, c in zip(stability, confidence, strict=True)]
    state = a_state(3)
    after, _ = stepper(state, view, some_dials(*numbers), None)
    draft = np.array(after.draft)
    draft[1, 17] += 1
    streak = mx.array([1, 1, 3])
    state = State(
        state.canvas, state.signal, mx.array(draft), streak, *state.arrays[4:]
    )
    after, found = stepper(state, view, some_dials(*numbers), None)
    assert np.array(after.streak).tolist() == [2, 0, 4]
    assert np.array(found.stopped).tolist() == stopped
    means = np.array(found.entropy).mean(axis=-1)
    close(found.mean, means, 1e-6)
    assert ((means > 0.01) & (means < 9)).all()


def test_draws_come_from_the_keys_of_their_row(tiny_model):
    stepper = Stepper(tiny_model[0], compiled=False)
    keys = some_dials(*[(1, 1, 1, 1)] * 3).keys
    uniforms, noise = stepper.draw(keys, LENGTH)
    for row, (propose, renoise) in enumerate(keys):
        same(uniforms[row], mx.random.uniform(shape=(LENGTH,), key=propose))
        same(noise[row], sampler.random_tokens(renoise, LENGTH, 32))


def test_states_are_joined_and_taken_apart():
    state = a_state(3)
    for whole, again in zip(
        state.arrays, State.join([state.row(i) for i in range(3)]).arrays, strict=True
    ):
        same(again, whole)
    assert all(len(array) == 1 for array in state.row(1).arrays)
    first = State.first(mx.arange(5), 8, mx.bfloat16)
    assert first.signal.shape == (1, 5, 8) and first.signal.dtype == mx.bfloat16
    assert not mx.any(first.signal).item()
    assert np.array(first.draft).tolist() == [[-1] * 5]  # equal to no canvas


def test_nothing_given_needs_no_pins():
    assert Pinned.of([np.full(40, -1)] * 2) is None


def test_free_positions_are_counted_in_rounds():
    rows = [np.full(40, -1), np.full(40, -1)]
    rows[0][3], rows[1][:20] = 9, 7
    pins = Pinned.of(rows)
    assert pins is not None
    same(pins.tokens, np.stack(rows))
    free = np.array(pins.free).tolist()
    wanted = [i for i in range(80) if i != 3 and not 40 <= i < 60]
    assert len(free) == 2 * ROUND and pins.free.dtype == mx.int32
    assert free[:59] == wanted and set(free[59:]) == {wanted[-1]}


def test_a_whole_round_of_free_positions_is_not_padded():
    pins = Pinned.of([np.array([5] * 8 + [-1] * ROUND)])
    assert pins is not None
    assert np.array(pins.free).tolist() == list(range(8, 8 + ROUND))


def test_given_everywhere_leaves_nothing_free():
    pins = Pinned.of([np.arange(40)])
    assert pins is not None and pins.free.size == 0


@pytest.mark.parametrize(
    ("name", "positions"), [("none", 120), ("some", 128), ("a row", 96), ("all", 0)]
)
def test_the_vocabulary_is_read_for_free_positions_only(
    tiny_model, monkeypatch, name, positions
):
    model, _ = tiny_model
    counts, read = [0], vocab.vocab_stats
    monkeypatch.setattr(
        vocab,
        "vocab_stats",
        lambda table, hidden, *a: counts.append(len(hidden)) or read(table, hidden, *a),
    )
    stepper, dials = Stepper(model, compiled=False), some_dials(*[(1, 1, 1, 1)] * 3)
    view, (_, pins) = model.view(prefixes(model, 3), LENGTH), some_pins(name, 3)
    stepper(a_state(3), view, dials, pins)
    assert sum(counts) == positions


@pytest.mark.parametrize("name", ["none", "some"])
def test_a_compiled_step_is_the_same_step(tiny_model, unfused, name):
    model, _ = tiny_model
    tokens, pins = some_pins(name, 3)
    dials = some_dials((0.7, 3.0, 1, 0.1), (1.6, 20.0, 1, 2.0), (0.3, 0.5, 1, 0.1))
    eager, compiled = (Stepper(model, compiled=c) for c in (False, True))
    view = model.view(prefixes(model, 3), LENGTH, bucketed=True)
    ours = theirs = a_state(3)
    for _ in range(4):
        ours, found = compiled(ours, view, dials, pins)
        theirs, wanted = eager(theirs, view, dials, pins)
        for mine, other in (
            (ours.canvas, theirs.canvas),
            (ours.draft, theirs.draft),
            (ours.streak, theirs.streak),
            (found.accepted, wanted.accepted),
            (found.stopped, wanted.stopped),
        ):
            same(mine, other)
        close(found.entropy, wanted.entropy, 1e-5)
        close(ours.signal, theirs.signal, 1e-4)
    assert (compiled.traces, eager.traces) == (1, 4)
    assert (np.array(ours.canvas)[tokens >= 0] == tokens[tokens >= 0]).all()


# two steps of each of five canvases of 64 tokens, behind a prompt of eight
SHORT = Settings(
    canvas_length=64, max_tokens=320, steps=2, confidence=0.0, eos=frozenset()
)
PROMPT = [2, 7, 8, 9, 5, 11, 12, 13]


def traces(model) -> int:
    """How often steps of this model were traced so far."""
    return sum(stepper.traces for stepper in step_module._STEPPERS[id(model)].values())


@pytest.fixture
def own_model(tiny, unfused):
    """Of which nothing was compiled yet."""
    return load(tiny)[0]


def test_a_step_is_traced_once_per_bucket_and_model(own_model):
    engine, counts = Engine(own_model, compiled=True), []
    engine.admit(PROMPT, SHORT, 0)
    while engine.running:
        engine.tick()
        counts.append(traces(own_model))
    # prefixes of 8, 72, 136 and 200 tokens lie in one bucket, 264 in the next
    assert counts == [1] * 8 + [2] * 2
    again = Engine(own_model, compiled=True)
    again.admit(PROMPT[::-1], SHORT, 1)
    list(again.run())
    assert traces(own_model) == 2


def test_a_bucket_that_is_just_full_is_no_other_shape(own_model):
    engine, counts = Engine(own_model, compiled=True), []
    engine.admit(PROMPT * 8, SHORT, 0)
    while engine.running:
        engine.tick()
        counts.append(traces(own_model))
    # prefixes of 64, 128, 192 and 256 tokens fill one bucket, 320 is in the next
    assert counts == [1] * 8 + [2] * 2


def test_another_number_of_rows_is_traced_once_more(own_model):
    one = SHORT.replace(max_tokens=128)
    engine = Engine(own_model, compiled=True)
    engine.admit(PROMPT, one, 0)
    list(engine.run())
    assert traces(own_model) == 1
    for _ in range(2):
        engine.admit(PROMPT, one, 0)
        engine.admit(PROMPT * 2, one, 1)
        list(engine.run())
        assert traces(own_model) == 2


def test_other_pins_are_not_traced_again(own_model):
    one, counts = SHORT.replace(max_tokens=64), []
    for pinned in ({3: 5}, {4: 6, 9: 7}, {n: 8 for n in range(31)}, {0: 1, 63: 2}):
        engine = Engine(own_model, compiled=True)
        engine.admit(PROMPT, one.replace(pinned=pinned), 0)
        list(engine.run())
        counts.append(traces(own_model))
    assert counts == [1, 1, 1, 1]  # 63 to 33 free positions are two rounds


def test_a_compiled_step_uses_the_weights_of_today(own_model):
    view, dials = own_model.view(prefixes(own_model, 1), 40), some_dials((1, 9, 1, 1))
    eager, compiled = (Stepper(own_model, compiled=c) for c in (False, True))
    before = compiled(a_state(1), view, dials, None)[1].entropy
    mx.eval(before)
    weight = own_model.embed_tokens.weight
    scalar = own_model.layers[1].decoder_scalar
    own_model.update({"embed_tokens": {"weight": weight * 0.5}})
    own_model.layers[1].update({"decoder_scalar": scalar * 3})
    entropy = compiled(a_state(1), view, dials, None)[1].entropy
    close(entropy, eager(a_state(1), view, dials, None)[1].entropy, 1e-5)
    assert np.abs(np.array(entropy - before)).max() > 0.1
    assert compiled.traces == 1


def test_a_model_is_let_go_after_compiled_steps(tiny, unfused):
    model = load(tiny)[0]
    engine = Engine(model, compiled=True)
    engine.admit(PROMPT, SHORT.replace(max_tokens=64), 0)
    list(engine.run())
    assert traces(model) == 1
    gone = weakref.ref(model)
    del model, engine
    gc.collect()
    assert gone() is None
