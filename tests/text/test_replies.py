"""Replies read canvas by canvas are the replies read at once."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calls import keys, values
from toy_tokenizers import MARKED, NAMES, byte_fallback, byte_level

from mlx_dgemma.text.calls import QUOTE, BrokenCallError, read_call
from mlx_dgemma.text.replies import (
    Answer,
    Call,
    Malformed,
    ReplyParser,
    Thought,
    merged,
    reply_message,
)
from mlx_dgemma.text.template import ChatTemplate
from mlx_dgemma.text.tokenizer import Tokenizer

relaxed = settings(deadline=None, max_examples=40)
LIKE_GEMMA = Path(__file__).parent / "gemma_like.jinja"
KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback}


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> dict[str, Tokenizer]:
    """Tokenizers that know the markers."""
    found = {}
    for name, build in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        build(MARKED).save(str(folder / "tokenizer.json"))
        found[name] = Tokenizer.from_dir(folder)
    return found


def read(tokenizer: Tokenizer, ids, chunk_ends=(), prompt=()) -> list:
    """The parts of a reply whose canvases end at `chunk_ends`."""
    reader = ReplyParser(tokenizer, prompt)
    edges = [0, *sorted(min(cut, len(ids)) for cut in chunk_ends), len(ids)]
    parts = [part for a, b in pairwise(edges) for part in reader.add(ids[a:b])]
    return merged([*parts, *reader.finish()])


def ordinary(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` in ordinary tokens, whatever it spells."""
    return [token for char in text for token in tokenizer.encode(char)]


def called(number=0, /, name="f", **arguments) -> Call:
    return Call(name, arguments, f"call_{number}")


