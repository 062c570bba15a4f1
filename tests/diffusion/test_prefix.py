"""A reused prefix gives each request, bit for bit, what a new one would."""

import itertools
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from exactly import exactly
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.events import Commit
from mlx_dgemma.diffusion.prefix import MIN_SHARE, Prefix, chunk_ends
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.model.cache import MAX_SNAPSHOTS, PrefixCache
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.settings import Settings

EOS = frozenset({1, 4})
LOOSE = Settings(canvas_length=16, max_tokens=32, steps=2, entropy_bound=8.0)
LOOSE = LOOSE.replace(confidence=2.0, eos=EOS)
CHUNK = 32
RNG = np.random.default_rng(5)
# turns of a conversation: 4 ends one
TURNS = [[3, *RNG.integers(5, 32, n).tolist(), 4] for n in (9, 25, 3, 40, 14, 60, 8)]


def history(turns: int) -> list[int]:
    return [2, *itertools.chain(*TURNS[:turns]), 3]


# --- where chunks end ----------------------------------------------------------------

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=200)


@given(tokens=IDS, more=IDS, maximum=st.integers(1, 60))
@settings(max_examples=50)
def test_chunks_end_behind_turns_whatever_follows(tokens, more, maximum):
    ends = chunk_ends(tokens, EOS, maximum)
    longer = chunk_ends([*tokens, *more], EOS, maximum)
    assert longer[: len(ends) - 1] == ends[:-1]
    minimum = -(-maximum // MIN_SHARE)
    assert ends[-1] == len(tokens)
    for start, end in itertools.pairwise([0, *ends]):
        assert end - start <= maximum
        if end < len(tokens):
            assert minimum <= end - start
            assert end - start == maximum or tokens[end - 1] in EOS
        between = range(start + minimum, end)
        assert not any(tokens[i - 1] in EOS for i in between)


def test_no_chunk_ends_inside_a_picture():
    for spans, ends in (
        ([], [30, 60, 90, 100]),
        ([(25, 45), (75, 76), (95, 100)], [45, 75, 100]),
        ([(30, 60), (60, 90)], [30, 60, 90, 100]),
        ([(0, 100)], [100]),
    ):
        named = [SimpleNamespace(start=start, end=end) for start, end in spans]
        assert chunk_ends([9] * 100, EOS, 30, named) == ends  # type: ignore[arg-type]


# --- requests ------------------------------------------------------------------------


def fresh(model, ids, seed=0, chunk=CHUNK, settings=LOOSE, **options) -> list:
    """What a request without a reused prefix gives."""
    engine = Engine(model, **options)
    engine.admit(ids, settings, seed, chunk)
    return exactly(engine.run())


def reused(engine, prefix, ids, chunk=CHUNK, settings=LOOSE) -> int:
    """Answer a prompt as a fresh request would; return how much was reused."""
    admitted = engine.admit(ids, settings, 0, chunk, prefix=prefix)
    assert admitted.prompt_tokens == len(ids) == admitted.reused + admitted.encoded
    assert exactly(engine.run()) == fresh(prefix.model, ids, 0, chunk, settings)
    return admitted.reused


def test_each_request_encodes_what_is_new(tiny_model):
    prefix, engine, last = Prefix(tiny_model[0]), Engine(tiny_model[0]), 0
    for turns in range(1, len(TURNS) + 1):
        ids = history(turns)
        # back to the end of the last turn that was known; one token followed it
        known = [end for end in chunk_ends(ids, EOS, CHUNK) if end < last]
        assert reused(engine, prefix, ids) == max([0, *known])
        last = len(ids)
    assert len(prefix.cache.snapshots) <= MAX_SNAPSHOTS


def test_other_prompts_reuse_what_they_share(tiny_model):
    prefix, engine, ids = Prefix(tiny_model[0]), Engine(tiny_model[0]), history(7)
    reused(engine, prefix, ids)
    assert reused(engine, prefix, ids) > len(ids) - CHUNK
    ends = [0, *chunk_ends(ids, EOS, CHUNK)]
    for at in (len(ids) - 2, 90, 5):
        found = reused(engine, prefix, [*ids[:at], 1, *ids[at + 1 :]])
        assert found in ends and found <= at
    assert found == 0


def test_other_chunks_reuse_only_what_is_cut_alike(tiny_model):
    prefix, engine, ids = Prefix(tiny_model[0]), Engine(tiny_model[0]), history(4)
    assert chunk_ends(ids, EOS, CHUNK) == [12, 39, 44, 76, 86, 87]
    assert chunk_ends(ids, EOS, 50) == [12, 39, 44, 86, 87]
    reused(engine, prefix, ids)
    # the snapshot at 44 was given up: it is nearest to the one before it
    assert reused(engine, prefix, ids, chunk=50) == 39


def test_conversations_side_by_side_change_nothing(tiny_model, unfused):
    """Each has its prefix; they come, end and go on while the other runs."""
    model, options = tiny_model[0], {"compiled": True, "ahead": True}
    engine, events, asked = Engine(model, **options), [], {}
    prefixes = [Prefix(model), Prefix(model)]
    for turns in range(2, 6):
        for who, prefix in enumerate(prefixes):
            while prefix.in_use:
                events += engine.tick()
            ids, seed = [2, 5 + who, *history(turns + who)], 10 * turns + who
            admitted = engine.admit(ids, LOOSE, seed, CHUNK, prefix=prefix)
            asked[admitted.request] = ids, seed
            events += engine.tick()
    events += engine.run()
    for number, (ids, seed) in asked.items():
        mine = exactly(e for e in events if e.request == number)
        solo = fresh(model, ids, seed, **options)
        assert [e[0] for e in mine] == [e[0] for e in solo]  # drafts and tokens


@pytest.mark.parametrize("ticks", [0, 3, 100])
def test_whole_chunks_are_left_after_the_end_or_a_cancellation(tiny_model, ticks):
    model, _ = tiny_model
    endless = LOOSE.replace(eos={999}, confidence=0.0, max_tokens=96)
    prefix, engine, ids = Prefix(model), Engine(model), history(5)
    number = engine.admit(ids, endless, 3, CHUNK, prefix=prefix).request
    assert prefix.in_use
    for _ in range(ticks):
        engine.tick()
    engine.cancel(number)
    assert not prefix.in_use and engine.tick() == []
    assert prefix.cache.length == len(prefix) == prefix.ends[-1] >= 80
    assert prefix.keys == ids[: len(prefix)]
    assert reused(engine, prefix, ids, settings=endless) >= 80


def test_interrupted_prefill_keeps_the_chunks_before(tiny_model, monkeypatch):
    model, _ = tiny_model
    ids, encode = history(7), DiffusionGemma.encode
    ends = chunk_ends(ids, EOS, CHUNK)
    for stop in (0, 1, len(ends) - 1):
        calls = iter(range(stop))

        def interrupted(self, *given, calls=calls):
            encode(self, *given)
            if next(calls, None) is None:
                raise KeyboardInterrupt

        prefix, engine = Prefix(model), Engine(model)
        monkeypatch.setattr(DiffusionGemma, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.admit(ids, LOOSE, 0, CHUNK, prefix=prefix)
        monkeypatch.setattr(DiffusionGemma, "encode", encode)
        assert not prefix.in_use and not engine.running
        assert prefix.ends == ends[:stop]
        assert reused(engine, prefix, ids) == [0, *ends][stop]


def test_prefix_serves_one_request_at_a_time_of_one_model(tiny_model, tmp_path):
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


@pytest.mark.parametrize(("compiled", "ahead"), [(False, False), (True, True)])
def test_buffers_are_not_copied_from_turn_to_turn(
    tiny_model, monkeypatch, unfused, compiled, ahead
):
    """Prompts and commits write buffers, here of 10 MB, in place."""
    model, _ = tiny_model
    engine, prefix = Engine(model, compiled=compiled, ahead=ahead), Prefix(model)
    reserve, encode, growths = PrefixCache.reserve, DiffusionGemma.encode, []

    def measured(self, ids, cache, *given):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        encode(self, ids, cache, *given)
        cache.evaluate()
        if cache is prefix.cache:
            growths.append(mx.get_peak_memory() - before)

    monkeypatch.setattr(PrefixCache, "reserve", lambda self, _: reserve(self, 65_536))
    monkeypatch.setattr(DiffusionGemma, "encode", measured)
    endless = LOOSE.replace(eos={999}, confidence=0.0, steps=2, max_tokens=40)
    ids, encoded = history(3), 0  # longer than a chunk
    # another batch keeps the engine busy, which must still release the view
    engine.admit([2, 9], endless.replace(canvas_length=7, steps=99), 0)
    for seed in range(3):
        admitted = engine.admit(ids, endless, seed, CHUNK, prefix=prefix)
        number, events = admitted.request, []
        ends = chunk_ends(ids, endless.eos, CHUNK)
        encoded += sum(end > admitted.reused for end in ends) + 2  # no last canvas
        while any(canvas.request == number for canvas in engine.running):
            events += engine.tick()
        mine = [e for e in events if isinstance(e, Commit) and e.request == number]
        ids = [*ids, *(t for e in mine for t in e.tokens), *TURNS[seed]]
    assert engine.running
    large = [growth for growth in growths if growth > 1e6]
    assert large == growths[:1] and len(growths) == encoded
