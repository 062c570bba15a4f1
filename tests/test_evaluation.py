"""Shares of right answers against a plain loop; scorers; broken rows of JSONL."""

import json
from dataclasses import replace

import pytest

from mlx_dgemma import Commit, generate, load, stream_generate
from mlx_dgemma.errors import DataError, SettingsError
from mlx_dgemma.evaluation import (
    Result,
    Row,
    check_rows,
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


def timeless(results):
    return [replace(result, seconds=0) for result in results]


# Against a plain loop


def test_shares_scores_and_steps_are_those_of_a_plain_loop(solver):
    caps = [1, 24]
    how = {"steps": caps, "batch_size": 2, "seed": 3}
    found = evaluate(*solver, PUZZLES, scorer=digits, **how)
    for cap, result in zip(caps, found, strict=True):
        texts, taken = [], 0
        for n, row in enumerate(PUZZLES):
            events = stream_generate(*solver, row.prompt, seed=3 + n, steps=cap)
            commits = [event for event in events if isinstance(event, Commit)]
            texts.append("".join(c.text for c in commits))
            taken += sum(c.steps for c in commits)
        exact = [t == row.answer for t, row in zip(texts, PUZZLES, strict=True)]
        scores = [
            digits("", text, row.answer)
            for text, row in zip(texts, PUZZLES, strict=True)
        ]
        means = {k: sum(s[k] for s in scores) / 3 for k in ("digits", "right")}
        assert (result.steps, result.count) == (cap, 3)
        assert result.exact == sum(exact) / 3
        assert result.scores == pytest.approx(means)
        assert result.mean_steps == taken / 3
        assert result.seconds > 0
    assert found[1].exact == 2 / 3  # or nothing was compared


def test_batches_and_other_rows_change_nothing(solver):
    one = timeless(evaluate(*solver, PUZZLES, steps=[1], batch_size=1))
    assert one == timeless(evaluate(*solver, PUZZLES, steps=[1]))
    (capless,) = evaluate(*solver, PUZZLES[:1])
    assert (capless.steps, capless.scores) == (solver[0].settings.steps, {})
    assert 1 < capless.mean_steps < capless.steps


def test_answer_may_span_several_canvases(tiny_model):
    """Right answers are what the model says, of one canvas or of several."""
    rows, taken, canvases = [], 0, []
    for seed in range(6):
        asked = {"seed": 5 + seed, "steps": 2}
        events = list(stream_generate(*tiny_model, "ab", **asked))
        commits = [event for event in events if isinstance(event, Commit)]
        rows.append(Row("ab", f" {''.join(c.text for c in commits)}\n"))
        taken += sum(c.steps for c in commits)
        canvases.append(len(commits))
    assert max(canvases) > 1
    told = []
    (result,) = evaluate(
        *tiny_model,
        rows,
        steps=[2],
        batch_size=4,
        seed=5,
        progress=lambda *numbers: told.append(numbers),
    )
    assert (result.exact, result.mean_steps) == (1.0, taken / 6)
    assert told == [(2, 4, 6), (2, 6, 6)]
    (others,) = evaluate(*tiny_model, rows, steps=[2], seed=6)
    assert others.exact < 1


def test_conversation_is_prompted_as_for_generating(tiny_model):
    talk = [{"role": "system", "content": "a"}, USER, ANSWER, USER]
    ids = chat_ids(tiny_model[1], talk)
    answer = generate(*tiny_model, ids, seed=0, steps=1)
    (result,) = evaluate(*tiny_model, [Row(talk, answer)], steps=[1])
    assert result.exact == 1
    assert Row(talk, "x").question == "1"


def test_tools_reach_the_template(tiny_model, tmp_path, monkeypatch):
    line = json.dumps({"messages": [USER, ANSWER], "tools": [{"a": 1}]})
    rows = read_rows(written(tmp_path, line))
    model, tokenizer = tiny_model
    asked = []

    def render(messages, **more):
        asked.append((messages, more["tools"]))
        return "<bos>ab"

    monkeypatch.setattr(tokenizer.chat_template, "render", render)
    evaluate(model, tokenizer, rows, steps=[1])
    assert asked == [([USER], [{"a": 1}])]


# Refusals


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*args):
        raise AssertionError("something was denoised")

    monkeypatch.setattr("mlx_dgemma.evaluation.Engine", refuse)


