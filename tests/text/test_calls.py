"""The grammar of calls: what is read, and how garbage is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.text.calls import BrokenCallError, read_call

relaxed = settings(deadline=None, max_examples=30)
letters = st.characters(exclude_categories=["Cs"])
keys = st.text(letters, min_size=1, max_size=8).filter(
    lambda key: not set(key) & set(':,{}[]"') and key == key.strip()
)
looks = st.sampled_from(['<|"|>', "<tool_call|>", '"', "}", "<|channel>thought\n"])
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(letters, max_size=8),
        looks,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=8,
)


@relaxed
@given(
    arguments=st.dictionaries(st.text(letters, max_size=8), values, max_size=4),
    escaped=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_json_is_read_too(arguments, escaped, indent):
    text = json.dumps(arguments, ensure_ascii=escaped, indent=indent)
    assert read_call(f"call:f{text}") == ("f", arguments)
    whole = json.dumps({"name": "f", "arguments": arguments}, indent=indent)
    assert read_call(whole) == ("f", arguments)


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("call:f{}", {}),
        (" call: f \n{ a : 1 , b : [ ] } ", {"a": 1, "b": []}),
        ('call:f{a:<|"|>x<|"|>}', {"a": "x"}),
        ('call:f{"a":"x\ny",b:"\\u00e9\\n"}', {"a": "x\ny", "b": "é\n"}),
        ("call:f{a:None,b:null,c:-0.5e2}", {"a": None, "b": None, "c": -50.0}),
        ('{"name":"f"}', {}),
        *(
            (f'{{"name":"f","{key}":{{"a":1}}}}', {"a": 1})
            for key in ("arguments", "parameters", "args")
        ),
        ('{"name":"f","arguments":"{\\"a\\": 1}"}', {"a": 1}),
        ('{"type":"function","function":{"name":"f","parameters":{"a":1}}}', {"a": 1}),
        ("{'name': 'f', 'arguments': {'a': True}}", {"a": True}),
        ("call:f{a:'it\\'s\\n',b:1}", {"a": "it's\n", "b": 1}),
        ("f(a=1, b='x', c=[{'d': None}])", {"a": 1, "b": "x", "c": [{"d": None}]}),
        ("f()", {}),
        ('call:f{a:\udc22<|"|>\udc22}', {"a": '<|"|>'}),
        (f"call:f{{a:{'[' * 63}{']' * 63}}}", {"a": json.loads("[" * 63 + "]" * 63)}),
    ],
)
def test_spellings_of_a_call(body, arguments):
    assert read_call(body) == ("f", arguments)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("", 'it begins with neither "call:" nor "{"'),
        ("call:f", "it has no arguments in {}"),
        ("call:{}", "it has no name"),
        ("call:a b{}", "its name is not one"),
        (f"call:{'a' * 129}{{}}", "its name is not one"),
        ('{"arguments":{}}', "it has no name"),
        ('{"name":["f"]}', "its name is not one"),
        ('{"name":"f","arguments":"x"}', "its arguments are not an object"),
        ('{"name":"f","at":"x"}', "it has 'at' beside name and arguments"),
        ('{"name":"f","args":{},"arguments":{}}', "it has arguments twice"),
        ("f(1)", "character 2: a key is missing"),
        ("f(a=1, b)", 'character 8: "=" is missing'),
        ("call:f{a:'x}", "character 9: a text does not end"),
        ("call:f{a:1", 'character 10: "," or "}" is missing'),
        ("call:f{a:1}}", "character 11: something follows its arguments"),
        ("call:f{a:[1}", 'character 11: "," or "]" is missing'),
        ("call:f{a}", 'character 8: ":" is missing'),
        ("call:f{:1}", "character 7: a key is missing"),
        ("call:f{a:1,}", "character 11: a key is missing"),
        ("call:f{a:1,a:2}", "character 11: a key stands twice"),
        ("call:f{a:}", "character 9: a value is missing"),
        ("call:f{a:[,]}", "character 10: a value is missing"),
        ("call:f{a:Oslo}", "character 9: neither a value nor a quoted text"),
        ("call:f{a:01}", 'character 10: "," or "}" is missing'),
        ("call:f{a:1e999}", "character 9: a number is too large"),
        (f"call:f{{a:{'9' * 401}}}", "character 9: a number is too long"),
        ('call:f{a:<|"|>b}', "character 9: a text does not end"),
        ('call:f{a:"\\x"}', "character 9: a text does not end, or holds a wrong"),
        ('call:f{a:"\\ud800"}', "character 9: a text holds a quote of another kind"),
        ('call:f{a:"b\udc22c"}', "character 9: a text holds a quote of another kind"),
        (f"call:f{'{a:' * 65}", "character 198: nested deeper than 64"),
        (f"call:f{{a:{'[' * 64}", "character 72: nested deeper than 64"),
    ],
)
def test_a_broken_call_says_why(body, why):
    with pytest.raises(BrokenCallError) as caught:
        read_call(body)
    assert str(caught.value).startswith(why)


@pytest.mark.parametrize(
    "body",
    [
        "call:f" + "{a:" * 10_000,
        "call:f{a:" + "[" * 2**20,
        "{" * 2**20,
        "call:f{a:" + "1" * 2**20 + "}",
        "call:f{" + " " * 2**20,
        "call:f{" + "a " * 2**19,
        'call:f{a:"' + "\\" * 2**20,
        'call:f{a:<|"|>' + '<|"|' * 2**18,
        "call:" + "a" * 2**20 + "{}",
    ],
    ids=lambda body: body[:12],
)
def test_garbage_is_refused_quickly(body, clock):
    with clock(0.3), pytest.raises(BrokenCallError):
        read_call(body)
