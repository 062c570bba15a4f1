"""What chat templates can do, and what the sandbox refuses."""

import enum
import time

import pytest
from toy_tokenizers import refusal

from mlx_dgemma.errors import SettingsError, TokenizerError
from mlx_dgemma.text import sandbox
from mlx_dgemma.text.template import ChatTemplate

USER = {"role": "user", "content": "hi"}


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
        ("{{ add_generation_prompt }}{{ missing }}", "False"),
    ],
)  # fmt: skip
def test_templates_are_set_up_as_expected(source, text):
    assert render(source) == text


def test_tools_and_variables_reach_the_template():
    tools = ({"function": {"name": "f"}},)
    assert render("{{ tools[0].function.name }}", tools=tools) == "f"
    given = {"bos_token": "<s>", "documents": [1], "messages": "never these"}
    source = "{{ bos_token }}{{ documents[0] }}{{ messages[0].content }}"
    assert render(source, variables=given) == "<s>1hi"


def test_messages_lose_empty_keys_and_gain_names_of_reasoning():
    source = "{% for m in messages %}{{ 'content' in m }}{% endfor %}"
    assert render(source, [USER, {"role": "tool", "content": None}]) == "TrueFalse"
    source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert render(source, [{**USER, name: "so"}]) == "soso"
    assert render(source, [{**USER, "reasoning": None}]) == ""
    role = enum.StrEnum("Role", ["USER"]).USER
    source = "{{ messages[0].role }}{{ messages[0].role.name is defined }}"
    assert render(source, [{"role": role}]) == "userFalse"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('no\nsuch role') }}", "no such role"),
        ("{{ missing.key }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ [0] * 10**16 }}", "it makes more than 33,554,432"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
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


def test_a_template_that_cannot_be_parsed_is_one_line():
    for source in ("{% if %}", "{{ a", "{% nope %}", "{% generation %}", "{{ a | b }}"):
        message = refusal(TokenizerError, ChatTemplate, source, "here.jinja")
        assert message.startswith("here.jinja: line 1: ")
    message = refusal(TokenizerError, ChatTemplate, "{% break %}", "here.jinja")
    assert message.startswith("here.jinja: 'break' outside loop")


def test_messages_must_be_objects():
    message = refusal(SettingsError, render, "x", ["hi"])
    assert message == 'a message must be {"role", "content"}'
    message = refusal(SettingsError, render, "x", variables={"a": {1}})
    assert message.startswith("a template variable holds a set; only text,")


TURNS = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"


def test_the_final_message_is_left_open():
    parts = [{"type": "text", "text": "so"}, {"type": "image"}]
    for source, content, text in (
        (TURNS, "so", "[hi][so"),
        (TURNS, " so far ", "[hi][so far"),
        (TURNS.replace(" | trim", ""), " so far ", "[hi][ so far "),
        (TURNS, "", "[hi]["),
        (TURNS.replace("content | trim", "content[0].text"), parts, "[][so"),
    ):
        messages = [USER, {"role": "assistant", "content": content}]
        assert render(source, messages, continue_final_message=True) == text


def test_what_cannot_be_continued_is_refused():
    options = {"continue_final_message": True}
    for messages in ([], [{"role": "assistant"}], [{"role": "user", "content": []}]):
        message = refusal(SettingsError, render, TURNS, messages, **options)
        assert message == "continue_final_message: the last message has no text"
    for source in ("{{ messages[0].role }}", "{{ messages[0].content[2:] }}"):
        message = refusal(TokenizerError, render, source, [USER], **options)
        assert "changes the text of the final message" in message
    both = {**options, "add_generation_prompt": True}
    assert "exclude each other" in refusal(SettingsError, render, TURNS, **both)


@pytest.mark.parametrize(
    "body",
    [
        "{{ 9**(9**9) }}",
        "{{ 'x' * 10**9 }}",
        "{{ 'x' | center(10**9) }}",
        "{{ 'x'.center(10**9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ ('x' * 10**6).replace('x', 'x' * 10**6) }}",
        "{{ ('x' * 10**6) | replace('x', 'x' * 10**6) }}",
        "{% set n = namespace(x='x') %}{% for i in range(99999) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(99999) %}"
        "{% set n.x = n.x + n.x %}{% endfor %}",
        "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ lipsum(10**5) }}",
        "{{ ['a' * 10**6] * 10**6 }}",
        "{{ ['a' * 10**6] * 10**6 ~ 'b' }}",
        "{{ (['a' * 10**6] * 10**6) | join }}",
        "{{ ','.join(['a' * 10**6] * 10**6) }}",
        "{{ '%s' % (['a' * 10**6] * 10**6) }}",
        "{% set n = namespace(x=['x']) %}{% for i in range(99) %}"
        "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
        "{{ messages | tojson(indent=10**8) }}",
        "{{ ('\t' * 10**6).expandtabs(10**6) }}",
        "{{ ('\n' * 10**6) | indent(10**6) }}",
        "{{ cycler() }}",
    ],
)
def test_work_and_output_are_limited_and_nothing_runs_while_it_is_compiled(
    body, monkeypatch
):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1.0)
    started = time.process_time()
    idle = ChatTemplate("{% if false %}" + body + "{% endif %}fine", "a.jinja")
    assert idle.render([{"role": "user", "content": "1"}]) == "fine"
    with pytest.raises(TokenizerError, match=r"^a\.jinja: refused the messages: "):
        ChatTemplate(body, "a.jinja").render([{"role": "user", "content": "1"}])
    assert time.process_time() - started < 4


def test_limits_leave_a_long_conversation_alone():
    template = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 10_000}] * 2_000
    assert len(ChatTemplate(template, "a.jinja").render(messages)) == 2_000 * 10_006
