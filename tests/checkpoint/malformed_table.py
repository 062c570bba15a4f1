"""Every malformed input the commands are tried with, and what they answer.

    python tests/checkpoint/malformed_table.py

prints them as a Markdown table. `test_malformed.py` asserts that each answer is
one line that names what is wrong.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1]))

from breakage import (
    CONFIG,
    GENERATION,
    INDEX,
    NORM,
    TEMPLATE,
    TOKENIZER,
    WEIGHTS,
    Break,
    cut,
    edited,
    header_entry,
    larger_tokenizer,
    other_tokenizer,
    pickled,
    quantised,
    removed,
    replaced_by_folder,
    sharded,
    tensors,
    text,
    written,
)
from tiny import write_tiny

from mlx_dgemma.cli import convert, generate


@dataclass(frozen=True, kw_only=True)
class Case:
    """One malformed input.

    breaks    damages a good model folder
    says      what the answer must name
    command   "both", "convert" or "generate"
    flags     beside the usual ones; MODEL and OUT stand for the two folders
    stdin     what the command can read
    """

    name: str
    says: tuple[str, ...]
    breaks: Break = lambda folder: None
    command: str = "both"
    flags: tuple[str, ...] = ()
    stdin: bytes = b""

    @property
    def commands(self) -> tuple[str, ...]:
        return ("convert", "generate") if self.command == "both" else (self.command,)


@dataclass(frozen=True)
class Answer:
    """What a command answered: its exit code, its stderr, and what it left."""

    code: int
    stdout: str
    stderr: str
    left: tuple[str, ...]
    crash: BaseException | None

    @property
    def line(self) -> str:
        """The line that says what is wrong, after click's usage if there is one."""
        lines = self.stderr.strip().splitlines()
        return lines[-1] if lines else ""


def ask(case: Case, command: str, good: Path, place: Path) -> Answer:
    """Give a broken copy of the good model to a command, all inside `place`."""
    model, out = place / "model", place / "out"
    shutil.copytree(good, model)
    case.breaks(model)
    before = sorted(os.listdir(place))
    usual = {
        "convert": ["--hf-path", str(model), "--mlx-path", str(out)],
        "generate": ["--model", str(model), "-p", "abc", "--steps", "1", "-m", "4"],
    }
    flags = [
        f.replace("MODEL", str(model)).replace("OUT", str(out)) for f in case.flags
    ]
    main = {"convert": convert.main, "generate": generate.main}[command]
    # A flag given twice counts the last time.
    result: Result = CliRunner().invoke(main, usual[command] + flags, input=case.stdin)
    left = tuple(sorted(set(os.listdir(place)) - set(before)))
    crash = result.exception
    if isinstance(crash, SystemExit):
        crash = None
    return Answer(result.exit_code, result.stdout, result.stderr, left, crash)


def cases() -> Iterator[Case]:
    yield from config_cases()
    yield from weight_cases()
    yield from tokenizer_cases()
    yield from convert_flags()
    yield from generate_flags()


