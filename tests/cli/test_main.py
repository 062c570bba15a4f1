"""`mlx_dgemma` itself: its list of commands, what it loads, how it reports errors."""

import resource
import subprocess

import pytest
from click.testing import CliRunner
from terminal import environment, python

from mlx_dgemma.checkpoint.hub import built_in
from mlx_dgemma.cli.main import COMMANDS, main

HEAVY = {"mlx", "numpy", "rich", "tokenizers", "transformers", "jinja2", "yaml"}


def run(*args):
    return CliRunner().invoke(main, list(args), prog_name="mlx_dgemma")


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_commands_models_and_exit_codes(args):
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, "")
    for name, text in COMMANDS.items():
        assert f"  {name:<9}  {text}\n" in result.stdout
    assert f"Built-in models: {', '.join(built_in())}." in result.stdout
    assert "Exit codes: 0 done; 1 refused or failed" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_command_runs_as_a_subcommand(name):
    result = run(name, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: mlx_dgemma {name} [OPTIONS]")
    if name in ("generate", "chat", "convert", "fuse"):
        assert ", ".join(built_in()) in " ".join(result.stdout.split())


def test_errors_are_those_of_the_command():
    for args, error in (
        (["nope"], "error: No such command 'nope'."),
        (["generate", "--model", "m"], "error: Missing option '--prompt' / '-p'."),
    ):
        result = run(*args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.splitlines()[1] == error
    result = run("generate", "--model", "no/where", "--prompt", " ")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: --prompt is empty; give some text\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", "generate", "chat", "convert", "fuse"])
def test_help_is_quick_and_imports_nothing_heavy(command):
    code = (
        "import sys, runpy; sys.argv = ['x', *sys.argv[1:], '--help']\n"
        "try: runpy.run_module('mlx_dgemma', run_name='__main__')\n"
        "except SystemExit as left: assert left.code == 0\n"
        f"assert not {HEAVY} & {{name.partition('.')[0] for name in sys.modules}}\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        python("-W", "error", "-c", code, *command.split()),
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 0.5  # CPU seconds, whatever else runs
