"""What rows become: prompts as for generating, answers with their end, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.errors import DGemmaError
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
TOOL = {"type": "function", "function": {"name": "look", "parameters": None}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Its template is the release's: `<|turn>model`, an empty thought, the answer."""
    return Tokenizer.from_dir(SUDOKU)


@pytest.fixture
def reader(tokenizer) -> ExampleReader:
    return ExampleReader(tokenizer, length=8, ends=ENDS, longest=64)


def templated(template: str | None) -> ExampleReader:
    tokenizer = Tokenizer.from_dir(SUDOKU)
    tokenizer.chat_template = template and ChatTemplate(template, "here.jinja")
    return ExampleReader(tokenizer, length=8, ends=ENDS, longest=64)


def row(*messages, **more) -> str:
    return json.dumps({"messages": list(messages), **more})


GOOD = row(ASKED, ANSWERED)


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


SYSTEM = {"role": "system", "content": " 9 "}


@pytest.mark.parametrize(
    "before",
    [
        [ASKED],
        [SYSTEM, ASKED, {"role": "assistant", "content": "77"}, ASKED],
        [{"role": "assistant", "content": "5"}],
        [{"role": "user", "content": "model\n|user<|turn>"}],
        [{"role": "user", "content": ""}],
    ],
)
def test_prompt_is_rendered_as_for_generating(reader, tokenizer, before):
    example = reader.example(row(*before, ANSWERED))
    assert list(example.prompt) == chat_ids(tokenizer, before)
    # the answer alone is trained, without `<|turn>model`, up to the end of its turn
    assert list(example.response) == [*tokenizer.encode("3.4"), TURN_END]
    assert example.fill == EOS


def test_equivalent_rows_are_the_same_example(reader):
    parts = [{"type": "text", "text": "3."}, {"type": "text", "text": "4"}]
    question = {"role": "user", "content": [{"type": "text", "text": "12"}]}
    nothing = {"tool_calls": [], "reasoning_content": None, "thinking": ""}
    for line in (
        '{"prompt": "12", "completion": "3.4"}',
        json.dumps({"prompt": [ASKED], "completion": [ANSWERED]}),
        json.dumps({"prompt": [ASKED], "completion": "3.4", "id": None}),
        row(ASKED, ANSWERED, prompt="9", completion="9"),
        row(question, {"role": "assistant", "content": parts}),
        row(ASKED, {"role": "assistant", "content": "\n 3.4\t "}),
        row(ASKED, {**ANSWERED, "role": "model", **nothing}),
    ):
        assert reader.example(line) == reader.example(GOOD), line
    several = [{"role": "assistant", "content": "7"}, ASKED, ANSWERED]
    line = json.dumps({"prompt": [ASKED], "completion": several})
    assert reader.example(line) == reader.example(row(ASKED, *several))


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        # tools reach the template of both renderings
        (
            "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}|{% for m in "
            "messages %}{{ m.content or m.tool_calls[0].function.name }}<turn|>"
            "{% endfor %}",
            "56|12<turn|>8<turn|>",
            "3.4<turn|>",
        ),
        # where the template ends no turn, the fill does
        (
            "{% for m in messages %}{{ m.content }}|{% endfor %}"
            "{% if add_generation_prompt %}<turn|>{% endif %}",
            "12||<turn|>",
            "3.4<eos>",
        ),
        # what the template writes behind an answer is trained up to the turn's end
        (
            "{% for m in messages %}{{ m.content or '' }}+\n<turn|>\n<eos>{% endfor %}",
            "12+\n<turn|>\n<eos>+\n<turn|>\n<eos>",
            "3.4+\n<turn|>",
        ),
    ],
)
def test_templates_of_other_kinds(template, prompt, response):
    reader = templated(template)
    call = {"role": "assistant", "content": None}
    call["tool_calls"] = [{"function": {"name": "8", "arguments": "{}"}}]
    tools = [{"type": "function", "function": {"name": n}} for n in "56"]
    tools = tools if "tools" in template else None
    found = reader.example(row(ASKED, call, ANSWERED, tools=tools))
    encode = reader.tokenizer.encode
    assert list(found.prompt) == encode(prompt)
    assert list(found.response) == encode(response)


def test_templates_that_refuse_or_leave_the_answer_out(tmp_path):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert "leaves the answer out" in refusal(templated(template).example, GOOD)
    reader = templated("{{ raise_exception('roles\nmust alternate') }}")
    path = write(tmp_path / "a", GOOD)
    said = refusal(reader.read, path)
    assert said.startswith(f"{path}:1: here.jinja") and "must alternate" in said


