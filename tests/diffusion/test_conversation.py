"""A conversation writes what each prompt would alone, and encodes only what is new."""

import itertools

import numpy as np
import pytest
from tiny import VOCABULARY, write_tiny

from mlx_dgemma import Commit, Prefilled, Step, load, stream_generate
from mlx_dgemma.diffusion.conversation import Conversation
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.text.chat import chat_ids

LOOSE = {"steps": 3, "entropy_bound": 8.0, "confidence": 2.0, "prefill_step_size": 32}
LONG = LOOSE | {"eos": frozenset({999}), "max_tokens": 48}  # always three canvases
LETTERS = "".join(VOCABULARY[7:])
# as the release's: the reply is opened by what no history repeats
STUBBED = (
    "<bos>{% for m in messages %}<|turn>{{ m['role'][0] }}{{ m['content'] | trim }}"
    "<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>a{% if not enable_thinking %}nn{% endif %}"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory):
    """The tiny model under a template like the release's."""
    folder = write_tiny(tmp_path_factory.mktemp("stubbed") / "m", num_hidden_layers=3)
    (folder / "chat_template.jinja").write_text(STUBBED)
    return load(folder)


def words(rng, most=30) -> str:
    return "".join(rng.choice(list(LETTERS), rng.integers(1, most)))


def bits(events) -> list:
    """What the canvases went through, number by number."""
    return [
        [np.array(e.entropy).tolist(), e.draft.tolist(), e.canvas.tolist()]
        if isinstance(e, Step)
        else [e.tokens, e.text, e.steps, e.finish_reason]
        for e in events
        if not isinstance(e, Prefilled)
    ]


