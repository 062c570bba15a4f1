"""All commands behind one name: help, usage errors, what they load."""

import pytest
from click.testing import CliRunner

from mlx_dgemma.checkpoint.hub import built_in
from mlx_dgemma.cli.main import COMMANDS, main

HEAVY = {"mlx", "numpy", "rich", "tokenizers", "transformers", "jinja2", "yaml"}
ASK, CONVERT = "generate --model m --prompt 1", "convert --hf-path m"
USAGE_ERRORS = {
    "nope": "No such command 'nope'",
    "generate --prompt 1": "--model",
    "generate --model m": "--prompt",
    f"{ASK} --max-tokens 0": "--max-tokens",
    f"{ASK} --steps some": "--steps",
    f"{ASK} --entropy-bound 0": "--entropy-bound",
    f"{ASK} --temperature 1": "--temperature",
    f"{ASK} --chat-template-args {{": "--chat-template-args",
    f"{ASK} --chat-template-args [1]": "is not a JSON object",
    "chat --model m --steps 0": "--steps",
    "chat --model m --seed -1": "--seed",
    "convert": "--hf-path",
    f"{CONVERT} --q-bits 7": "--q-bits",
    f"{CONVERT} --dtype int8": "--dtype",
    f"{CONVERT} --bits 4": "--bits",
    f"{CONVERT} --q-bits 4": "--q-bits is given without",
    f"{CONVERT} --q-mode mxfp4": "--q-mode is given without",
    f"{CONVERT} -q -d": "--quantize and --dequantize exclude",
    "fuse": "--model",
    "fuse --model m --mlx-path x": "--mlx-path",
    "lora --nope": "--nope",
    "evaluate --nope": "--nope",
    "benchmark --nope": "--nope",
}


def run(*args):
    return CliRunner().invoke(main, list(args), prog_name="mlx_dgemma")


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_commands_models_and_exit_codes(args):
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(COMMANDS) == 7
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


@pytest.mark.parametrize("args", USAGE_ERRORS)
def test_usage_error_names_the_flag_and_exits_2(args):
    result = run(*args.split())
    assert (result.exit_code, result.stdout) == (2, "")
    *usage, error = result.stderr.splitlines()
    assert all(line.startswith("Usage: mlx_dgemma") for line in usage)
    assert error.startswith("error: ") and USAGE_ERRORS[args] in error
