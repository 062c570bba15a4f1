"""Shares of right answers against a plain loop; broken rows of JSONL."""

import json
from dataclasses import replace

import pytest

from mlx_dgemma import Commit, generate, load, stream_generate
from mlx_dgemma.errors import DataError, SettingsError
from mlx_dgemma.evaluation.evaluate import (
    Result,
    Row,
    check_sudoku,
    evaluate,
    read_rows,
    table,
)
from mlx_dgemma.evaluation.sudoku import draw, score
from mlx_dgemma.text.chat import chat_ids

USER = {"role": "user", "content": "1"}
ANSWER = {"role": "assistant", "content": "2"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.fixture(scope="module")
def solver():
    return load("sudoku4")


@pytest.fixture(scope="module")
def puzzles():
    return [Row(puzzle, answer) for puzzle, answer in draw(6, 4, (4, 6), seed=1)]


def timeless(results):
    return [replace(result, seconds=0) for result in results]


# Against a plain loop


def test_shares_and_steps_are_those_of_a_plain_loop(solver, puzzles):
    caps = [1, 2]
    found = evaluate(*solver, puzzles, task="sudoku", steps=caps, batch_size=4, seed=3)
    right = []
    for cap, result in zip(caps, found, strict=True):
        texts = [
            generate(*solver, row.prompt, seed=3 + n, steps=cap)
            for n, row in enumerate(puzzles)
        ]
        scores = [
            score(row.prompt, text, row.answer)
            for row, text in zip(puzzles, texts, strict=True)
        ]
        right.append(sum(s.exact for s in scores))
        assert (result.steps, result.count, result.mean_steps) == (cap, 6, cap)
        assert result.exact == right[-1] / 6
        assert result.cells == pytest.approx(sum(s.cells for s in scores) / 6)
        assert result.givens == pytest.approx(sum(s.givens for s in scores) / 6)
        assert result.seconds > 0
    assert 0 < right[0] < 6  # or nothing was compared


def test_batches_and_rows_beside_change_nothing(solver, puzzles):
    one = timeless(evaluate(*solver, puzzles[:4], steps=[1], batch_size=1))
    assert one == timeless(evaluate(*solver, puzzles[:4], steps=[1], batch_size=3))
    assert one == timeless(evaluate(*solver, puzzles[:4], steps=[1]))


def test_an_answer_may_span_several_canvases(tiny_model):
    """Right answers are what the model says, of one canvas or of several."""
    rows, taken, canvases = [], 0, []
    for seed in range(12):
        asked = {"seed": 5 + seed, "steps": 2}
        events = list(stream_generate(*tiny_model, "ab", **asked))
        commits = [event for event in events if isinstance(event, Commit)]
        rows.append(Row("ab", f" {''.join(c.text for c in commits)}\n"))
        taken += sum(c.steps for c in commits)
        canvases.append(len(commits))
    assert max(canvases) > 1
    (result,) = evaluate(*tiny_model, rows, steps=[2], batch_size=5, seed=5)
    assert (result.exact, result.mean_steps) == (1.0, taken / 12)
    (worse,) = evaluate(*tiny_model, [Row("ab", "z"), *rows[1:]], steps=[2], seed=5)
    assert worse.exact == 11 / 12
    (others,) = evaluate(*tiny_model, rows, steps=[2], seed=6)
    assert others.exact < 1


def test_no_step_cap_is_the_checkpoints_own(solver, puzzles):
    (result,) = evaluate(*solver, puzzles[:2])
    assert result.steps == solver[0].settings.steps
    assert (result.cells, result.givens) == (None, None)
    assert 1 < result.mean_steps < result.steps


def test_progress_is_told_batch_by_batch(solver, puzzles):
    told = []
    evaluate(
        *solver,
        puzzles[:3],
        steps=[1, 2],
        batch_size=2,
        progress=lambda *numbers: told.append(numbers),
    )
    assert told == [(1, 2, 3), (1, 3, 3), (2, 2, 3), (2, 3, 3)]


@pytest.fixture
def ids_seen(monkeypatch):
    """The ids of every prompt that is admitted."""
    from mlx_dgemma.evaluation import evaluate as module

    seen, admit = [], module.Engine.admit

    def note(engine, prompt, *rest):
        seen.append(list(prompt))
        return admit(engine, prompt, *rest)

    monkeypatch.setattr(module.Engine, "admit", note)
    return seen


def test_a_conversation_is_prompted_as_for_generating(tiny_model, ids_seen):
    talk = [{"role": "system", "content": "a"}, USER, ANSWER, USER]
    evaluate(*tiny_model, [Row(talk, "x"), Row("1", "x")], steps=[1])
    _, tokenizer = tiny_model
    assert ids_seen == [chat_ids(tokenizer, p) for p in (talk, "1")]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"task": "chess"}, "task is 'chess'; supported: exact, sudoku"),
        ({"rows": []}, "nothing to evaluate"),
        ({"steps": []}, "nothing to evaluate"),
        ({"steps": [2, 0]}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(
    tiny_model, ids_seen, asked, told
):
    with pytest.raises(SettingsError, match=told):
        evaluate(*tiny_model, **{"rows": [Row("1", "2")]} | asked)
    assert not ids_seen


def test_a_row_that_cannot_be_asked_is_named(tiny_model, ids_seen, puzzles):
    bad = Row([{"role": "wizard", "content": "1"}], "2", where="data.jsonl:7")
    with pytest.raises(DataError, match=r"data\.jsonl:7: message 0: role is 'wizard'"):
        evaluate(*tiny_model, [Row("1", "2"), bad])
    bad = Row("1", "2", where="data.jsonl:8")
    with pytest.raises(DataError, match=r"data\.jsonl:8: the answer has 1 cells"):
        evaluate(*tiny_model, [*puzzles, bad], task="sudoku")
    assert not ids_seen


def test_the_puzzle_is_in_the_last_message(puzzles):
    row = puzzles[0]
    talk = [USER, ANSWER, {"role": "user", "content": f"? {row.prompt}"}]
    check_sudoku([Row(talk, row.answer)])
    with pytest.raises(DataError, match="does not end with a 4x4 Sudoku"):
        check_sudoku([Row([*talk, USER], row.answer)])


# The table

EXACT = Result(2, 8, 0.5, None, None, 1.25, 3.04)
BETTER = Result(2, 8, 1.0, 1.0, 0.9996, 1.5, 4.0)


def test_a_single_label_needs_no_name():
    assert table({"base": [EXACT, replace(EXACT, steps=4, exact=1 / 3)]}) == [
        "| steps allowed | exact | mean steps | seconds |",
        "| --- | --- | --- | --- |",
        "| 2 | 50.0% | 1.25 | 3.0 |",
        "| 4 | 33.3% | 1.25 | 3.0 |",
    ]


def test_labels_stand_side_by_side():
    sudoku = replace(BETTER, exact=0.0, cells=0.25)
    heading, rule, line = table({"base": [sudoku], "tuned": [BETTER]})
    columns = ["exact", "cells", "givens kept", "mean steps", "seconds"]
    named = [f"{label}: {c}" for label in ("base", "tuned") for c in columns]
    assert heading == f"| steps allowed | {' | '.join(named)} |"
    assert rule == "|" + " --- |" * 11
    base, tuned = "0.0% | 25.0% | 100.0% | 1.50", "100.0% | 100.0% | 100.0% | 1.50"
    assert line == f"| 2 | {base} | 4.0 | {tuned} | 4.0 |"


def test_different_step_caps_make_no_table():
    with pytest.raises(SettingsError, match="different step caps"):
        table({"base": [EXACT], "tuned": [replace(EXACT, steps=4)]})


# Rows


def written(folder, *lines):
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join(line.encode() for line in lines))
    return file


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"messages": [USER, ANSWER]}, "1", "2"),
        ({"messages": [USER, ANSWER], "id": 7}, "1", "2"),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER], "2"),
        ({"messages": [{**USER, "content": PARTS}, ANSWER]}, "ab", "2"),
        ({"prompt": "1", "completion": " 2\n"}, "1", " 2\n"),
        ({"prompt": "a\u2028\x85b", "completion": "2"}, "a\u2028\x85b", "2"),
        ({"prompt": [USER], "completion": [ANSWER]}, "1", "2"),
        ({"prompt": [ANSWER, USER], "completion": "2"}, [ANSWER, USER], "2"),
        (
            {"prompt": [{"role": "system", "content": "1"}], "completion": "2"},
            [{"role": "system", "content": "1"}],
            "2",
        ),
    ],
)
def test_rows_of_both_shapes_are_read(tmp_path, row, prompt, answer):
    texts = [json.dumps(row), json.dumps(row, ensure_ascii=False)]
    file = written(tmp_path, texts[0], "", texts[1] + "\r", "")
    first, second = read_rows(file)
    assert (first.prompt, first.answer) == (prompt, answer)
    assert (second.prompt, second.answer) == (prompt, answer)
    assert (first.where, second.where) == (f"{file}:1", f"{file}:3")


