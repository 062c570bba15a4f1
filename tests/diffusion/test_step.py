"""One step of several canvases equals the formulas applied to all logits."""

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import load
from mlx_dgemma.diffusion import sampler
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.step import (
    FREE_MULTIPLE,
    Pinned,
    State,
    StepConfig,
    StepInputs,
    Stepper,
)
from mlx_dgemma.model.cache import PrefixCache
from mlx_dgemma.settings import Settings

L = 40
RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, 32, (1, length)).astype(np.int32) for length in (30, 5, 17)]
PINNED = {
    "none": [],
    "some": [(0, 3, 9), (0, 20, 1), (1, 0, 4)],
    "a row": [(1, position, 7) for position in range(L)],
    "all": [(row, position, 5) for row in range(3) for position in range(L)],
}


def joined_prefixes(model, rows: int) -> PrefixCache:
    caches = []
    for prompt in PROMPTS[:rows]:
        caches.append(model.make_cache())
        model.encode(mx.array(prompt), caches[-1])
    return PrefixCache.join(model.config, caches) if rows > 1 else caches[0]


def some_state(rows: int) -> State:
    """In the middle of denoising: a signal, and a draft of the step before."""
    rng = np.random.default_rng(rows)
    ids = rng.integers(0, 32, (2, rows, L)).astype(np.int32)
    first = State.join([State.first(mx.array(row), 64, mx.float32) for row in ids[0]])
    signal = mx.array(rng.normal(size=(rows, L, 64)).astype(np.float32))
    return first._replace(signal=signal, draft=mx.array(ids[1]))


def some_inputs(*rows: tuple[float, float, float, float]) -> StepInputs:
    """Each row a temperature, an entropy bound, stability and confidence."""
    keys = [
        [sampler.fold(7, row, 0, purpose) for purpose in ("propose", "renoise")]
        for row in range(len(rows))
    ]
    columns = mx.array(np.array([[*row, 0.9, 0] for row in rows], np.float32).T)
    return StepInputs(mx.array(np.array(keys)), *columns)


def some_pinned(name: str, rows: int) -> tuple[np.ndarray, Pinned | None]:
    tokens = np.full((rows, L), -1, np.int32)
    for row, position, token in PINNED[name]:
        if row < rows:
            tokens[row, position] = token
    return tokens, Pinned.of(list(tokens))


def assert_close(found: mx.array, expected, atol: float) -> None:
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=atol)


def assert_same(found: mx.array, expected) -> None:
    np.testing.assert_array_equal(np.array(found), np.array(expected))


@pytest.mark.parametrize(
    ("rows", "name"), [(1, "some"), (3, "none"), (3, "some"), (3, "a row"), (3, "all")]
)
def test_step_equals_the_formulas_on_all_logits(tiny_model, rows, name):
    """Each row with its own temperature, entropy bound and random keys."""
    model, _ = tiny_model
    numbers = [(0.7, 3.0, 1, 0.1), (1.6, 20.0, 1, 0.1), (0.3, 0.5, 1, 0.1)][:rows]
    cache, state = joined_prefixes(model, rows), some_state(rows)
    inputs, (tokens, pinned) = some_inputs(*numbers), some_pinned(name, rows)
    stepper = Stepper(model, compiled=False)
    after, stats = stepper(state, model.view(cache, L), inputs, pinned)

    logits = model.denoise(state.canvas, cache, state.signal)
    processed = np.array(sampler.process(logits, inputs.temperature))
    ids = np.arange(processed.shape[-1])
    certain = np.where(ids == tokens[..., None], 0, -np.inf).astype(np.float32)
    processed = np.where(tokens[..., None] >= 0, certain, processed)
    entropy = np.array(sampler.entropy(mx.array(processed)))
    accepted = np.array(sampler.accept(mx.array(entropy), inputs.entropy_bound))
    accepted |= tokens >= 0
    for row, (propose, renoise) in enumerate(inputs.keys):
        uniforms = np.array(mx.random.uniform(shape=(L,), key=propose))[:, None]
        sums = np.cumsum(
            np.array(mx.softmax(mx.array(processed[row]), axis=-1)), axis=-1
        )
        samples = (sums <= uniforms * sums[:, -1:]).sum(axis=-1)
        noise = sampler.random_tokens(renoise, L, 32)
        assert_same(after.canvas[row], np.where(accepted[row], samples, noise))
    assert_same(stats.accepted, accepted)
    assert_same(after.draft, processed.argmax(axis=-1))
    assert_close(stats.entropy, entropy, 1e-5)
    assert_close(stats.mean, entropy.mean(axis=-1), 1e-5)
    assert_close(after.signal, model.self_condition(mx.array(processed)), 2e-4)
    if name != "all":
        assert accepted[tokens < 0].any() and not accepted[tokens < 0].all()