def config_cases() -> Iterator[Case]:
    def case(name: str, breaks: Break, *says: str) -> Case:
        return Case(name=name, breaks=breaks, says=says)

    def config(content: bytes | str) -> Break:
        return written(CONFIG, content)

    yield case("config.json missing", removed(CONFIG), CONFIG, "no such file")
    yield case("config.json empty", config(""), CONFIG, "line 1")
    yield case("config.json without keys", config("{}"), CONFIG, "model_type")
    yield case("config.json a list", config("[1, 2]"), CONFIG, "object")
    yield case("config.json torn", config('{"model_type": "di'), CONFIG, "line 1")
    yield case("config.json not UTF-8", config(b'{"a": "\xff"}'), CONFIG, "UTF-8")
    yield case("config.json UTF-16", config("{}".encode("utf-16")), CONFIG, "UTF-8")
    yield case("config.json with a BOM", config(b"\xef\xbb\xbf{}"), CONFIG, "BOM")
    yield case("config.json a folder", replaced_by_folder(CONFIG), CONFIG, "directory")
    deep = "[" * 10_000 + "]" * 10_000
    yield case("config.json nested 10,000 deep", config(deep), CONFIG, "parsed")
    yield case("NaN in config.json", text(rms_norm_eps=float("nan")), CONFIG, "NaN")
    endless = '{"model_type": ' + "9" * 5000 + "}"
    yield case("number of 5,000 digits", config(endless), CONFIG, "parsed")
    yield case("other model_type", edited(model_type="llama"), "model_type", "llama")
    yield case("auto_map", edited(auto_map={"A": "m.A"}), CONFIG, "auto_map")
    yield case("untied head", edited(tie_word_embeddings=False), "tie_word_embeddings")
    yield case("no text_config", edited(text_config=None), "text_config", "missing")
    yield case("negative layers", text(num_hidden_layers=-2), "num_hidden_layers", "-2")
    yield case("a billion layers", text(num_hidden_layers=10**9), "num_hidden_layers")
    yield case("vast width", text(hidden_size=2**60), "hidden_size")
    yield case("vast vocabulary", text(vocab_size=10**15), "vocab_size")
    yield case("width as text", text(hidden_size="64"), "hidden_size", "'64'")
    yield case("number beyond floats", text(rms_norm_eps=10**400), "rms_norm_eps")
    yield case("canvas_length 0", edited(canvas_length=0), "canvas_length", "0")
    yield case("vast canvas_length", edited(canvas_length=10**9), "canvas_length")
    yield case("canvas_length true", edited(canvas_length=True), "canvas_length")
    yield case("unknown layer type", text(layer_types=["x"] * 3), "layer_types[0]", "x")
    yield case(
        "last layer slides",
        text(layer_types=["sliding_attention"] * 3),
        "layer_types",
        "full_attention",
    )
    yield case("3 of 4 heads", text(num_key_value_heads=3), "num_attention_heads")
    yield case("more experts than there are", text(top_k_experts=9), "top_k_experts")
    rope = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}
    yield case("unknown rope", text(rope_parameters=rope), "rope_type", "yarn")
    attention = {"use_bidirectional_attention": "all"}
    yield case("bidirectional encoder", text(**attention), *attention)
    yield case("eos not an id", edited(eos_token_id="<eos>"), "eos_token_id", "<eos>")
    yield case("eos out of vocabulary", edited(eos_token_id=[99]), "eos_token_id", "99")
    yield from generation_cases()


def generation_cases() -> Iterator[Case]:
    def case(name: str, says: tuple[str, ...], **keys: Any) -> Case:
        breaks = edited(GENERATION, **keys)
        return Case(name=name, breaks=breaks, says=(GENERATION, *says))

    yield Case(
        name="generation_config.json torn",
        breaks=written(GENERATION, "{"),
        says=(GENERATION, "line 1"),
    )
    yield Case(
        name="generation_config.json a folder",
        breaks=replaced_by_folder(GENERATION),
        says=(GENERATION, "directory"),
    )
    yield case("t_max 0", ("t_max", "above 0"), t_max=0)
    yield case("t_max below 0", ("t_max", "-1"), t_max=-1)
    yield case("t_min above t_max", ("t_min", "t_max"), t_min=0.9, t_max=0.1)
    yield case("no denoising steps", ("max_denoising_steps",), max_denoising_steps=0)
    yield case("eos of text", ("eos_token_id",), eos_token_id=["a"])
    sampler = {"_cls_name": "OtherSampler"}
    yield case("unknown sampler", ("OtherSampler",), sampler_config=sampler)


def weight_cases() -> Iterator[Case]:
    def case(name: str, breaks: Break, *says: str) -> Case:
        return Case(name=name, breaks=breaks, says=says)

    yield case("weights missing", removed(WEIGHTS), WEIGHTS, INDEX)
    yield case("weights empty", written(WEIGHTS, b""), WEIGHTS, "0 bytes")
    yield case("weights cut in the data", cut(-100), WEIGHTS, "truncated")
    yield case("weights cut in the header", cut(500), WEIGHTS, "truncated")
    page = b"<!DOCTYPE html><html><body>404</body></html>"
    yield case("weights a web page", written(WEIGHTS, page), WEIGHTS, "safetensors")
    header = b"\x10" + bytes(7) + b"{" * 16
    yield case("weights with a broken header", written(WEIGHTS, header), WEIGHTS)
    yield case("weights a folder", replaced_by_folder(WEIGHTS), WEIGHTS, "directory")
    yield case("dtype unknown", header_entry(dtype="F8_E4M3"), NORM, "F8_E4M3")
    yield case("dtype a list", header_entry(dtype=[]), NORM)
    yield case("negative shape", header_entry(shape=[-64]), NORM)
    yield case("overlapping tensors", header_entry(data_offsets=[0, 256]), "overlap")
    yield case("wrong byte count", header_entry(shape=[65]), NORM, "260")
    yield case("weight of integers", tensors(**{NORM: mx.zeros(64, mx.int32)}), NORM)
    yield case("wrong shape", tensors(**{NORM: mx.ones(63)}), NORM, "[63]", "[64]")
    yield case("missing tensor", tensors(**{NORM: None}), "missing", NORM)
    yield case("extra tensor", tensors(extra=mx.ones(1)), "unexpected", "extra")
    copy = {"model.encoder.language_model.x.weight": mx.ones(1)}
    yield case("unknown tensor of the encoder", tensors(**copy), *copy)
    twice = {"model.decoder.layers.0.experts.down_proj.weight": mx.ones((4, 64, 32))}
    yield case("tensor under two names", tensors(**twice), "experts.down_proj")
    vision = {"model.encoder.vision_tower.x": mx.ones(1)}
    yield case("vision without vision_config", tensors(**vision), *vision)
    yield case("only pickles", pickled, "pytorch_model.bin", "run code")
    yield from index_cases()
    yield case("quantisation of 7 bits", edited(quantization={"bits": 7}), "bits", "7")
    yield case("quantisation a word", edited(quantization="4bit"), "quantization")
    foreign = edited(quantization_config={"quant_method": "fp8"})
    yield case("foreign quantisation", foreign, "quant_method", "fp8", "bfloat16")
    yield Case(
        name="4 bits declared as 8",
        breaks=quantised(bits=8, group_size=64),
        says=(WEIGHTS, "quantization", "8-bit"),
        command="generate",
    )