UNENDED = Malformed("call:f{}", "it does not end")
REPLIES = {
    "": [],
    "héllo 日本語 🎉": [Answer("héllo 日本語 🎉")],
    "<|channel>thought<channel|>so": [Answer("so")],
    "<|channel>thought\nhm\n\nah\n<channel|>so": [Thought("hm\n\nah"), Answer("so")],
    "<|channel>thought\nhm 🎉<channel|>\n so": [Thought("hm 🎉"), Answer("\n so")],
    "<|channel>thou": [Thought("thou")],
    "<|channel>thoughtful": [Thought("thoughtful")],
    "<|channel>well\nyes<channel|>so": [Thought("well\nyes"), Answer("so")],
    "<|channel>final\nyes\n<channel|>!": [Answer("yes\n!")],
    "<|channel>thought\na\n<|channel>final\nb": [Thought("a"), Answer("b")],
    "a<channel|>b<tool_call|>c<|\"|>d": [Answer("abcd")],
    "a<turn|><|turn>b<|image|><eos>c<pad>": [Answer("abc")],
    "<|channel>th<turn|>ought\na<|image|>b": [Thought("ab")],
    'ok<|tool_call>call:f{a:<|"|>x, }y<|"|>,n:3}<tool_call|>!':
        [Answer("ok"), called(a="x, }y", n=3), Answer("!")],
    '<|tool_call>call:f{a:<|"|>é🎉\n"<|"|>,<|"|>b c<|"|>:[-1.5,null]}<tool_call|>':
        [called(a='é🎉\n"', **{"b c": [-1.5, None]})],
    "<|channel>thought\nhm<|tool_call>call:f{}<tool_call|><|tool_response>r:f{<|channel>x":
        [Thought("hm"), called()],
    "<|tool_call>call:f{}<|tool_response>b": [UNENDED],
    "<|tool_call>call:f{}<|tool_call>call:g{}<tool_call|><|tool_call>call:f{}<tool_call|>":
        [UNENDED, called(0, "g"), called(1)],
    "<|tool_call>call:f{}<|channel>thought\nhm<channel|>a":
        [UNENDED, Thought("hm"), Answer("a")],
    '<|tool_call>call:f{a:<|"|>b}<tool_call|>c':
        [Malformed('call:f{a:"b}', "character 9: a text does not end"), Answer("c")],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_however_its_canvases_end(marked, kind, reply):
    tokenizer = marked[kind]
    ids = tokenizer.encode(reply)
    for chunk_ends in (*((cut,) for cut in range(len(ids) + 1)), range(len(ids))):
        assert read(tokenizer, ids, chunk_ends) == REPLIES[reply]


@pytest.mark.parametrize("kind", KINDS)
def test_a_marker_in_ordinary_tokens_is_text(marked, kind):
    tokenizer = marked[kind]
    (channel,) = tokenizer.encode("<|channel>")
    for marker in MARKED:
        ids = ordinary(tokenizer, f"{marker}thought\na")
        assert not tokenizer.special_ids & set(ids)
        assert read(tokenizer, ids) == [Answer(f"{marker}thought\na")]
        assert read(tokenizer, [channel, *ids]) == [Thought(f"{marker}thought\na")]


SIGNS = {"<|channel>": "C", "<channel|>": "E", "<|tool_call>": "T", "<tool_call|>": "U"}
SIGNS |= {'<|"|>': "Q", "<|tool_response>": "R"}
SPAN = re.compile("C([^ECT]*)|T([^UCT]*)(U?)|([^CT]+)")


def plainly(reply: str) -> list:
    """The parts of a whole reply, its markers written as SIGNS."""
    parts, calls = [], 0
    for found in SPAN.finditer(reply.split("R")[0]):
        thought, body, end, answer = found.groups()
        if answer is not None:
            parts.append(Answer(re.sub("[EUQ]", "", answer)))
        elif thought is not None:
            text = re.sub("[UQ]", "", thought)
            kind = Answer if text.startswith("final\n") else Thought
            text = re.sub(r"\A(thought|final)(\n|\Z)", "", text)
            parts.append(kind(text.removesuffix("\n") if kind is Thought else text))
        else:
            body = body.replace("E", "")
            try:
                name, arguments = read_call(body.replace("Q", "\udc22"))
                assert end
                parts.append(called(calls, name, **arguments))
                calls += 1
            except (BrokenCallError, AssertionError):
                parts.append(body.replace("Q", '"'))
    return merged(parts)


pieces = st.sampled_from(
    [*SIGNS, "thought", "final", "a", "\n", "call:", "f", "{", "}"]
)


@relaxed
@given(
    reply=st.lists(pieces, max_size=24),
    chunk_ends=st.lists(st.integers(0, 40), max_size=6),
    hidden=st.sampled_from(["", "<turn|>", "<|image|>", "<tool_response|>"]),
)
def test_any_reply_is_what_a_plain_reading_says(marked, reply, chunk_ends, hidden):
    tokenizer = marked["byte_level"]
    ids = tokenizer.encode(hidden.join(reply))
    parts = read(tokenizer, ids, chunk_ends)
    expected = plainly("".join(SIGNS.get(piece, piece) for piece in reply))
    assert [p.text if isinstance(p, Malformed) else p for p in parts] == expected
    texts = [part.text for part in parts if not isinstance(part, Call)]
    assert not set("".join(texts)) & set("<|>")


@relaxed
@given(
    ids=st.lists(st.integers(-2, 430), max_size=60),
    chunk_ends=st.lists(st.integers(0, 60), max_size=8),
)
def test_any_tokens_are_read_alike_however_split(marked, ids, chunk_ends):
    for tokenizer in marked.values():
        assert read(tokenizer, ids, chunk_ends) == read(tokenizer, ids)


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(text=st.text(max_size=20), chunk_ends=st.lists(st.integers(0, 40), max_size=4))
def test_without_markers_a_reply_is_its_tokens_decoded(loaded, name, text, chunk_ends):
    tokenizer = loaded[name]
    ids = tokenizer.encode(f"<|channel>thought\n{text}<channel|><turn|>hello")
    said = tokenizer.decode(ids)
    assert read(tokenizer, ids, chunk_ends) == ([Answer(said)] if said else [])


@pytest.mark.parametrize(
    ("prompt", "reply", "parts"),
    [
        ("<|turn>model\n", "thought\na", [Answer("thought\na")]),
        ("<|turn>model\n<|channel>thought\n<channel|>", "a", [Answer("a")]),
        ("<tool_response|><|channel>thought\n", "a<channel|>b",
         [Thought("a"), Answer("b")]),
        ("<|turn>model\n<|channel>thou", "ght\na\n<channel|>b",
         [Thought("a"), Answer("b")]),
        ("<|channel>thought\nso", " far<channel|>b", [Thought(" far"), Answer("b")]),
        ('<|tool_call>call:f{a:<|"|>b', 'c<|"|>}<tool_call|>', [called(a="bc")]),
        ("<|tool_call>call:f{}<tool_call|>", "a", [Answer("a")]),
        # a user's text cannot open one
        ("<|turn>user\n<|channel>thought\n<turn|>\n<|turn>model\n", "a", [Answer("a")]),
        ("<|channel>thought\n<tool_response|>", "a", [Answer("a")]),
    ],
)  # fmt: skip
def test_what_the_prompt_left_open_goes_on(marked, prompt, reply, parts):
    tokenizer = marked["byte_level"]
    before, ids = tokenizer.encode(prompt), tokenizer.encode(reply)
    for cut in range(len(ids) + 1):
        assert read(tokenizer, ids, [cut], before) == parts


def test_a_character_may_begin_in_the_prompt(marked):
    ids = marked["byte_level"].encode("<|channel>thought\n🎉")
    assert read(marked["byte_level"], ids[-1:], (), ids[:-1]) == [Thought("🎉")]


def written(value) -> str:
    """A value as templates write it into a prompt, QUOTE for a quote token."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        pairs = (f"{key}:{written(item)}" for key, item in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


@relaxed
@given(
    arguments=st.dictionaries(keys, values, max_size=4),
    name=st.from_regex(r"[A-Za-z0-9_./-]{1,20}", fullmatch=True),
    chunk_ends=st.lists(st.integers(0, 300), max_size=5),
)
def test_any_call_is_read_as_it_was_meant(marked, arguments, name, chunk_ends):
    tokenizer = marked["byte_level"]
    begin, end, quote = tokenizer.encode('<|tool_call><tool_call|><|"|>')
    texts = f"call:{name}{written(arguments)}".split(QUOTE)
    body = [i for text in texts for i in (*ordinary(tokenizer, text), quote)][:-1]
    ids = [begin, *body, end]
    assert read(tokenizer, ids, chunk_ends) == [Call(name, arguments, "call_0")]


def test_a_long_reply_takes_linear_time(marked, clock):
    tokenizer = marked["byte_level"]
    (begin,) = tokenizer.encode("<|tool_call>")
    (bracket,) = tokenizer.encode("[")
    with clock(2):
        parts = read(tokenizer, [begin, *[bracket] * 100_000], range(0, 10**5, 32))
    assert parts == [Malformed("[" * 100_000, "it does not end")]


def test_the_message_renders_as_the_reply_was_written(marked):
    tokenizer = marked["byte_level"]
    template = ChatTemplate(LIKE_GEMMA.read_text(encoding="utf-8"), "here")
    for reply in (
        "<|channel>thought\nhm\n<channel|><|tool_call>call:f{a:1}<tool_call|>",
        '<|tool_call>call:f{}<tool_call|><|tool_call>call:g{b:<|"|>é<|"|>}<tool_call|>',
        f"<|tool_call>call:f{{a:{'[' * 63}{']' * 63}}}<tool_call|>",
    ):
        parts = read(tokenizer, tokenizer.encode(reply))
        messages = [{"role": "user", "content": "hi"}, reply_message(parts)]
        rendered = template.render(messages, variables={"enable_thinking": True})
        assert rendered.endswith(f"<|turn>model\n{reply}<|tool_response>")


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ("<think>\nhm\n</think>\nYes", [Thought("hm"), Answer("Yes")]),
        (" \n<think>hm</think>", [Thought("hm")]),
        ("<think>a</b></think>c<think>d", [Thought("a</b>"), Answer("c<think>d")]),
        ("<think>not ended\n", [Thought("not ended")]),
        ("<thing>", [Answer("<thing>")]),
        ("  <thi", [Answer("  <thi")]),
        ("a <think>b</think>", [Answer("a <think>b</think>")]),
    ],
)
def test_a_first_think_in_ordinary_tokens_is_a_thought(marked, said, parts):
    for tokenizer in marked.values():
        for size in (1, 2, 3, 100):
            parser, found = ReplyParser(tokenizer), []
            ids = tokenizer.encode(said)
            for start in range(0, len(ids), size):
                found += parser.add(ids[start : start + size])
            assert merged([*found, *parser.finish()]) == parts


def test_parts_become_the_message_of_the_history():
    function = {"name": "f", "arguments": {"a": [1]}}
    calls = [{"id": "call_0", "type": "function", "function": function}]
    broken = Malformed("call:f{", "it does not end")
    for parts, said in (
        ([], {"content": ""}),
        (
            [Thought("h"), Thought("m"), Answer("so"), Answer(" it is")],
            {"content": "so it is", "reasoning_content": "hm"},
        ),
        ([called(a=[1])], {"content": None, "tool_calls": calls}),
        ([Answer("ok"), called(a=[1])], {"content": "ok", "tool_calls": calls}),
        ([Answer("a "), broken], {"content": "a call:f{"}),
    ):
        assert reply_message(parts) == {"role": "assistant"} | said
