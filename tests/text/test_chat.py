"""Chat templates in their sandbox, and prompts of every shape."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import MARKED, byte_level

from mlx_dgemma.errors import SettingsError, TokenizerError
from mlx_dgemma.text.chat import chat_ids, encode_chat
from mlx_dgemma.text.pictures import expand, picture_sources
from mlx_dgemma.text.tokenizer import Tokenizer

BOS = 2
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set text = message.content %}
    {%- else %}
        {%- set text = message.content | map(attribute='text') | join %}
    {%- endif %}
    {{- '<|turn>' + message.role + '\\n' + text + '<turn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}
{%- if enable_thinking %}{{ '<think>' }}{% endif %}
"""
USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be kind"}
TOOL = {"type": "function", "function": {"name": "f", "description": "does f"}}


def make(folder: Path, template: str | None = TEMPLATE) -> Tokenizer:
    byte_level().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "pad_token": "<pad>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return make(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Tokenizer:
    return make(tmp_path_factory.mktemp("plain"), template=None)


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def refusal(kind: type[Exception], call, *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_is_one_user_message(tokenizer):
    ids = chat_ids(tokenizer, "hello")
    assert shown(tokenizer, ids) == "<bos><|turn>user\nhello<turn|><|turn>model\n"
    assert ids[0] == BOS
    assert ids.count(BOS) == 1


def test_thinking_is_off_unless_asked_for(tokenizer):
    assert "<think>" not in shown(tokenizer, chat_ids(tokenizer, "a"))
    thinking = chat_ids(tokenizer, "a", thinking=True)
    assert shown(tokenizer, thinking).endswith("model\n<think>")


@pytest.mark.parametrize("prompt", ["hi", [USER]])
def test_system_is_put_in_front(tokenizer, prompt):
    ids = chat_ids(tokenizer, prompt, system="be kind")
    assert ids == chat_ids(tokenizer, [SYSTEM, USER])
    assert shown(tokenizer, ids).startswith("<bos><|turn>system\nbe kind<turn|>")


def test_messages_are_not_changed(tokenizer):
    messages = [dict(USER)]
    chat_ids(tokenizer, messages, system="be kind")
    assert messages == [USER]


def test_text_parts_are_text(tokenizer):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    message = {"role": "user", "content": parts}
    assert chat_ids(tokenizer, [message]) == chat_ids(tokenizer, "hi")


def test_a_call_of_tools_needs_no_content(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}
    ids = chat_ids(tokenizer, [USER, call])
    assert "<|turn>assistant\n<turn|>" in shown(tokenizer, ids)
    message = refusal(
        SettingsError, chat_ids, tokenizer, [USER, {**call, "tool_calls": []}]
    )
    assert message == "message 1: content is NoneType; it must be text or text parts"


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), range(5, 7)])
def test_ids_are_used_as_they_are(tokenizer, plain, ids):
    assert chat_ids(tokenizer, ids) == [5, 6]
    assert chat_ids(plain, ids) == [5, 6]


def test_without_template_text_is_raw_behind_bos(plain):
    raw = chat_ids(plain, "hello")
    assert shown(plain, raw) == "<bos>hello"
    assert chat_ids(plain, "<bos>hello") == raw
    assert chat_ids(plain, "") == [BOS]


