"""`mlx_dgemma.evaluate`: rows read or drawn, the table, JSON, refusals."""

import json
import subprocess
from dataclasses import asdict

import mlx.core as mx
import pytest
from click.testing import CliRunner
from terminal import environment, python, run_in_terminal

from mlx_dgemma import load
from mlx_dgemma.cli.evaluate import ANOTHER, main
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.evaluation import evaluate as library
from mlx_dgemma.evaluation import sudoku

COMMAND = python("-W", "error", "-m", "mlx_dgemma.evaluate")
DRAW = ["--model", "sudoku4", "--size", "4", "--givens", "5-7"]
HEAVY = {"mlx", "mlx_lm", "numpy", "rich", "tokenizers", "transformers", "jinja2"}


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def found(*args):
    result = run(*args, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def timeless(results):
    return [{**result, "seconds": 0} for result in results]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sudoku.write_data(folder, size=4, givens=(5, 7), train=0, valid=0, test=4)
    return folder


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mlx_dgemma.diffusion.generation.load", refuse)


# What is measured


def test_json_is_what_the_library_finds(data):
    told = found("--model", "sudoku4", "--data", data, "--steps", "1, 3", "--seed", 2)
    rows = library.read_rows(data / "test.jsonl")
    results = library.evaluate(*load("sudoku4"), rows, steps=[1, 3], seed=2)
    (label, base), *more = told.pop("results").items()
    assert (label, more) == ("base", [])
    assert timeless(base) == timeless(map(asdict, results))
    assert set(told.pop("machine")) == {"device", "mlx", "mlx_dgemma"}
    assert told == {
        "model": "sudoku4",
        "adapter_path": None,
        "data": str(data),
        "drawn": None,
        "task": "exact",
        "count": 4,
        "batch_size": 50,
        "seed": 2,
    }


def test_drawn_puzzles_are_no_data_sets_of_the_same_seed():
    told = found(*DRAW, "--count", 3, "--steps", 1, "--seed", 7)
    assert (told["task"], told["count"]) == ("sudoku", 3)
    assert told["drawn"] == {"size": 4, "givens": "5-7"}
    drawn = sudoku.draw(3, 4, (5, 7), seed=ANOTHER + 7)
    assert drawn != sudoku.draw(3, 4, (5, 7), seed=7)
    rows = [library.Row(*pair) for pair in drawn]
    asked = {"task": "sudoku", "steps": [1], "seed": 7}
    results = library.evaluate(*load("sudoku4"), rows, **asked)
    assert timeless(told["results"]["base"]) == timeless(map(asdict, results))


def test_the_table_of_the_first_rows_of_a_file(data):
    asked = ["--data", data / "test.jsonl", "--task", "sudoku", "--count", 2, "-b", 1]
    result = run("--model", "sudoku4", *asked)
    assert (result.exit_code, result.stderr) == (0, "")
    heading, rule, line = result.stdout.splitlines()
    assert heading == (
        "| steps allowed | exact | cells | givens kept | mean steps | seconds |"
    )
    assert rule.count("---") == 6
    assert line.startswith("| 24 | 100.0% | 100.0% | 100.0% | ")


@pytest.mark.parametrize(
    ("flags", "task"),
    [
        ([], "sudoku"),
        (["--task", "exact"], "exact"),
    ],
)
def test_drawing_means_the_task_sudoku_unless_said(flags, task):
    told = found(*DRAW, "--count", 1, "--steps", 1, *flags)
    assert told["task"] == task
    assert (told["results"]["base"][0]["cells"] is None) == (task == "exact")


def test_progress_is_drawn_in_a_terminal_alone(tmp_path):
    out = tmp_path / "out"
    asked = [*DRAW, "--count", "3", "--steps", "1,2", "-b", "2"]
    ended = run_in_terminal([*COMMAND, *asked], stdout=out)
    assert ended.code == 0
    assert ended.screen().lines() == [
        "base, steps 1: 3 of 3",
        "base, steps 2: 3 of 3",
    ]
    assert ended.stdout.decode().startswith("| steps allowed |")
    assert len(ended.stdout.splitlines()) == 4


# With an adapter: its folder is made here, by the training side's own writer


def adapter(folder, value):
    """An adapter of the last layer whose numbers are all `value`."""
    from mlx_dgemma.adapters import folder as adapters
    from mlx_dgemma.adapters.lora import LoRA, shapes

    model, _ = load("sudoku4")
    lora = LoRA(rank=1, scale=1.0, num_layers=1)
    weights = {
        name: mx.full(shape, value)
        for name, shape in shapes(model.config, lora).items()
    }
    config = adapters.config_of(lora, lora.num_layers)
    adapters.save(folder, weights, config)
    return folder


def test_the_tuned_model_is_measured_beside_the_base(tmp_path):
    asked = [*DRAW, "--count", 3, "--steps", "1,2"]
    alone = found(*asked)["results"]["base"]
    same = adapter(tmp_path / "same", 0.0)
    told = found(*asked, "--adapter-path", same)
    assert told["adapter_path"] == str(same)
    assert list(told["results"]) == ["base", "tuned"]
    for results in told["results"].values():
        assert timeless(results) == timeless(alone)
    worse = adapter(tmp_path / "worse", 9.0)
    result = run(*asked, "--adapter-path", worse)
    assert (result.exit_code, result.stderr) == (0, "")
    heading, _, *lines = result.stdout.splitlines()
    assert [name.strip() for name in heading.split("|")][2:-1] == [
        f"{label}: {column}"
        for label in ("base", "tuned")
        for column in ("exact", "cells", "givens kept", "mean steps", "seconds")
    ]
    for line, base in zip(lines, alone, strict=True):
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[2] == f"{base['exact']:.1%}"
        assert cells[7] == "0.0%"


def test_an_adapter_that_does_not_fit_is_refused_before_anything_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(library, "evaluate", lambda *a, **k: pytest.fail("measured"))
    result = run(*DRAW, "--adapter-path", tmp_path / "nowhere")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nowhere: no such folder" in result.stderr
    folder = adapter(tmp_path / "torn", 0.0)
    (folder / "adapters.safetensors").unlink()
    result = run(*DRAW, "--adapter-path", folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "adapters.safetensors: no such file" in result.stderr


# Refusals


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "give one of --data and --givens"),
        (["--data", "x", "--givens", "36-46"], "give one of --data and --givens"),
        (["--data", "x", "--size", "4"], "--size needs --givens"),
        (["--data", "no/where.jsonl"], "no/where.jsonl: No such file"),
        (["--data", "no\n\x1b[2J/where"], "No such file"),
        (["--givens", "some"], "--givens is 'some'; write it like 36-46"),
        (["--givens", "10-20"], "givens of a 9x9 puzzle is 10"),
        (["--givens", "40-36"], "givens 40-36 is no range"),
        (["--givens", "5-20", "--size", "4"], "givens of a 4x4 puzzle is 20"),
        *(
            (["--givens", "40", "--count", "1", "--steps", steps], "--steps is")
            for steps in ("", "0", "1,,2", "1,x", "-1", "1.5", "٣", "9" * 5000)
        ),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(args, told):
    result = run("--model", "sudoku4", *args)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and told in line
    assert isinstance(run("--model", "x", *args, "--debug").exception, DGemmaError)


@pytest.mark.usefixtures("nothing_loads")
def test_a_broken_row_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "1"}\n')
    result = run("--model", "sudoku4", "--data", file)
    assert result.stderr.startswith(f"error: {file}:2: has neither messages")
    file.write_text('{"prompt": "1", "completion": "2"}\n')
    result = run("--model", "sudoku4", "--data", file, "--task", "sudoku")
    assert result.stderr.startswith(f"error: {file}:1: the answer has 1 cells")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((flag, "0") for flag in ("--count", "--batch-size", "-b")),
        ("--seed", "-1"),
        ("--size", "5"),
        ("--task", "chess"),
        ("--temperature", "1"),
    ],
)
def test_wrong_usage_names_the_flag_and_exits_2(flag, value):
    result = run(*DRAW, flag, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert flag in result.stderr
    assert run("--data", "x").exit_code == 2


def test_more_steps_than_the_sampler_takes_are_refused():
    result = run(*DRAW, "--count", 1, "--steps", 2_000_000)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: steps is 2000000; it must be a whole")


# As a person runs it


def ended(command):
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_help_names_every_option_and_prints_no_warning():
    result = ended([*COMMAND, "--help"])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: python -m mlx_dgemma.evaluate [OPTIONS]")
    for option in main.params:
        assert all(name in result.stdout for name in option.opts)


def test_help_imports_nothing_heavy():
    result = ended(
        python(
            *("-W", "error", "-c"),
            "import sys, runpy; sys.argv[1:] = ['--help']\n"
            "try: runpy.run_module('mlx_dgemma.evaluate', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print(*sys.modules, file=sys.stderr)",
        )
    )
    loaded = {module.partition(".")[0] for module in result.stderr.split()}
    assert "click" in loaded
    assert not loaded & HEAVY
