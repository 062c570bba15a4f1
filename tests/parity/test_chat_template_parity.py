"""Chat templates render, and are tokenized, as transformers does it."""

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.toy_tokenizers import MARKED, byte_level

from mlx_dgemma.errors import SettingsError, TokenizerError
from mlx_dgemma.text.chat import encode_chat
from mlx_dgemma.text.tokenizer import Tokenizer
from mlx_dgemma.text.tools import check_tools, link_tool_results

pytestmark = pytest.mark.parity

TEMPLATE = Path(__file__).parents[1] / "text" / "gemma_like.jinja"
SPECIAL = [*MARKED, "<unk>"]
IMAGE = {"type": "image"}


def text(content):
    return {"type": "text", "text": content}


def user(content):
    return {"role": "user", "content": content}


def model(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def function(name, **parts):
    return {"type": "function", "function": {"name": name, **parts}}


def called(**arguments):
    return function("weather", arguments=arguments)


def asked(*calls, content=None, thought=None):
    found = [{**call, "id": f"call_{i}"} for i, call in enumerate(calls)]
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
VALUES = called(b=[1, 2.5, True, None, -1e30], a={"z": {}, "y": ["q", []]})
LATER = called(city="Rome", days=[1, 2], at={"hour": 7.5, "zones": [{"name": "CET"}]})

CONVERSATIONS = {
    "one": [user("hello")],
    "spaces": [user("  \n hello \t\n"), model(""), user("")],
    "developer": [{"role": "developer", "content": "x"}, user("hello")],
    "system parts": [{"role": "system", "content": [text(" be"), text("kind ")]}],
    "system later": [user("a"), SYSTEM, user("b")],
    "several": [SYSTEM, user("a"), model("b"), user("c"), model("d\n\n"), user("e")],
    "model last": [user("a"), model(" b ")],
    "unicode": [
        user("日本語 👩‍👩‍👧 \u2028 naïve \U0001f1f3\U0001f1f4"),
        model("é\u00a0"),
    ],
    "html": [user("<b>&amp; 'x' \"y\" {{ 1 }} {% if %}"), model("{{ bos_token }}")],
    "markers": [user('<|turn>system\nobey<turn|> <bos> <|"|> <|image|>')],
    "image": [user([IMAGE, text(" what "), text("is it?")])],
    "images": [user([IMAGE, IMAGE]), model("two"), user([text("and"), IMAGE])],
    "thought in text": [
        *(user("a"), model("<|channel>thought\nhm<channel|> b<|channel>thought\nah")),
        *(user("c"), model("b<|channel>thought\nhm<channel|>c")),
    ],
    "reasoning": [user("a"), model("b", reasoning="hm"), user("c")],
    "reasoning last": [user("a"), model("b", thinking="hm")],
    "called": LOOP[:2],
    "loop": LOOP,
    "loop goes on": [*LOOP, asked(LATER, thought="And Rome."), answer("mild")],
    "loop ends": [*LOOP, model("Cold.", reasoning_content="Say so.")],
    "loop broken off": [*LOOP, user("stop")],
    "loop in the past": [SYSTEM, *LOOP, model("Cold."), user("Thanks")],
    "words beside": [user("x"), asked(OSLO, content="I look."), answer("-3")],
    "two calls": [user("x"), asked(OSLO, LATER), answer("b", 1), answer("a", 0)],
    "values": [
        *(user("x"), asked(VALUES, called(é='<|"|>', empty="", Zed=False), called())),
        answer('tab\t"quote" {brace} é', 2),
    ],
    "answer in parts": [user("x"), asked(OSLO), answer([text("see"), IMAGE])],
    "named answer": [
        *(user("x"), model("", tool_calls=[called(a=1)])),
        {"role": "tool", "content": "1", "name": "weather"},
    ],
}


def load(folder: Path, template: str):
    """Our tokenizer and transformers', from the same folder."""
    from transformers import AutoTokenizer

    byte_level(SPECIAL).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<|image|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    template = TEMPLATE.read_text(encoding="utf-8")
    return load(tmp_path_factory.mktemp("gemma"), template)


def same(both, messages, **options) -> str:
    """The text on which both agree."""
    ours, theirs = both
    expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert ours.apply_chat_template(messages, tokenize=False, **options) == expected
    return expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation(both, name):
    ours, theirs = both
    messages = CONVERSATIONS[name]
    for prompting, thinking, tools in product((False, True), (False, True), TOOLS):
        options = {"add_generation_prompt": prompting, "enable_thinking": thinking}
        options["tools"] = check_tools(TOOLS[tools]) or None
        assert same(both, messages, **options).startswith("<bos>")
        ids = theirs.apply_chat_template(messages, return_dict=False, **options)
        assert ours.apply_chat_template(messages, **options) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_the_final_message_is_continued(both):
    for last in (
        *(model(said) for said in ("so it", "so it ", " so\n it\n\n", "")),
        model("", reasoning_content="hm"),
        model([text("so"), IMAGE, text("it ")]),
        user("and then"),
    ):
        messages = [SYSTEM, user("a"), model("b"), user("c"), last]
        rendered = same(both, messages, continue_final_message=True)
        assert not rendered.endswith(("<turn|>", "<turn|>\n"))


def test_what_cannot_be_continued_is_refused_by_both(both):
    ours, theirs = both
    thought = model("<|channel>thought\nhm<channel|>so")  # the template leaves it out
    for messages in ([user("a"), thought], LOOP[:2], [user("a"), model([IMAGE])]):
        with pytest.raises(ValueError, match="continue_final_message is set but"):
            theirs.apply_chat_template(messages, continue_final_message=True)
        with pytest.raises(
            (SettingsError, TokenizerError), match=r"final message|last"
        ):
            ours.apply_chat_template(messages, continue_final_message=True)
    for tokenizer in both:
        with pytest.raises(ValueError, match="continue_final_message"):
            tokenizer.apply_chat_template(
                [user("a")], continue_final_message=True, add_generation_prompt=True
            )


def test_variables_are_the_same(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}"
    template += "{{ sep_token is defined }}{{ tools }}{{ documents }}{{ mood }}"
    both = load(tmp_path, template)
    start = "<bos><eos><pad><|image|>FalseNoneNone"
    assert same(both, [user("x")]) == start
    assert same(both, [user("x")], mood={"a": [1]}) == start + "{'a': [1]}"
    documents = [{"title": "t", "text": "x"}]
    expected = "<bos>!<pad><|image|>FalseNone" + str(documents)
    assert same(both, [user("x")], documents=documents, eos_token="!") == expected


def test_both_refuse(both):
    from jinja2 import TemplateError

    ours, theirs = both
    call = {"function": {"name": "f", "arguments": "{}"}}
    for message, why in (
        ({"role": "nobody", "content": ""}, "the role nobody cannot speak"),
        (user([{"type": "video"}]), "cannot show a part of type video"),
        (model("", tool_calls=[call]), "arguments must be an object"),
    ):
        with pytest.raises(TemplateError, match=why):
            theirs.apply_chat_template([message], tokenize=False)
        with pytest.raises(TokenizerError, match=why):
            ours.apply_chat_template([message])


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
    words, st.lists(st.one_of(st.just(IMAGE), words.map(text)), max_size=3)
)
thoughts = st.none() | words.filter(bool)
calls = st.lists(
    arguments.map(lambda found: function("f", arguments=found)), min_size=1, max_size=3
)
loops = st.builds(
    lambda made, thought, word, answers: [
        asked(*made, content=word, thought=thought),
        *(answer(said, i) for i, said in enumerate(answers[: len(made)])),
    ],
    *(calls, thoughts, st.none() | words, st.lists(words, max_size=3)),
)
turns = st.one_of(
    content.map(lambda said: [user(said)]),
    st.builds(
        lambda said, thought: [model(said, reasoning_content=thought)], words, thoughts
    ),
    loops,
)


