"""Thoughts, answers and calls from a model's tokens to the history of a talk."""

import json

import pytest
from tiny import VOCABULARY, write_tiny

from mlx_dgemma import Commit, generate, load, stream_generate
from mlx_dgemma.diffusion.conversation import Conversation
from mlx_dgemma.text.replies import Answer, Call, Thought

MARKERS = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>']
PIECES = [*VOCABULARY[:7], *"abcdel{}:12utfghijkm", *MARKERS]
TEMPLATE = (
    "<bos>{% for m in messages %}<|turn>{{ m['role'][0] }}"
    "{% for c in m.get('tool_calls') or [] %}<|tool_call>{{ c['function']['name'] }}"
    "<tool_call|>{% endfor %}{{ m['content'] or '' }}<turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "ab", "parameters": {}}}]


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A tiny checkpoint whose vocabulary has the markers; turns end with eos 4."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel

    folder = write_tiny(tmp_path_factory.mktemp("marked") / "m")
    ids = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = [*PIECES[:5], *MARKERS]
    tokenizer.add_special_tokens([AddedToken(p, special=True) for p in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load(folder)


def pinned(*pieces: str) -> dict:
    """Settings that make a model say this, and end."""
    tokens = [PIECES.index(p) for piece in pieces for p in _split(piece)]
    return {
        "pinned": dict(enumerate([*tokens, 4])),
        "max_tokens": 32,
        "steps": 1,
        "seed": 0,
    }


def _split(piece: str) -> list[str]:
    return [piece] if piece in MARKERS else list(piece)


def test_a_commit_has_parts_and_its_text_is_the_answer(marked):
    said = pinned("<|channel>", "ab\nc", "<channel|>", "dee")
    (commit,) = [
        e for e in stream_generate(*marked, "a", **said) if isinstance(e, Commit)
    ]
    assert commit.parts == (Thought("ab\nc"), Answer("dee"))
    assert commit.text == "dee" == generate(*marked, "a", **said)


def test_stop_strings_are_of_the_answer(marked):
    said = pinned("<|channel>", "dee", "<channel|>", "abdeec")
    (commit,) = [
        e
        for e in stream_generate(*marked, "a", stop="de", **said)
        if isinstance(e, Commit)
    ]
    assert commit.finish_reason == "stop"
    assert commit.parts == (Thought("dee"), Answer("ab"))


def test_a_thought_may_span_canvases(marked):
    """16 tokens a canvas: it goes on where the first one ended."""
    said = pinned("<|channel>", "a" * 20, "<channel|>", "bcd")
    commits = [
        e for e in stream_generate(*marked, "a", **said) if isinstance(e, Commit)
    ]
    assert [commit.text for commit in commits] == ["", "bcd"]
    thoughts = [p.text for c in commits for p in c.parts if isinstance(p, Thought)]
    assert "".join(thoughts) == "a" * 20


def test_a_call_is_answered_and_the_talk_goes_on(marked):
    model, tokenizer = marked
    call = pinned("<|tool_call>", "call:ab{}", "<tool_call|>")
    talk = Conversation(model, tokenizer, tools=TOOLS, **without_seed(call))
    commits = [e for e in talk.ask("a", seed=0) if isinstance(e, Commit)]
    assert [c.parts for c in commits] == [(Call("ab", {}, "call_0"),)]
    assert commits[0].text == ""
    (_, answer) = talk.messages
    assert answer["content"] is None
    assert answer["tool_calls"][0]["function"] == {"name": "ab", "arguments": {}}
    json.dumps(talk.messages)
    talk.add({"role": "tool", "tool_call_id": "call_0", "content": "12"})
    fresh = list(stream_generate(model, tokenizer, talk.messages, tools=TOOLS, **call))
    events = list(talk.ask(seed=0))
    assert [e.parts for e in events if isinstance(e, Commit)] == [
        e.parts for e in fresh if isinstance(e, Commit)
    ]
    assert [m["role"] for m in talk.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


def test_what_was_thought_before_a_stop_is_kept(marked):
    model, tokenizer = marked
    said = pinned("<|channel>", "a" * 20, "<channel|>", "bcd")
    talk = Conversation(model, tokenizer, **without_seed(said))
    events = talk.ask("a", seed=0)
    for event in events:
        if isinstance(event, Commit):
            break
    events.close()
    assert talk.messages[-1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "a" * 15,
    }


def without_seed(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name != "seed"}
