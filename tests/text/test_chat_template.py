"""What chat templates can do, and what the sandbox refuses."""

import enum

import pytest

from mlx_dgemma.errors import SettingsError, TokenizerError
from mlx_dgemma.text.chat import ChatTemplate

USER = {"role": "user", "content": "hi"}


def refusal(kind: type[Exception], call, *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def render(source: str, messages=(USER,), **kwargs) -> str:
    return ChatTemplate(source, "here.jinja").render(list(messages), **kwargs)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if true %}\nx\n{% endif %}\ny", "x\ny"),
        ("  {% if true %}x{% endif %}", "x"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ {'b':1,'a':2}|tojson(separators=(',', ':'),sort_keys=true) }}",
         '{"a":2,"b":1}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
         "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}", "023"),
        ("a{% generation %}b{% set c = 1 %}{% endgeneration %}{{ c is defined }}",
         "abFalse"),
        ("{% set ns = namespace(n=0, self=1) %}{% set ns.n = 5 %}{{ ns.n }}", "5"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{{ enable_thinking is defined }}{{ enable_thinking }}", "TrueFalse"),
        ("{{ missing }}", ""),
    ],
)  # fmt: skip
def test_templates_are_set_up_as_expected(source, text):
    assert render(source) == text


def test_tools_and_named_tokens_reach_the_template():
    tools = ({"function": {"name": "f"}},)
    assert render("{{ tools[0].function.name }}", tools=tools) == "f"
    assert render("{{ bos_token }}", named_tokens={"bos_token": "<s>"}) == "<s>"


def test_empty_keys_of_messages_are_left_out():
    source = "{% for m in messages %}{{ 'content' in m }}{% endfor %}"
    assert render(source, [USER, {"role": "tool", "content": None}]) == "TrueFalse"


def test_reasoning_is_found_under_every_name():
    source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert render(source, [{**USER, name: "so"}]) == "soso"
    assert render(source, [{**USER, "reasoning": None}]) == ""


def test_an_enumeration_is_its_text():
    class Role(enum.StrEnum):
        USER = "user"

    source = "{{ messages[0].role }}{{ messages[0].role.name is defined }}"
    assert render(source, [{"role": Role.USER, "content": ""}]) == "userFalse"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('no\nsuch role') }}", "no such role"),
        ("{{ missing.key }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ [0] * 10**16 }}", "MemoryError"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ strftime_now(3) }}", "must be str"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__ }}{{ ''.__class__.__base__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "cannot hold '_x'"),
        ("{{ namespace(_x=1) }}", "cannot hold '_x'"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages | tojson(indent={}) }}", "dict"),
    ],
)
def test_a_template_that_fails_is_one_line(source, why):
    message = refusal(TokenizerError, render, source)
    assert message.startswith("here.jinja: refused the messages: ")
    assert why in message


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ a", "{% nope %}", "{% generation %}", "{{ a | nope }}"]
)
def test_a_template_that_cannot_be_parsed_is_one_line(source):
    message = refusal(TokenizerError, ChatTemplate, source, "here.jinja")
    assert message.startswith("here.jinja: line 1: ")


def test_messages_must_be_objects():
    message = refusal(SettingsError, render, "x", ["hi"])
    assert message == 'a message must be {"role", "content"}'


def test_a_template_that_python_cannot_compile_is_one_line():
    message = refusal(TokenizerError, ChatTemplate, "{% break %}", "here.jinja")
    assert message.startswith("here.jinja: 'break' outside loop")