@pytest.mark.usefixtures("nothing_runs")
def test_impossible_settings_and_prompts_are_refused_before_anything_runs(tiny_model):
    for asked, told in (
        ({"rows": []}, "nothing to evaluate"),
        ({"steps": []}, "nothing to evaluate"),
        ({"steps": [2, 0]}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(SettingsError, match=told):
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
    with pytest.raises(DataError, match=r"data\.jsonl:3: no puzzle"):
        check_rows(rows, lambda prompt, expected: strict(prompt, "", expected))


def test_scorer_is_loaded_from_a_file(tmp_path):
    file = tmp_path / "score.py"
    file.write_text("def length(p, a, e): return {'length': 2}\ncheck = max\n")
    scorer, check = load_scorer(f"{file}:length")
    assert scorer("", "", "") == {"length": 2} and check is max
    file.write_text("def length(p, a, e): return {}\n")
    assert load_scorer(f"{file}:length")[1] is None
    for text, told in (
        ("score.py", r"scorer is 'score\.py'; write it like FILE\.py:function"),
        (f"{file}:", "write it like"),
        (f"{file}:width", "has no function 'width'"),
        (f"{tmp_path}/nowhere.py:length", "No such file"),
    ):
        with pytest.raises(SettingsError, match=told):
            load_scorer(text)
    file.write_text("def\n")
    with pytest.raises(SettingsError, match=r"score\.py:1: invalid syntax"):
        load_scorer(f"{file}:length")


# The table

EXACT = Result(2, 8, 0.5, {}, 1.25, 3.04)
SCORED = Result(2, 8, 1.0, {"cells": 1.0, "kept": 0.9996}, 1.5, 4.0)


def test_table():
    assert table({"base": [EXACT, replace(EXACT, steps=4, exact=1 / 3)]}) == [
        "| steps allowed | exact | mean steps | seconds |",
        "| --- | --- | --- | --- |",
        "| 2 | 50.0% | 1.25 | 3.0 |",
        "| 4 | 33.3% | 1.25 | 3.0 |",
    ]
    worse = replace(SCORED, exact=0.0, scores={"cells": 0.25, "kept": 1.0})
    heading, rule, line = table({"base": [worse], "tuned": [SCORED]})
    columns = ["exact", "cells", "kept", "mean steps", "seconds"]
    named = [f"{label}: {c}" for label in ("base", "tuned") for c in columns]
    assert heading == f"| steps allowed | {' | '.join(named)} |"
    assert rule == "|" + " --- |" * 11
    base, tuned = "0.0% | 25.0% | 100.0% | 1.50", "100.0% | 100.0% | 100.0% | 1.50"
    assert line == f"| 2 | {base} | 4.0 | {tuned} | 4.0 |"
    with pytest.raises(SettingsError, match="different step caps"):
        table({"base": [EXACT], "tuned": [replace(EXACT, steps=4)]})


# Rows


def written(folder, *lines):
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join(line.encode() for line in lines))
    return file


SYSTEM = {"role": "system", "content": "1"}


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"messages": [USER, ANSWER], "id": 7}, "1", "2"),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER], "2"),
        ({"messages": [{**USER, "content": PARTS}, ANSWER]}, "ab", "2"),
        ({"prompt": "a\u2028\x85b", "completion": "2"}, "a\u2028\x85b", "2"),
        ({"prompt": [USER], "completion": [ANSWER]}, "1", "2"),
        ({"prompt": [SYSTEM], "completion": "2"}, [SYSTEM], "2"),
    ],
)
def test_rows_of_both_shapes_are_read(tmp_path, row, prompt, answer):
    texts = [json.dumps(row), json.dumps(row, ensure_ascii=False)]
    file = written(tmp_path, texts[0], "", texts[1] + "\r", "")
    first, second = read_rows(file)
    assert (first.prompt, first.answer) == (second.prompt, second.answer)
    assert (first.prompt, first.answer) == (prompt, answer)
    assert (first.where, second.where) == (f"{file}:1", f"{file}:3")
    file.rename(tmp_path / "test.jsonl")
    assert [row.answer for row in read_rows(tmp_path)] == [answer, answer]


MESSAGES = '{"messages": %s}'
CALL = {"role": "assistant", "tool_calls": [1]}
BROKEN = [
    ("{", "broken JSON"),
    ("[" * 200_000, "nested too deeply|broken JSON"),
    ('"text"', "is str"),
    ("{}", "has neither messages nor prompt and completion"),
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
    (MESSAGES % json.dumps([USER, CALL]), "answer is empty"),
    ('{"prompt": "1", "completion": null}', "completion is not a list"),
    ('{"prompt": "\\ud800", "completion": "2"}', "holds a lone surrogate"),
    ('{"prompt": "1", "completion": "2", "tools": {}}', "tools is dict"),
]


@pytest.mark.parametrize(("line", "told"), BROKEN)
def test_broken_row_is_named_with_file_and_line(tmp_path, line, told):
    file = written(tmp_path, '{"prompt": "1", "completion": "2"}', "", line)
    with pytest.raises(DataError, match=f"rows.jsonl:3: .*({told})") as error:
        read_rows(file)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


def test_files_without_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no rows"):
        read_rows(written(tmp_path, "", "  "))
    with pytest.raises(DataError, match=r"test\.jsonl: no such file"):
        read_rows(tmp_path)
