"""The package as a whole: its public names, what importing costs, its limits."""

import ast
import importlib
import inspect
import subprocess
import sys
import time
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlx_dgemma

PACKAGE = Path(mlx_dgemma.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = ["benchmark", "chat", "convert", "evaluate", "fuse", "generate", "lora"]
HEAVY = ["mlx", "mlx_lm", "numpy", "rich", "tokenizers", "transformers", "jinja2"]
HEAVY += ["matplotlib", "yaml"]


def python(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *args]
    return subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)


# --- names ---------------------------------------------------------------------------


def test_public_names_are_listed_alike_everywhere():
    names = mlx_dgemma.__all__
    assert {"load", "generate", "stream_generate", "convert", "Settings"} <= set(names)
    assert names == sorted(set(names))
    assert all(mlx_dgemma.__getattr__(name) is not None for name in names)
    assert dir(mlx_dgemma) == sorted([*names, "__version__"])
    starred: dict[str, object] = {}
    exec("from mlx_dgemma import *", starred)
    assert set(starred) - {"__builtins__"} == set(names)
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node.names for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.name == alias.asname for (alias,) in imports)  # re-exported


def test_function_and_command_of_one_name_live_side_by_side(monkeypatch):
    importlib.reload(mlx_dgemma)
    module = importlib.import_module("mlx_dgemma.convert")
    assert module.main.name == "main"
    assert inspect.isfunction(mlx_dgemma.convert)
    monkeypatch.setattr("mlx_dgemma.convert", len)
    assert mlx_dgemma.convert is len


# --- imports -------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    ended = python("-c", f"{code}\nprint(*sys.modules, file=sys.stderr)")
    return {module.partition(".")[0] for module in ended.stderr.split()}


def test_importing_the_package_imports_nothing_heavy():
    loaded = loaded_by("import sys, mlx_dgemma")
    assert "mlx_dgemma" in loaded
    assert not loaded & {*HEAVY, "click"}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_quick_and_imports_nothing_heavy(name):
    started = time.perf_counter()
    ended = python("-m", f"mlx_dgemma.{name}", "--help")
    assert time.perf_counter() - started < 1
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"Usage: python -m mlx_dgemma.{name} [OPTIONS]")
    loaded = loaded_by(
        "import sys, runpy; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_module('mlx_dgemma.{name}', run_name='__main__')\n"
        "except SystemExit: pass"
    )
    assert "click" in loaded and not loaded & set(HEAVY)


def test_console_script_and_module_are_one_command():
    project = PACKAGE.parent / "pyproject.toml"
    scripts = tomllib.loads(project.read_text())["project"]["scripts"]
    assert set(scripts) == {"mlx_dgemma", *(f"mlx_dgemma.{name}" for name in COMMANDS)}
    for name in COMMANDS:
        module, function = scripts[f"mlx_dgemma.{name}"].split(":")
        main = vars(importlib.import_module(module))[function]
        assert importlib.import_module(f"mlx_dgemma.{name}").main is main


# --- structure: the limits of the contributors' notes, as tests ---------------------

# a module imports from its own folder and from lower ones
ORDER = "errors installation | settings | files | backends | text media | checkpoint"
ORDER += " | model | adapters | diffusion | performance | loading | training"
ORDER += " | evaluation | cli"
RANKS = {
    name: rank
    for rank, names in enumerate(ORDER.split(" | "))
    for name in names.split()
}


def imports_of(file: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    folders, found = file.relative_to(PACKAGE).parent.parts, set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*folders[: len(folders) + 1 - node.level]]
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
            found |= {n if n in modules else ".".join(base) for n in names}
    return found - {""}


def test_imports_neither_climb_nor_circle():
    names = {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
        for file in FILES
        if file.name != "__init__.py" or file.parent != PACKAGE
    }
    names = {name.removesuffix(".__init__"): file for name, file in names.items()}
    graph = {name: imports_of(file, set(names)) for name, file in names.items()}
    climbing = []
    for name, imported in graph.items():
        folder = name.partition(".")[0]
        for other in imported:
            home = other.partition(".")[0]
            if home != folder and RANKS.get(home, 99) >= RANKS.get(folder, 99):
                climbing.append(f"{name} imports {other}")
    assert climbing == []
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


GUESSES = ("getattr", "hasattr", "setattr", "delattr")
PUBLIC = {*mlx_dgemma.__all__, "encode_prompt"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_file_keeps_the_limits(file):
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    tree = ast.parse(source)
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in PUBLIC]
    public = {member for found in classes for member in found.body}
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                assert node.end_lineno - node.lineno < 60, node.name
                count = 0 if node in public else parameters(node)
                assert count <= 8, f"{node.name} has {count}"
            case ast.ExceptHandler():
                assert not catches_all(node), f"line {node.lineno} catches everything"
            case ast.Name(id=name) if name in GUESSES:
                raise AssertionError(f"{name} in line {node.lineno}")
            case ast.Subscript(value=ast.Call(func=ast.Name(id="vars"))):
                raise AssertionError(f"vars()[...] in line {node.lineno}")


def test_every_mutant_still_changes_its_formula():
    tables = (PACKAGE.parent / "tests" / "mutants").glob("*.toml")
    mutants = [one for t in tables for one in tomllib.loads(t.read_text())["mutant"]]
    assert len(mutants) > 50
    for one in mutants:
        source = (PACKAGE / one["file"]).read_text()
        assert source.count(one["old"]) == 1, one["formula"]


def parameters(function) -> int:
    """How many there are, 0 for public functions and click commands."""
    decorators = [ast.dump(decorator) for decorator in function.decorator_list]
    if function.name in PUBLIC or any("click" in text for text in decorators):
        return 0
    args = [*function.args.args, *function.args.kwonlyargs]
    return sum(arg.arg not in ("self", "cls") for arg in args)


def catches_all(handler) -> bool:
    if handler.type is None:
        return True
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
    return bool(names & {"Exception", "BaseException"})
