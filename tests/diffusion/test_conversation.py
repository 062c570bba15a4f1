"""A conversation answers as each prompt alone would, and encodes only what is new."""

import itertools
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
from exactly import exactly
from tiny import VOCABULARY, write_tiny, write_tokenizer

from mlx_dgemma import (
    Answer,
    Call,
    Commit,
    Prefilled,
    Step,
    Thought,
    load,
    stream_generate,
)
from mlx_dgemma.diffusion.conversation import Conversation
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.text.chat import chat_ids

LOOSE = {"steps": 2, "entropy_bound": 8.0, "confidence": 2.0, "max_tokens": 16}
LOOSE |= {"prefill_step_size": 32}
LONG = LOOSE | {"eos": frozenset({999}), "max_tokens": 48}  # always three canvases
LETTERS = "".join(VOCABULARY[7:])
MARKERS = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>']
PIECES = [*VOCABULARY[:7], *"abcdel{}:12utfghijkm", *MARKERS]
# as the release's: the reply begins with tokens that no history repeats
TEMPLATE = (
    "<bos>{% for m in messages %}<|turn>{{ m['role'][0] }}"
    "{% for c in m.get('tool_calls') or [] %}<|tool_call>{{ c['function']['name'] }}"
    "<tool_call|>{% endfor %}{{ (m['content'] or '') | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>a{% if not enable_thinking %}bb{% endif %}"
    "{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "ab", "parameters": {}}}]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """The tiny model with a chat template like the release's."""
    folder = write_tiny(tmp_path_factory.mktemp("chatty") / "m")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load(folder)


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def test_turns_equal_fresh_prompts_through_edits_of_the_past(chatty):
    model, tokenizer = chatty
    rng, encoded, total = np.random.default_rng(1), 0, 0
    for number in range(2):
        talk, last = Conversation(model, tokenizer, **LOOSE), []
        for turn in range(6):
            edited = turn > 1 and rng.random() < 0.3
            if edited:
                talk.edit(int(rng.integers(len(talk.messages))), "own words")
            words = "".join(rng.choice(list(LETTERS), rng.integers(1, 30)))
            said, seed = [*talk.messages, user(words)], 100 * number + turn
            events = list(talk.ask(words, seed=seed))
            fresh = list(stream_generate(model, tokenizer, said, seed=seed, **LOOSE))
            assert exactly(events) == exactly(fresh)
            text = "".join(e.text for e in fresh)
            assert talk.messages == [*said, assistant(text)]
            ids = chat_ids(tokenizer, said)
            assert events[0] is talk.stats
            assert events[0].prompt_tokens == len(ids)
            # at most a chunk before what is new, and what is new
            if not edited:
                pairs = zip(ids, last, strict=False)
                shared = len(list(itertools.takewhile(lambda p: p[0] == p[1], pairs)))
                assert events[0].reused > shared - 32
            encoded, total = encoded + events[0].encoded, total + len(ids)
            last = ids
    assert encoded < 0.6 * total


def test_system_turn_and_thinking_can_be_set_between_answers(chatty):
    options = {"system": "abc" * 20, "thinking": True}
    talk = Conversation(*chatty, **options, **LOOSE)
    changes = {}, {"system": "abd"}, {"thinking": False}, {"system": None}
    for turn, change in enumerate(changes):
        options |= change
        talk.system, talk.thinking = options["system"], options["thinking"]
        said = [*talk.messages, user("12" * 9)]
        fresh = stream_generate(*chatty, said, seed=turn, **options, **LOOSE)
        assert exactly(talk.ask("12" * 9, seed=turn)) == exactly(fresh)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 4
    assert talk.transcript() == talk.messages
    talk.system = "a"
    assert talk.transcript() == [{"role": "system", "content": "a"}, *talk.messages]


@pytest.mark.parametrize("taken", ["nothing", Prefilled, Step, Commit, "ctrl-c"])
def test_committed_text_stays_after_an_interruption(chatty, monkeypatch, taken):
    """By closing or by Ctrl-C; without a commit the messages are as before."""
    talk, commit = Conversation(*chatty, **LONG), None
    list(talk.ask("ab", seed=0))
    before, events, tick = talk.messages, talk.ask("12", seed=3), Engine.tick
    if taken == "ctrl-c":
        commit = next(event for event in events if isinstance(event, Commit))
        monkeypatch.setattr(Engine, "tick", lambda self: signal.raise_signal(2))
        with pytest.raises(KeyboardInterrupt):
            next(events)
        monkeypatch.setattr(Engine, "tick", tick)
    elif taken != "nothing":
        event = next(event for event in events if isinstance(event, taken))
        commit = event if taken is Commit else None
    events.close()
    expected = before
    if commit is not None:
        assert commit.finish_reason is None
        answer = assistant(chatty[1].decode(commit.tokens))
        expected = [*before, user("12"), answer]
    assert talk.messages == expected
    fresh = stream_generate(*chatty, [*expected, user("34")], seed=1, **LONG)
    assert exactly(talk.ask("34", seed=1)) == exactly(fresh)


def test_stop_string_ends_the_message_and_held_text_is_kept(chatty):
    talk = Conversation(*chatty, **LONG)
    first = next(e for e in talk.ask("ab", seed=0) if isinstance(e, Commit)).text
    talk.reset()
    list(talk.ask("ab", seed=0, stop=first[10:13]))
    assert talk.messages[-1]["content"] == first[: first.index(first[10:13])]
    talk.reset()
    events = talk.ask("ab", seed=0, stop=[f"{first[-1]}never"])
    held = next(e for e in events if isinstance(e, Commit))
    events.close()
    assert held.text == first[:-1]
    assert talk.messages[-1]["content"] == first


def test_past_can_be_changed(chatty):
    talk = Conversation(*chatty, **LOOSE)
    for turn, content in enumerate(["ab", "cd", "ef"]):
        list(talk.ask(content, seed=turn))
    first = talk.messages
    talk.rewind(0)
    assert talk.messages == first
    talk.rewind(1)
    list(talk.ask("ef", seed=2))
    assert talk.messages == first  # the same again
    talk.edit(3, "own words")
    assert talk.messages == [*first[:3], assistant("own words")]
    talk.edit(2, "12")
    talk.add(user([{"type": "text", "text": "34"}]))
    said = talk.messages
    assert [m["content"] for m in said[2:]] == ["12", [{"type": "text", "text": "34"}]]
    fresh = stream_generate(*chatty, said, seed=5, **LOOSE)
    assert exactly(talk.ask(seed=5)) == exactly(fresh)
    talk.messages[0]["content"] = "other"  # of a copy
    assert talk.messages[:4] == said
    talk.reset()
    assert talk.messages == []


def test_impossible_requests_are_refused_at_once(chatty, tiny_model):
    talk = Conversation(*chatty, **LOOSE)
    list(talk.ask("ab", seed=0))
    before = talk.messages
    for act, message in (
        (talk.ask, "there is no question to answer; give one to ask"),
        (lambda: talk.ask(7), "content is int; it must be text or a list of"),
        (lambda: talk.ask("ab", stop=[""]), "must be strings that are not empty"),
        (lambda: talk.ask("ab", seed=-1), "seed is -1"),
        (lambda: talk.edit(2, "a"), "message 2 is not there; there are 2, from 0"),
        (lambda: talk.edit(-1, "a"), "message -1 is not there"),
        (lambda: talk.edit(0, None), "content is NoneType; it must be text"),
        (lambda: talk.rewind(2), "turns is 2; the conversation has 1 to take"),
        (lambda: talk.rewind(-1), "turns is -1"),
        (lambda: talk.ask([{}], images=["a.png"]), "images go with a text"),
        (lambda: Conversation(*tiny_model, hot=1), "'hot' is no setting"),
        (lambda: Conversation(*tiny_model, prefill_step_size=0), "step_size is 0"),
    ):
        with pytest.raises(SettingsError, match=message):
            act()
        assert talk.messages == before


def test_one_answer_at_a_time(chatty):
    talk = Conversation(*chatty, **LOOSE)
    early, late = talk.ask("ab", seed=0), talk.ask("cd", seed=0)
    next(early)
    changes = lambda: talk.edit(0, "a"), lambda: next(late), lambda: talk.load("a")
    for act in (talk.rewind, talk.reset, talk.ask, *changes):
        with pytest.raises(SettingsError, match="an answer is being written; close"):
            act()
    with pytest.raises(SettingsError, match="a running request writes to this prefix"):
        talk.save("a")
    list(early)
    stale = talk.ask("cd", seed=0)
    talk.rewind()
    with pytest.raises(SettingsError, match="the messages have changed since ask"):
        next(stale)
    assert talk.messages == []


def test_a_second_thread_is_refused_while_the_first_encodes(tiny_model, monkeypatch):
    """Both would write to one cache; the guard stands before the work it guards."""
    model, tokenizer = tiny_model
    talk, engine = Conversation(model, tokenizer, **LOOSE), Engine(model)
    encoding, go_on, encode = Event(), Event(), DiffusionGemma.encode

    def waiting(self, *given):
        encoding.set()
        assert go_on.wait(20)
        encode(self, *given)

    monkeypatch.setattr(DiffusionGemma, "encode", waiting)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(lambda: list(talk.ask("1", seed=0)))
        admitted = pool.submit(engine.admit, [2, 7], model.settings, 0)
        assert encoding.wait(20)
        try:
            for refused in (lambda: list(talk.ask("2")), lambda: talk.add({})):
                with pytest.raises(SettingsError, match="an answer is being written"):
                    refused()
            with pytest.raises(SettingsError, match="a running request writes to"):
                Engine(model).admit([2, 7], model.settings, 0, prefix=talk.prefix)
            for refused in (engine.tick, lambda: engine.admit([2], model.settings, 0)):
                with pytest.raises(SettingsError, match="another thread is using this"):
                    refused()
        finally:
            go_on.set()
        assert len(asked.result()) > 2 and admitted.result().prompt_tokens == 2
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_without_a_template_the_prompt_is_the_text_in_a_row(tmp_path):
    folder = write_tiny(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    model, tokenizer = load(folder)
    talk, text = Conversation(model, tokenizer, **LOOSE), ""
    for turn in range(3):
        text += "abcd" * 5
        fresh = stream_generate(model, tokenizer, text, seed=turn, **LOOSE)
        assert exactly(talk.ask("abcd" * 5, seed=turn)) == exactly(fresh)
        text += talk.messages[-1]["content"]
    assert talk.stats is not None and talk.stats.reused >= 32
    with pytest.raises(SettingsError, match="system cannot be used"):
        Conversation(model, tokenizer, system="a").ask("b")
    with pytest.raises(SettingsError, match="without a chat template, content must be"):
        talk.ask([{"type": "text", "text": "a"}])


# --- thoughts and calls --------------------------------------------------------------


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A tiny checkpoint whose vocabulary has the markers; turns end with eos 4."""
    folder = write_tiny(tmp_path_factory.mktemp("marked") / "m")
    write_tokenizer(folder, PIECES, [*PIECES[:5], *MARKERS])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load(folder)


def saying(tokenizer, reply: str) -> dict:
    """Settings that pin the reply."""
    tokens = [*tokenizer.encode(reply), 4]
    return {"pinned": dict(enumerate(tokens)), "max_tokens": 32, "steps": 1}


def test_commits_hold_thoughts_and_stop_strings_end_answers_only(marked):
    options = saying(marked[1], "<|channel>dee<channel|>abdeec")
    *_, commit = stream_generate(*marked, "a", **options)
    assert (commit.text, commit.parts) == ("abdeec", (Thought("dee"), Answer("abdeec")))
    *_, commit = stream_generate(*marked, "a", stop="de", **options)
    assert commit.parts == (Thought("dee"), Answer("ab"))
    assert commit.finish_reason == "stop"


def test_call_is_answered_and_the_conversation_goes_on(marked):
    options = saying(marked[1], "<|tool_call>call:ab{}<tool_call|>")
    talk = Conversation(*marked, tools=TOOLS, **options)
    *_, commit = talk.ask("a", seed=0)
    assert (commit.text, commit.parts) == ("", (Call("ab", {}, "call_0"),))
    answer = talk.messages[1]
    assert answer["content"] is None
    assert answer["tool_calls"][0]["function"] == {"name": "ab", "arguments": {}}
    talk.add({"role": "tool", "tool_call_id": "call_0", "content": "12"})
    json.dumps(talk.transcript())
    fresh = stream_generate(*marked, talk.messages, tools=TOOLS, seed=0, **options)
    assert exactly(talk.ask(seed=0)) == exactly(fresh)
    roles = [m["role"] for m in talk.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]
