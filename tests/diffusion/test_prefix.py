"""A prefix owner to one request after another gives each the bits of a new one."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit, Prefilled, Step
from mlx_dgemma.diffusion.prefix import EARLY, Prefix, chunk_ends
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.model.cache import MAX_SNAPSHOTS, PrefixCache
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.settings import Settings

EOS = frozenset({1, 4})
LOOSE = Settings(
    canvas_length=16,
    max_tokens=48,
    steps=4,
    entropy_bound=8.0,
    confidence=2.0,
    eos=EOS,
)
MOST = 32  # tokens of a chunk
RNG = np.random.default_rng(5)
# turns of talk: 4 ends one
TURNS = [[3, *RNG.integers(5, 32, n).tolist(), 4] for n in (9, 25, 3, 40, 14, 60, 8)]


def history(turns: int) -> list[int]:
    return [2, *itertools.chain(*TURNS[:turns]), 3]


# --- where chunks end ----------------------------------------------------------------

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=200)


@given(tokens=IDS, more=IDS, most=st.integers(1, 60))
def test_what_follows_a_cut_never_moves_it(tokens, more, most):
    assert (
        chunk_ends([*tokens, *more], EOS, most)[
            : len(chunk_ends(tokens, EOS, most)) - 1
        ]
        == (chunk_ends(tokens, EOS, most)[:-1])
    )


@given(tokens=IDS, most=st.integers(1, 60))
def test_chunks_end_behind_turns_unless_they_are_small(tokens, most):
    ends = chunk_ends(tokens, EOS, most)
    least = -(-most // EARLY)
    assert ends[-1] == len(tokens)
    starts = [0, *ends][:-1]
    for start, end in zip(starts[:-1], ends[:-1], strict=True):
        assert least <= end - start <= most
        assert end - start == most or tokens[end - 1] in EOS
        between = range(start + least, end)
        assert not any(tokens[i - 1] in EOS for i in between)
    assert ends[-1] - starts[-1] <= most


def test_no_chunk_ends_inside_what_must_stay_whole():
    tokens = [9] * 100
    assert chunk_ends(tokens, EOS, 30) == [30, 60, 90, 100]
    assert chunk_ends(tokens, EOS, 30, [(25, 45), (75, 76), (95, 100)]) == [45, 75, 100]
    assert chunk_ends(tokens, EOS, 30, [(30, 60), (60, 90)]) == [30, 60, 90, 100]
    assert chunk_ends(tokens, EOS, 30, [(0, 100)]) == [100]


# --- requests ------------------------------------------------------------------------


def finish(engine) -> list:
    return list(engine.run())


def assert_same(events, wanted, request=None) -> None:
    """Every step and commit is, bit for bit, the other's."""
    events = [e for e in events if request is None or e.request == request]
    for mine, other in zip(events, wanted, strict=True):
        if isinstance(mine, Step):
            for name in ("draft", "canvas", "accepted", "entropy"):
                a, b = (np.array(vars(event)[name]) for event in (mine, other))
                np.testing.assert_array_equal(a, b)
        elif isinstance(mine, Commit):
            assert (mine.tokens, mine.steps) == (other.tokens, other.steps)


def alone(model, ids, seed, settings=LOOSE, **given) -> list:
    """What a request without a owner prefix gives."""
    engine = Engine(model, **given)
    engine.admit(ids, settings, seed, MOST)
    return finish(engine)


def test_each_request_encodes_what_is_new(tiny_model):
    model, _ = tiny_model
    prefix, engine, last = Prefix(model), Engine(model), 0
    for turns in range(1, len(TURNS) + 1):
        ids = history(turns)
        admitted = engine.admit(ids, LOOSE, turns, MOST, prefix=prefix)
        assert admitted.prompt_tokens == len(ids) == admitted.reused + admitted.encoded
        # back to the end of the last turn that was known; what followed is one token
        known = chunk_ends(ids, EOS, MOST)
        assert admitted.reused == max([0, *(end for end in known if end < last)])
        assert_same(finish(engine), alone(model, ids, turns))
        last = len(ids)
    assert len(prefix.cache.snapshots) <= MAX_SNAPSHOTS


