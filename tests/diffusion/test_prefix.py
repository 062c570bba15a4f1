"""A reused prefix gives each request, bit for bit, what a new one would."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from exactly import exactly
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from mlx_dgemma import DiffusionGemma, Engine, Prefix, PrefixCache, Settings, load
from mlx_dgemma.diffusion.prefix import MIN_SHARE, chunk_ends
from mlx_dgemma.errors import SettingsError

EOS = frozenset({1, 4})
LOOSE = Settings(canvas_length=16, max_tokens=32, steps=2, entropy_bound=8.0)
LOOSE = LOOSE.replace(confidence=2.0, eos=EOS)
ENDLESS = LOOSE.replace(eos={999}, confidence=0.0, max_tokens=96)
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


# --- requests ------------------------------------------------------------------------


def reused(engine, prefix, ids, chunk=CHUNK, settings=LOOSE) -> int:
    """Answer a prompt as a fresh request would; return how much was reused."""
    admitted = engine.admit(ids, settings, 0, chunk, prefix=prefix)
    assert admitted.prompt_tokens == len(ids) == admitted.reused + admitted.encoded
    found, fresh = exactly(engine.run()), Engine(prefix.model)
    fresh.admit(ids, settings, 0, chunk)
    assert found == exactly(fresh.run())
    return admitted.reused


@pytest.fixture
def both(tiny_model):
    """An engine, and an empty prefix."""
    return Engine(tiny_model[0]), Prefix(tiny_model[0])


def test_each_request_encodes_what_is_new(both):
    last = 0
    for turns in range(1, len(TURNS) + 1):
        ids = history(turns)
        # back to the end of the last turn that was known; one token followed it
        known = [end for end in chunk_ends(ids, EOS, CHUNK) if end < last]
        assert reused(*both, ids) == max([0, *known])
        last = len(ids)


def test_other_prompts_reuse_what_they_share(both):
    ids = history(7)
    reused(*both, ids)
    assert reused(*both, ids) > len(ids) - CHUNK
    ends = [0, *chunk_ends(ids, EOS, CHUNK)]
    for at in (len(ids) - 2, 90, 5):
        found = reused(*both, [*ids[:at], 1, *ids[at + 1 :]])
        assert found in ends and found <= at
    assert found == 0


def test_other_chunks_reuse_only_what_is_cut_alike(both):
    ids = history(4)
    assert chunk_ends(ids, EOS, CHUNK) == [12, 39, 44, 76, 86, 87]
    assert chunk_ends(ids, EOS, 50) == [12, 39, 44, 86, 87]
    reused(*both, ids)
    # the snapshot at 44 was given up: it is nearest to the one before it
    assert reused(*both, ids, chunk=50) == 39


@pytest.mark.parametrize("ticks", [0, 3, 100])
def test_whole_chunks_are_left_after_the_end_or_a_cancellation(both, ticks):
    (engine, prefix), ids = both, history(5)
    number = engine.admit(ids, ENDLESS, 3, CHUNK, prefix=prefix).request
    for _ in range(ticks):
        engine.tick()
    engine.cancel(number)
    assert not prefix.in_use and engine.tick() == []
    assert prefix.cache.length == len(prefix) == prefix.ends[-1] >= 80
    assert prefix.keys == ids[: len(prefix)]
    assert reused(engine, prefix, ids, settings=ENDLESS) >= 80


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_interrupted_prefill_keeps_the_chunks_before(both, monkeypatch, stop):
    (engine, prefix), ids, encode = both, history(7), DiffusionGemma.encode
    ends, calls = chunk_ends(ids, EOS, CHUNK), iter(range(stop))

    def interrupted(self, *given):
        encode(self, *given)
        if next(calls, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DiffusionGemma, "encode", interrupted)
        engine.admit(ids, LOOSE, 0, CHUNK, prefix=prefix)
    assert not prefix.in_use and not engine.running
    assert prefix.ends == ends[:stop]
    assert reused(engine, prefix, ids) == [0, *ends][stop]


def test_prefix_serves_one_request_at_a_time_of_one_model(both, tmp_path):
    (engine, prefix), ids = both, history(1)
    first = engine.admit(ids, LOOSE, 0, prefix=prefix)
    for other in (engine, Engine(prefix.model)):
        with pytest.raises(SettingsError, match="a running request writes to this"):
            other.admit(ids, LOOSE, 0, prefix=prefix)
    engine.cancel(first.request)
    stranger = Engine(load(write_tiny(tmp_path / "m", seed=1))[0])
    for other, prompt, message in (
        (stranger, ids, "this prefix is another model's"),
        (engine, [99], "prompt holds id 99"),
    ):
        with pytest.raises(SettingsError, match=message):
            other.admit(prompt, LOOSE, 0, prefix=prefix)
        assert not prefix.in_use


@pytest.mark.parametrize("on", [False, True])
def test_buffers_are_not_copied_from_turn_to_turn(tiny_model, monkeypatch, unfused, on):
    """Prompts and commits write buffers, here of 10 MB, in place."""
    engine, prefix = Engine(tiny_model[0], compiled=on, ahead=on), Prefix(tiny_model[0])
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
    ids = history(3)  # longer than a chunk
    # another batch keeps the engine busy, which must still release the view
    engine.admit([2, 9], ENDLESS.replace(canvas_length=7, steps=99), 0)
    for seed in range(3):
        engine.admit(ids, ENDLESS.replace(max_tokens=40), seed, CHUNK, prefix=prefix)
        while prefix.in_use:
            engine.tick()
        ids = [*ids, *TURNS[seed]]
    assert engine.running
    assert len(growths) > 9 and max(growths[1:]) < 1e6 < growths[0]