def test_without_a_template_there_is_one_prompt_of_raw_text():
    reader = templated(None)
    example, encode = reader.example(GOOD), reader.tokenizer.encode
    assert list(example.prompt) == encode("<bos>12")
    assert list(example.response) == encode("3.4<eos>")
    for line in (row(SYSTEM, ASKED, ANSWERED), row(ASKED, ANSWERED, tools=[{"n": 1}])):
        assert "no chat template" in refusal(reader.example, line)


def test_answers_are_filled_with_an_eos_that_ends_an_answer(tokenizer):
    for ends in ({EOS}, {TURN_END, EOS}):
        assert ExampleReader(tokenizer, 8, frozenset(ends), 64).fill == EOS
    said = refusal(ExampleReader, tokenizer, 8, frozenset({TURN_END}), 64)
    assert "eos" in said and "generation_config.json" in said


PIECES = [*"0123456789 \n.-|+", "user", "model", "<|channel>", "<|turn>"]
ANSWERS = st.lists(st.sampled_from(PIECES)).map("".join)


@given(answer=ANSWERS, longest=st.integers(20, 80))
@settings(max_examples=60, deadline=None)
def test_decoding_the_response_gives_the_answer_back(tokenizer, answer, longest):
    reader = ExampleReader(tokenizer, length=4, ends=ENDS, longest=longest)
    line = row(ASKED, {"role": "assistant", "content": answer})
    if not answer.strip():
        assert "empty" in refusal(reader.example, line)
        return
    example = reader.example(line)
    # a special token is spelled in ordinary ones, of which it has few
    if tokenizer.mark_special(answer, "?") != answer:
        unknown = tokenizer.token_id("<unk>")
        assert not set(example.response[:-1]) & (tokenizer.special_ids - {unknown})
        return
    count = len(tokenizer.encode(answer.strip()))
    text = tokenizer.decode(example.response, skip_special_tokens=False)
    if example.fill is None:
        assert len(example.prompt) + count + 1 > longest - 4
        assert answer.strip().startswith(text)
    else:
        assert text == answer.strip() + "<turn|>"
    assert len(example.prompt) + 4 * example.canvases(4) <= longest
    pieces = [example.cut(4, i) for i in range(example.canvases(4))]
    joined = [token for _, canvas in pieces for token in canvas]
    assert joined[: len(example.response)] == list(example.response)
    assert set(joined[len(example.response) :]) <= {EOS}


def test_an_answer_that_is_too_long_is_cut_to_whole_canvases(tokenizer, tmp_path):
    prompt = len(chat_ids(tokenizer, "12"))
    reader = ExampleReader(tokenizer, 8, ENDS, longest=prompt + 8 + 8 + 7)
    answers = "1" * 15, "1" * 16, "12" * 50  # the first and its end: two canvases
    lines = (row(ASKED, {"role": "assistant", "content": text}) for text in answers)
    found = reader.read(write(tmp_path / "a", *lines))
    assert found.truncated == 2 and found.longest == prompt + 16
    one, two, three = found.examples
    assert one.fill == EOS and one.response[-1] == TURN_END
    for example, text in ((two, "1" * 16), (three, "12" * 8)):
        assert example.fill is None and ENDS.isdisjoint(example.response)
        assert tokenizer.decode(example.response) == text


def test_a_prompt_that_leaves_no_canvas_is_refused(tokenizer):
    prompt = len(chat_ids(tokenizer, "12"))
    for room in (-100, 0, 7):
        narrow = ExampleReader(tokenizer, 8, ENDS, prompt + room)
        said = refusal(narrow.example, GOOD)
        assert f"of {prompt} tokens leaves no canvas of 8" in said
        assert f"--max-seq-length {prompt + room}" in said
    ExampleReader(tokenizer, 8, ENDS, prompt + 8).example(GOOD)


def assistant(**message) -> str:
    return row(ASKED, {"role": "assistant", **message})


def nested(depth: int) -> str:
    return GOOD[:-1] + f', "tools": {"[" * depth}{"]" * depth}}}'


