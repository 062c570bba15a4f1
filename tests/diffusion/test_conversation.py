"""A conversation answers as each prompt alone would, and encodes only what is new."""

import copy
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
from exactly import exactly
from tiny import VOCABULARY, write_tiny, write_tokenizer

import mlx_dgemma as dg
from mlx_dgemma import Commit, Conversation, stream_generate
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.text.chat import chat_ids

LOOSE = {"steps": 2, "entropy_bound": 8.0, "confidence": 2.0, "max_tokens": 16}
LOOSE |= {"prefill_step_size": 32}
LONG = LOOSE | {"eos": frozenset({999}), "max_tokens": 48}  # always three canvases
MARKERS = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>']
PIECES = [*VOCABULARY[:7], *"abcdel{}:12utfghijkm", *MARKERS]
# as the release's: the reply begins with tokens that no history repeats
TEMPLATE = (
    "{% if tools %}{% endif %}"
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
    return dg.load(folder)


@pytest.fixture(scope="module")
def marked(chatty, tmp_path_factory):
    """Its model with a vocabulary that has the markers; turns end with eos 4."""
    folder = tmp_path_factory.mktemp("marked")
    write_tokenizer(folder, PIECES, [*PIECES[:5], *MARKERS])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return chatty[0], dg.Tokenizer.from_dir(folder)


def message(role: str, content) -> dict:
    return {"role": role, "content": content}


def fresh(loaded, prompt, seed: int, **options) -> list:
    """What a request of its own says to a prompt."""
    return exactly(stream_generate(*loaded, prompt, seed=seed, **options))


def first_commit(events) -> Commit:
    return next(event for event in events if isinstance(event, Commit))


def test_turns_equal_fresh_prompts_through_edits_of_the_past(chatty):
    rng, encoded, total = np.random.default_rng(1), 0, 0
    for number in range(2):
        talk = Conversation(*chatty, **LOOSE)
        for turn in range(6):
            if turn > 1 and rng.random() < 0.3:
                talk.edit(int(rng.integers(len(talk.messages))), "own words")
            words = "".join(rng.choice(VOCABULARY[7:], rng.integers(1, 30)))
            said, seed = [*talk.messages, message("user", words)], 100 * number + turn
            events = list(talk.ask(words, seed=seed))
            assert exactly(events) == fresh(chatty, said, seed, **LOOSE)
            text = "".join(event.text for event in events)
            assert talk.messages == [*said, message("assistant", text)]
            assert events[0] is talk.stats
            encoded += events[0].encoded
            total += events[0].prompt_tokens
    assert encoded < 0.6 * total


def test_system_turn_and_thinking_can_be_set_between_answers(chatty):
    options = {"system": "abc" * 20, "thinking": True}
    talk = Conversation(*chatty, **options, **LOOSE)
    changes = {}, {"system": "abd"}, {"thinking": False}, {"system": None}
    for turn, change in enumerate(changes):
        options |= change
        talk.system, talk.thinking = options["system"], options["thinking"]
        said = [*talk.messages, message("user", "12")]
        expected = fresh(chatty, said, turn, **options, **LOOSE)
        assert exactly(talk.ask("12", seed=turn)) == expected
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 4
    assert talk.transcript() == talk.messages
    talk.system = "a"
    assert talk.transcript() == [message("system", "a"), *talk.messages]


@pytest.mark.parametrize("taken", ["nothing", dg.Prefilled, dg.Step, Commit, "ctrl-c"])
def test_committed_text_stays_after_an_interruption(chatty, monkeypatch, taken):
    """By closing or by Ctrl-C; without a commit the messages are as before."""
    talk, commit = Conversation(*chatty, **LONG), None
    list(talk.ask("ab", seed=0))
    expected, events = talk.messages, talk.ask("12", seed=3)
    if taken in (Commit, "ctrl-c"):
        commit = first_commit(events)
        answer = message("assistant", chatty[1].decode(commit.tokens))
        expected += [message("user", "12"), answer]
    elif taken != "nothing":
        next(event for event in events if isinstance(event, taken))
    if taken == "ctrl-c":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(dg.Engine, "tick", lambda self: signal.raise_signal(2))
            next(events)
    events.close()
    assert talk.messages == expected
    after = fresh(chatty, [*expected, message("user", "34")], 1, **LONG)
    assert exactly(talk.ask("34", seed=1)) == after


def test_text_held_back_for_a_stop_string_is_kept(chatty):
    talk = Conversation(*chatty, **LONG)
    first = first_commit(talk.ask("ab", seed=0)).text
    talk.reset()
    events = talk.ask("ab", seed=0, stop=[f"{first[-1]}never"])
    assert first_commit(events).text == first[:-1]
    events.close()
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
    assert talk.messages == [*first[:3], message("assistant", "own words")]
    said = [*first[:2], message("user", "12")]
    said.append(message("user", [{"type": "text", "text": "34"}]))
    talk.edit(2, "12")
    talk.add(said[3])
    assert talk.messages == said
    assert exactly(talk.ask(seed=5)) == fresh(chatty, said, 5, **LOOSE)
    talk.messages[0]["content"] = "other"  # of a copy
    assert talk.messages[:4] == said
    talk.reset()
    assert talk.messages == []


def test_impossible_requests_are_refused_at_once(chatty):
    talk = Conversation(*chatty, **LOOSE)
    list(talk.ask("ab", seed=0))
    before = talk.messages
    for act, refused in (
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
        (lambda: Conversation(*chatty, hot=1), "'hot' is no setting"),
        (lambda: Conversation(*chatty, prefill_step_size=0), "step_size is 0"),
    ):
        with pytest.raises(SettingsError, match=refused):
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


def test_a_second_thread_is_refused_while_the_first_encodes(chatty, monkeypatch):
    """Both would write to one cache; the guard stands before the work it guards."""
    talk, engine = Conversation(*chatty, **LOOSE), dg.Engine(chatty[0])
    encoding, go_on, encode = Event(), Event(), dg.DiffusionGemma.encode
    given = [2, 7], chatty[0].settings, 0

    def waiting(self, *given):
        encoding.set()
        assert go_on.wait(20)
        encode(self, *given)

    monkeypatch.setattr(dg.DiffusionGemma, "encode", waiting)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(lambda: list(talk.ask("1", seed=0)))
        admitted = pool.submit(engine.admit, *given)
        assert encoding.wait(20)
        other = dg.Engine(chatty[0])
        try:
            for act, refused in (
                (lambda: list(talk.ask("2")), "an answer is being written"),
                (lambda: talk.add({}), "an answer is being written"),
                (lambda: other.admit(*given, prefix=talk.prefix), "a running request"),
                (engine.tick, "another thread is using this"),
                (lambda: engine.admit(*given), "another thread is using this"),
            ):
                with pytest.raises(SettingsError, match=refused):
                    act()
        finally:
            go_on.set()
        assert len(asked.result()) > 2 and admitted.result().prompt_tokens == 2
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_without_a_template_the_prompt_is_the_text_in_a_row(tmp_path):
    folder, text = write_tiny(tmp_path / "m"), ""
    (folder / "chat_template.jinja").unlink()
    loaded = dg.load(folder)
    talk = Conversation(*loaded, **LOOSE)
    for turn in range(3):
        text += "abcd" * 5
        expected = fresh(loaded, text, turn, **LOOSE)
        assert exactly(talk.ask("abcd" * 5, seed=turn)) == expected
        text += talk.messages[-1]["content"]
    with pytest.raises(SettingsError, match="without a chat template, content must be"):
        talk.ask([{"type": "text", "text": "a"}])
    talk.system = "a"
    with pytest.raises(SettingsError, match="system cannot be used"):
        talk.ask("b")


# --- thoughts and calls --------------------------------------------------------------


def saying(tokenizer, reply: str) -> dict:
    """Settings that pin the reply."""
    tokens = [*tokenizer.encode(reply), 4]
    return {"pinned": dict(enumerate(tokens)), "max_tokens": 32, "steps": 1}


def test_commits_hold_thoughts_and_stop_strings_end_answers_only(marked):
    options = saying(marked[1], "<|channel>dee<channel|>abdeec")
    for stop, answer in (((), "abdeec"), ("de", "ab")):
        *_, commit = stream_generate(*marked, "a", stop=stop, **options)
        assert (commit.text, commit.finish_reason) == (answer, "stop")
        assert commit.parts == (dg.Thought("dee"), dg.Answer(answer))


def test_call_is_answered_and_the_conversation_goes_on(marked):
    options = saying(marked[1], "<|tool_call>call:ab{}<tool_call|>")
    talk = Conversation(*marked, tools=TOOLS, **options)
    *_, commit = talk.ask("a", seed=0)
    assert (commit.text, commit.parts) == ("", (dg.Call("ab", {}, "call_0"),))
    answer = talk.messages[1]
    assert answer["content"] is None
    assert answer["tool_calls"][0]["function"] == {"name": "ab", "arguments": {}}
    talk.add({"role": "tool", "tool_call_id": "call_0", "content": "12"})
    json.dumps(talk.transcript())
    expected = fresh(marked, talk.messages, 0, tools=TOOLS, **options)
    assert exactly(talk.ask(seed=0)) == expected


def test_a_reply_goes_back_as_the_ids_that_were_written(chatty, tmp_path):
    """Here "ab" is a token that no encoding gives; a trimmed reply is encoded anew."""
    write_tokenizer(tmp_path, [*VOCABULARY[:7], *"0123456789", "ab", *"bcdefghijklmno"])
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    model, tokenizer = chatty[0], dg.Tokenizer.from_dir(tmp_path)
    own, kept, seeds = tokenizer.token_id("ab"), 0, 12
    for seed in range(seeds):
        talk = Conversation(model, tokenizer, **LOOSE, min_tokens=16)
        *_, commit = talk.ask("b", seed=seed)
        reply = copy.deepcopy(talk.messages[-1])["content"]
        assert reply == tokenizer.decode(commit.tokens) == commit.text
        talk.add({"role": "user", "content": "c"})
        prompt = chat_ids(tokenizer, talk.messages)
        plain = chat_ids(tokenizer, json.loads(json.dumps(talk.messages)))
        first = tokenizer.encode("<bos><|turn>ub<turn|>\n<|turn>a")
        shown = reply == reply.strip()
        if not shown or tokenizer.special_ids & {*commit.tokens}:
            assert prompt == plain
            continue
        assert prompt[len(first) :][:16] == [*commit.tokens]
        assert (prompt != plain) == (own in commit.tokens)
        kept += own in commit.tokens
    assert kept
