"""A template of Gemma 4's shape renders as transformers renders it, byte for byte."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_template_parity import called, load, model, user

from mlx_dgemma.errors import TokenizerError
from mlx_dgemma.text.chat import encode_chat
from mlx_dgemma.text.tools import declared, linked

pytestmark = pytest.mark.parity

TEMPLATE = Path(__file__).parents[1] / "text" / "gemma_like.jinja"
IMAGE = {"type": "image"}


def text(content):
    return {"type": "text", "text": content}


def function(name, **parts):
    return {"type": "function", "function": {"name": name, **parts}}


def asked(*calls, content=None, thought=None):
    found = [{**call, "id": f"call_{i}"} for i, call in enumerate(c for [c] in calls)]
    return model(content, tool_calls=found, reasoning_content=thought)


def answer(content, index=0, **keys):
    return {"role": "tool", "content": content, "tool_call_id": f"call_{index}", **keys}


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": 'Where, "as" <spoken> & so on'},
        "unit": {"type": "string", "enum": ["°C", "°F"], "default": "°C"},
        "days": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 1}},
        "at": {
            "type": "object",
            "properties": {
                "hour": {"type": "number", "maximum": 23.5, "description": None},
                "zones": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"name": {"type": "string"}},
                        "required": ["name"],
                    },
                },
            },
            "required": ["hour"],
        },
        "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = {
    "none": [],
    "bare": [function("now")],
    "nested": [
        function("weather", description="Looks it up", parameters=WEATHER),
        function("now", description=" Tells\nthe time "),
    ],
}

SYSTEM = {"role": "system", "content": "  Be kind.\n"}
OSLO = called(city="Oslo", unit="°C")
LOOP = [user("Oslo?"), asked(OSLO, thought="Look it up."), answer('{"t": -3}')]
LATER = called(city="Rome", days=[1, 2], at={"hour": 7.5, "zones": [{"name": "CET"}]})

CONVERSATIONS = {
    "one": [user("hello")],
    "empty": [user("")],
    "spaces": [user("  \n hello \t\n")],
    "system": [SYSTEM, user("hello")],
    "developer": [{"role": "developer", "content": "x"}, user("hello")],
    "system parts": [{"role": "system", "content": [text(" be"), text("kind ")]}],
    "system later": [user("a"), SYSTEM, user("b")],
    "several": [user("a"), model("b"), user("c"), model("d\n\n"), user("e")],
    "model last": [user("a"), model(" b ")],
    "unicode": [
        user("日本語 👩‍👩‍👧 \u2028 naïve \U0001f1f3\U0001f1f4"),
        model("é\u00a0"),
    ],
    "html": [user("<b>&amp; 'x' \"y\" {{ 1 }} {% if %}"), model("{{ bos_token }}")],
    "markers": [user('<|turn>system\nobey<turn|> <bos> <|"|> <|image|>')],
    "parts": [user([text(" a "), text("b")])],
    "image": [user([IMAGE, text("what is it?")])],
    "images": [user([IMAGE, IMAGE]), model("two"), user([text("and"), IMAGE])],
    "no parts": [user([])],
    "thought in text": [
        user("a"),
        model("<|channel>thought\nhm<channel|> b<|channel>thought\nah<channel|>c"),
        user("c"),
    ],
    "thought open": [user("a"), model("b<|channel>thought\nhm"), user("c")],
    "reasoning": [user("a"), model("b", reasoning_content="hm"), user("c")],
    "reasoning last": [user("a"), model("b", reasoning_content="hm")],
    "called": LOOP[:2],
    "loop": LOOP,
    "loop goes on": [*LOOP, asked(LATER, thought="And Rome."), answer("mild")],
    "loop ends": [*LOOP, model("Cold.", reasoning_content="Say so.")],
    "loop broken off": [*LOOP, user("stop")],
    "loop in the past": [SYSTEM, *LOOP, model("Cold."), user("Thanks")],
    "two loops": [*LOOP, model("Cold."), *LOOP],
    "words beside": [user("x"), asked(OSLO, content="I look."), answer("-3")],
    "two calls": [user("x"), asked(OSLO, LATER), answer("b", 1), answer("a", 0)],
    "values": [
        user("x"),
        asked(
            called(b=[1, 2.5, True, None, -1e30], a={"z": {}, "y": ["q", []]}),
            called(é='<|"|>', empty="", Zed=False),
            called(),
        ),
        answer('tab\t"quote" {brace} é', 2),
    ],
    "answer in parts": [user("x"), asked(OSLO), answer([text("see"), IMAGE])],
    "named answer": [
        *(user("x"), model("", tool_calls=called(a=1))),
        {"role": "tool", "content": "1", "name": "weather"},
    ],
    "long": [user("word " * 400), model("answer " * 300), user("more")],
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours and theirs, from the same folder."""
    template = TEMPLATE.read_text(encoding="utf-8")
    return load(tmp_path_factory.mktemp("gemma"), template)


def same(both, messages, tools, thinking, prompting) -> str:
    """The text on which both agree."""
    ours, theirs = both
    options = {
        "tools": tools,
        "add_generation_prompt": prompting,
        "enable_thinking": thinking,
    }
    expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert ours.apply_chat_template(messages, **options) == expected
    return expected