@pytest.mark.parametrize(
    ("stability", "confidence", "stopped"),
    [
        # the second row's draft changes, the third row's entropy is higher
        ((1, 1, 1), (9.0, 9.0, 0.0), [True, False, False]),
        ((0, 0, 0), (9.0, 9.0, 0.0), [True, True, False]),
        ((3, 0, 5), (9.0, 0.0, 9.0), [False, False, False]),
        ((2, 1, 4), (9.0, 9.0, 9.0), [True, False, True]),
    ],
)
def test_row_stops_when_it_is_stable_and_confident(
    tiny_model, stability, confidence, stopped
):
    model, _ = tiny_model
    stepper = Stepper(model, compiled=False)
    view = model.view(joined_prefixes(model, 3), L)
    rows = zip(stability, confidence, strict=True)
    inputs, state = some_inputs(*[(0.5, 1.0, s, c) for s, c in rows]), some_state(3)
    draft = np.array(stepper(state, view, inputs, None)[0].draft)
    draft[1, 17] += 1
    state = state._replace(draft=mx.array(draft), streak=mx.array([1, 1, 3]))
    after, stats = stepper(state, view, inputs, None)
    assert after.streak.tolist() == [2, 0, 4]
    assert stats.stopped.tolist() == stopped


def test_confidence_sampler_reveals_tokens_for_good(tiny_model):
    model, _ = tiny_model
    stepper = Stepper(model, compiled=False, config=StepConfig("confidence"))
    view, inputs = model.view(joined_prefixes(model, 1), L), some_inputs((1, 1, 9, 0))
    state, counts = some_state(1), []
    for _ in range(L):
        before = np.array(state.revealed)
        state, stats = stepper(state, view, inputs, None)
        revealed, accepted = np.array(state.revealed), np.array(stats.accepted)
        np.testing.assert_array_equal(accepted, revealed >= 0)
        np.testing.assert_array_equal(revealed[before >= 0], before[before >= 0])
        for tokens in (np.array(state.canvas), np.array(state.draft)):
            np.testing.assert_array_equal(tokens[accepted], revealed[accepted])
        counts.append(int(accepted.sum()))
        assert stats.stopped.item() == (counts[-1] == L)
        if counts[-1] == L:
            break
    assert counts == sorted(set(counts)) and counts[-1] == L


def test_states_are_joined_and_taken_apart():
    state = some_state(3)
    again = State.join([state.row(i) for i in range(3)])
    for array, other in zip(again, state, strict=True):
        assert_same(array, other)
    first = State.first(mx.arange(5), 8, mx.bfloat16)
    assert first.signal.shape == (1, 5, 8) and first.signal.dtype == mx.bfloat16
    assert not mx.any(first.signal).item()
    assert first.draft.tolist() == [[-1] * 5]  # equal to no canvas


