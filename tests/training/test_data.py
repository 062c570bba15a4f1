"""What rows become: prompts as for generating, answers with their end, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.errors import DataError, DGemmaError
from mlx_dgemma.text.chat import chat_ids
from mlx_dgemma.text.template import ChatTemplate
from mlx_dgemma.text.tokenizer import Tokenizer
from mlx_dgemma.training import data
from mlx_dgemma.training.data import Dataset, Example, ExampleReader

SUDOKU = Path(data.__file__).parents[1] / "assets" / "sudoku4"
EOS, TURN_END = 1, 4
ENDS = frozenset({EOS, TURN_END})
ASKED = {"role": "user", "content": "12"}
ANSWERED = {"role": "assistant", "content": "3.4"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Its template is the release's: `<|turn>model`, an empty thought, the answer."""
    return Tokenizer.from_dir(SUDOKU)


@pytest.fixture
def reader(tokenizer) -> ExampleReader:
    return ExampleReader(tokenizer, length=8, ends=ENDS, longest=64)


@pytest.fixture
def bare() -> Tokenizer:
    """The same tokenizer without a chat template."""
    tokenizer = Tokenizer.from_dir(SUDOKU)
    tokenizer.chat_template = None
    return tokenizer


def templated(template: str) -> ExampleReader:
    tokenizer = Tokenizer.from_dir(SUDOKU)
    tokenizer.chat_template = ChatTemplate(template, "here.jinja")
    return ExampleReader(tokenizer, length=8, ends=ENDS, longest=64)