def common(one, other) -> int:
    pairs = itertools.takewhile(lambda p: p[0] == p[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


def test_twenty_conversations_of_six_turns_with_edits_of_the_past(stubbed):
    model, tokenizer = stubbed
    changes = LOOSE | {"max_tokens": 32, "steps": 2}
    rng, encoded, whole = np.random.default_rng(1), 0, 0
    for number in range(20):
        talk, last = Conversation(model, tokenizer, **changes), []
        for turn in range(6):
            edited = turn > 1 and rng.random() < 0.3
            if edited:
                index = int(rng.integers(len(talk.messages)))
                talk.edit(index, words(rng, 20))
            said = [*talk.messages, {"role": "user", "content": words(rng)}]
            seed = 100 * number + turn
            events = list(talk.ask(said[-1]["content"], seed=seed))
            wanted = list(stream_generate(model, tokenizer, said, seed=seed, **changes))
            assert bits(events) == bits(wanted)
            text = "".join(e.text for e in wanted if isinstance(e, Commit))
            assert talk.messages == [*said, {"role": "assistant", "content": text}]
            ids = chat_ids(tokenizer, said)
            assert events[0] is talk.stats
            assert events[0].prompt_tokens == len(ids)
            # at most a chunk before what is new, and what is new
            if not edited:
                assert events[0].reused > common(ids, last) - 32
            encoded, whole = encoded + events[0].encoded, whole + len(ids)
            last = ids
    assert encoded < 0.6 * whole


def test_what_a_turn_encodes_does_not_grow_with_the_history(stubbed):
    talk = Conversation(*stubbed, max_tokens=16, **LOOSE)
    counts = []
    for turn in range(30):
        list(talk.ask("abc" * 5, seed=turn))
        assert talk.stats is not None
        counts.append(talk.stats)
    assert counts[-1].prompt_tokens > 700
    assert max(c.encoded for c in counts) < 32 + 15 + 16 + 12
    # marks and room included, memory grows by what full layers keep of a token
    assert talk.prefix.cache.nbytes < 500_000


def test_the_system_turn_and_thinking_are_part_of_every_prompt(tiny_model, stubbed):
    for (model, tokenizer), given in [
        (tiny_model, {"system": "abc"}),
        (stubbed, {"system": "abc" * 9, "thinking": True}),
    ]:
        talk = Conversation(model, tokenizer, **given, **LOOSE, max_tokens=16)
        for turn, content in enumerate(["12", "34" * 20, "5"]):
            said = [*talk.messages, {"role": "user", "content": content}]
            wanted = stream_generate(
                model, tokenizer, said, seed=turn, max_tokens=16, **given, **LOOSE
            )
            assert bits(talk.ask(content, seed=turn)) == bits(wanted)
        assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 3


@pytest.mark.parametrize("how", ["close", "break", "interrupt"])
def test_what_is_committed_when_it_is_interrupted_stays(stubbed, monkeypatch, how):
    """In the middle of the second canvas; the next turn goes on from there."""
    model, tokenizer = stubbed
    talk = Conversation(model, tokenizer, **LONG)
    list(talk.ask("ab", seed=0))
    before = talk.messages
    commits = []
    if how == "interrupt":
        tick = Engine.tick

        def interrupted(self):
            if commits:
                raise KeyboardInterrupt
            return tick(self)

        monkeypatch.setattr(Engine, "tick", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for event in talk.ask("12", seed=3):
                commits += [event] * isinstance(event, Commit)
        monkeypatch.setattr(Engine, "tick", tick)
    else:
        events = talk.ask("12", seed=3)
        for event in events:
            if commits and isinstance(event, Step) and event.step == 1:
                break
            commits += [event] * isinstance(event, Commit)
        if how == "close":
            events.close()
        del events
    assert len(commits) == 1 and commits[0].finish_reason is None
    answer = {"role": "assistant", "content": tokenizer.decode(commits[0].tokens)}
    assert talk.messages == [*before, {"role": "user", "content": "12"}, answer]
    said = [*talk.messages, {"role": "user", "content": "34"}]
    wanted = stream_generate(*stubbed, said, seed=1, **LONG)
    assert bits(talk.ask("34", seed=1)) == bits(wanted)
    assert talk.stats is not None and talk.stats.reused > 0


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_when_nothing_was_committed_nothing_was_asked(stubbed, taken):
    talk = Conversation(*stubbed, **LOOSE)
    list(talk.ask("ab", seed=0))
    before = talk.messages
    events = talk.ask("12", seed=1)
    for _ in range(taken):
        next(events)
    events.close()
    assert talk.messages == before
    wanted = stream_generate(
        *stubbed, [*before, {"role": "user", "content": "12"}], seed=1, **LOOSE
    )
    assert bits(talk.ask("12", seed=1)) == bits(wanted)


def test_text_held_back_for_a_stop_string_is_not_lost(stubbed):
    talk = Conversation(*stubbed, **LONG)
    commits = [e for e in talk.ask("ab", seed=0) if isinstance(e, Commit)]
    talk.reset()
    begins = commits[0].text[-1]  # of a stop string, for all one can tell
    events = talk.ask("ab", seed=0, stop=[f"{begins}never"])
    first = next(e for e in events if isinstance(e, Commit))
    events.close()
    assert first.text == commits[0].text[:-1]
    assert talk.messages[-1]["content"] == commits[0].text


def test_a_stop_string_ends_the_message(stubbed):
    talk = Conversation(*stubbed, **LONG)
    list(talk.ask("ab", seed=0))
    whole = talk.messages[-1]["content"]
    talk.rewind()
    assert talk.messages == []
    list(talk.ask("ab", seed=0, stop=whole[20:23]))
    assert talk.messages[-1]["content"] == whole[: whole.index(whole[20:23])]


def test_the_past_can_be_changed(stubbed):
    talk = Conversation(*stubbed, **LOOSE)
    for turn, content in enumerate(["ab", "cd", "ef"]):
        list(talk.ask(content, seed=turn))
    first = talk.messages
    talk.rewind(0)
    assert talk.messages == first
    talk.rewind(2)
    assert talk.messages == first[:2]
    list(talk.ask("cd", seed=1))
    list(talk.ask("ef", seed=2))
    assert talk.messages == first  # the same again
    talk.edit(3, "own words")
    assert talk.messages == [*first[:3], {"role": "assistant", "content": "own words"}]
    talk.edit(2, "12")
    assert talk.messages == [*first[:2], {"role": "user", "content": "12"}]
    list(talk.ask(seed=5))
    assert [m["content"] for m in talk.messages[:3:2]] == ["ab", "12"]
    assert len(talk.messages) == 4
    talk.reset()
    assert talk.messages == []


def test_messages_are_a_copy(stubbed):
    talk = Conversation(*stubbed, **LOOSE)
    list(talk.ask("ab", seed=0))
    talk.messages[0]["content"] = "other"
    talk.messages.clear()
    assert talk.messages[0]["content"] == "ab"


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda talk: talk.ask(), "there is no question to answer; give one to ask"),
        (lambda talk: talk.ask(7), "content is int; it must be text or a list of"),
        (lambda talk: talk.ask("ab", stop=[""]), "must be strings that are not empty"),
        (lambda talk: talk.ask("ab", seed=-1), "seed is -1"),
        (lambda talk: talk.edit(2, "a"), "message 2 is not there; there are 2, from 0"),
        (lambda talk: talk.edit(-1, "a"), "message -1 is not there"),
        (lambda talk: talk.edit(0, None), "content is NoneType; it must be text"),
        (lambda talk: talk.rewind(2), "turns is 2; the conversation has 1 to take"),
        (lambda talk: talk.rewind(-1), "turns is -1"),
    ],
)
def test_what_cannot_be_is_refused_at_once(stubbed, do, message):
    talk = Conversation(*stubbed, **LOOSE)
    list(talk.ask("ab", seed=0))
    before = talk.messages
    with pytest.raises(SettingsError, match=message):
        do(talk)
    assert talk.messages == before


