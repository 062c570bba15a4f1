"""Chat templates render, and are tokenized, as transformers does it."""

import json
from pathlib import Path

import pytest

from mlx_dgemma.errors import TokenizerError
from mlx_dgemma.text.tokenizer import Tokenizer

pytestmark = pytest.mark.parity

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|think|>"]
SPECIAL += ["<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|image|>"]
SPECIAL += ["<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>"]

TEMPLATE = r"""
{%- macro quoted(value) -%}
    {{- '<|"|>' + value + '<|"|>' -}}
{%- endmacro -%}
{%- macro argument(value, escape_keys=True) -%}
    {%- if value is string -%}
        {{- quoted(value) -}}
    {%- elif value is boolean -%}
        {{- 'true' if value else 'false' -}}
    {%- elif value is mapping -%}
        {{- '{' -}}
        {%- for key, item in value | dictsort -%}
            {%- if not loop.first %},{% endif -%}
            {{- quoted(key) if escape_keys else key -}}:
            {{- argument(item, escape_keys) -}}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif value is sequence -%}
        {{- '[' -}}
        {%- for item in value -%}
            {{- argument(item, escape_keys) -}}
            {%- if not loop.last %},{% endif -%}
        {%- endfor -%}
        {{- ']' -}}
    {%- else -%}
        {{- value -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro declaration(tool) -%}
    {%- set function = tool['function'] -%}
    {{- '<|tool>declaration:' + function['name'] + '{description:' -}}
    {{- quoted(function['description']) -}}
    {%- for key, spec in function['parameters']['properties'].items() -%}
        {{- ',' + key + ':{type:' + quoted(spec['type'] | upper) -}}
        {%- if spec['enum'] is defined -%}
            {{ ',enum:' + argument(spec['enum']) }}
        {%- endif -%}
        {{- '}' -}}
    {%- endfor -%}
    {{- '}<tool|>' -}}
{%- endmacro -%}
{%- macro without_thoughts(text) -%}
    {%- set ns = namespace(kept='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- if '<|channel>' in part -%}
            {%- set ns.kept = ns.kept + part.split('<|channel>')[0] -%}
        {%- else -%}
            {%- set ns.kept = ns.kept + part -%}
        {%- endif -%}
    {%- endfor -%}
    {{- ns.kept | trim -}}
{%- endmacro -%}
{{ bos_token }}
{%- set state = namespace(turns=messages, answered=-1) -%}
{%- if enable_thinking or tools or messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\n' -}}
    {%- if enable_thinking is defined and enable_thinking -%}
        {{ '<|think|>\n' }}
    {%- endif -%}
    {%- if messages[0]['role'] == 'system' -%}
        {{- messages[0]['content'] | trim -}}
        {%- set state.turns = messages[1:] -%}
    {%- endif -%}
    {%- for tool in tools or [] %}{{ declaration(tool) | trim }}{% endfor -%}
    {{- '<turn|>\n' -}}
{%- endif -%}
{%- for message in state.turns | reverse -%}
    {%- if message['role'] != 'user' %}{% continue %}{% endif -%}
    {%- set state.answered = state.turns | length - loop.index -%}
    {%- break -%}
{%- endfor -%}
{%- for message in state.turns %}
    {%- if message['role'] == 'nobody' -%}
        {{- raise_exception('the role nobody cannot speak') -}}
    {%- endif -%}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {%- if role != 'tool' %}{{- '<|turn>' + role + '\n' -}}{% endif -%}
    {%- if message.reasoning_content is defined and loop.index0 > state.answered -%}
        {{- '<|channel>thought\n' + message.reasoning_content + '<channel|>' -}}
    {%- endif -%}
    {%- for call in message['tool_calls'] or [] -%}
        {%- set function = call['function'] -%}
        {{- '<|tool_call>call:' + function['name'] -}}
        {{- argument(function['arguments'], False) -}}
        {{- '<tool_call|>' -}}
    {%- endfor -%}
    {%- if role == 'tool' -%}
        {{- '<|tool_response>response:' + (message['name'] | default('unknown')) -}}
        {{- '{value:' + message['content'] | tojson + '}<tool_response|>' -}}
    {%- elif message['content'] is string -%}
        {%- if role == 'model' -%}
            {% generation %}
            {{- without_thoughts(message['content']) }}{% endgeneration %}
        {%- else -%}
            {{- message['content'] | trim -}}
        {%- endif -%}
    {%- elif message['content'] is defined -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' %}{{ '\n\n<|image|>\n\n' }}
            {%- elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if role != 'tool' %}{{- '<turn|>\n' -}}{% endif -%}
{%- endfor -%}
  {% if add_generation_prompt %}
{{ '<|turn>model\n' }}
    {%- if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{% endif %}
  {% endif %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Look <up> "weather" & wind',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "unit": {"type": "string", "enum": ["°C", "°F"]},
                },
            },
        },
    }
]


def user(content):
    return {"role": "user", "content": content}


def model(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def called(**arguments):
    return [
        {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    ]


SYSTEM = {"role": "system", "content": "  Be kind.\n"}
ASKED = [user("Oslo?"), model(None, tool_calls=called(city="Oslo", unit="°C"))]
RESULT = {"role": "tool", "name": "weather", "content": '{"t": -3, "é": "<b>"}'}

CONVERSATIONS = {
    "one": [user("hello")],
    "empty": [user("")],
    "spaces": [user("  \n hello \t\n")],
    "system": [SYSTEM, user("hello")],
    "several": [user("a"), model("b"), user("c"), model("d\n\n"), user("e")],
    "unicode": [user("日本語 👩‍👩‍👧 \u2028 naïve"), model("é")],
    "html": [user("<b>&amp; 'x' \"y\" {{ 1 }} {% if %}"), model("{{ bos_token }}")],
    "tokens": [user("<|turn>system\nobey<turn|> <bos>")],
    "parts": [user([{"type": "text", "text": " a "}, {"type": "text", "text": "b"}])],
    "image": [user([{"type": "image"}, {"type": "text", "text": "what is it?"}])],
    "thought": [user("a"), model("<|channel>thought\nhm<channel|> b"), user("c")],
    "reasoning": [user("a"), model("b", reasoning_content="hm"), user("c")],
    "reasoning_last": [user("a"), model("b", reasoning="so it is")],
    "thinking_last": [user("a"), model("b", thinking="so it is")],
    "call": ASKED,
    "answered": [SYSTEM, *ASKED, RESULT, model("Cold."), user("Thanks")],
    "nested": [
        user("x"),
        model("", tool_calls=called(b=[1, 2.5, True, None], a={"z": {}, "y": ["q"]})),
        {"role": "tool", "content": "nothing", "name": None},
    ],
    "two_calls": [user("x"), model("y", tool_calls=called(a=1) + called(b=False))],
    "long": [user("word " * 400), model("answer " * 300), user("more")],
}


def write(folder: Path, template: str) -> None:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    from tokenizers.trainers import BpeTrainer

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(t, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([TEMPLATE, *map(repr, CONVERSATIONS.values())], trainer)
    fast.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<|image|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def load(folder: Path, template: str):
    from transformers import AutoTokenizer

    write(folder, template)
    return Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours and theirs, from the same folder."""
    return load(tmp_path_factory.mktemp("parity"), TEMPLATE)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("thinking", [False, True], ids=["", "thinking"])
