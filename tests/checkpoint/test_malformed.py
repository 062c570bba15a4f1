"""The commands, given broken folders and flags: one line, and nothing left behind.

The parts of an expected message are separated by an ellipsis. Every case of a reader
is in that reader's tests; here is one of each kind of message.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_dgemma.cli import convert, generate

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER, NAMES = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
FOLDER = object()  # stands where a file should


def put(path: Path, content: Any) -> None:
    """Change a file: new content, other keys of its JSON, a folder; None removes it."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | content))
    else:
        path.unlink()
        if content is FOLDER:
            path.mkdir()


PAGE = b"<!DOCTYPE html><html><body>404</body></html>"
OTHER = {"quantization_config": {"quant_method": "fp8"}}
# What both commands are given: a file and what it holds
FOLDERS: list[tuple[str, Any, str]] = [
    (CONFIG, None, "config.json: no such file"),
    (CONFIG, b'{"model_type": "di', "config.json: broken JSON … line 1"),
    (CONFIG, FOLDER, "config.json … directory"),
    (CONFIG, {"model_type": "llama"}, "model_type is 'llama'"),
    (CONFIG, {"auto_map": {"A": "m.A"}}, "config.json: auto_map"),
    (CONFIG, OTHER, "is 'fp8' … bfloat16 release"),
    (GENERATION, b"{", "generation_config.json: broken JSON … line 1"),
    (GENERATION, {"t_min": 0.9, "t_max": 0.1}, "generation_config.json: t_min … t_max"),
    (WEIGHTS, None, f"has neither {WEIGHTS} nor {INDEX}"),
    (WEIGHTS, PAGE, "not safetensors: download it again"),
    (WEIGHTS, FOLDER, "model.safetensors … directory"),
    (INDEX, b'{"weight_map": {"x": "../y"}}', f"{INDEX}: x … '../y'"),
    (TOKENIZER, None, "tokenizer.json … tokenizer.model"),
    (TOKENIZER, b'{"a": ', "tokenizer.json"),
    (TOKENIZER, b"{}", "tokenizer.json"),
    (TOKENIZER, b"\xff\xfe", "tokenizer.json"),
    (NAMES, b"\xff", "tokenizer_config.json: not UTF-8"),
    (NAMES, {"bos_token": "<no>"}, "tokenizer_config.json … bos_token … <no>"),
    (TEMPLATE, b"\xff", "chat_template.jinja … UTF-8"),
    (TEMPLATE, b"\n{% if %}", "chat_template.jinja … line 2"),
]
# What `generate` alone notices
TALKS: list[tuple[str, Any, str]] = [
    (TEMPLATE, b"{{ raise_exception('no such role') }}", "no such role"),
    (TEMPLATE, b"{{ 1 // 0 }}", "chat_template.jinja … zero"),
    (TEMPLATE, b"{% for i in range(10**9) %}{% endfor %}", "Range"),
    (TEMPLATE, b"{{ ''.__class__.__mro__ }}", "chat_template.jinja … unsafe"),
]
# Flags; MODEL and OUT stand for the two folders
CONVERT = [
    ("--hf-path MODEL/none", "none … no such"),
    ("--hf-path MODEL/config.json", "config.json: is a file"),
    ("--hf-path a--b/c", "a--b/c"),
    ("--mlx-path MODEL", "model: exists … --overwrite"),
    ("--mlx-path MODEL --overwrite", "model: holds the model to convert"),
    ("--mlx-path OUT/x", "out: no such folder"),
    ("--mlx-path MODEL/config.json/x", "config.json"),
    ("-q --q-mode mxfp4 --q-bits 3", "q-bits is 3"),
    ("-d", "not quantised"),
]
GENERATE: list[tuple[str, str, bytes]] = [
    ("--model MODEL/none", "none … no such", b""),
    ("--seed -1", "--seed … -1", b""),
    ("--steps 0", "--steps … 0", b""),
    ("--max-tokens 0", "--max-tokens … 0", b""),
    ("--canvas-length 0", "--canvas-length", b""),
    ("--entropy-bound nan", "bound … nan", b""),
    ("--t-min 2 --t-max 1", "t_min … t_max", b""),
    ("--t-max inf", "t_max … inf", b""),
    ("--stop ", "stop", b""),
    ("--prefill-step-size 0", "--prefill-step-size", b""),
    ("--stability -1", "--stability … -1", b""),
    ("-p \udcff", "surrogate", b""),
    ("-p \u00a0", "--prompt … empty", b""),
    ("-p -", "stdin … empty", b""),
    ("-p -", "stdin … UTF-8", b"abc\xff"),
]
CASES = [("convert", file, content, "", says, b"") for file, content, says in FOLDERS]
CASES += [
    ("generate", file, content, "", says, b"")
    for file, content, says in FOLDERS + TALKS
]
CASES += [("convert", "", None, flags, says, b"") for flags, says in CONVERT]
CASES += [("generate", "", None, *case) for case in GENERATE]


def run(command: str, model: Path, flags: str = "", stdin: bytes = b"") -> Result:
    """Run a command; of a flag given twice the last counts."""
    out = model.with_name("out")
    main, usual = {
        "convert": (convert.main, f"--hf-path {model} --mlx-path {out}"),
        "generate": (generate.main, f"--model {model} -p abc --steps 1 -m 4"),
    }[command]
    given = flags.replace("MODEL", str(model)).replace("OUT", str(out))
    arguments = usual.split() + (given.split(" ") if given else [])
    return CliRunner().invoke(main, arguments, input=stdin)


@pytest.mark.parametrize(
    ("command", "file", "content", "flags", "says", "stdin"),
    CASES,
    ids=[f"{case[0]} {case[3]}: {case[4]}" for case in CASES],
)
def test_malformed_input_is_refused_in_one_line(
    tiny, tmp_path, command, file, content, flags, says, stdin
):
    model = shutil.copytree(tiny, tmp_path / "model")
    if file:
        put(model / file, content)
    before = sorted(os.listdir(tmp_path))
    result = run(command, model, flags, stdin)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert sorted(os.listdir(tmp_path)) == before
    lines = result.stderr.splitlines()
    if result.exit_code == 2:  # click shows how to use the command first
        assert lines[0].startswith("Usage: ")
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    else:
        assert result.exit_code == len(lines) == 1
        assert lines[0].startswith("error: ")
    for part in says.split(" … "):
        assert part in lines[-1].replace(str(tmp_path), "")


def test_whole_folders_are_accepted(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    assert run("generate", model).exit_code == run("convert", model).exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_a_token_the_model_does_not_have_is_named(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    changed = json.loads((model / TOKENIZER).read_text())
    changed["model"]["vocab"]["a"] = 99
    (model / TOKENIZER).write_text(json.dumps(changed))
    result = run("generate", model)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert "id 99" in result.stderr and "0 to 31" in result.stderr
