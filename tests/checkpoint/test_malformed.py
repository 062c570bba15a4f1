"""The commands, given broken folders and flags: one line, and nothing left behind.

The parts of an expected message are separated by an ellipsis. Every case of a reader
is in that reader's tests; here is one of each kind of message.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from mlx_dgemma.cli import convert, generate

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER, NAMES = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
NORM = "model.decoder.norm.weight"
Break = Callable[[Path], object]


def put(name: str, content: bytes | str) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def gone(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def made_folder(name: str) -> Break:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Break:
    def edited(folder: Path) -> None:
        path = folder / name
        value = json.loads(path.read_text()) if path.exists() else {}
        change(value)
        path.write_text(json.dumps(value))

    return edited


def keys(name: str = CONFIG, **changes: Any) -> Break:
    return edit(name, lambda value: value.update(changes))


def text(**changes: Any) -> Break:
    return edit(CONFIG, lambda value: value["text_config"].update(changes))


def tensor(name: str, array: mx.array | None) -> Break:
    """One tensor of the weight file changed, or removed."""

    def change(folder: Path) -> None:
        arrays = dict(mx.load(str(folder / WEIGHTS)))
        mx.eval(arrays)
        changed = {n: a for n, a in (arrays | {name: array}).items() if a is not None}
        mx.save_safetensors(str(folder / WEIGHTS), changed)

    return change


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def renamed(old: str, new: str, content: bytes) -> Break:
    return lambda folder: (gone(old)(folder), put(new, content)(folder))


def at_target(make: Callable[[Path, Path], object]) -> Break:
    """Something made where the conversion is to be written."""
    return lambda folder: make(folder, folder.with_name("out"))


def whole(folder: Path) -> None:
    """Leave the folder as it is."""


PAGE = b"<!DOCTYPE html><html><body>404</body></html>"
# What both commands are given
FOLDERS: list[tuple[Break, str]] = [
    (gone(CONFIG), "config.json: no such file"),
    (put(CONFIG, '{"model_type": "di'), "config.json: broken JSON … line 1"),
    (made_folder(CONFIG), "config.json … directory"),
    (keys(model_type="llama"), "model_type is 'llama'"),
    (keys(auto_map={"A": "m.A"}), "config.json: auto_map"),
    (keys(eos_token_id=[99]), "eos_token_id is [99]"),
    (text(top_k_experts=9), "top_k_experts is 9"),
    (put(GENERATION, "{"), "generation_config.json: broken JSON … line 1"),
    (keys(GENERATION, t_min=0.9, t_max=0.1), "generation_config.json: t_min … t_max"),
    (gone(WEIGHTS), "has neither model.safetensors nor model.safetensors.index.json"),
    (cut, "model.safetensors … truncated"),
    (put(WEIGHTS, PAGE), "not safetensors: download it again"),
    (made_folder(WEIGHTS), "model.safetensors … directory"),
    (tensor(NORM, mx.ones(63)), f"{NORM} has shape [63] … [64]"),
    (tensor(NORM, None), f"missing tensors: {NORM}"),
    (tensor("extra", mx.ones(1)), "unexpected tensors: extra"),
    (renamed(WEIGHTS, "pytorch_model.bin", b"\x80\x04."), "pytorch_model.bin … code"),
    (put(INDEX, '{"weight_map": {"x": "../y"}}'), f"{INDEX}: x … '../y'"),
    (keys(quantization={"bits": 7}), "quantization: bits is 7"),
    (keys(quantization_config={"quant_method": "fp8"}), "is 'fp8' … bfloat16 release"),
    (gone(TOKENIZER), "tokenizer.json … tokenizer.model"),
    (put(TOKENIZER, '{"a": '), "tokenizer.json"),
    (put(TOKENIZER, "{}"), "tokenizer.json"),
    (put(TOKENIZER, b"\xff\xfe"), "tokenizer.json"),
    (put(NAMES, b"\xff"), "tokenizer_config.json: not UTF-8"),
    (keys(NAMES, bos_token="<none>"), "tokenizer_config.json … bos_token … <none>"),
    (renamed(TOKENIZER, "tokenizer.model", b"\x0a\xff\xff"), "tokenizer.model"),
    (put(TEMPLATE, b"\xff"), "chat_template.jinja … UTF-8"),
    (put(TEMPLATE, "\n{% if %}"), "chat_template.jinja … line 2"),
]
# What `generate` alone notices
TALKS: list[tuple[Break, str]] = [
    (edit(TOKENIZER, lambda v: v["model"]["vocab"].update(a=99)), "id 99 … 0 to 31"),
    (put(TEMPLATE, "{{ raise_exception('no such role') }}"), "no such role"),
    (put(TEMPLATE, "{{ 1 // 0 }}"), "chat_template.jinja … zero"),
    (put(TEMPLATE, "{% for i in range(10**9) %}{% endfor %}"), "Range"),
    (put(TEMPLATE, "{{ ''.__class__.__mro__ }}"), "chat_template.jinja … unsafe"),
]
# Flags; MODEL and OUT stand for the two folders
CONVERT: list[tuple[str, str, Break]] = [
    ("--hf-path MODEL/none", "none … no such", whole),
    ("--hf-path MODEL/config.json", "config.json: is a file", whole),
    ("--hf-path a--b/c", "a--b/c", whole),
    ("", "out: exists … --overwrite", at_target(shutil.copytree)),
    ("--overwrite", "out: is no model folder", at_target(lambda _, o: o.touch())),
    ("--overwrite", "out: is a link", at_target(lambda f, o: o.symlink_to(f))),
    ("--mlx-path MODEL --overwrite", "model: holds the model to convert", whole),
    ("--mlx-path OUT/x", "out: no such folder", whole),
    ("--mlx-path MODEL/config.json/x", "config.json", whole),
    ("-q --q-mode mxfp4 --q-bits 3", "q-bits is 3", whole),
    ("-q -d", "--quantize and --dequantize", whole),
    ("-d", "not quantised", whole),
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
CASES = [("convert", breaks, "", says, b"") for breaks, says in FOLDERS]
CASES += [("generate", breaks, "", says, b"") for breaks, says in FOLDERS + TALKS]
CASES += [("convert", breaks, flags, says, b"") for flags, says, breaks in CONVERT]
CASES += [("generate", whole, flags, says, stdin) for flags, says, stdin in GENERATE]


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
    ("command", "breaks", "flags", "says", "stdin"),
    CASES,
    ids=[f"{command} {flags}: {says}" for command, _, flags, says, _ in CASES],
)
def test_malformed_input_is_refused_in_one_line(
    tiny, tmp_path, command, breaks, flags, says, stdin
):
    model = shutil.copytree(tiny, tmp_path / "model")
    breaks(model)
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
