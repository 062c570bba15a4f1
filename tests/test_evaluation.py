"""Shares of right answers against a plain loop; scorers; broken rows of JSONL."""

import json
from dataclasses import replace

import pytest

from mlx_dgemma import Commit, generate, load, stream_generate
from mlx_dgemma.errors import DataError, SettingsError
from mlx_dgemma.evaluation import (
    Result,
    Row,
    evaluate,
    load_scorer,
    read_rows,
    table,
)
from mlx_dgemma.text.chat import chat_ids

USER = {"role": "user", "content": "1"}
ANSWER = {"role": "assistant", "content": "2"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
PUZZLES = [
    Row("4000\n0310\n0430\n0000", "4123\n2314\n1432\n3241"),
    Row("0002\n0000\n1020\n2031", "3142\n4213\n1324\n2431"),
    Row("0020\n0200\n0014\n0400", "no\nanswer\nis\nthis"),
]


@pytest.fixture(scope="module")
def solver():
    return load("sudoku4")


def digits(prompt, answer, expected):
    """A scorer: shares of answered digits, and of characters that are expected."""
    right = sum(a == b for a, b in zip(answer, expected, strict=False))
    return {"digits": answer.count("1") / 16, "right": right / len(expected)}


def plain_answers(model, rows, seed, **changes):
    """Text, steps and canvases of each row, generated one by one."""
    for n, row in enumerate(rows):
        events = stream_generate(*model, row.prompt, seed=seed + n, **changes)
        commits = [event for event in events if isinstance(event, Commit)]
        text = "".join(c.text for c in commits)
        yield text, sum(c.steps for c in commits), len(commits)


# Against a plain loop


def test_shares_scores_and_steps_are_those_of_a_plain_loop(solver):
    how = {"steps": [1, 24], "batch_size": 2, "seed": 3}
    found = evaluate(*solver, PUZZLES, scorer=digits, **how)
    for cap, result in zip([1, 24], found, strict=True):
        texts, steps, _ = zip(
            *plain_answers(solver, PUZZLES, 3, steps=cap), strict=True
        )
        pairs = list(zip(texts, (row.answer for row in PUZZLES), strict=True))
        scores = [digits("", *pair) for pair in pairs]
        means = {k: sum(s[k] for s in scores) / 3 for k in ("digits", "right")}
        assert (result.steps, result.count) == (cap, 3)
        assert result.exact == sum(text == answer for text, answer in pairs) / 3
        assert result.scores == pytest.approx(means)
        assert result.mean_steps == sum(steps) / 3
        assert result.seconds > 0
    assert found[1].exact == 2 / 3  # or nothing was compared
    (capless,) = evaluate(*solver, PUZZLES[:1])
    assert (capless.steps, capless.scores) == (solver[0].settings.steps, {})
    assert 1 < capless.mean_steps < capless.steps


def test_answer_may_span_several_canvases(tiny_model):
    rows, how = [Row("ab", "")] * 6, {"steps": [2], "batch_size": 4}
    texts, steps, canvases = zip(
        *plain_answers(tiny_model, rows, 5, steps=2), strict=True
    )
    assert max(canvases) > 1
    rows, progress = [Row("ab", f" {text}\n") for text in texts], []
    (result,) = evaluate(
        *tiny_model, rows, seed=5, progress=lambda *n: progress.append(n), **how
    )
    assert (result.exact, result.mean_steps) == (1.0, sum(steps) / 6)
    assert progress == [(2, done, 6) for done in range(7)]
    (others,) = evaluate(*tiny_model, rows, seed=6, **how)
    assert others.exact < 1


def test_conversation_and_tools_are_prompted_as_for_generating(
    tiny_model, tmp_path, monkeypatch
):
    talk = [{"role": "system", "content": "a"}, USER, ANSWER, USER]
    ids = chat_ids(tiny_model[1], talk)
    answer = generate(*tiny_model, ids, seed=0, steps=1)
    (result,) = evaluate(*tiny_model, [Row(talk, answer)], steps=[1])
    assert result.exact == 1
    tools = [{"type": "function", "function": {"name": "look"}}]
    line = json.dumps({"messages": [USER, ANSWER], "tools": tools, "system": "a"})
    rows, asked = read_rows(write_rows(tmp_path, line)), []

    def render(messages, **more):
        names = [tool["function"]["name"] for tool in more["tools"]]
        asked.append((messages, names))
        return "<bos>ab"

    monkeypatch.setattr(tiny_model[1].chat_template, "render", render)
    monkeypatch.setattr(tiny_model[1].chat_template, "variables", {"tools"})
    evaluate(*tiny_model, rows, steps=[1])
    assert asked == [([{"role": "system", "content": "a"}, USER], ["look"])]


# Refusals


def test_impossible_settings_and_prompts_are_refused_before_anything_runs(
    tiny_model, monkeypatch
):
    monkeypatch.setattr("mlx_dgemma.evaluation.Engine", lambda *a: pytest.fail("ran"))
    for asked, message in (
        ({"rows": []}, "nothing to evaluate"),
        ({"steps": []}, "nothing to evaluate"),
        ({"steps": [2, 0]}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(SettingsError, match=message):
            evaluate(*tiny_model, **{"rows": [Row("1", "2")]} | asked)
    bad = Row([{"role": "wizard", "content": "1"}], "2", where="data.jsonl:7")
    with pytest.raises(DataError, match=r"data\.jsonl:7: message 0: role is 'wizard'"):
        evaluate(*tiny_model, [Row("1", "2"), bad])


def test_errors_of_a_scorer_name_the_row(tiny_model):
    def strict(prompt, answer, expected):
        if expected == "b":
            raise ValueError("no puzzle")
        return {expected: 1.0}

    rows = [Row("1", a, where=f"data.jsonl:{n}") for n, a in enumerate("aab", 1)]
    with pytest.raises(DataError, match=r"data\.jsonl:3: no puzzle"):
        evaluate(*tiny_model, rows, scorer=strict, steps=[1])
    rows[1] = replace(rows[1], answer="c")
    with pytest.raises(SettingsError, match=r"data\.jsonl:2: the scorer returned c"):
        evaluate(*tiny_model, rows, scorer=strict, steps=[1])


def test_scorer_is_loaded_from_a_file(tmp_path):
    file = tmp_path / "score.py"
    rows = [Row("1", "12", where="data.jsonl:1"), Row("1", "x", where="data.jsonl:2")]
    file.write_text("def length(p, a, e): return {'length': 2}\n")
    assert load_scorer(f"{file}:length", rows)("", "", "") == {"length": 2}
    with file.open("a") as more:
        more.write("def check(prompt, expected): int(expected)\n")
    assert load_scorer(f"{file}:length", rows[:1])("", "", "") == {"length": 2}
    with pytest.raises(DataError, match=r"data\.jsonl:2: invalid literal"):
        load_scorer(f"{file}:length", rows)
    (tmp_path / "broken.py").write_text("def\n")
    for text, message in (
        ("score.py", r"scorer is 'score\.py'; write it like FILE\.py:function"),
        (f"{file}:", "write it like"),
        (f"{file}:width", "has no function 'width'"),
        (f"{tmp_path}/nowhere.py:length", "No such file"),
        (f"{tmp_path}/broken.py:length", r"broken\.py:1: invalid syntax"),
    ):
        with pytest.raises(SettingsError, match=message):
            load_scorer(text, [])


# The table


def test_table():
    exact = Result(2, 8, 0.5, {}, 1.25, 3.04)
    assert table({"base": [exact, replace(exact, steps=4, exact=1 / 3)]}) == [
        "| steps allowed | exact | mean steps | seconds |",
        "| --- | --- | --- | --- |",
        "| 2 | 50.0% | 1.25 | 3.0 |",
        "| 4 | 33.3% | 1.25 | 3.0 |",
    ]
    tuned = Result(2, 8, 1.0, {"kept": 0.9996}, 1.5, 4.0)
    base = replace(tuned, exact=0.0, scores={"kept": 0.25})
    columns = ["exact", "kept", "mean steps", "seconds"]
    named = [f"{label}: {c}" for label in ("base", "tuned") for c in columns]
    assert table({"base": [base], "tuned": [tuned]}) == [
        f"| steps allowed | {' | '.join(named)} |",
        "|" + " --- |" * 9,
        "| 2 | 0.0% | 25.0% | 1.50 | 4.0 | 100.0% | 100.0% | 1.50 | 4.0 |",
    ]
    with pytest.raises(SettingsError, match="different step caps"):
        table({"base": [exact], "tuned": [replace(exact, steps=4)]})


# Rows


def write_rows(folder, *lines):
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join(line.encode() for line in lines))
    return file


SYSTEM = {"role": "system", "content": "1"}


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"messages": [USER, ANSWER], "id": None}, "1", "2"),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER], "2"),
        ({"messages": [{**USER, "content": PARTS}, ANSWER]}, "ab", "2"),
        ({"prompt": "a\u2028\x85b", "completion": "2"}, "a\u2028\x85b", "2"),
        ({"prompt": [USER], "completion": [ANSWER]}, "1", "2"),
        ({"prompt": [SYSTEM], "completion": "2"}, [SYSTEM], "2"),
    ],
)
def test_rows_of_both_shapes_are_read(tmp_path, row, prompt, answer):
    texts = [json.dumps(row), json.dumps(row, ensure_ascii=False)]
    file = write_rows(tmp_path, texts[0], "", texts[1] + "\r", "")
    assert read_rows(file) == [
        Row(prompt, answer, where=f"{file}:1"),
        Row(prompt, answer, where=f"{file}:3"),
    ]
    file.rename(tmp_path / "test.jsonl")
    assert [row.answer for row in read_rows(tmp_path)] == [answer, answer]


