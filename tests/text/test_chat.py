"""Prompts of every shape: text, token ids, messages, and images among them."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy_tokenizers import MARKED, byte_level, refusal, write

from mlx_dgemma.errors import SettingsError, TokenizerError
from mlx_dgemma.text import chat
from mlx_dgemma.text.chat import chat_ids, encode_chat
from mlx_dgemma.text.tokenizer import Tokenizer

BOS = 2
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if content is not string %}
        {%- set content = content | map(attribute='text') | join %}
    {%- endif %}
    {{- '<|turn>' + message.role + '\\n' + content + '<turn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}
{%- if enable_thinking %}{{ '<think>' }}{% endif %}{{ mood }}
"""
USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be kind"}
MODEL = {"role": "assistant", "content": "so"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}
URL = {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}
WHAT = {"type": "text", "text": "what?"}
TOOL = {"type": "function", "function": {"name": "f", "description": "does f"}}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def image(source):
    return {"type": "image", "image": source}


def make(folder: Path, template: str | None = TEMPLATE) -> Tokenizer:
    byte_level(MARKED).save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "pad_token": "<pad>", "add_bos_token": True}
    write(folder, "tokenizer_config.json", config)
    if template is not None:
        write(folder, "chat_template.jinja", template)
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return make(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Tokenizer:
    return make(tmp_path_factory.mktemp("plain"), template=None)


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_prompts_as_the_template_renders_them(tokenizer):
    hi = "<bos><|turn>user\nhi<turn|>"
    for prompt, options, text in (
        ("hi", {}, f"{hi}<|turn>model\n"),
        ("hi", {"thinking": True}, f"{hi}<|turn>model\n<think>"),
        ([USER, MODEL], {"continue_final_message": True}, f"{hi}<|turn>assistant\nso"),
        ([USER, CALL], {}, f"{hi}<|turn>assistant\n<turn|><|turn>model\n"),
        (user(WHAT, WHAT), {}, "<bos><|turn>user\nwhat?what?<turn|><|turn>model\n"),
    ):
        ids = chat_ids(tokenizer, prompt, **options)
        assert shown(tokenizer, ids) == text
        assert ids[0] == BOS and ids.count(BOS) == 1
    assert tokenizer.apply_chat_template([USER], tokenize=False) == hi
    assert tokenizer.apply_chat_template([USER]) == tokenizer.encode(hi)


@pytest.mark.parametrize("prompt", ["hi", [USER]])
def test_system_is_put_in_front(tokenizer, prompt):
    ids = chat_ids(tokenizer, prompt, system="be kind")
    assert ids == chat_ids(tokenizer, [SYSTEM, USER])
    assert shown(tokenizer, ids).startswith("<bos><|turn>system\nbe kind<turn|>")
    assert prompt in ("hi", [{"role": "user", "content": "hi"}])


def test_ids_are_used_as_they_are(tokenizer, plain):
    for ids in ([5, 6], (5, 6), range(5, 7)):
        assert chat_ids(tokenizer, ids) == chat_ids(plain, ids) == [5, 6]


@settings(deadline=None, max_examples=30)
@given(text=st.text())
@example(text="")
def test_without_template_text_is_raw_behind_bos(plain, text):
    ids = chat_ids(plain, text)
    assert ids[0] == BOS
    assert shown(plain, ids[1:]) == text
    assert chat_ids(plain, f"<bos>{text}") == ids


def test_a_rendered_prompt_is_not_rendered_again(tokenizer):
    rendered = tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=False
    )
    ids = chat_ids(tokenizer, rendered)
    assert ids == chat_ids(tokenizer, "hi") == tokenizer.encode(rendered)
    assert chat_ids(tokenizer, rendered.removeprefix("<bos>")) == ids
    assert shown(tokenizer, chat_ids(tokenizer, " <bos>")).count("<|turn>user") == 1