def test_free_positions_are_padded_to_a_multiple():
    assert Pinned.of([np.full(L, -1)] * 2) is None
    rows = [np.full(L, -1), np.full(L, -1)]
    rows[0][3], rows[1][:20] = 9, 7
    pinned = Pinned.of(rows)
    assert pinned is not None
    assert_same(pinned.tokens, np.stack(rows))
    expected = [i for i in range(80) if i != 3 and not 40 <= i < 60]
    free = pinned.free.tolist()
    assert len(free) == 2 * FREE_MULTIPLE and pinned.free.dtype == mx.int32
    assert free[:59] == expected and set(free[59:]) == {expected[-1]}
    exact = Pinned.of([np.array([5] * 8 + [-1] * FREE_MULTIPLE)])
    assert exact is not None
    assert exact.free.tolist() == list(range(8, 8 + FREE_MULTIPLE))


@pytest.mark.parametrize("name", ["none", "some"])
def test_compiled_step_equals_the_plain_one(tiny_model, unfused, name):
    model, _ = tiny_model
    _, pinned = some_pinned(name, 3)
    inputs = some_inputs((0.7, 3.0, 1, 0.1), (1.6, 20.0, 1, 2.0), (0.3, 0.5, 1, 0.1))
    plain, compiled = (Stepper(model, compiled=c) for c in (False, True))
    view = model.view(joined_prefixes(model, 3), L, bucketed=True)
    ours = theirs = some_state(3)
    for _ in range(4):
        ours, found = compiled(ours, view, inputs, pinned)
        theirs, expected = plain(theirs, view, inputs, pinned)
        for field in ("canvas", "draft", "streak"):
            assert_same(ours._asdict()[field], theirs._asdict()[field])
        assert_same(found.accepted, expected.accepted)
        assert_same(found.stopped, expected.stopped)
        assert_close(found.entropy, expected.entropy, 1e-5)
        assert_close(ours.signal, theirs.signal, 1e-4)
    assert (compiled.traces, plain.traces) == (1, 4)


# two steps of each of five canvases of 64 tokens
SHORT = Settings(canvas_length=64, max_tokens=320, steps=2, confidence=0, eos=set())
PROMPT = [2, 7, 8, 9, 5, 11, 12, 13]


def traces(model) -> int:
    """How often steps of this model were traced so far."""
    made = model.programs._made.values()
    return sum(program.traces for program in made if isinstance(program, Stepper))


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
    short = SHORT.replace(max_tokens=64)
    assert run(own_model, (PROMPT, short)) == [2, 2]
    for _ in range(2):
        assert run(own_model, (PROMPT, short), (PROMPT * 2, short))[-1] == 3


def test_other_pinned_positions_are_not_traced_again(own_model):
    short = SHORT.replace(max_tokens=64)
    for pinned in ({3: 5}, {4: 6, 9: 7}, {n: 8 for n in range(31)}, {0: 1, 63: 2}):
        # 63 to 33 free positions are padded to 64
        assert run(own_model, (PROMPT, short.replace(pinned=pinned))) == [1, 1]


def test_compiled_step_uses_the_weights_of_today(own_model):
    view, inputs = own_model.view(joined_prefixes(own_model, 1), L), (1, 9, 1, 1)
    plain, compiled = (Stepper(own_model, compiled=c) for c in (False, True))
    given = some_state(1), view, some_inputs(inputs), None
    before = compiled(*given)[1].entropy
    mx.eval(before)
    weight = own_model.embed_tokens.weight
    own_model.update({"embed_tokens": {"weight": weight * 0.5}})
    entropy = compiled(*given)[1].entropy
    assert_close(entropy, plain(*given)[1].entropy, 1e-5)
    assert np.abs(np.array(entropy - before)).max() > 0.1
    assert compiled.traces == 1


def test_model_is_freed_after_compiled_steps(tiny, unfused):
    model = load(tiny)[0]
    assert run(model, (PROMPT, SHORT.replace(max_tokens=64))) == [1, 1]
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