@settings(deadline=None, max_examples=60)
@given(text=st.text())
def test_every_text_arrives_whole(plain, text):
    ids = chat_ids(plain, text)
    assert ids[0] == BOS
    assert plain.decode(ids[1:], skip_special_tokens=False) == text


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
        ([None], {}, "prompt[0] is None"),
        (["hi"], {}, 'message 0: is str; it must be {"role", "content"}'),
        ([USER, 3], {}, "message 1: is int"),
        ([{"content": "a"}], {}, "message 0: role is None; it must be one of system,"),
        ([USER, {"role": "bot", "content": ""}], {}, "message 1: role is 'bot'"),
        ([{"role": ["user"], "content": ""}], {}, "message 0: role is ['user']"),
        ([{"role": "user"}], {}, "message 0: content is NoneType; it must be text"),
        ([{"role": "user", "content": 3}], {}, "message 0: content is int"),
        ([{"role": "user", "content": ["a"]}], {}, "message 0: a content part must be"),
        (
            [USER, {"role": "user", "content": [{"type": "text"}]}],
            {},
            "message 1: a content part must be",
        ),
        (
            [USER, {"role": "user", "content": [{"type": "image"}]}],
            {},
            "message 1: holds a part of type 'image'; this version reads text only",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": ""}]}],
            {},
            "this version reads text only",
        ),
        ([SYSTEM], {"system": "x"}, "system is given and message 0 is a system"),
        ([USER, SYSTEM], {"system": "x"}, "system is given and message 1 is a system"),
        ("hi", {"system": 3}, "system must be text, not int"),
        ([1], {"system": "x"}, "system cannot be used: the prompt is token ids"),
        ([1], {"thinking": True}, "thinking cannot be used: the prompt is token ids"),
        ([1], {"tools": [TOOL]}, "tools cannot be used: the prompt is token ids"),
        ("hi", {"tools": [{}]}, 'tool 0: it must be {"type": "function"'),
        (
            [USER, {"role": "tool", "content": "1"}],
            {},
            "message 1: no call of a tool stands before it",
        ),
        ("a\ud800", {}, "text holds a lone surrogate at character"),
        ([{**USER, "at": Path()}], {}, "message 0 holds a PosixPath; only text,"),
        ([{**USER, "at": [{1}]}], {}, "message 0 holds a set; only text,"),
    ],
)
def test_a_bad_prompt_is_refused(tokenizer, prompt, options, why):
    assert why in refusal(SettingsError, chat_ids, tokenizer, prompt, **options)


@pytest.mark.parametrize(
    "option", [{"system": "x"}, {"thinking": True}, {"tools": [TOOL]}]
)
def test_without_template_only_plain_text_is_possible(plain, option):
    message = refusal(SettingsError, chat_ids, plain, "hi", **option)
    assert message == (
        f"{next(iter(option))} cannot be used: the tokenizer has no chat template"
    )
    message = refusal(TokenizerError, chat_ids, plain, [USER])
    assert "no chat template; add chat_template.jinja" in message


def test_an_empty_prompt_without_bos_is_refused(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert "prompt is empty" in refusal(SettingsError, chat_ids, tokenizer, "")


def test_apply_chat_template_can_tokenize(tokenizer):
    text = tokenizer.apply_chat_template([USER])
    assert text == "<bos><|turn>user\nhi<turn|><|turn>model\n"
    ids = tokenizer.apply_chat_template([USER], tokenize=True)
    assert ids == tokenizer.encode(text)
    bare = tokenizer.apply_chat_template([USER], add_generation_prompt=False)
    assert bare == "<bos><|turn>user\nhi<turn|>"


@pytest.mark.parametrize("prompt", ["hi", [USER]])
def test_tools_reach_the_template(tmp_path, prompt):
    tokenizer = make(tmp_path, "{{ tools | tojson }}|")
    shown_tools = shown(tokenizer, chat_ids(tokenizer, prompt, tools=[TOOL]))
    assert shown_tools == json.dumps([TOOL]) + "|"
    for none in (None, []):
        assert shown(tokenizer, chat_ids(tokenizer, prompt, tools=none)) == "null|"


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


# Pictures

SPELLED = """\
{%- for part in messages[-1].content -%}
{{ '<|image|>' if part.type == 'image' else part.text }}
{%- endfor -%}|{{ messages | tojson }}"""
URL = {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}
WHAT = {"type": "text", "text": "what?"}


def image(source):
    return {"type": "image", "image": source}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("seeing")
    make(folder, SPELLED)
    byte_level(MARKED).save(str(folder / "tokenizer.json"))
    return Tokenizer.from_dir(folder)


def test_pictures_are_one_token_each_and_their_sources(seeing):
    data = object()
    messages = [
        {"role": "user", "content": [image("a.png"), WHAT]},
        {"role": "user", "content": "and"},
        {"role": "user", "content": (URL, WHAT, image(data))},
    ]
    ids, sources = encode_chat(seeing, messages, system="be kind")
    assert sources == ["a.png", "data:,", data]
    assert picture_sources(messages) == sources
    text, _, rendered = shown(seeing, ids).partition("|[")
    assert text == "<|image|>what?<|image|>"
    assert ids.count(seeing.token_id("<|image|>")) == 2
    bare = {"type": "image"}
    assert [m["content"] for m in json.loads("[" + rendered)] == [
        *("be kind", [bare, WHAT], "and", [bare, WHAT, bare]),
    ]


@pytest.mark.parametrize("prompt", ["hi", [USER], [5, 6]])
def test_without_pictures_both_encode_alike(tokenizer, prompt):
    ids, sources = encode_chat(tokenizer, prompt)
    assert (ids, sources) == (chat_ids(tokenizer, prompt), [])


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"type": "image"}, 'message 0: an image part must be {"type", "image":'),
        (image(""), 'message 0: an image part must be {"type", "image":'),
        ({"type": "image_url"}, "message 0: an image_url part must be"),
        (URL | {"image_url": "data:,"}, "message 0: an image_url part must be"),
        (URL | {"image_url": {"url": ""}}, "message 0: an image_url part must be"),
        (URL | {"image_url": {"url": b"x"}}, "message 0: an image_url part must be"),
        ({"type": "video"}, "a part of type 'video'; this version reads text and pict"),
        ({"type": ["image"]}, "message 0: a content part must be"),
        ("image", "message 0: a content part must be"),
    ],
)
def test_a_bad_picture_is_refused(seeing, part, why):
    messages = [{"role": "user", "content": [WHAT, part]}]
    assert why in refusal(SettingsError, encode_chat, seeing, messages)