def row(*messages, **more) -> str:
    return json.dumps({"messages": list(messages), **more})


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(
        b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in lines)
    )
    return path


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(DGemmaError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    message.encode()  # a terminal can show it
    return message


# Prompts and answers


CONVERSATIONS = {
    "one question": [ASKED],
    "a system turn": [{"role": "system", "content": "9"}, ASKED],
    "several turns": [
        {"role": "system", "content": " 9 "},
        ASKED,
        {"role": "assistant", "content": "77"},
        {"role": "user", "content": "2\n1"},
    ],
    "an answer before any question": [{"role": "assistant", "content": "5"}],
    "words of the template": [{"role": "user", "content": "model\n|user<|turn>"}],
    "no words": [{"role": "user", "content": ""}],
}


@pytest.mark.parametrize("before", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_what_comes_before_is_rendered_as_for_generating(reader, tokenizer, before):
    example = reader.example(row(*before, ANSWERED))
    rendered = tokenizer.apply_chat_template(
        before, add_generation_prompt=True, tokenize=False
    )
    assert list(example.prompt) == tokenizer.encode(rendered)
    assert list(example.prompt) == chat_ids(tokenizer, before)
    answer = tokenizer.encode("3.4")
    assert list(example.response) == [*answer, TURN_END]  # and no `<|turn>model`
    assert example.fill == EOS


def test_earlier_answers_are_prompt_and_never_trained(reader, tokenizer):
    turns = [ASKED, {"role": "assistant", "content": "77"}, ASKED, ANSWERED]
    example = reader.example(row(*turns))
    assert "77<turn|>" in tokenizer.decode(example.prompt, skip_special_tokens=False)
    assert tokenizer.decode(example.response) == "3.4"


def test_a_prompt_and_its_completion_are_two_messages(reader):
    messages = reader.example(row(ASKED, ANSWERED))
    assert reader.example('{"prompt": "12", "completion": "3.4"}') == messages
    lists = {"prompt": [ASKED], "completion": [ANSWERED]}
    assert reader.example(json.dumps(lists)) == messages
    mixed = {"prompt": [ASKED], "completion": "3.4", "id": 7}
    assert reader.example(json.dumps(mixed)) == messages


def test_messages_are_taken_where_a_row_has_both(reader):
    both = row(ASKED, ANSWERED, prompt="9", completion="9")
    assert reader.example(both) == reader.example(row(ASKED, ANSWERED))


def test_a_completion_of_several_messages_answers_with_its_last(reader, tokenizer):
    prompt = [{"role": "system", "content": "9"}, ASKED]
    completion = [{"role": "assistant", "content": "7"}, ASKED, ANSWERED]
    given = json.dumps({"prompt": prompt, "completion": completion})
    assert reader.example(given) == reader.example(row(*prompt, *completion))


def test_text_parts_are_one_text(reader):
    parts = [{"type": "text", "text": "3."}, {"type": "text", "text": "4"}]
    question = {"role": "user", "content": [{"type": "text", "text": "12"}]}
    found = reader.example(row(question, {"role": "assistant", "content": parts}))
    assert found == reader.example(row(ASKED, ANSWERED))


def test_an_answer_is_its_text_without_the_blanks_around_it(reader):
    padded = {"role": "assistant", "content": "\n 3.4\t "}
    assert reader.example(row(ASKED, padded)) == reader.example(row(ASKED, ANSWERED))


def test_an_answer_of_the_model_is_the_assistants(reader):
    other = {**ANSWERED, "role": "model"}
    assert reader.example(row(ASKED, other)) == reader.example(row(ASKED, ANSWERED))


def test_nothing_said_of_calls_and_reasoning_is_no_refusal(reader):
    empty = {**ANSWERED, "tool_calls": [], "reasoning_content": None, "thinking": ""}
    assert reader.example(row(ASKED, empty)) == reader.example(row(ASKED, ANSWERED))


def test_tools_reach_the_template_of_both_renderings():
    reader = templated(
        "{% for t in tools or [] %}{{ t.n }}{% endfor %}|"
        "{% for m in messages %}{{ m.content }}<turn|>{% endfor %}"
    )
    tokenizer = reader.tokenizer
    found = reader.example(row(ASKED, ANSWERED, tools=[{"n": 5}, {"n": 6}]))
    assert tokenizer.decode(found.prompt, skip_special_tokens=False) == "56|12<turn|>"
    assert tokenizer.decode(found.response) == "3.4"
    without = reader.example(row(ASKED, ANSWERED, tools=None))
    assert tokenizer.decode(without.prompt, skip_special_tokens=False) == "|12<turn|>"


def test_a_call_of_tools_before_the_answer_needs_no_words():
    reader = templated(
        "{% for m in messages %}{{ m.content or m.tool_calls[0].n }}<turn|>{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"n": 8}]}
    result = {"role": "tool", "content": "9"}
    found = reader.example(row(ASKED, call, result, ANSWERED))
    text = reader.tokenizer.decode(found.prompt, skip_special_tokens=False)
    assert text == "12<turn|>8<turn|>9<turn|>"


def test_where_the_template_ends_no_turn_the_fill_does():
    reader = templated(
        "{% for m in messages %}{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}<turn|>{% endif %}"
    )
    found = reader.example(row(ASKED, ANSWERED))
    assert list(found.response) == [*reader.tokenizer.encode("3.4"), EOS]


def test_what_the_template_writes_behind_an_answer_is_trained_to_the_turns_end():
    reader = templated(
        "{% for m in messages %}{{ m.content }}+\n<turn|>\n<eos>{% endfor %}"
    )
    found = reader.example(row(ASKED, ANSWERED))
    assert list(found.response) == [*reader.tokenizer.encode("3.4+\n"), TURN_END]


def test_a_template_that_leaves_answers_out_is_refused():
    reader = templated(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    assert "leaves the answer out" in refusal(reader.example, row(ASKED, ANSWERED))


def test_without_a_template_the_prompt_is_raw_text_behind_bos(bare):
    reader = ExampleReader(bare, length=8, ends=ENDS, longest=64)
    for line in (row(ASKED, ANSWERED), '{"prompt": "12", "completion": "3.4"}'):
        example = reader.example(line)
        assert list(example.prompt) == chat_ids(bare, "12")
        assert bare.decode(example.prompt, skip_special_tokens=False) == "<bos>12"
        assert list(example.response) == [*bare.encode("3.4"), EOS]


@pytest.mark.parametrize(
    "given",
    [
        row(ASKED, ANSWERED, ASKED, ANSWERED),
        row({"role": "system", "content": "1"}, ASKED, ANSWERED),
        row(ASKED, ANSWERED, tools=[{"n": 1}]),
    ],
)
def test_without_a_template_there_is_one_prompt_only(bare, given):
    reader = ExampleReader(bare, length=8, ends=ENDS, longest=64)
    assert "no chat template" in refusal(reader.example, given)


@pytest.mark.parametrize("ends", [{EOS}, {TURN_END, EOS}])
def test_answers_are_filled_with_eos_where_it_ends_an_answer(tokenizer, ends):
    assert ExampleReader(tokenizer, 8, frozenset(ends), 64).fill == EOS


def test_a_tokenizer_whose_eos_ends_nothing_is_refused(tokenizer):
    said = refusal(ExampleReader, tokenizer, 8, frozenset({TURN_END}), 64)
    assert "eos" in said and "generation_config.json" in said


def test_the_named_end_of_text_fills_where_no_piece_is_called_eos():
    class Other:
        eos_token_id = 11
        token_id = staticmethod(lambda piece: None)

    assert ExampleReader(Other(), 8, frozenset({11, 12}), 64).fill == 11


PIECES = [*"0123456789 \n.-|+", "user", "model", "<|channel>", "<|turn>"]
ANSWERS = st.lists(st.sampled_from(PIECES)).map("".join)


@given(answer=ANSWERS, longest=st.integers(20, 80))
@settings(max_examples=150, deadline=None)
def test_decoding_the_response_gives_the_answer_back(tokenizer, answer, longest):
    reader = ExampleReader(tokenizer, length=4, ends=ENDS, longest=longest)
    given = row(ASKED, {"role": "assistant", "content": answer})
    if not answer.strip():
        assert "empty" in refusal(reader.example, given)
        return
    example = reader.example(given)
    whole = tokenizer.encode(answer.strip())
    text = tokenizer.decode(example.response, skip_special_tokens=False)
    if example.fill is None:
        assert len(example.prompt) + len(whole) + 1 > longest - 4
        assert answer.strip().startswith(text)
    else:
        assert text == answer.strip() + "<turn|>"
    assert len(example.prompt) + 4 * example.canvases(4) <= longest
    pieces = [example.cut(4, i) for i in range(example.canvases(4))]
    joined = [token for _, canvas in pieces for token in canvas]
    assert joined[: len(example.response)] == list(example.response)
    assert set(joined[len(example.response) :]) <= {EOS}


# Canvases


@pytest.mark.parametrize(
    ("size", "canvases"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3), (40, 5)]
)
def test_an_answer_takes_as_many_canvases_as_it_needs(size, canvases):
    example = Example((2,), tuple(range(100, 100 + size)), fill=EOS)
    assert example.canvases(8) == canvases
    for index in range(canvases):
        before, canvas = example.cut(8, index)
        assert before == example.response[: 8 * index]  # strictly earlier ones
        held = example.response[8 * index : 8 * index + 8]
        assert canvas == held + (EOS,) * (8 - len(held))


def test_a_canvas_that_is_full_has_no_filling(reader):
    seven = {"role": "assistant", "content": "1234567"}
    before, canvas = reader.example(row(ASKED, seven)).cut(8, 0)
    assert before == () and canvas[-1] == TURN_END and EOS not in canvas
    six = {"role": "assistant", "content": "123456"}
    _, canvas = reader.example(row(ASKED, six)).cut(8, 0)
    assert canvas[-2:] == (TURN_END, EOS)


def test_an_answer_that_is_too_long_is_cut_to_whole_canvases(tokenizer, tmp_path):
    prompt = len(chat_ids(tokenizer, "12"))
    reader = ExampleReader(tokenizer, 8, ENDS, longest=prompt + 8 + 8 + 7)
    fits = {"role": "assistant", "content": "1" * 15}  # and its end: two canvases
    long = {"role": "assistant", "content": "1" * 16}
    longer = {"role": "assistant", "content": "12" * 50}
    path = write(tmp_path / "a", *(row(ASKED, a) for a in (fits, long, longer)))
    found = reader.read(path)
    assert found.truncated == 2
    one, two, three = found.examples
    assert one.fill == EOS and one.response[-1] == TURN_END
    for example, text in ((two, "1" * 16), (three, "12" * 8)):
        assert example.fill is None
        assert tokenizer.decode(example.response) == text
        assert ENDS.isdisjoint(example.response)
        assert [len(example.cut(8, i)[1]) for i in range(2)] == [8, 8]


@pytest.mark.parametrize("room", [0, 1, 7])
def test_a_prompt_that_leaves_no_canvas_is_refused(tokenizer, room):
    prompt = len(chat_ids(tokenizer, "12"))
    narrow = ExampleReader(tokenizer, 8, ENDS, prompt + room)
    said = refusal(narrow.example, row(ASKED, ANSWERED))
    assert str(prompt) in said and f"--max-seq-length {prompt + room}" in said
    ExampleReader(tokenizer, 8, ENDS, prompt + 8).example(row(ASKED, ANSWERED))


def test_a_prompt_longer_than_all_is_refused_too(tokenizer):
    wordy = {"role": "user", "content": "1" * 500}
    said = refusal(ExampleReader(tokenizer, 8, ENDS, 64).example, row(wordy, ANSWERED))
    assert "leaves no canvas of 8" in said


# Rows that cannot be used


def assistant(**message) -> str:
    return row(ASKED, {"role": "assistant", **message})


def tools_of_depth(depth: int) -> str:
    return row(ASKED, ANSWERED)[:-1] + f', "tools": {"[" * depth}{"]" * depth}}}'


BAD = {
    '{"messages": [': "broken JSON",
    "{'prompt': '1'}": "broken JSON",
    "[1, 2]": "is list, not an object",
    '"12"': "is str, not an object",
    "null": "is NoneType, not an object",
    "{}": "neither messages nor prompt and completion",
    '{"prompt": "1"}': "neither messages nor prompt and completion",
    '{"completion": "1"}': "neither messages nor prompt and completion",
    '{"text": "12"}': "neither messages nor prompt and completion",
    '{"messages": []}': "messages is not a list of messages",
    '{"messages": null}': "messages is not a list of messages",
    '{"messages": {"role": "user"}}': "messages is not a list of messages",
    '{"prompt": 1, "completion": "2"}': "prompt is not a list of messages",
    '{"prompt": "1", "completion": null}': "completion is not a list of messages",
    '{"prompt": "1", "completion": []}': "completion is not a list of messages",
    row("12", ANSWERED): "messages[0] is no message with role and content",
    row({"content": "12"}, ANSWERED): "messages[0] is no message",
    row({"role": 1, "content": "12"}, ANSWERED): "messages[0] is no message",
    row({"role": "human", "content": "1"}, ANSWERED): "messages[0]: role is 'human'",
    row({"role": "a\nb", "content": "1"}, ANSWERED): r"role is 'a\nb'",
    row({"role": "\ud800", "content": "1"}, ANSWERED): r"role is '\ud800'",
    row({"role": "user", "content": 12}, ANSWERED): "messages[0]: content is int",
    row({"role": "user", "content": None}, ANSWERED): "messages[0]: has no content",
    row({"role": "user"}, ANSWERED): "messages[0]: has no content",
    row(ASKED, ANSWERED, ASKED): "the last message is the user's",
    row(ASKED, {"role": "system", "content": "1"}): "the last message is the system's",
    row(ANSWERED): "nothing before the answer",
    '{"prompt": "1", "completion": [{"role": "user", "content": "2"}]}': "the user's",
    assistant(content=""): "the answer is empty",
    assistant(content=" \n\t"): "the answer is empty",
    assistant(content=[]): "the answer is empty",
    assistant(content=None): "messages[1]: has no content",
    '{"prompt": "1", "completion": ""}': "the answer is empty",
    assistant(content="1", tool_calls=[{"id": "1"}]): "the answer holds tool_calls",
    assistant(content=None, tool_calls=[{"id": "1"}]): "the answer holds tool_calls",
    assistant(content="1", reasoning_content="2"): "holds reasoning_content",
    assistant(content="1", thinking="2"): "the answer holds thinking",
    assistant(content="1", reasoning="2"): "the answer holds reasoning",
    assistant(content=[{"type": "image_url", "image_url": {"url": "a"}}]): (
        "messages[1]: only text can be trained on"
    ),
    row(
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1"}]},
        ANSWERED,
    ): "messages[0]: only text can be trained on",
    row({"role": "user", "content": ["12"]}, ANSWERED): "only text can be trained on",
    assistant(content="1\ud800"): "a lone surrogate at character 1",
    row({"role": "user", "content": "\udc12"}, ANSWERED): "a lone surrogate",
    assistant(content="12<turn|>3"): "holds a token that ends it",
    assistant(content="12<eos>"): "holds a token that ends it",
    row(ASKED, ANSWERED, tools={}): "tools is dict, not a list",
    row(ASKED, ANSWERED, tools="f"): "tools is str, not a list",
    row(ASKED, ANSWERED, score=float("nan")): "holds NaN",
    row(ASKED, ANSWERED, tools=[-float("inf")]): "holds -Infinity",
    row({**ASKED, "name": float("inf")}, ANSWERED): "holds Infinity",
    tools_of_depth(100_000): "nested too deeply",
    tools_of_depth(700): "nested too deeply",
    "9" * 5000: "broken JSON",
    row(ASKED, ANSWERED)[:-1] + f', "tools": [{"9" * 5000}]}}': "broken JSON",
    row({"role": "user", "content": "1" * 99}, ANSWERED): "leaves no canvas of 8",
}


@pytest.mark.parametrize(("line", "why"), BAD.items(), ids=lambda x: x[:40])
def test_bad_rows_are_refused_with_file_line_and_reason(reader, tmp_path, line, why):
    good = row(ASKED, ANSWERED)
    path = write(tmp_path / "rows.jsonl", good, "", line, good)
    said = refusal(reader.read, path)
    assert said.startswith(f"{path}:3: ") and why in said and "--skip-bad" in said
    left = reader.read(path, skip_bad=True)
    assert len(left) == 2 and len(left.bad) == 1
    assert left.bad[0].startswith(f"{path}:3: ") and why in left.bad[0]


def test_bytes_that_are_no_text_are_a_bad_row(reader, tmp_path):
    good = row(ASKED, ANSWERED)
    bad = good.replace("12", "1é").encode("latin-1") + b"\n"
    path = write(tmp_path / "rows.jsonl", good, bad, good)
    assert refusal(reader.read, path).startswith(f"{path}:2: not UTF-8")
    assert len(reader.read(path, skip_bad=True)) == 2
    path.write_bytes(good.encode("utf-16"))
    assert refusal(reader.read, path).startswith(f"{path}:1: not UTF-8")


@pytest.mark.parametrize(
    "number", ["1e999", "-" + "9" * 4000, "1e-999", "0." + "1" * 9999]
)
def test_hostile_numbers_outside_the_text_do_not_matter(reader, number):
    line = row(ASKED, ANSWERED)[:-1] + f', "score": {number}}}'
    assert reader.example(line) == reader.example(row(ASKED, ANSWERED))


def test_a_broken_template_is_the_rows_refusal(tmp_path):
    reader = templated("{{ raise_exception('roles\nmust alternate') }}")
    path = write(tmp_path / "a", row(ASKED, ANSWERED))
    said = refusal(reader.read, path)
    assert said.startswith(f"{path}:1: here.jinja") and "must alternate" in said


# Files


def test_line_ends_of_windows_and_blank_lines_change_nothing(reader, tmp_path):
    one, two = row(ASKED, ANSWERED), '{"prompt": "1", "completion": "5"}'
    plain = reader.read(write(tmp_path / "a", one, two))
    given = f"\r\n{one}\r\n\r\n  \n{two}".encode()  # and no end of the last line
    other = reader.read(write(tmp_path / "b", given))
    assert plain.examples == other.examples and len(plain) == 2
    broken = write(tmp_path / "c", f"\r\n{one}\r\n\r\n{{\r\n".encode())
    assert refusal(reader.read, broken).startswith(f"{broken}:4: ")


def test_line_separators_inside_a_text_end_no_line(tmp_path):
    reader = templated("{% for m in messages %}{{ m.content }}<turn|>{% endfor %}")
    turn = {"role": "user", "content": "1\u20282\x0b3\x85"}
    line = json.dumps({"messages": [turn, ANSWERED]}, ensure_ascii=False)
    found = reader.read(write(tmp_path / "a", line, line))
    assert len(found) == 2 and len(found.examples[0].prompt) == 7


@pytest.mark.parametrize("content", [b"", b"\n \r\n"])
def test_a_file_without_rows_is_refused(reader, tmp_path, content):
    path = write(tmp_path / "rows.jsonl", content)
    for skip_bad in (False, True):
        said = refusal(reader.read, path, skip_bad=skip_bad)
        assert said == f"{path}: has no usable rows"


def test_a_file_of_bad_rows_alone_is_refused(reader, tmp_path):
    path = write(tmp_path / "rows.jsonl", "{", "[]")
    assert "no usable rows" in refusal(reader.read, path, skip_bad=True)


def test_files_that_cannot_be_read_are_named(reader, tmp_path):
    missing = tmp_path / "none.jsonl"
    assert refusal(reader.read, missing) == f"{missing}: no such file"
    assert refusal(reader.read, tmp_path).startswith(f"{tmp_path}: cannot be read")


def test_every_bad_row_is_listed(reader, tmp_path):
    good = row(ASKED, ANSWERED)
    path = write(tmp_path / "rows.jsonl", "{", good, "[]", good, "{}")
    found = reader.read(path, skip_bad=True)
    assert len(found) == 2
    places = [reason.partition(": ")[0] for reason in found.bad]
    assert places == [f"{path}:1", f"{path}:3", f"{path}:5"]


def test_the_first_bad_row_is_the_one_that_is_named(reader, tmp_path):
    path = write(tmp_path / "rows.jsonl", "[]", "{")
    with pytest.raises(DataError, match=r":1: is list"):
        reader.read(path)


# Digests


BASE = Example((2, 3), (5, 6, 7), fill=1)


@pytest.mark.parametrize(
    "other",
    [
        (replace(BASE, prompt=(2, 4)),),
        (replace(BASE, response=(5, 6, 8)),),
        (replace(BASE, response=(5, 6)),),
        (replace(BASE, fill=4),),
        (replace(BASE, fill=None),),
        (replace(BASE, fill=0),),
        (Example((2,), (3, 5, 6, 7), fill=1),),
        (Example((2, 3, 5), (6, 7), fill=1),),
        (BASE, BASE),
        (),
    ],
    ids=str,
)
def test_a_digest_tells_every_id_apart(other):
    assert Dataset((BASE,)).digest != Dataset(other).digest
    assert Dataset((BASE, BASE)).digest != Dataset((BASE, *other)).digest


def test_a_fill_of_the_first_id_is_no_missing_fill():
    zero, none = (Dataset((replace(BASE, fill=fill),)) for fill in (0, None))
    assert zero.digest != none.digest
    assert (zero.truncated, none.truncated) == (0, 1)


def test_a_digest_knows_order_but_not_names(reader, tmp_path):
    rows = row(ASKED, ANSWERED), '{"prompt": "1", "completion": "5"}'
    here, there = write(tmp_path / "a", *rows), write(tmp_path / "b", *rows)
    turned = write(tmp_path / "c", *rows[::-1])
    assert reader.read(here).digest == reader.read(there).digest
    assert reader.read(here).digest != reader.read(turned).digest


def test_a_byte_order_mark_is_no_part_of_the_first_row(reader, tmp_path):
    path = write(tmp_path / "train.jsonl", "\ufeff" + row(ASKED, ANSWERED))
    assert len(reader.read(path)) == 1