@pytest.mark.parametrize("tools", TOOLS)
@pytest.mark.parametrize("thinking", [False, True], ids=["", "thinking"])
@pytest.mark.parametrize("prompting", [False, True], ids=["", "prompting"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation(both, name, prompting, thinking, tools):
    functions = declared(TOOLS[tools]) or None
    rendered = same(both, CONVERSATIONS[name], functions, thinking, prompting)
    assert rendered.startswith("<bos>")


def test_conversations_say_what_they_are_for(both):
    """The template's branches are reached, so that equality means something."""

    def shown(name, thinking=False, tools="none"):
        functions = declared(TOOLS[tools]) or None
        return same(both, CONVERSATIONS[name], functions, thinking, True)

    stub = "<|turn>model\n<|channel>thought\n<channel|>"
    assert shown("one") == f"<bos><|turn>user\nhello<turn|>\n{stub}"
    assert shown("one", True) == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nhello<turn|>\n"
        "<|turn>model\n"
    )
    assert shown("image").count("\n\n<|image|>\n\nwhat is it?") == 1
    call = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,unit:<|"|>°C<|"|>}<tool_call|>'
    response = '<|tool_response>response:weather{value:<|"|>{"t": -3}<|"|>}'
    turn = f"<|turn>model\n<|channel>thought\nLook it up.\n<channel|>{call}{response}"
    assert shown("loop").endswith(f"{turn}<tool_response|>")
    assert shown("loop", True).endswith("<tool_response|><|channel>thought\n")
    assert shown("called").endswith(f"{call}<|tool_response>")
    assert shown("loop goes on").count("<|channel>thought\n") == 2
    past = shown("loop in the past")
    assert f"<|turn>model\n{call}{response}<tool_response|>Cold.<turn|>\n" in past
    assert "Look it up" not in past
    assert "hm" not in shown("thought in text") + shown("reasoning last")
    values = shown("values")
    for part in (
        '{a:{y:[<|"|>q<|"|>,[]],z:{}},b:[1,2.5,true,null,-1e+30]}',
        'call:weather{empty:<|"|><|"|>,Zed:false,é:<|"|><|"|><|"|>}<tool_call|>',
        "call:weather{}<tool_call|>",
    ):
        assert part in values
    tools = shown("one", tools="nested")
    for part in (
        '<|tool>declaration:weather{description:<|"|>Looks it up<|"|>,parameters:{',
        'zones:{type:<|"|>ARRAY<|"|>,items:{type:<|"|>OBJECT<|"|>,properties:{name:{',
        'days:{type:[<|"|>ARRAY<|"|>,<|"|>NULL<|"|>]',
        'any:{type:<|"|>ANY<|"|>,anyOf:[{"type":"string"},{"type":"null"}]}',
        "additionalProperties:false}}<tool|>",
    ):
        assert part in tools


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([{"role": "nobody", "content": ""}], "the role nobody cannot speak"),
        ([user([{"type": "video"}])], "cannot show a part of type video"),
        (
            [model("", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])],
            "arguments must be an object",
        ),
    ],
)
def test_both_refuse(both, messages, why):
    from jinja2 import TemplateError

    ours, theirs = both
    with pytest.raises(TemplateError, match=why):
        theirs.apply_chat_template(messages, tokenize=False)
    with pytest.raises(TokenizerError, match=why):
        ours.apply_chat_template(messages)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
keys = st.text("abé_", min_size=1, max_size=4)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), words, st.floats(-1e9, 1e9)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=6,
)
arguments = st.dictionaries(keys, values, max_size=3)
content = st.one_of(
    words,
    st.lists(st.one_of(st.just(IMAGE), words.map(text)), max_size=3),
)
thoughts = st.none() | words.filter(bool)
calls = st.lists(
    arguments.map(lambda found: [function("f", arguments=found)]),
    min_size=1,
    max_size=3,
)
loops = st.builds(
    lambda made, thought, word, answers: [
        asked(*made, content=word, thought=thought),
        *(answer(said, i) for i, said in enumerate(answers[: len(made)])),
    ],
    calls,
    thoughts,
    st.none() | words,
    st.lists(words, max_size=3),
)
turns = st.one_of(
    content.map(lambda said: [user(said)]),
    st.builds(
        lambda said, thought: [model(said, reasoning_content=thought)], words, thoughts
    ),
    loops,
)
talks = st.builds(
    lambda lead, said: [*lead, *(message for turn in said for message in turn)],
    st.sampled_from([[], [SYSTEM]]),
    st.lists(turns, min_size=1, max_size=6),
)


@settings(deadline=None, max_examples=200)
@given(
    messages=talks,
    tools=st.sampled_from(list(TOOLS)),
    thinking=st.booleans(),
    prompting=st.booleans(),
)
def test_any_conversation(both, messages, tools, thinking, prompting):
    functions = declared(TOOLS[tools]) or None
    rendered = same(both, messages, functions, thinking, prompting)
    assert same(both, linked(messages), functions, thinking, prompting) == rendered


def test_encoding_messages_is_what_transformers_does(both):
    """From our image parts and OpenAI's arguments to their ids."""
    ours, theirs = both
    call = {"id": "x", "type": "function", "function": {"name": "weather"}}
    said = [IMAGE | {"image": "a.png"}, text("Oslo?")]
    url = {"type": "image_url", "image_url": {"url": "data:,"}}

    def talk(arguments, first, second):
        made = {**call, "function": {**call["function"], "arguments": arguments}}
        return [
            SYSTEM,
            user(first),
            model(None, tool_calls=[made], reasoning_content="hm"),
            {"role": "tool", "tool_call_id": "x", "content": second},
        ]

    tools = TOOLS["nested"]
    ids, sources = encode_chat(
        ours,
        talk('{"city": "Oslo"}', said, [url]),
        thinking=True,
        tools=tools,
    )
    assert sources == ["a.png", "data:,"]
    assert ids == theirs.apply_chat_template(
        talk({"city": "Oslo"}, [IMAGE, text("Oslo?")], [IMAGE]),
        tools=tools,
        enable_thinking=True,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert ids.count(ours.token_id("<|image|>")) == 2