BAD = [
    ("broken JSON", '{"messages": ['),
    ("is list, not an object", "[1, 2]"),
    ("neither messages nor prompt and completion", "{}"),
    ("neither messages nor prompt and completion", '{"prompt": "1"}'),
    ("messages is not a list of messages", '{"messages": []}'),
    ("prompt is not a list of messages", '{"prompt": 1, "completion": "2"}'),
    ("completion is not a list of", '{"prompt": "1", "completion": null}'),
    ("messages[0] is no message with role and content", row("12", ANSWERED)),
    ("messages[0] is no message", row({"role": 1, "content": "12"}, ANSWERED)),
    (r"role is 'a\nb'", row({"role": "a\nb", "content": "1"}, ANSWERED)),
    ("lone surrogate", row({"role": "\ud800", "content": "1"}, ANSWERED)),
    ("messages[0]: content is int", row({"role": "user", "content": 12}, ANSWERED)),
    ("messages[0]: has no content", row({"role": "user"}, ANSWERED)),
    ("the last message is the user's", row(ASKED, ANSWERED, ASKED)),
    ("nothing before the answer", row(ANSWERED)),
    ("the answer is empty", assistant(content=" \n\t")),
    ("the answer is empty", assistant(content=[])),
    ("messages[1]: has no content", assistant(content=None)),
    ("tool_calls must be a list", assistant(content=None, tool_calls=[{"id": "1"}])),
    ("has a column 'note'", row(ASKED, ANSWERED, note="1")),
    ("images: only text can be used", row(ASKED, ANSWERED, images=["a.png"])),
    ("system is int, not text", row(ASKED, ANSWERED, system=1)),
    ("has system twice", row(SYSTEM, ASKED, ANSWERED, system="1")),
    ("tools is text, but not JSON", row(ASKED, ANSWERED, tools="[")),
    ("chat_template_kwargs must be", row(ASKED, ANSWERED, chat_template_kwargs=1)),
    ("shows no tools", row(ASKED, ANSWERED, tools=[TOOL])),
    ("holds reasoning_content", assistant(content="1", reasoning_content="2")),
    ("the answer holds thinking", assistant(content="1", thinking="2")),
    ("the answer holds reasoning", assistant(content="1", reasoning="2")),
    ("messages[1]: only text", assistant(content=[{"type": "image_url"}])),
    ("only text is supported", row({"role": "user", "content": ["12"]}, ANSWERED)),
    ("tools is dict, not a list", row(ASKED, ANSWERED, tools={})),
    ("holds NaN", row(ASKED, ANSWERED, note=float("nan"))),
    ("nested too deeply", nested(100_000)),
    ("nested deeper than 64", nested(700)),
    ("broken JSON", GOOD[:-1] + f', "tools": [{"9" * 5000}]}}'),
    ("not UTF-8", GOOD.replace("12", "1é").encode("latin-1") + b"\n"),
]


def test_bad_rows_are_refused_with_file_line_and_reason(reader, tmp_path):
    for why, line in BAD:
        path = write(tmp_path / "rows.jsonl", GOOD, "", line, GOOD)
        said = refusal(reader.read, path)
        assert said.startswith(f"{path}:3: ") and why in said and "--skip-bad" in said
        found = reader.read(path, skip_bad=True)
        assert len(found) == 2
        (bad,) = found.bad
        assert bad.startswith(f"{path}:3: ") and why in bad


def test_line_ends_blank_lines_and_a_byte_order_mark(reader, tmp_path):
    other = '{"prompt": "1", "completion": "5"}'
    plain = reader.read(write(tmp_path / "a", GOOD, other))
    text = f"\ufeff{GOOD}\r\n\r\n  \n{other}".encode()  # and no end of the last line
    assert reader.read(write(tmp_path / "b", text)).examples == plain.examples
    reader = templated("{% for m in messages %}{{ m.content }}<turn|>{% endfor %}")
    turn = {"role": "user", "content": "1\u20282\x0b3\x85"}  # line ends elsewhere
    line = json.dumps({"messages": [turn, ANSWERED]}, ensure_ascii=False)
    found = reader.read(write(tmp_path / "c", line, line))
    assert len(found) == 2 and len(found.examples[0].prompt) == 7


def test_an_id_the_model_lacks_is_refused(tokenizer):
    row = json.dumps({"messages": [ASKED, ANSWERED]})
    reader = ExampleReader(tokenizer, 8, ENDS, longest=64, vocab_size=6)
    with pytest.raises(DGemmaError, match=r"makes id \d+; the model knows 0 to 5"):
        reader.example(row)


def test_files_without_usable_rows_are_named(reader, tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in (b"", b"\n \r\n", b"{\n[]\n"):
        said = refusal(reader.read, write(path, content), skip_bad=True)
        assert said == f"{path}: has no usable rows"
    missing = tmp_path / "none.jsonl"
    assert refusal(reader.read, missing) == f"{missing}: no such file"
    assert refusal(reader.read, tmp_path).startswith(f"{tmp_path}: cannot be read")


def test_a_digest_tells_every_id_and_their_order_apart():
    base = Example((2, 3), (5, 6, 7), fill=1)
    others = [replace(base, prompt=(2, 4)), replace(base, response=(5, 6, 8))]
    others += [replace(base, response=(5, 6)), Example((2,), (3, 5, 6, 7), fill=1)]
    others += [replace(base, fill=fill) for fill in (4, None, 0)]
    sets = [(base,), (), (base, base), *((other,) for other in others)]
    sets += [pair for other in others for pair in ((base, other), (other, base))]
    assert len({Dataset(examples).digest for examples in sets}) == len(sets)
