"""Ways to damage a good model folder, for the table of malformed inputs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
NORM = "model.decoder.norm.weight"
Break = Callable[[Path], object]


def written(name: str, content: bytes | str) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def removed(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def replaced_by_folder(name: str) -> Break:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def edited(name: str = CONFIG, **keys: Any) -> Break:
    """Keys of a JSON file changed; None takes one out."""

    def edit(folder: Path) -> None:
        path = folder / name
        value = json.loads(path.read_text()) if path.exists() else {}
        value = {k: v for k, v in (value | keys).items() if v is not None}
        path.write_text(json.dumps(value))

    return edit


def text(**keys: Any) -> Break:
    """Keys of config.json's text_config changed."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["text_config"] |= keys
        (folder / CONFIG).write_text(json.dumps(config))

    return edit


def cut(bytes_left: int) -> Break:
    """The weight file ends early."""

    def truncate(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:bytes_left])

    return truncate


def tensors(**changes: mx.array | None) -> Break:
    """Tensors of the weight file changed; None takes one out, __ is a dot."""

    def change(folder: Path) -> None:
        arrays = load(folder)
        arrays |= {name.replace("__", "."): array for name, array in changes.items()}
        kept = {name: array for name, array in arrays.items() if array is not None}
        mx.save_safetensors(str(folder / WEIGHTS), kept)

    return change


def load(folder: Path) -> dict[str, Any]:
    arrays = mx.load(str(folder / WEIGHTS))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return dict(arrays)


def sharded(change: Callable[[dict[str, str]], object]) -> Break:
    """The weights in two shards, with an index that was changed."""

    def deal(folder: Path) -> None:
        arrays = load(folder)
        (folder / WEIGHTS).unlink()
        weight_map = {}
        for i, names in enumerate((sorted(arrays)[::2], sorted(arrays)[1::2]), 1):
            file = f"model-0000{i}-of-00002.safetensors"
            mx.save_safetensors(str(folder / file), {n: arrays[n] for n in names})
            weight_map |= dict.fromkeys(names, file)
        change(weight_map)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return deal


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def quantised(**declared: int) -> Break:
    """Weights stored at 4 bits, and what is declared of them."""

    def store(folder: Path) -> None:
        from mlx_dgemma.checkpoint.convert import convert as convert_folder

        out = folder.with_name("quantised")
        convert_folder(folder, out, quantize=True)
        shutil.rmtree(folder)
        out.rename(folder)
        if declared:
            edited(quantization=declared)(folder)

    return store


def other_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff")


def larger_tokenizer(folder: Path) -> None:
    value = json.loads((folder / TOKENIZER).read_text())
    value["model"]["vocab"]["a"] = 99
    (folder / TOKENIZER).write_text(json.dumps(value))


def header_entry(**keys: Any) -> Break:
    """One entry of the weight file's header changed."""

    def change(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header[NORM] |= keys
        new = json.dumps(header).encode()
        rest = content[8 + length :]
        (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + rest)

    return change