def test_a_history_that_parts_goes_back_to_where_it_did(tiny_model):
    model, _ = tiny_model
    prefix, engine, ids = Prefix(model), Engine(model), history(7)
    engine.admit(ids, LOOSE, 0, MOST, prefix=prefix)
    finish(engine)
    ends = [0, *chunk_ends(ids, EOS, MOST)]
    for at in (len(ids) - 2, 150, 90, 60, 5, 100):
        other = [*ids[:at], 1, *ids[at + 1 :]]
        admitted = engine.admit(other, LOOSE, at, MOST, prefix=prefix)
        assert admitted.reused in ends and admitted.reused <= at
        assert_same(finish(engine), alone(model, other, at))
    assert admitted.reused == 0


def test_the_same_prompt_again_encodes_nothing(tiny_model):
    model, _ = tiny_model
    prefix, engine, ids = Prefix(model), Engine(model), history(3)
    settings = LOOSE.replace(max_tokens=16)  # no canvas is encoded
    for seed in (0, 1):
        admitted = engine.admit(ids, settings, seed, MOST, prefix=prefix)
        assert_same(finish(engine), alone(model, ids, seed, settings))
    assert admitted.reused == len(ids) and admitted.encoded == 0


def test_another_chunk_size_reuses_only_what_is_cut_alike(tiny_model):
    model, _ = tiny_model
    prefix, engine, ids = Prefix(model), Engine(model), history(4)
    assert chunk_ends(ids, EOS, MOST) == [12, 39, 44, 76, 86, 87]
    assert chunk_ends(ids, EOS, 50) == [12, 39, 44, 86, 87]
    engine.admit(ids, LOOSE, 0, MOST, prefix=prefix)
    finish(engine)
    # 44, so near 39, is the mark that was given up
    assert engine.admit(ids, LOOSE, 0, 50, prefix=prefix).reused == 39
    wanted = Engine(model)
    wanted.admit(ids, LOOSE, 0, 50)
    assert_same(finish(engine), finish(wanted))


@pytest.mark.parametrize("given", [{}, {"compiled": True, "ahead": True}])
def test_conversations_side_by_side_change_nothing(tiny_model, unfused, given):
    """Each has its prefix; they come, end and go on while the others run."""
    model, _ = tiny_model
    engine, prefixes = Engine(model, **given), [Prefix(model) for _ in range(3)]
    turns, running, events, asked = [0, 2, 4], {}, [], {}
    while min(turns) < 7 or running:
        for who, prefix in enumerate(prefixes):
            if who not in running and turns[who] < 7:
                turns[who] += 1
                ids = [2, 5 + who, *history(turns[who])]
                seed = 10 * turns[who] + who
                admitted = engine.admit(ids, LOOSE, seed, MOST, prefix=prefix)
                running[who] = admitted.request
                asked[admitted.request] = ids, seed
        events += engine.tick()
        left = {canvas.request for canvas in engine.running}
        running = {who: number for who, number in running.items() if number in left}
    for number, (ids, seed) in asked.items():
        mine = [e for e in events if isinstance(e, Commit) and e.request == number]
        wanted = [e for e in alone(model, ids, seed, **given) if isinstance(e, Commit)]
        assert [e.tokens for e in mine] == [e.tokens for e in wanted]


def test_what_is_left_is_whole_chunks(tiny_model):
    """Whether the request ended, was cancelled, or was cancelled before a step."""
    model, _ = tiny_model
    never = LOOSE.replace(eos=frozenset({4}), confidence=0.0, max_tokens=400)
    for ticks in (0, 3, 9, 60, 100):
        prefix, engine, ids = Prefix(model), Engine(model), history(5)
        number = engine.admit(ids, never, 3, MOST, prefix=prefix).request
        assert prefix.in_use
        for _ in range(ticks):
            engine.tick()
        engine.cancel(number)
        assert not prefix.in_use and engine._views == {}
        assert prefix.cache.length == len(prefix) == prefix.ends[-1] >= 80
        assert prefix.keys == ids[: len(prefix)]
        again = engine.admit(ids, LOOSE, 3, MOST, prefix=prefix)
        assert again.reused >= 80
        assert_same(finish(engine), alone(model, ids, 3))