def test_settings_are_checked_when_it_begins(tiny_model):
    with pytest.raises(SettingsError, match="'temperature' is no setting"):
        Conversation(*tiny_model, temperature=1.0)
    with pytest.raises(SettingsError, match="prefill_step_size is 0"):
        Conversation(*tiny_model, prefill_step_size=0)


def test_one_answer_at_a_time(stubbed):
    talk = Conversation(*stubbed, **LOOSE)
    early, late = talk.ask("ab", seed=0), talk.ask("cd", seed=0)
    next(early)
    for do in (talk.rewind, talk.reset, talk.ask, lambda: talk.edit(0, "a")):
        with pytest.raises(SettingsError, match="an answer is being written; close"):
            do()
    with pytest.raises(SettingsError, match="an answer is being written"):
        next(late)
    list(early)
    stale = talk.ask("cd", seed=0)
    talk.rewind()
    with pytest.raises(SettingsError, match="the messages have changed since ask"):
        next(stale)
    assert talk.messages == []


def test_without_a_template_the_prompt_is_the_text_in_a_row(tmp_path):
    folder = write_tiny(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    model, tokenizer = load(folder)
    talk = Conversation(model, tokenizer, **LOOSE, max_tokens=16)
    text = ""
    for turn in range(4):
        text += "abcd" * 5
        wanted = stream_generate(
            model, tokenizer, text, seed=turn, max_tokens=16, **LOOSE
        )
        assert bits(talk.ask("abcd" * 5, seed=turn)) == bits(wanted)
        text += talk.messages[-1]["content"]
    assert talk.stats is not None and talk.stats.reused >= 32
    with pytest.raises(SettingsError, match="system cannot be used"):
        Conversation(model, tokenizer, system="a").ask("b")
    with pytest.raises(SettingsError, match="without a chat template, content must be"):
        talk.ask([{"type": "text", "text": "a"}])


def test_a_seed_is_chosen_and_reported(stubbed):
    talk = Conversation(*stubbed, **LOOSE)
    events = list(talk.ask("ab"))
    talk.rewind()
    assert bits(talk.ask("ab", seed=events[0].seed)) == bits(events)


def test_it_may_be_talked_to_from_one_thread_after_another(stubbed):
    from concurrent.futures import ThreadPoolExecutor

    there = Conversation(*stubbed, max_tokens=64, **LOOSE)
    here = Conversation(*stubbed, max_tokens=64, **LOOSE)
    for turn in range(4):
        content = "ab" * 9 * (turn + 1)
        if turn == 3:
            there.rewind(2)
            here.rewind(2)
        stream, events = there.ask(content, seed=turn), []
        while not events or events[-1] is not None:
            with ThreadPoolExecutor(1) as pool:  # a new thread for each event
                events.append(pool.submit(next, stream, None).result())
        assert bits(events[:-1]) == bits(here.ask(content, seed=turn))


def test_what_is_encoded_can_be_saved_and_loaded(stubbed, tmp_path):
    given = {"system": "ab" * 40, "max_tokens": 16} | LOOSE
    for turn in range(2):
        talk = Conversation(*stubbed, **given)
        if turn:
            talk.load(tmp_path / "a.cache")
        list(talk.ask(f"{turn}" * 5, seed=0))
        assert talk.stats is not None
        assert (talk.stats.reused >= 64) == (turn == 1)
        talk.save(tmp_path / "a.cache")
        events = talk.ask("1")
        next(events)
        for do in (talk.save, talk.load):
            with pytest.raises(SettingsError, match=r"running request|being written"):
                do(tmp_path / "a.cache")
        events.close()


def test_the_system_turn_and_thinking_can_be_changed(stubbed):
    model, tokenizer = stubbed
    talk = Conversation(model, tokenizer, system="abc" * 20, max_tokens=16, **LOOSE)
    list(talk.ask("12" * 9, seed=0))
    talk.think(True)
    talk.instruct("abd")
    said = [*talk.messages, {"role": "user", "content": "34"}]
    wanted = stream_generate(
        *stubbed, said, system="abd", thinking=True, seed=1, max_tokens=16, **LOOSE
    )
    assert bits(talk.ask("34", seed=1)) == bits(wanted)
    talk.instruct(None)
    said = [*talk.messages, {"role": "user", "content": "5"}]
    wanted = stream_generate(
        *stubbed, said, thinking=True, seed=2, max_tokens=16, **LOOSE
    )
    assert bits(talk.ask("5", seed=2)) == bits(wanted)


def test_other_messages_can_be_added_and_answered(stubbed):
    talk = Conversation(*stubbed, max_tokens=16, **LOOSE)
    list(talk.ask("ab", seed=0))
    talk.add({"role": "user", "content": [{"type": "text", "text": "12"}]})
    said = talk.messages
    wanted = stream_generate(*stubbed, said, seed=1, max_tokens=16, **LOOSE)
    assert bits(talk.ask(seed=1)) == bits(wanted)
    assert talk.messages[:-1] == said