@pytest.mark.parametrize("part", [image("a.png"), URL])
def test_text_prompts_hold_no_pictures(seeing, part):
    messages = [{"role": "user", "content": [WHAT, part]}]
    message = refusal(SettingsError, chat_ids, seeing, messages)
    assert message.endswith("this version reads text only")


@pytest.mark.parametrize(
    ("ids", "counts", "expected"),
    [
        ([1, 2], [], [1, 2]),
        ([], [], []),
        ([7], [1], [8, 7, 9]),
        ([1, 7, 2, 7, 7], [2, 1, 3], [1, 8, 7, 7, 9, 2, 8, 7, 9, 8, 7, 7, 7, 9]),
        ((8, 7, 9), (1,), [8, 8, 7, 9, 9]),
    ],
)
def test_pictures_get_their_room(ids, counts, expected):
    assert expand(ids, 7, 8, 9, counts) == expected


@pytest.mark.parametrize("counts", [[], [4], [4, 4, 4]])
def test_no_text_can_spell_a_picture(seeing, counts):
    token = seeing.token_id("<|image|>")
    content = [image("a.png"), {"type": "text", "text": "<|image|>"}]
    ids, _ = encode_chat(seeing, [{"role": "user", "content": content}])
    # one shown in front of the bar, one spelled; the rest is the echo behind it
    ids = ids[: ids.index(seeing.encode("|")[0])]
    assert refusal(SettingsError, expand, ids, token, 8, 9, counts) == (
        f"the prompt holds 2 image tokens and {len(counts)} pictures; each picture "
        "needs one, and no text may spell one"
    )


# Where templates come from


def test_the_template_file_comes_first(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": "beside"}')
    assert make(tmp_path, None).apply_chat_template([USER]) == "beside"
    config = {"chat_template": "inside"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_dir(tmp_path).apply_chat_template([USER]) == "inside"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_dir(tmp_path).apply_chat_template([USER]) == "file"


def test_of_several_templates_the_default_is_taken(tmp_path):
    make(tmp_path, None)
    entries = [
        {"name": "rag", "template": "rag"},
        {"name": "default", "template": "default"},
    ]
    config = {"chat_template": entries}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_dir(tmp_path).apply_chat_template([USER]) == "default"


def test_a_torn_template_file_is_refused(tmp_path):
    make(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"hi \xff")
    message = refusal(TokenizerError, Tokenizer.from_dir, tmp_path)
    assert message == f"{path}: not UTF-8 at byte 3"
    path.write_text("one\n{% for %}\n")
    message = refusal(TokenizerError, Tokenizer.from_dir, tmp_path)
    assert message.startswith(f"{path}: line 2: ")
