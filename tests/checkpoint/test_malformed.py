"""The real commands, given broken folders and flags: one line, and nothing left."""

import pytest
from malformed_table import CASES, Case, ask

ASKED = [(case, command) for case in CASES for command in case.commands]


def named(value: Case | str) -> str:
    return value.name if isinstance(value, Case) else value


@pytest.mark.parametrize(("case", "command"), ASKED, ids=named)
def test_a_malformed_input_is_answered_in_one_line(tiny, tmp_path, case, command):
    answer = ask(case, command, tiny, tmp_path)
    assert answer.crash is None
    assert answer.code in (1, 2)
    assert answer.stdout == ""
    assert answer.left == ()
    lines = answer.stderr.splitlines()
    if answer.code == 2:  # click shows how to use the command first
        assert lines[0].startswith("Usage: ")
        assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
    else:
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
    for part in case.says:
        assert part in answer.line.replace(str(tmp_path), "")


def test_the_table_names_each_case_once():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert len(names) >= 100


@pytest.mark.parametrize("command", ["convert", "generate"])
def test_what_is_not_broken_is_not_refused(tiny, tmp_path, command):
    answer = ask(Case(name="good", says=()), command, tiny, tmp_path)
    assert answer.code == 0
    assert answer.left == (("out",) if command == "convert" else ())