def test_of_a_folder_the_test_rows_are_read(tmp_path):
    written(tmp_path, '{"prompt": "1", "completion": "2"}').rename(
        tmp_path / "test.jsonl"
    )
    (tmp_path / "train.jsonl").write_text("broken")
    assert [row.answer for row in read_rows(tmp_path)] == ["2"]
    assert [row.answer for row in read_rows(str(tmp_path / "test.jsonl"))] == ["2"]


def test_tools_reach_the_template(tiny_model, tmp_path, ids_seen, monkeypatch):
    rows = read_rows(
        written(tmp_path, json.dumps({"messages": [USER, ANSWER], "tools": [{"a": 1}]}))
    )
    model, tokenizer = tiny_model
    asked = []

    def render(messages, **more):
        asked.append((messages, more["tools"]))
        return "<bos>ab"

    monkeypatch.setattr(tokenizer.chat_template, "render", render)
    evaluate(model, tokenizer, rows, steps=[1])
    assert asked == [([USER], [{"a": 1}])]
    assert ids_seen == [tokenizer.encode("<bos>ab")]


MESSAGES = '{"messages": %s}'


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "broken JSON: Expecting property name"),
        ('{"messages": ]}', "broken JSON"),
        ("[" * 200_000, "broken JSON"),
        ("1" * 5_000, "broken JSON"),
        ('"text"', "is str; it must be an object"),
        ("[]", "is list"),
        ("null", "is NoneType"),
        ("{}", "has neither messages nor prompt and completion"),
        ('{"prompt": "1"}', "has neither messages nor prompt and completion"),
        ('{"text": "1"}', "has neither messages"),
        (MESSAGES % "[]", r"messages must be a list of messages, not \[\]"),
        (MESSAGES % '"1"', 'messages must be a list of messages, not "1"'),
        (MESSAGES % '["1"]', r'messages\[0\] is "1", not {"role", "content"}'),
        (MESSAGES % '[{"content": "1"}]', r"messages\[0\] is"),
        (MESSAGES % '[{"role": 1, "content": "1"}]', r"messages\[0\] is"),
        (MESSAGES % '[{"role": "user"}]', r"messages\[0\]: content is null"),
        (MESSAGES % '[{"role": "user", "content": 1}]', "content is 1; it must be"),
        (
            MESSAGES % '[{"role": "user", "content": [{"type": "image"}]}]',
            "content is .*image",
        ),
        (MESSAGES % json.dumps([ANSWER]), "has nothing before the answer"),
        (MESSAGES % json.dumps([USER, ANSWER, USER]), "last message is the user's"),
        (MESSAGES % json.dumps([USER, ANSWER | {"content": " "}]), "answer is empty"),
        (
            MESSAGES % json.dumps([USER, {"role": "assistant", "tool_calls": [1]}]),
            "its answer is empty",
        ),
        ('{"prompt": 1, "completion": "2"}', "prompt must be a list of messages"),
        ('{"prompt": "1", "completion": null}', "completion must be a list"),
        ('{"prompt": "1", "completion": ""}', "its answer is empty"),
        ('{"prompt": "\\ud800", "completion": "2"}', "holds a lone surrogate"),
        ('{"prompt": "1", "completion": "2", "tools": {}}', "tools is dict"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(tmp_path, line, told):
    file = written(tmp_path, '{"prompt": "1", "completion": "2"}', "", line)
    with pytest.raises(DataError, match=f"rows.jsonl:3: .*{told}") as error:
        read_rows(file)
    assert str(error.value).startswith(f"{file}:3: ")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


def test_files_without_rows_are_refused(tmp_path):
    for lines in ([], ["", "  "]):
        with pytest.raises(DataError, match=r"rows\.jsonl: holds no rows"):
            read_rows(written(tmp_path, *lines))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"test\.jsonl: No such file"):
        read_rows(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\xff", "completion": "2"}')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not UTF-8 at byte 12"):
        read_rows(tmp_path / "rows.jsonl")