MESSAGES = '{"messages": %s}'
BROKEN = [
    ("{", "broken JSON"),
    ('"text"', "is str"),
    ('{"prompt": "1"}', "has neither messages nor prompt and completion"),
    (MESSAGES % "[]", "messages is not a list of messages"),
    (MESSAGES % '["1"]', r"messages\[0\] is"),
    (MESSAGES % '[{"role": 1, "content": "1"}]', r"messages\[0\] is"),
    (MESSAGES % '[{"role": "user"}]', r"messages\[0\]: has no content"),
    (
        MESSAGES % '[{"role": "user", "content": [{"type": "image"}]}]',
        "only text is supported",
    ),
    (MESSAGES % json.dumps([ANSWER]), "has nothing before the answer"),
    (MESSAGES % json.dumps([USER, ANSWER, USER]), "last message is the user's"),
    (MESSAGES % json.dumps([USER, ANSWER | {"content": " "}]), "answer is empty"),
    ('{"prompt": "1", "completion": null}', "completion is not a list"),
    ('{"prompt": "\\ud800", "completion": "2"}', "holds a lone surrogate"),
    ('{"prompt": "1", "completion": "2", "tools": {}}', "tools is dict"),
]


def test_broken_row_is_named_with_file_and_line(tmp_path):
    for line, message in BROKEN:
        file = write_rows(tmp_path, '{"prompt": "1", "completion": "2"}', "", line)
        with pytest.raises(DataError, match=f"rows.jsonl:3: .*({message})") as error:
            read_rows(file)
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no rows"):
        read_rows(write_rows(tmp_path, "", "  "))
    with pytest.raises(DataError, match=r"test\.jsonl: no such file"):
        read_rows(tmp_path)