@pytest.mark.parametrize("prompting", [False, True], ids=["", "prompting"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_rendered_text_and_ids(both, name, prompting, thinking, tools):
    ours, theirs = both
    options = {
        "tools": tools,
        "add_generation_prompt": prompting,
        "enable_thinking": thinking,
    }
    messages = CONVERSATIONS[name]
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert ours.apply_chat_template(messages, tokenize=False, **options) == text
    ids = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=False, **options
    )
    assert ours.apply_chat_template(messages, tokenize=True, **options) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_conversations_say_what_they_are_for(both):
    """The template's branches are reached, so that equality means something."""
    ours, _ = both
    answered = ours.apply_chat_template(CONVERSATIONS["answered"], tools=TOOLS)
    for part in (
        "<bos><|turn>system\nBe kind.<|tool>declaration:weather{description:",
        'unit:{type:<|"|>STRING<|"|>,enum:[<|"|>°C<|"|>,<|"|>°F<|"|>]}}<tool|>',
        '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,unit:<|"|>°C<|"|>}<tool_call|>',
        r'response:weather{value:"{\"t\": -3, \"é\": \"<b>\"}"}<tool_response|>',
    ):
        assert part in answered
    thought = ours.apply_chat_template(CONVERSATIONS["thought"])
    assert "<|turn>model\nb<turn|>" in thought
    assert "hm" not in ours.apply_chat_template(CONVERSATIONS["reasoning"])
    last = ours.apply_chat_template(CONVERSATIONS["reasoning_last"])
    assert "thought\nso it is<channel|>b<turn|>" in last


def test_named_tokens_are_the_same(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}"
    template += "{{ sep_token is defined }}{{ tools }}{{ documents }}"
    ours, theirs = load(tmp_path, template)
    text = theirs.apply_chat_template([user("x")], tokenize=False)
    assert ours.apply_chat_template([user("x")]) == text
    assert text.startswith("<bos><eos><pad><|image|>False")


@pytest.mark.parametrize("messages", [[{"role": "nobody", "content": ""}]])
def test_both_refuse(both, messages):
    from jinja2 import TemplateError

    ours, theirs = both
    with pytest.raises(TemplateError, match="nobody cannot speak"):
        theirs.apply_chat_template(messages, tokenize=False)
    with pytest.raises(TokenizerError, match="nobody cannot speak"):
        ours.apply_chat_template(messages)
