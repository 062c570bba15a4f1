"""`--backend` of every command, and `mlx_dgemma.benchmark --backends`."""

import json
import sys
from dataclasses import fields
from importlib import import_module

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dgemma import backends, installation
from mlx_dgemma.backends import BACKENDS, ENVIRONMENT, Choices
from mlx_dgemma.errors import BackendError, DGemmaError
from mlx_dgemma.performance import devices

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
DEFAULT = "the device MLX computes on by default here"


def run(command, *args):
    main = import_module(f"mlx_dgemma.cli.{command}").main
    return CliRunner().invoke(main, [str(a) for a in args])


def survey(*args):
    result = run("benchmark", "--backends", *args)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


@pytest.fixture(autouse=True)
def linux(monkeypatch):
    """A Linux machine without a GPU, nothing chosen; what is chosen is forgotten."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(installation, "installed", lambda: ("mlx-cpu",))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(mx, "set_default_device", lambda device: None)


# Which device, and why


def test_every_device_has_a_line_and_the_one_in_use_its_choices():
    first, second, third, blank, device, *choices = survey().splitlines()
    assert first == f"cpu    in use: {DEFAULT}"
    assert second.startswith("metal  not here: this MLX has no Metal; ")
    assert third.startswith("cuda   not here: this MLX was installed without CUDA: pip")
    assert blank == "" and device.startswith("CPU (")
    assert device.split("; ")[1].startswith("memory ") and device.endswith(" GB")
    why, shown = BACKENDS["cpu"].why, {line.split()[0]: line for line in choices}
    assert list(shown) == list(why)
    assert all(line.endswith(f"  {why[name]}") for name, line in shown.items())
    values = {
        name: line.removesuffix(why[name]).split() for name, line in shown.items()
    }
    assert values["compiles"] == ["compiles", "no"]
    assert values["dequantizes"] == ["dequantizes", "yes"]
    assert values["product_dtype"] == ["product_dtype", "float32"]
    assert values["product_rows"] == ["product_rows", "1"]
    assert values["score_bytes"] == ["score_bytes", "8.4", "MB"]
    assert values["experts"] == ["experts"]


def test_json_says_the_same():
    found = json.loads(survey("--json"))
    assert set(found) == {"refused", "backends", "chosen"}
    assert found["refused"] is None
    missing = {name: one["missing"] for name, one in found["backends"].items()}
    assert missing == {name: device.missing() for name, device in BACKENDS.items()}
    chosen, device = found["chosen"], BACKENDS["cpu"]
    assert (chosen["name"], chosen["reason"]) == ("cpu", DEFAULT)
    assert chosen["device"] == device.description()
    assert chosen["limits"] == vars(device.limits())
    assert chosen["why"] == device.why and chosen["info"] == device.info()
    assert set(chosen["choices"]) == {f.name for f in fields(Choices)}
    given = vars(device.choices) | {"product_dtype": "float32"}
    assert chosen["choices"] == given
    assert devices.lines(found) == survey().splitlines()


def test_a_gpu_shows_what_it_takes_as_given(as_gpu):
    lines = survey().splitlines()
    assert lines[1] == "metal  in use: asked for by the program"
    assert lines[0] == "cpu    here: --backend cpu asks for it"
    assert lines[4].endswith("; memory unknown")
    shown = {line.split()[0]: line.split()[1:3] for line in lines[5:]}
    assert shown["compiles"][0] == "yes"
    assert shown["product_dtype"] == ["as", "given"]
    assert shown["score_bytes"] == ["536.9", "MB"]


def test_a_device_that_was_asked_for_is_shown_as_such(monkeypatch):
    assert "cpu    in use: asked for by --backend" in survey("--backend", "cpu")
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    assert f"cpu    in use: asked for by ${ENVIRONMENT}" in survey()


@pytest.mark.parametrize(
    ("name", "told"),
    [("metal", "metal: this MLX has no Metal"), ("gpu", f"${ENVIRONMENT} is 'gpu'")],
)
def test_that_none_can_be_used_is_a_diagnosis_and_no_failure(monkeypatch, name, told):
    monkeypatch.setenv(ENVIRONMENT, name)
    *lines, blank, last = survey().splitlines()
    assert [line.split()[0] for line in lines] == list(BACKENDS)
    assert lines[0] == "cpu    here: --backend cpu asks for it"
    assert blank == "" and last.startswith("none in use: ") and told in last
    found = json.loads(survey("--json"))
    assert set(found) == {"refused", "backends"} and told in found["refused"]
    assert devices.lines(found) == [*lines, blank, last]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--roofline"], "--roofline needs something to measure"),
        (["--model", "sudoku4"], "give one of --model, --synthetic, --estimate and"),
        (["--synthetic", "tiny"], "give one of --model, --synthetic, --estimate and"),
        (["--estimate", "all"], "give one of --model, --synthetic, --estimate and"),
        (["--prompt", "1"], "--prompt needs --model"),
        (["--q-bits", "4"], "--q-bits, --q-mode and --dtype are for --synthetic"),
    ],
)
def test_what_does_not_go_with_it_is_refused(args, told):
    result = run("benchmark", "--backends", *args)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and told in line


# The option of every command


def given(command, tmp_path):
    return [part.format(out=tmp_path / "out") for part in COMMANDS[command]]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_devices_and_the_variable(command):
    result = run(command, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"--backend [{'|'.join(BACKENDS)}]" in result.stdout
    assert f"[env: {ENVIRONMENT}; default: MLX's]" in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_that_is_here_is_chosen_first(command, tmp_path):
    result = run(command, *given(command, tmp_path), "--backend", "cpu")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "backend" not in line
    found = backends._chosen
    assert found is not None and (found.backend.name, found.asked) == ("cpu", True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_that_is_not_here_is_one_line_before_anything_else(command, tmp_path):
    args = [*given(command, tmp_path), "--backend", "metal"]
    result = run(command, *args)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: metal: this MLX has no Metal; it needs a Mac")
    assert ENVIRONMENT not in line
    assert not (tmp_path / "out").exists() and backends._chosen is None
    assert isinstance(run(command, *args, "--debug").exception, BackendError)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_device_is_wrong_usage(command, tmp_path):
    result = run(command, *given(command, tmp_path), "--backend", "tpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'--backend': 'tpu' is not one of 'cpu', 'metal', 'cuda'" in result.stderr


COMPUTING = {
    "benchmark": ["--synthetic", "tiny", "-p", "6", "--steps", "1", "-n", "1"],
    "convert": ["--hf-path", "sudoku4", "--mlx-path", "{out}"],
    "generate": ["--model", "sudoku4", "--prompt", "1"],
}


@pytest.mark.parametrize(("command", "args"), COMPUTING.items())
def test_a_wrong_variable_is_one_line(monkeypatch, tmp_path, command, args):
    monkeypatch.setenv(ENVIRONMENT, "gpu")
    result = run(command, *(part.format(out=tmp_path / "out") for part in args))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        f"error: backend asked for by ${ENVIRONMENT} is 'gpu'; known: cpu, metal, cuda"
    ]
    assert not (tmp_path / "out").exists()


def test_the_option_is_heard_before_the_variable(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "gpu")
    result = run("benchmark", "--model", NOWHERE, "--backend", "cpu", "--debug")
    assert isinstance(result.exception, DGemmaError)
    assert not isinstance(result.exception, BackendError)
    assert backends.current().name == "cpu"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("libcuda.so.1: cannot open shared object file: No such file", "NVIDIA driver"),
        ("No module named 'mlx'", "No module named 'mlx'; install mlx-dgemma again"),
    ],
)
def test_an_mlx_that_does_not_load_is_one_line(monkeypatch, error, told):
    def refuse(*given):
        raise ImportError(error)

    monkeypatch.setattr(backends, "choose", refuse)
    result = run("generate", *COMMANDS["generate"], "--backend", "cuda")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and told in line