@pytest.mark.parametrize("prompt", ["hi", [USER]])
def test_tools_and_variables_reach_the_template(tmp_path, prompt):
    tokenizer = make(tmp_path, "{{ tools | tojson }}|{{ mood }}")

    def rendered(**options):
        return shown(tokenizer, chat_ids(tokenizer, prompt, **options))

    assert rendered(tools=[TOOL]) == json.dumps([TOOL]) + "|"
    for nothing in (None, []):
        assert rendered(tools=nothing) == "null|"
    assert rendered(chat_template_kwargs={"mood": [1]}) == "null|[1]"


def test_messages_of_tools_are_completed(tmp_path):
    tokenizer = make(tmp_path, "{{ messages[1:] | tojson }}")
    call = {"id": "x", "function": {"name": "f", "arguments": '{"a": 1}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "content": "2", "tool_call_id": "x"}
    ids = chat_ids(tokenizer, [USER, asked, answer])
    read = {"id": "x", "function": {"name": "f", "arguments": {"a": 1}}}
    assert json.loads(shown(tokenizer, ids)) == [
        {"role": "assistant", "tool_calls": [read]},
        {**answer, "name": "f"},
    ]
    assert call["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize(
    ("prompt", "options", "why"),
    [
        ([], {}, "prompt is empty; give text, token ids or messages"),
        (5, {}, "prompt is int; it must be text, a list of token ids or"),
        (b"hi", {}, "prompt is bytes; it must be text"),
        ({"role": "user"}, {}, "prompt is dict; it must be text"),
        ([1, -2], {}, "prompt[1] is -2; a list prompt holds token ids"),
        ([1, True], {}, "prompt[1] is True"),
        ([1, USER], {}, "prompt[1] is {'role'"),
        ([1.5], {}, "prompt[0] is 1.5"),
        (["hi"], {}, 'message 0: is str; it must be {"role", "content"}'),
        ([{"content": "a"}], {}, "message 0: role is None; it must be one of system,"),
        ([USER, {"role": "bot", "content": ""}], {}, "message 1: role is 'bot'"),
        ([{**MODEL, "content": None, "tool_calls": []}], {}, "content is NoneType"),
        ([{"role": "user", "content": 3}], {}, "message 0: content is int"),
        (user("a"), {}, "message 0: a content part must be"),
        ([USER, *user({"type": "text"})], {}, "message 1: a content part must be"),
        (user({"type": ["image"]}), {}, "message 0: a content part must be"),
        (user({"type": "video"}), {}, "a part of type 'video'; this version reads tex"),
        (user({"type": "image"}), {}, 'message 0: an image part must be {"type", "im'),
        (user(image("")), {}, 'message 0: an image part must be {"type", "image":'),
        (user({"type": "image_url"}), {}, "message 0: an image_url part must be"),
        (user(URL | {"image_url": "data:,"}), {}, "an image_url part must be"),
        (user(URL | {"image_url": {"url": b"x"}}), {}, "an image_url part must be"),
        (user(WHAT, URL), {}, "the prompt holds images; only text can be used"),
        (user(image("a.png")), {}, "the prompt holds images; only text can be used"),
        ([USER, SYSTEM], {"system": "x"}, "system is given and a message is a system"),
        ("hi", {"system": 3}, "system must be text, not int"),
        ("hi", {"tools": [{}]}, 'tool 0: it must be {"type": "function"'),
        ([USER, {"role": "tool", "content": "1"}], {}, "message 1: no call of a tool"),
        ("hi", {"continue_final_message": True}, "messages that end with the assist"),
        ([USER], {"continue_final_message": True}, "messages that end with the assis"),
        ("hi", {"chat_template_kwargs": [1]}, "chat_template_kwargs is list; it must"),
        ("hi", {"chat_template_kwargs": {3: 1}}, "chat_template_kwargs: 3 is not a"),
        ("hi", {"chat_template_kwargs": {"tools": 1}}, "cannot set tools"),
        ("hi", {"chat_template_kwargs": {"enable_thinking": 1}}, "g; use thinking"),
        ("hi", {"chat_template_kwargs": {"a": {1}}}, "a template variable holds a set"),
        ("a\ud800", {}, "text holds a lone surrogate at character"),
        ([{**USER, "at": [{1}]}], {}, "message 0 holds a set; only text,"),
    ],
)
def test_a_bad_prompt_is_refused(tokenizer, prompt, options, why):
    assert why in refusal(SettingsError, chat_ids, tokenizer, prompt, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "system": "x",
        "thinking": True,
        "tools": [TOOL],
        "chat_template_kwargs": {"mood": "x"},
        "continue_final_message": True,
    }.items(),
)
def test_arguments_of_an_unused_template_are_refused(tokenizer, plain, name, value):
    for used, prompt, why in (
        (plain, "hi", "the tokenizer has no chat template"),
        (tokenizer, [1], "the prompt is token ids"),
        (tokenizer, "<bos>hi", "the prompt is rendered already"),
        (tokenizer, "<|turn>user\n", "the prompt is rendered already"),
    ):
        message = refusal(SettingsError, chat_ids, used, prompt, **{name: value})
        assert message == f"{name} cannot be used: {why}"


def test_messages_need_a_template_and_text_some_token(plain, tmp_path):
    message = refusal(TokenizerError, chat_ids, plain, [USER])
    assert "no chat template; add chat_template.jinja" in message
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tmp_path)  # without BOS
    assert "prompt is empty" in refusal(SettingsError, chat_ids, tokenizer, "")


