"""`--backend` of every command, and `mlx_dgemma.benchmark --backends`."""

import json
import sys
from importlib import import_module

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dgemma import backends, installation
from mlx_dgemma.backends import BACKENDS, ENVIRONMENT
from mlx_dgemma.errors import BackendError

NOWHERE = "no/where/at/all"
# What each command needs to get as far as its model, which is not there.
COMMANDS = {
    "benchmark": ["--model", NOWHERE],
    "convert": ["--hf-path", NOWHERE, "--mlx-path", "{out}"],
    "evaluate": ["--model", NOWHERE, "--data", "{out}"],
    "fuse": ["--model", NOWHERE, "--save-path", "{out}"],
    "generate": ["--model", NOWHERE, "--prompt", "1"],
    "lora": ["--train", "--model", NOWHERE, "--data", "{out}"],
}


def run(command, *args):
    main = import_module(f"mlx_dgemma.cli.{command}").main
    return CliRunner().invoke(main, [str(a) for a in args])


def refused(result) -> str:
    """The one line of a refusal."""
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(autouse=True)
def linux(monkeypatch):
    """A Linux machine without a GPU, nothing chosen; what is chosen is forgotten."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(backends, "_current", None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(installation, "installed", lambda: ["mlx-cpu"])
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(mx, "set_default_device", lambda device: None)


def test_backends_prints_state_memory_and_numbers():
    lines = run("benchmark", "--backends").stdout.splitlines()
    assert lines[0].split(maxsplit=1) == ["cpu", "in use: MLX's default device"]
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert shown["device"].startswith("CPU (") and int(shown["memory"]) > 1e9
    assert (shown["compiles"], shown["vocabulary_chunk"]) == ("False", "2048")
    assert shown["metal"].startswith("missing: this MLX has no Metal; it needs a Mac")
    assert "pip install 'mlx-dgemma[cuda13]'" in shown["cuda"]
    found = json.loads(run("benchmark", "--backends", "--json").stdout)
    assert list(found) == list(BACKENDS)
    assert found["cuda"] == {"state": f"missing: {BACKENDS['cuda'].missing()}"}
    assert found["cpu"]["score_bytes"] == BACKENDS["cpu"].score_bytes


def test_backends_says_who_asked(monkeypatch, as_gpu):
    shown = run("benchmark", "--backends").stdout.splitlines()
    assert "cpu    available: --backend cpu" in shown
    assert any(line.startswith("metal  in use:") for line in shown)
    shown = run("benchmark", "--backends", "--backend", "cpu").stdout
    assert "in use: asked for by --backend" in shown
    monkeypatch.setattr(backends, "_current", None)
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    shown = run("benchmark", "--backends").stdout
    assert f"in use: asked for by ${ENVIRONMENT}" in shown


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("metal", "metal: this MLX has no Metal"), ("gpu", f"${ENVIRONMENT} is 'gpu'")],
)
def test_backends_shows_a_wrong_choice_without_failing(monkeypatch, name, phrase):
    monkeypatch.setenv(ENVIRONMENT, name)
    result = run("benchmark", "--backends")
    assert result.exit_code == 0
    *lines, last = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(BACKENDS)
    assert last.startswith("none in use") and phrase in last


@pytest.mark.parametrize("command", COMMANDS)
def test_backend_option_of_every_command(command, tmp_path, monkeypatch):
    args = [part.format(out=tmp_path / "out") for part in COMMANDS[command]]
    usage = run(command, "--help").stdout
    assert f"--backend [{'|'.join(BACKENDS)}]" in usage
    assert f"[env: {ENVIRONMENT}; default: MLX's]" in " ".join(usage.split())
    result = run(command, *args, "--backend", "tpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'--backend': 'tpu' is not one of 'cpu', 'metal', 'cuda'" in result.stderr
    missing = [*args, "--backend", "metal"]  # refused before anything else
    assert "metal: this MLX has no Metal" in refused(run(command, *missing))
    assert not (tmp_path / "out").exists() and backends._current is None
    assert isinstance(run(command, *missing, "--debug").exception, BackendError)
    monkeypatch.setenv(ENVIRONMENT, "gpu")  # the option comes first
    assert ENVIRONMENT not in refused(run(command, *args, "--backend", "cpu"))
    assert backends.current().name == "cpu"


def test_a_wrong_variable_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv(ENVIRONMENT, "gpu")
    out = tmp_path / "out"
    for command, args in (
        ("benchmark", "--synthetic tiny -p 6 --steps 1 -n 1"),
        ("convert", f"--hf-path sudoku4 --mlx-path {out}"),
        ("generate", "--model sudoku4 --prompt 1"),
    ):
        line = refused(run(command, *args.split()))
        assert f"asked for by ${ENVIRONMENT} is 'gpu'; known: cpu, metal, cuda" in line
    assert not out.exists()
