"""The package as a whole: its public names, what importing costs, its budgets."""

import ast
import importlib
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import mlx_dgemma

PACKAGE = Path(mlx_dgemma.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = ["benchmark", "chat", "convert", "evaluate", "fuse", "generate", "lora"]
HEAVY = ["mlx", "mlx_lm", "numpy", "rich", "tokenizers", "transformers", "jinja2"]
HEAVY += ["matplotlib", "yaml"]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *args],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )


def test_the_public_names_are_sorted_and_each_is_there():
    names = mlx_dgemma.__all__
    assert names == sorted(names)
    assert len(names) == len(set(names))
    for name in names:
        assert vars(mlx_dgemma).get(name) or mlx_dgemma.__getattr__(name)
    assert set(names) >= {"load", "generate", "stream_generate", "convert"}
    assert set(names) >= {"Prefilled", "Step", "Commit", "Settings", "DGemmaError"}


def test_dir_lists_the_public_names_and_the_version():
    assert dir(mlx_dgemma) == sorted([*mlx_dgemma.__all__, "__version__"])


def test_a_star_import_brings_the_public_names():
    names: dict[str, object] = {}
    exec("from mlx_dgemma import *", names)
    assert set(names) - {"__builtins__"} == set(mlx_dgemma.__all__)


def test_type_checkers_see_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {a.name for node in typed.body for a in node.names}
    assert imported == set(mlx_dgemma.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'mlx_dgemma' has no attribute 'nope'"):
        _ = mlx_dgemma.nope
    with pytest.raises(ImportError):
        exec("from mlx_dgemma import nope")


ORDERS = {
    "module first": "import mlx_dgemma.{name}",
    "command first": "import mlx_dgemma.cli.{name}",
    "function first": "from mlx_dgemma import {name}; import mlx_dgemma.{name}",
    "by its path": "import importlib; importlib.import_module('mlx_dgemma.{name}')",
    "run as a module": (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('mlx_dgemma.{name}', run_name='__main__')\n"
        "except SystemExit as left: assert left.code == 0"
    ),
}


@pytest.mark.parametrize("name", ["convert", "evaluate", "fuse", "generate"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_function_is_never_hidden_by_the_command_of_its_name(name, order):
    ended = python(
        "-c",
        f"{ORDERS[order].format(name=name)}\n"
        "import types, mlx_dgemma\n"
        f"from mlx_dgemma import {name} as imported\n"
        f"assert isinstance(mlx_dgemma.{name}, types.FunctionType)\n"
        f"assert imported is mlx_dgemma.{name}\n"
        f"assert imported.__name__ == '{name}'\n",
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_module_of_a_command_can_still_be_had():
    for name in COMMANDS:
        module = importlib.import_module(f"mlx_dgemma.{name}")
        assert module is sys.modules[f"mlx_dgemma.{name}"]
        assert module.main.name == "main"


def test_a_public_name_can_be_replaced(monkeypatch):
    monkeypatch.setattr("mlx_dgemma.generate", len)
    assert mlx_dgemma.generate is len


def test_a_reload_keeps_the_functions():
    importlib.reload(mlx_dgemma)
    importlib.import_module("mlx_dgemma.convert")
    assert callable(mlx_dgemma.convert)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_quick_and_silent(name):
    started = time.perf_counter()
    ended = python("-m", f"mlx_dgemma.{name}", "--help")
    seconds = time.perf_counter() - started
    print(f"mlx_dgemma.{name} --help: {seconds:.3f} s")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"Usage: python -m mlx_dgemma.{name} [OPTIONS]")
    assert seconds < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    ended = python(
        "-c",
        "import sys, runpy; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_module('mlx_dgemma.{name}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)",
    )
    loaded = {module.partition(".")[0] for module in ended.stderr.split()}
    assert "click" in loaded
    assert not loaded & set(HEAVY)


def test_importing_the_package_imports_nothing_heavy():
    ended = python("-c", "import sys, mlx_dgemma; print(*sys.modules)")
    loaded = {module.partition(".")[0] for module in ended.stdout.split()}
    assert "mlx_dgemma" in loaded
    assert not loaded & {*HEAVY, "click"}


def test_a_console_script_and_its_module_are_one_command():
    project = PACKAGE.parent / "pyproject.toml"
    scripts = tomllib.loads(project.read_text())["project"]["scripts"]
    assert set(scripts) == {f"mlx_dgemma.{name}" for name in COMMANDS}
    for name in COMMANDS:
        module, function = scripts[f"mlx_dgemma.{name}"].split(":")
        main = vars(importlib.import_module(module))[function]
        assert importlib.import_module(f"mlx_dgemma.{name}").main is main


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_keeps_the_budgets(file):
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                assert lines_of_code(node) <= LONGEST_FUNCTION, node.name
            case ast.ExceptHandler():
                assert not catches_all(node), f"line {node.lineno} catches everything"
            case ast.Name(id="getattr" | "hasattr" | "setattr" as name):
                raise AssertionError(f"{name} in line {node.lineno}")


def lines_of_code(function):
    """From `def` to the end, the docstring left out."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        text = function.body[0]
        lines -= text.end_lineno - text.lineno + 1
    return lines


def catches_all(handler):
    if handler.type is None:
        return True
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
    return bool(names & {"Exception", "BaseException"})
