"""`mlx_dgemma.evaluate`: the table, JSON, scorers, adapters, refusals."""

import json
from dataclasses import asdict

import mlx.core as mx
import pytest
from click.testing import CliRunner
from terminal import ROOT, python, run_in_terminal

from mlx_dgemma import evaluation, load
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.adapters.lora import LoRA, shapes
from mlx_dgemma.cli.evaluate import main
from mlx_dgemma.errors import DGemmaError

COMMAND = python("-m", "mlx_dgemma.evaluate")
SCORER = f"{ROOT / 'examples/sudoku/score.py'}:score"
PAIRS = [
    ("4000\n0310\n0430\n0000", "4123\n2314\n1432\n3241"),
    ("0002\n0000\n1020\n2031", "3142\n4213\n1324\n2431"),
]


def run(*args):
    return CliRunner().invoke(main, ["--model", "sudoku4", *map(str, args)])


def found(*args):
    result = run(*args, "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def timeless(results):
    return [{**result, "seconds": 0} for result in results]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "test.jsonl"
    rows = [json.dumps({"prompt": p, "completion": a}) + "\n" for p, a in PAIRS]
    file.write_text("".join(rows))
    return file


def test_json_is_what_the_library_finds(data):
    printed = found("--data", data, "--steps", "1, 3", "--seed", 2, "--scorer", SCORER)
    rows, how = evaluation.read_rows(data), {"steps": [1, 3], "seed": 2}
    scorer = evaluation.load_scorer(SCORER, rows)
    results = evaluation.evaluate(*load("sudoku4"), rows, scorer=scorer, **how)
    assert timeless(printed["results"]["base"]) == timeless(map(asdict, results))
    assert set(printed.pop("machine")) == {"device", "mlx", "mlx_dgemma"}
    assert list(printed.pop("results")) == ["base"]
    given = {"model": "sudoku4", "adapter_path": None, "data": str(data)}
    given |= {"scorer": SCORER, "count": 2, "batch_size": 50, "seed": 2}
    assert printed == given


def test_table_of_the_first_rows_of_a_folder(data):
    result = run("--data", data.parent, "--count", 1, "-b", 1, "--scorer", SCORER)
    heading, _, line = result.stdout.splitlines()
    assert heading == (
        "| steps allowed | exact | cells | givens kept | mean steps | seconds |"
    )
    assert line.startswith("| 24 | 100.0% | 100.0% | 100.0% | ")


def test_tuned_model_is_measured_beside_the_base(data, tmp_path, monkeypatch):
    model, _ = load("sudoku4")
    lora = LoRA(rank=1, scale=1.0, num_layers=1)
    made = {name: mx.full(s, 9.0) for name, s in shapes(model.config, lora).items()}
    adapters.save(tmp_path, made, adapters.config_of(lora, lora.num_layers))
    printed = found("--data", data, "--adapter-path", tmp_path, "--steps", 4)
    assert printed["adapter_path"] == str(tmp_path)
    base, tuned = printed["results"]["base"][0], printed["results"]["tuned"][0]
    assert (base["exact"], tuned["exact"]) == (1, 0)
    assert (base["steps"], tuned["steps"]) == (4, 4)
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: pytest.fail("ran"))
    result = run("--data", data, "--adapter-path", tmp_path / "nowhere")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nowhere: no such folder" in result.stderr


def test_refusals_are_one_line_before_a_model_is_loaded(data, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_dgemma.loading.load", lambda *a, **k: pytest.fail("ran"))
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "1"}\n')
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "1", "completion": "2"}\n')
    for args, reason in (
        (["--data", "no/where.jsonl"], "no/where.jsonl: no such file"),
        (["--data", "no\n\x1b[2J/where"], "no such file"),
        (["--data", broken], f"{broken}:2: has neither messages"),
        (["--data", other, "--scorer", SCORER], f"{other}:1: the answer has 1 cells"),
        (["--data", data, "--scorer", "score.py"], "write it like FILE.py:function"),
    ):
        result = run(*args)
        assert (result.exit_code, result.stdout) == (1, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and reason in line
        assert isinstance(run(*args, "--debug").exception, DGemmaError)
    for flag, value in (("--count", "0"), ("-b", "0"), ("--seed", "-1"), ("--size", 4)):
        result = run("--data", data, flag, value)
        assert (result.exit_code, result.stdout) == (2, "") and flag in result.stderr
    for steps in ("", "0", "1,x"):
        result = run("--data", data, "--steps", steps)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "--steps is" in result.stderr.splitlines()[-1]
    assert run().exit_code == 2


@pytest.mark.slow
def test_progress_is_drawn_in_a_terminal(data, tmp_path):
    asked = ["--model", "sudoku4", "--data", str(data), "--steps", "1,2", "-b", "1"]
    ended = run_in_terminal([*COMMAND, *asked], stdout=tmp_path / "out")
    assert ended.code == 0
    assert "base, steps 2: 2 of 2" in ended.sent
    assert not any(ended.screen().lines()), "nothing is left of it"
    assert ended.stdout.decode().startswith("| steps allowed |")