SPELLED = """\
{%- for part in messages[-1].content -%}
{{ '<|image|>' if part.type == 'image' else part.text }}
{%- endfor -%}|{{ messages | tojson }}"""


def test_images_are_one_token_each_and_their_sources(tmp_path):
    tokenizer, data = make(tmp_path, SPELLED), object()
    messages = [
        {"role": "user", "content": [image("a.png"), WHAT]},
        {"role": "user", "content": "and"},
        {"role": "user", "content": (URL, WHAT, image(data))},
    ]
    ids, sources = encode_chat(tokenizer, messages, system="be kind")
    assert sources == chat.image_sources(messages) == ["a.png", "data:,", data]
    text, _, rendered = shown(tokenizer, ids).partition("|[")
    assert text == "<|image|>what?<|image|>"
    assert ids.count(tokenizer.token_id("<|image|>")) == 2
    bare = {"type": "image"}
    assert [m["content"] for m in json.loads("[" + rendered)] == [
        *("be kind", [bare, WHAT], "and", [bare, WHAT, bare]),
    ]


def test_images_get_their_room_and_no_text_can_spell_one():
    for ids, counts, expected in (
        ([1, 2], [], [1, 2]),
        ([1, 7, 2, 7, 7], [2, 1, 3], [1, 8, 7, 7, 9, 2, 8, 7, 9, 8, 7, 7, 7, 9]),
        ((8, 7, 9), (1,), [8, 8, 7, 9, 9]),
    ):
        assert chat.insert_image_tokens(ids, 7, 8, 9, counts) == expected
    for counts in ([], [4], [4, 4, 4]):
        room = (chat.insert_image_tokens, [7, 1, 7], 7, 8, 9, counts)
        why = f"the prompt holds 2 image tokens and {len(counts)} pictures; each pictur"
        assert refusal(SettingsError, *room).startswith(why)


def test_the_template_file_comes_first(tmp_path):
    make(tmp_path, None)
    several = [{"name": name, "template": name} for name in ("rag", "default")]
    for name, value, expected in (
        ("chat_template.json", {"chat_template": "beside"}, "beside"),
        ("tokenizer_config.json", {"chat_template": several}, "default"),
        ("tokenizer_config.json", {"chat_template": "inside"}, "inside"),
        ("chat_template.jinja", "file", "file"),
    ):
        tokenizer = Tokenizer.from_dir(write(tmp_path, name, value))
        assert tokenizer.apply_chat_template([USER], tokenize=False) == expected


def test_a_broken_template_file_is_refused(tmp_path):
    make(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"hi \xff")
    message = refusal(TokenizerError, Tokenizer.from_dir, tmp_path)
    assert message == f"{path}: not UTF-8 at byte 3"
    path.write_text("one\n{% for %}\n")
    message = refusal(TokenizerError, Tokenizer.from_dir, tmp_path)
    assert message.startswith(f"{path}: line 2: ")
