"""Tools and their answers: what is taken, what is completed, what is refused."""

import copy
import json
from types import MappingProxyType

import pytest
from toy_tokenizers import refusal

from mlx_dgemma.errors import SettingsError
from mlx_dgemma.text.tools import check_tools, link_tool_results

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where", "enum": ["Oslo", "Rome"]},
        "days": {"type": ["array", "null"], "items": {"type": "integer"}},
        "unit": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "at": {
            "type": "object",
            "properties": {"hour": {"type": "number", "minimum": 0.5}},
            "required": ["hour"],
        },
    },
    "required": ["city"],
    "additionalProperties": False,
}
USER = {"role": "user", "content": "hi"}


def tool(name="f", **function):
    return {"type": "function", "function": {"name": name, **function}}


def call(name="f", arguments=None, **keys):
    return tool(name, arguments=arguments or {}) | keys


def asked(*calls):
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def answer(**keys):
    return {"role": "tool", "content": "1", **keys}


def circular() -> dict:
    schema = nested(1)
    schema["properties"]["a"] = schema
    return schema


def nested(depth: int) -> dict:
    schema: dict = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_a_good_tool_is_taken_as_it_is():
    tools = [tool("weather", description="Tells it", parameters=SCHEMA, strict=True)]
    before = copy.deepcopy(tools)
    assert check_tools(tools) == before == tools
    assert check_tools([]) == []
    names = ["a", "http.post", "server/tool-1", "_", "9" * 128]
    checked = check_tools([tool(name) for name in names])
    assert [found["function"]["name"] for found in checked] == names


def test_what_a_template_needs_is_filled_in():
    full = tool("f", description="")
    for bare in (tool("f"), tool("f", description=None), tool("f", parameters={})):
        assert check_tools([bare]) == [full]
    proxy = MappingProxyType({"name": "f"})
    frozen = MappingProxyType({"type": "function", "function": proxy})
    assert check_tools((frozen,)) == [full]


def schema(**keys):
    return [tool(parameters=SCHEMA | keys)]


SHAPE = 'it must be {"type": "function", "function": {…}}'
BAD_TOOLS = [
    ("f", "tools is str; it must be a list"),
    ([tool("a")] * 129, "129 tools are too many; at most 128"),
    ([3], f"tool 0: {SHAPE}"),
    ([tool("a"), {"type": "web_search"}], f"tool 1: {SHAPE}"),
    ([{"type": "function", "function": "f"}], f"tool 0: {SHAPE}"),
    ([tool(None)], "tool 0: name is None; letters, digits and"),
    ([tool("")], "tool 0: name is ''"),
    ([tool("f{}<tool|>")], "tool 0: name is 'f{}<tool|>'"),
    ([tool("f\n")], "tool 0: name is 'f\\n'"),
    ([tool("a" * 129)], "tool 0: name is 'aaa"),
    ([tool("a"), tool("b"), tool("a")], "tool 2: there are two called 'a'"),
    ([tool(description=3)], "tool 0: description is int; it must be text"),
    ([tool(parameters=[1])], "tool 0: parameters must be a JSON schema with"),
    (schema(type=None), "tool 0: parameters must be a JSON"),
    (schema(properties=[]), "tool 0: parameters.properties must be an object"),
    (
        schema(properties={"a": "b"}, required=[]),
        "tool 0: parameters.a must be an object",
    ),
    (schema(required="city"), "tool 0: parameters.required must be a list of names"),
    (schema(required=["zip"]), "tool 0: parameters.required names 'zip', not a prop"),
    (schema(items={"required": [1]}), "parameters.items.required must be a list of"),
    ([tool(parameters=nested(32))], "tool 0: nested deeper than 64"),
    ([tool(parameters=nested(50_000))], "tool 0: nested deeper than 64"),
    ([tool(parameters=circular())], "tool 0: nested deeper than 64"),
    ([tool(default={1, 2})], "tool 0: {1, 2} is not JSON"),
    ([tool(default=float("nan"))], "tool 0: nan is not JSON"),
    ([tool(default={3: 1})], "tool 0: the key 3 is not text"),
    ([tool(str(i), description="x" * 2**15) for i in range(8)], "characters; at most"),
]


@pytest.mark.parametrize(("tools", "why"), BAD_TOOLS)
def test_a_bad_tool_is_refused(tools, why, clock):
    with clock(0.5):
        assert why in refusal(SettingsError, check_tools, tools)


# Answers of tools


def test_an_answer_is_named_by_its_call():
    messages = [USER, asked(call("f", id="x"), call("g", id="y"))]
    answers = [answer(tool_call_id="y"), answer(tool_call_id="x")]
    found = link_tool_results([*messages, *answers])
    assert [message["name"] for message in found[2:]] == ["g", "f"]
    assert "name" not in answers[0]
    said = {"role": "assistant", "content": "ho", "tool_calls": None}
    assert link_tool_results([USER, said]) == [USER, said]


def test_an_answer_may_be_named():
    for calls, keys in (
        ([call(id="x")], {"tool_call_id": "x", "name": "f"}),
        ([call(id="x")], {"name": "f"}),
        ([call()], {"name": "f"}),
        ([call()], {"name": "f", "tool_call_id": "unknown"}),
    ):
        messages = link_tool_results([USER, asked(*calls), answer(**keys)])
        assert messages[2]["name"] == "f"


def test_arguments_in_a_text_are_read():
    deep = "[" * 63 + "]" * 63  # as deep as a call may be
    for text in ("{}", "", '{"a": [1, "é"]}', f'{{"a": {deep}}}'):
        message = asked({"id": "x", "function": {"name": "f", "arguments": text}})
        (found,) = link_tool_results([message])
        read = {"name": "f", "arguments": json.loads(text or "{}")}
        assert found["tool_calls"][0]["function"] == read
        assert message["tool_calls"][0]["function"]["arguments"] == text


ASKED = asked(call(id="x"))
NO_CALL = "no call of a tool stands before it"
BAD_MESSAGES = [
    ([answer(name="f")], f"message 0: {NO_CALL}"),
    ([ASKED, USER, answer(tool_call_id="x")], f"message 2: {NO_CALL}"),
    ([ASKED, answer()], "message 1: name is None; give the tool's"),
    ([ASKED, answer(tool_call_id="y")], "message 1: tool_call_id is 'y'; no call bef"),
    ([ASKED, answer(tool_call_id=["x"])], "message 1: tool_call_id is ['x']; no call"),
    (
        [ASKED, answer(tool_call_id="x", name="g")],
        "name is 'g', but its call is of 'f'",
    ),
    ([asked({"name": "f"})], "message 0: tool_calls must be a list of"),
    ([asked(call(id=3))], "message 0: tool_calls must be a list of"),
    ([asked() | {"tool_calls": "f"}], "message 0: tool_calls must be a list of"),
    ([asked(call(arguments="[1]"))], "message 0: the arguments of a call are not"),
    ([asked(call(arguments="[" * 10**5))], "message 0: the arguments of a call"),
    ([asked(call(arguments='{"a": NaN}'))], "message 0: nan is not JSON"),
    ([asked(call(arguments={"a": {1}}))], "message 0: {1} is not JSON"),
    ([asked(call(arguments=json.dumps(nested(32))))], "message 0: nested deeper than"),
]


@pytest.mark.parametrize(("messages", "why"), BAD_MESSAGES)
def test_bad_messages_of_tools_are_refused(messages, why):
    assert why in refusal(SettingsError, link_tool_results, messages)