def index_cases() -> Iterator[Case]:
    def case(name: str, change: Callable[[dict[str, str]], object], *says: str) -> Case:
        return Case(name=name, breaks=sharded(change), says=says)

    def point(place: str) -> Callable[[dict[str, str]], object]:
        return lambda names: names.update({NORM: place})

    absent = "model-00003-of-00003.safetensors"
    yield case("index lacks an entry", lambda names: names.pop(NORM), INDEX, NORM)
    yield case("index names an absent shard", point(absent), absent, "no such file")
    other = {"x.y": "model-00001-of-00002.safetensors"}
    yield case("index names an absent tensor", lambda n: n.update(other), "x.y")
    for place in ("../model.safetensors", "/etc/passwd", "..\\x.safetensors"):
        yield case(f"index leads to {place}", point(place), INDEX, NORM, repr(place))
    yield case("index empty", lambda names: names.clear(), INDEX, "weight_map")
    yield Case(name="index a list", breaks=written(INDEX, "[]"), says=(INDEX, "object"))


def tokenizer_cases() -> Iterator[Case]:
    def case(name: str, breaks: Break, *says: str, command: str = "both") -> Case:
        return Case(name=name, breaks=breaks, says=says, command=command)

    names = "tokenizer_config.json"
    yield case("tokenizer missing", removed(TOKENIZER), TOKENIZER, "tokenizer.model")
    yield case("tokenizer.json torn", written(TOKENIZER, '{"a": '), TOKENIZER)
    yield case("tokenizer.json without model", written(TOKENIZER, "{}"), TOKENIZER)
    yield case("tokenizer.json not UTF-8", written(TOKENIZER, b"\xff\xfe"), TOKENIZER)
    yield case("tokenizer_config.json not UTF-8", written(names, b"\xff"), names, "UTF")
    yield case("tokenizer_config.json a list", written(names, "[]"), names, "object")
    unknown = edited(names, bos_token="<none>")
    yield case("bos not in the vocabulary", unknown, names, "bos_token", "<none>")
    yield case("tokenizer.model broken", other_tokenizer, "tokenizer.model")
    yield case(
        "tokenizer with ids the model lacks",
        larger_tokenizer,
        "id 99",
        "0 to 31",
        command="generate",
    )
    yield case("template not UTF-8", written(TEMPLATE, b"\xff"), TEMPLATE, "UTF-8")
    yield case("template broken", written(TEMPLATE, "\n{% if %}"), TEMPLATE, "line 2")
    for name, source, says in (
        ("raises", "{{ raise_exception('no such role') }}", "no such role"),
        ("divides by zero", "{{ 1 // 0 }}", "zero"),
        ("loops without end", "{% for i in range(10**9) %}{% endfor %}", "Range"),
        ("breaks out", "{{ ''.__class__.__mro__ }}", "unsafe"),
    ):
        breaks = written(TEMPLATE, source)
        yield case(f"template {name}", breaks, TEMPLATE, says, command="generate")