def test_an_interrupted_prefill_keeps_the_chunks_before(tiny_model, monkeypatch):
    model, _ = tiny_model
    ids = history(7)
    encode = DiffusionGemma._encode_layer

    for stop in range(0, 2 * len(chunk_ends(ids, EOS, MOST)) - 1, 3):
        calls = iter(range(stop + 1))

        def interrupted(self, index, *given, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return encode(self, index, *given)

        prefix, engine = Prefix(model), Engine(model)
        monkeypatch.setattr(DiffusionGemma, "_encode_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.admit(ids, LOOSE, 0, MOST, prefix=prefix)
        monkeypatch.setattr(DiffusionGemma, "_encode_layer", encode)
        assert not prefix.in_use and not engine.running
        whole = chunk_ends(ids, EOS, MOST)[: (stop + 1) // 2]
        assert prefix.ends == whole
        admitted = engine.admit(ids, LOOSE, 0, MOST, prefix=prefix)
        assert admitted.reused == (whole or [0])[-1]
        assert_same(finish(engine), alone(model, ids, 0))


def test_one_request_at_a_time_of_one_model(tiny_model, tmp_path):
    model, _ = tiny_model
    prefix, engine = Prefix(model), Engine(model)
    first = engine.admit(history(1), LOOSE, 0, prefix=prefix)
    for other in (engine, Engine(model)):
        with pytest.raises(SettingsError, match="a running request writes to this"):
            other.admit(history(1), LOOSE, 0, prefix=prefix)
    engine.cancel(first.request)
    stranger, _ = load(write_tiny(tmp_path / "m", seed=1))
    with pytest.raises(SettingsError, match="this prefix is another model's"):
        Engine(stranger).admit(history(1), LOOSE, 0, prefix=prefix)
    with pytest.raises(SettingsError, match="prompt holds id 99"):
        engine.admit([99], LOOSE, 0, prefix=prefix)
    assert not prefix.in_use


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_nothing_is_copied_from_turn_to_turn(
    tiny_model, monkeypatch, unfused, compiled, ahead
):
    """Buffers, here 10 MB, are written in place by prompts and commits alike."""
    model, _ = tiny_model
    engine, prefix = Engine(model, compiled=compiled, ahead=ahead), Prefix(model)
    reserve = PrefixCache.reserve
    monkeypatch.setattr(PrefixCache, "reserve", lambda self, _: reserve(self, 65_536))
    settings = LOOSE.replace(
        eos=frozenset({999}), confidence=0.0, steps=3, max_tokens=40
    )
    growths: list[int] = []
    append = Engine._append

    def measured(self, canvas, *given):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        append(self, canvas, *given)
        if canvas.owner is not None:
            growths.append(mx.get_peak_memory() - before)

    monkeypatch.setattr(Engine, "_append", measured)
    ids = history(3)  # longer than a chunk
    # another lane keeps the engine in_use, which must still let go of our prefix
    engine.admit([2, 9], settings.replace(canvas_length=7, steps=99), 0)
    for seed in range(4):
        number = engine.admit(ids, settings, seed, MOST, prefix=prefix).request
        events: list = []
        while any(canvas.request == number for canvas in engine.running):
            events += engine.tick()
        mine = [e for e in events if isinstance(e, Commit) and e.request == number]
        ids = [*ids, *(t for e in mine for t in e.tokens), *TURNS[seed]]
    assert engine.running
    large = [grown for grown in growths if grown > 1e6]
    assert large == growths[:1] and len(growths) > 12


def test_a_prefilled_event_says_what_was_reused(tiny_model):
    model, _ = tiny_model
    event = Engine(model).admit(history(2), LOOSE, 0)
    assert isinstance(event, Prefilled)
    assert (event.reused, event.encoded) == (0, len(history(2)))
