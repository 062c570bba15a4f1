"""Every malformed input the commands are tried with, and what the answer must say.

A case is a way to break a good model folder, or flags, and the parts of the message,
separated by an ellipsis.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.checkpoint.convert import convert

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


def keys(name: str = CONFIG, **changes: Any) -> Break:
    """Keys of a JSON file changed; None takes one out."""

    def change(folder: Path) -> None:
        path = folder / name
        value = json.loads(path.read_text()) if path.exists() else {}
        value = {k: v for k, v in (value | changes).items() if v is not None}
        path.write_text(json.dumps(value))

    return change


def text(**changes: Any) -> Break:
    """Keys of config.json's text_config changed."""

    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["text_config"] |= changes
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def cut(end: int) -> Break:
    def truncate(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:end])

    return truncate


def load(folder: Path) -> dict[str, Any]:
    arrays = dict(mx.load(str(folder / WEIGHTS)))
    mx.eval(arrays)
    return arrays


def tensor(name: str, array: mx.array | None) -> Break:
    """One tensor of the weight file changed, or taken out."""

    def change(folder: Path) -> None:
        arrays = load(folder) | {name: array}
        kept = {name: array for name, array in arrays.items() if array is not None}
        mx.save_safetensors(str(folder / WEIGHTS), kept)

    return change


def index(**changes: str) -> Break:
    """The weights in two shards; some entries of the index changed, "" for none."""

    def deal(folder: Path) -> None:
        arrays = load(folder)
        (folder / WEIGHTS).unlink()
        weight_map = {}
        for i, names in enumerate((sorted(arrays)[::2], sorted(arrays)[1::2]), 1):
            file = f"model-0000{i}-of-00002.safetensors"
            mx.save_safetensors(str(folder / file), {n: arrays[n] for n in names})
            weight_map |= dict.fromkeys(names, file)
        weight_map = {n: f for n, f in (weight_map | changes).items() if f}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return deal


def header(**changes: Any) -> Break:
    """The entry of NORM in the weight file's header changed."""

    def change(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        entries[NORM] |= changes
        new = json.dumps(entries).encode()
        rest = content[8 + length :]
        (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + rest)

    return change


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def quantised(**declared: int) -> Break:
    """Weights stored at 4 bits, and what is declared of them."""

    def store(folder: Path) -> None:
        out = folder.with_name("quantised")
        convert(folder, out, quantize=True)
        shutil.rmtree(folder)
        out.rename(folder)
        if declared:
            keys(quantization=declared)(folder)

    return store


def other_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff")


def larger_tokenizer(folder: Path) -> None:
    value = json.loads((folder / TOKENIZER).read_text())
    value["model"]["vocab"]["a"] = 99
    (folder / TOKENIZER).write_text(json.dumps(value))


def at_target(make: Callable[[Path, Path], object]) -> Break:
    """Something made where the conversion is to be written."""
    return lambda folder: make(folder, folder.with_name("out"))


def photos(folder: Path, out: Path) -> None:
    (out / "photos").mkdir(parents=True)


ROPE = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}
PAGE = b"<!DOCTYPE html><html><body>404</body></html>"
TWICE = "model.decoder.layers.0.experts.down_proj.weight"
COPY = "model.encoder.language_model.x.weight"
TOWER = "model.encoder.vision_tower.x"
ABSENT = "model-00003-of-00003.safetensors"
SHARD = "model-00001-of-00002.safetensors"