def convert_flags() -> Iterator[Case]:
    def case(name: str, flags: str, *says: str, breaks: Break | None = None) -> Case:
        breaks = breaks or (lambda folder: None)
        return Case(
            name=name,
            breaks=breaks,
            says=says,
            command="convert",
            flags=tuple(flags.split()),
        )

    yield case("--hf-path not a folder", "--hf-path MODEL/none", "none", "no such")
    yield case("--hf-path a file", "--hf-path MODEL/config.json", CONFIG, "is a file")
    yield case("--hf-path no hub id", "--hf-path a--b/c", "a--b/c")
    yield case(
        "--mlx-path exists",
        "",
        "out",
        "--overwrite",
        breaks=lambda folder: shutil.copytree(folder, folder.with_name("out")),
    )
    yield case(
        "--mlx-path a file",
        "--overwrite",
        "out",
        "no model folder",
        breaks=lambda folder: folder.with_name("out").write_bytes(b"x"),
    )
    yield case(
        "--mlx-path no model folder",
        "--overwrite",
        "out",
        "no model folder",
        breaks=lambda folder: (folder.with_name("out") / "photos").mkdir(parents=True),
    )
    yield case(
        "--mlx-path a link",
        "--overwrite",
        "out",
        "link",
        breaks=lambda folder: folder.with_name("out").symlink_to(folder),
    )
    yield case(
        "--mlx-path the source", "--mlx-path MODEL --overwrite", "model", "holds"
    )
    yield case("--mlx-path's parent missing", "--mlx-path OUT/x", "out", "no such")
    yield case("--mlx-path's parent a file", "--mlx-path MODEL/config.json/x", CONFIG)
    yield case("--q-bits without -q", "--q-bits 4", "--q-bits", "--quantize")
    yield case("--q-bits 7", "-q --q-bits 7", "--q-bits", "7")
    yield case("--q-bits 3 with mxfp4", "-q --q-mode mxfp4 --q-bits 3", "q-bits", "3")
    yield case("--q-group-size 16 with affine", "-q --q-group-size 16", "group-size")
    yield case("-q and -d", "-q -d", "--quantize", "--dequantize")
    yield case("-d of dense weights", "-d", "not quantised")
    yield case("-q of quantised weights", "-q", "--dequantize", breaks=quantised())
    yield case("--dtype float64", "--dtype float64", "--dtype", "float64")
    yield case("unknown recipe", "-q --quant-predicate best", "--quant-predicate")
    yield case("unknown option", "--quantise", "--quantise")


def generate_flags() -> Iterator[Case]:
    def case(name: str, flags: str, *says: str, stdin: bytes = b"") -> Case:
        return Case(
            name=name,
            says=says,
            command="generate",
            flags=tuple(flags.split(" ")),
            stdin=stdin,
        )

    yield case("--model not a folder", "--model MODEL/none", "none", "no such")
    yield case("--model a file", "--model MODEL/config.json", CONFIG, "is a file")
    yield case("--seed -1", "--seed -1", "--seed", "-1")
    yield case("--steps 0", "--steps 0", "--steps", "0")
    yield case("--max-tokens 0", "--max-tokens 0", "--max-tokens", "0")
    yield case("--canvas-length 0", "--canvas-length 0", "--canvas-length")
    yield case("--entropy-bound nan", "--entropy-bound nan", "bound", "nan")
    yield case("--t-min above --t-max", "--t-min 2 --t-max 1", "t_min", "t_max")
    yield case("--t-max inf", "--t-max inf", "t_max", "inf")
    yield case("--stop without text", "--stop ", "stop")
    yield case("--prefill-step-size 0", "--prefill-step-size 0", "--prefill-step-size")
    yield case("--stability -1", "--stability -1", "--stability", "-1")
    yield case("prompt of half a character", "-p \udcff", "surrogate")
    yield case("prompt of spaces", "-p \u00a0", "--prompt", "empty")
    yield case("stdin empty", "-p -", "stdin", "empty")
    yield case("stdin not UTF-8", "-p -", "stdin", "UTF-8", stdin=b"abc\xff")


CASES = list(cases())


def main() -> None:
    """Print every case and its answer as a Markdown table."""
    print("| input | command | exit | answer |\n| --- | --- | ---: | --- |")
    with tempfile.TemporaryDirectory() as place:
        good = write_tiny(Path(place) / "good")
        for number, case in enumerate(CASES):
            for command in case.commands:
                folder = Path(place) / f"{number}-{command}"
                folder.mkdir()
                answer = ask(case, command, good, folder)
                line = answer.line.replace(f"{folder}/", "").replace("|", "\\|")
                print(f"| {case.name} | {command} | {answer.code} | `{line}` |")
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