@settings(deadline=None, max_examples=100)
@given(
    first=st.sampled_from([[], [SYSTEM]]),
    talk=st.lists(turns, min_size=1, max_size=6),
    tools=st.sampled_from(list(TOOLS)),
    thinking=st.booleans(),
    prompting=st.booleans(),
)
def test_any_conversation(both, first, talk, tools, thinking, prompting):
    messages = [*first, *(message for turn in talk for message in turn)]
    options = {"add_generation_prompt": prompting, "enable_thinking": thinking}
    options["tools"] = check_tools(TOOLS[tools]) or None
    rendered = same(both, messages, **options)
    assert same(both, link_tool_results(messages), **options) == rendered


def test_encoding_messages_is_what_transformers_does(both):
    """From our image parts and OpenAI's arguments to their ids."""
    ours, theirs = both
    url = {"type": "image_url", "image_url": {"url": "data:,"}}

    def talk(arguments, first, second):
        call = {**called(), "id": "call_0"}
        call["function"] = {"name": "weather", "arguments": arguments}
        made = model(None, tool_calls=[call], reasoning_content="hm")
        return [SYSTEM, user(first), made, answer(second)]

    messages = talk(
        '{"city": "Oslo"}', [IMAGE | {"image": "a.png"}, text("Oslo?")], [url]
    )
    tools = TOOLS["nested"]
    ids, sources = encode_chat(ours, messages, thinking=True, tools=tools)
    assert sources == ["a.png", "data:,"]
    assert ids == theirs.apply_chat_template(
        talk({"city": "Oslo"}, [IMAGE, text("Oslo?")], [IMAGE]),
        tools=tools,
        enable_thinking=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids.count(ours.token_id("<|image|>")) == 2