# What both commands are given
FOLDERS: list[tuple[Break, str]] = [
    (gone(CONFIG), "config.json: no such file"),
    (put(CONFIG, ""), "config.json … line 1"),
    (put(CONFIG, "{}"), "config.json … model_type"),
    (put(CONFIG, "[1, 2]"), "config.json … not an object"),
    (put(CONFIG, '{"model_type": "di'), "config.json: broken JSON … line 1"),
    (put(CONFIG, b'{"a": "\xff"}'), "config.json: not UTF-8"),
    (put(CONFIG, "{}".encode("utf-16")), "config.json: not UTF-8"),
    (made_folder(CONFIG), "config.json … directory"),
    (put(CONFIG, "[" * 10_000 + "]" * 10_000), "config.json: is nested too deeply"),
    (put(CONFIG, '{"model_type": ' + "9" * 5000 + "}"), "config.json … too long"),
    (text(rms_norm_eps=float("nan")), "config.json: holds NaN"),
    (keys(model_type="llama"), "model_type is 'llama'"),
    (keys(auto_map={"A": "m.A"}), "config.json: auto_map"),
    (keys(tie_word_embeddings=False), "tie_word_embeddings"),
    (keys(text_config=None), "text_config is missing"),
    (text(num_hidden_layers=-2), "num_hidden_layers is -2"),
    (text(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    (text(hidden_size=2**60), "hidden_size"),
    (text(vocab_size=10**15), "vocab_size"),
    (text(hidden_size="64"), "hidden_size is '64'"),
    (text(rms_norm_eps=10**400), "rms_norm_eps is inf"),
    (keys(canvas_length=0), "canvas_length is 0"),
    (keys(canvas_length=True), "canvas_length is True"),
    (text(layer_types=["x"] * 3), "layer_types[0] is 'x'"),
    (text(layer_types=["sliding_attention"] * 3), "must end with 'full_attention'"),
    (text(num_key_value_heads=3), "num_attention_heads is 4"),
    (text(top_k_experts=9), "top_k_experts is 9"),
    (text(rope_parameters=ROPE), "rope_type is 'yarn'"),
    (text(use_bidirectional_attention="all"), "use_bidirectional_attention is 'all'"),
    (keys(eos_token_id="<eos>"), "eos_token_id is '<eos>'"),
    (keys(eos_token_id=[99]), "eos_token_id is [99]"),
    (put(GENERATION, "{"), "generation_config.json: broken JSON … line 1"),
    (made_folder(GENERATION), "generation_config.json … directory"),
    (keys(GENERATION, t_max=0), "generation_config.json: t_max … above 0"),
    (keys(GENERATION, t_min=0.9, t_max=0.1), "generation_config.json: t_min … t_max"),
    (keys(GENERATION, max_denoising_steps=0), "max_denoising_steps is 0"),
    (keys(GENERATION, eos_token_id=["a"]), "generation_config.json: eos_token_id"),
    (keys(GENERATION, sampler_config={"_cls_name": "Other"}), "_cls_name is 'Other'"),
    (gone(WEIGHTS), "has neither model.safetensors nor model.safetensors.index.json"),
    (put(WEIGHTS, b""), "model.safetensors: 0 bytes"),
    (cut(-100), "model.safetensors … truncated"),
    (cut(500), "model.safetensors: header of … truncated"),
    (put(WEIGHTS, PAGE), "not safetensors: download it again"),
    (put(WEIGHTS, b"\x10" + bytes(7) + b"{" * 16), "model.safetensors: broken header"),
    (made_folder(WEIGHTS), "model.safetensors … directory"),
    (header(dtype="F8_E4M3"), f"{NORM}: dtype F8_E4M3"),
    (header(dtype=[]), f"{NORM}: dtype []"),
    (header(shape=[-64]), f"{NORM}: broken header entry"),
    (header(data_offsets=[0, 256]), "overlap"),
    (header(shape=[65]), f"{NORM}: 256 bytes … needs 260"),
    (tensor(NORM, mx.zeros(64, mx.int32)), f"{NORM} holds mlx.core.int32"),
    (tensor(NORM, mx.ones(63)), f"{NORM} has shape [63] … [64]"),
    (tensor(NORM, None), f"missing tensors: {NORM}"),
    (tensor("extra", mx.ones(1)), "unexpected tensors: extra"),
    (tensor(COPY, mx.ones(1)), f"unexpected tensors: {COPY}"),
    (tensor(TWICE, mx.ones((4, 64, 32))), "unexpected tensors … experts.down_proj"),
    (tensor(TOWER, mx.ones(1)), f"unexpected tensors: {TOWER}"),
    (pickled, "pytorch_model.bin … run code"),
    (index(**{NORM: ""}), f"{INDEX}: does not name {NORM}"),
    (index(**{NORM: ABSENT}), f"{ABSENT}: no such file"),
    (index(**{"x.y": SHARD}), f"{SHARD}: lacks x.y"),
    (index(**{NORM: "../x.safetensors"}), f"{INDEX}: {NORM} … '../x.safetensors'"),
    (index(**{NORM: "/etc/passwd"}), f"{INDEX}: {NORM} … '/etc/passwd'"),
    (put(INDEX, "{}"), f"{INDEX}: weight_map"),
    (put(INDEX, "[]"), f"{INDEX} … not an object"),
    (keys(quantization={"bits": 7}), "quantization: bits is 7"),
    (keys(quantization="4bit"), "quantization must be an object"),
    (keys(quantization_config={"quant_method": "fp8"}), "is 'fp8' … bfloat16 release"),
    (gone(TOKENIZER), "tokenizer.json … tokenizer.model"),
    (put(TOKENIZER, '{"a": '), "tokenizer.json"),
    (put(TOKENIZER, "{}"), "tokenizer.json"),
    (put(TOKENIZER, b"\xff\xfe"), "tokenizer.json"),
    (put(NAMES, b"\xff"), "tokenizer_config.json: not UTF-8"),
    (put(NAMES, "[]"), "tokenizer_config.json … not an object"),
    (keys(NAMES, bos_token="<none>"), "tokenizer_config.json … bos_token … <none>"),
    (other_tokenizer, "tokenizer.model"),
    (put(TEMPLATE, b"\xff"), "chat_template.jinja … UTF-8"),
    (put(TEMPLATE, "\n{% if %}"), "chat_template.jinja … line 2"),
]
# What `generate` alone notices
TALKS: list[tuple[Break, str]] = [
    (quantised(bits=8, group_size=64), "model.safetensors … 8-bit … quantization"),
    (larger_tokenizer, "id 99 … 0 to 31"),
    (put(TEMPLATE, "{{ raise_exception('no such role') }}"), "no such role"),
    (put(TEMPLATE, "{{ 1 // 0 }}"), "chat_template.jinja … zero"),
    (put(TEMPLATE, "{% for i in range(10**9) %}{% endfor %}"), "Range"),
    (put(TEMPLATE, "{{ ''.__class__.__mro__ }}"), "chat_template.jinja … unsafe"),
]
# Flags of `convert`; MODEL and OUT stand for the two folders
CONVERT: list[tuple[str, str] | tuple[str, str, Break]] = [
    ("--hf-path MODEL/none", "none … no such"),
    ("--hf-path MODEL/config.json", "config.json: is a file"),
    ("--hf-path a--b/c", "a--b/c"),
    ("", "out: exists … --overwrite", at_target(shutil.copytree)),
    ("--overwrite", "out: is no model folder", at_target(lambda _, o: o.touch())),
    ("--overwrite", "out: is no model folder", at_target(photos)),
    ("--overwrite", "out: is a link", at_target(lambda f, o: o.symlink_to(f))),
    ("--mlx-path MODEL --overwrite", "model: holds the model to convert"),
    ("--mlx-path OUT/x", "out: no such folder"),
    ("--mlx-path MODEL/config.json/x", "config.json"),
    ("--q-bits 4", "--q-bits is given without --quantize"),
    ("-q --q-bits 7", "--q-bits … 7"),
    ("-q --q-mode mxfp4 --q-bits 3", "q-bits is 3"),
    ("-q --q-group-size 16", "group-size is 16"),
    ("-q -d", "--quantize and --dequantize"),
    ("-d", "not quantised"),
    ("-q", "--dequantize", quantised()),
    ("--dtype float64", "--dtype … float64"),
    ("-q --quant-predicate best", "--quant-predicate"),
    ("--quantise", "--quantise"),
]
# Flags of `generate`, and what it reads
GENERATE: list[tuple[str, str] | tuple[str, str, bytes]] = [
    ("--model MODEL/none", "none … no such"),
    ("--model MODEL/config.json", "config.json: is a file"),
    ("--seed -1", "--seed … -1"),
    ("--steps 0", "--steps … 0"),
    ("--max-tokens 0", "--max-tokens … 0"),
    ("--canvas-length 0", "--canvas-length"),
    ("--entropy-bound nan", "bound … nan"),
    ("--t-min 2 --t-max 1", "t_min … t_max"),
    ("--t-max inf", "t_max … inf"),
    ("--stop ", "stop"),
    ("--prefill-step-size 0", "--prefill-step-size"),
    ("--stability -1", "--stability … -1"),
    ("-p \udcff", "surrogate"),
    ("-p \u00a0", "--prompt … empty"),
    ("-p -", "stdin … empty"),
    ("-p -", "stdin … UTF-8", b"abc\xff"),
]
