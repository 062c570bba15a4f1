"""Every reader of files from outside: how its files are made, and how it is used."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from adapters.adapter_files import factors, write_adapter, write_peft
from text.toy_tokenizers import byte_fallback, byte_level, train_sentencepiece
from tiny import write_tiny
from tiny_vision import asked, drawn, picture, text, write_tiny_vision
from training.runs import write_rows

from mlx_dgemma import LoRA, TrainSettings, convert, generate, load, stream_generate
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.diffusion.prefix import load_prefix
from mlx_dgemma.errors import DGemmaError, MediaError
from mlx_dgemma.evaluation import read_rows
from mlx_dgemma.media.images import ImageBudget, read_picture
from mlx_dgemma.media.videos import read_frames
from mlx_dgemma.text.tokenizer import Tokenizer
from mlx_dgemma.training import record
from mlx_dgemma.training.data import ExampleReader
from mlx_dgemma.training.finetune import prepare
from mlx_dgemma.training.settings import Run
from mlx_dgemma.training.trainer import LOG, STATE
from mlx_dgemma.training.yaml import flags

SHORT: dict[str, Any] = {"max_tokens": 16, "steps": 2, "seed": 0}
MESSAGES = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b 12"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "d"}}


@dataclass(frozen=True)
class Reader:
    """`write` makes a good folder, `read` uses what lies in one; `files` change."""

    files: tuple[str, ...]
    write: Callable[[Path], object]
    read: Callable[[Path], object]


def read_model(folder: Path) -> None:
    model, tokenizer = load(folder)
    generate(model, tokenizer, "12", **SHORT)


def read_seeing(folder: Path) -> None:
    model, tokenizer = load(folder)
    if model.config.canvas_length > 64:
        return  # slow, not broken
    prompt = asked(picture(drawn(40, 30)), text("b"))
    list(stream_generate(model, tokenizer, prompt, **SHORT))


def read_source(folder: Path) -> None:
    convert(folder, folder / "converted", quantize=True)


def write_shards(folder: Path) -> None:
    """A checkpoint in two shards and their index."""
    write_tiny(folder)
    file = folder / "model.safetensors"
    weights = dict(mx.load(str(file)))
    names = sorted(weights)
    shards = {"model-1-of-2.safetensors": names[::2]}
    shards |= {"model-2-of-2.safetensors": names[1::2]}
    for shard, inside in shards.items():
        mx.save_safetensors(
            str(folder / shard), {name: weights[name] for name in inside}
        )
    file.unlink()
    places = {name: shard for shard, inside in shards.items() for name in inside}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(make: Callable[[], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir()
        make().save(str(folder / "tokenizer.json"))
        named = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))

    return write


def write_sentencepiece(folder: Path) -> None:
    folder.mkdir()
    train_sentencepiece(folder, True)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')


def read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_dir(folder)
    for words in (
        "Hello, wörld 12!\n\n",
        "<bos>a<eos>",
        "\u0000\U0001f600\u3042 aa" * 50,
    ):
        ids = tokenizer.encode(words, add_special_tokens=True)
        tokenizer.decode(ids)
        tokenizer.decode([*range(min(300, tokenizer.vocab_size))])
        tokenizer.mark_special(words, "\ue000")
        tokenizer.encode_rendered(words, None)
        pieces = tokenizer.detokenizer()
        pieces.add(ids)
        pieces.finish()


def write_template(folder: Path) -> None:
    write_tokenizer(byte_level)(folder)
    source = Path(__file__).parents[1] / "text" / "gemma_like.jinja"
    (folder / "chat_template.jinja").write_text(source.read_text())


def read_template(folder: Path) -> None:
    tokenizer = Tokenizer.from_dir(folder)
    tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    tokenizer.apply_chat_template(MESSAGES[:2], tools=[TOOL], enable_thinking=True)


def write_adapted(folder: Path) -> None:
    write_tiny(folder)
    write_adapter(folder / "adapter", read_config(folder))
    for file in (folder / "adapter").iterdir():
        file.rename(folder / file.name)


def write_peft_adapted(folder: Path) -> None:
    write_tiny(folder)
    paths = ("layers.0.self_attn.q_proj", "layers.1.mlp.gate_proj")
    made = factors(read_config(folder), paths)
    write_peft(folder / "adapter", {"decoder": made, "encoder": made})
    for file in (folder / "adapter").iterdir():
        file.rename(folder / file.name)


@cache
def tiny_model(folder: Path) -> Any:
    """The unchanged model that lies beside what changes."""
    return load(folder)


def read_adapted(folder: Path) -> None:
    model, tokenizer = load(folder.parent / "good")
    adapters.load(model, folder)
    generate(model, tokenizer, "12", **SHORT)


def write_cache(folder: Path) -> None:
    from mlx_dgemma import Conversation

    model, tokenizer = load(write_tiny(folder))
    talk = Conversation(model, tokenizer, max_tokens=16, steps=2)
    list(talk.ask("12", seed=0))
    talk.save(folder / "cache.safetensors")


def read_cache(folder: Path) -> None:
    model, _ = tiny_model(folder.parent / "good")
    load_prefix(folder / "cache.safetensors", model)


def run_of(folder: Path, iters: int) -> Run:
    settings = TrainSettings(iters=iters, batch_size=2, save_every=1, val_batches=1)
    return Run(
        model=folder / "model",
        data=folder / "data",
        adapter_path=folder,
        lora=LoRA(rank=2, num_layers=1),
        settings=settings,
        resume=(folder / STATE).exists(),
    )


def write_run(folder: Path) -> None:
    write_tiny(folder / "model")
    write_rows(folder / "data", train=4, valid=2)
    list(prepare(run_of(folder, 2)).events())


def read_run(folder: Path) -> None:
    trainer = prepare(run_of(folder, 2))
    record.read(folder / LOG)
    record.Log(folder / LOG, 1, writes=True)
    trainer.draw()


def write_data(folder: Path) -> None:
    write_tiny(folder / "model")
    call = {"name": "f", "arguments": {"a": 1}}
    calls = [{"id": "1", "type": "function", "function": call}]
    rows: list[dict[str, Any]] = [
        {"prompt": "abc", "completion": "12"},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "e"}]},
        {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": calls}]},
        {"system": "a", "prompt": "b", "completion": "c", "tools": [TOOL]},
        {"text": "abc"},
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def read_data(folder: Path) -> None:
    _, tokenizer = tiny_model(folder.parent / "good" / "model")
    with suppress(DGemmaError):
        read_rows(folder / "train.jsonl")
    reader = ExampleReader(tokenizer, 16, frozenset({1, 4}), 4096)
    reader.read(folder / "train.jsonl")


def write_yaml(folder: Path) -> None:
    folder.mkdir()
    (folder / "run.yaml").write_text(
        'model: sudoku4\ndata: "rows"\niters: 100\nlearning_rate: 1e-5\ntrain: true\n'
        "seed: 7\nlora_parameters:\n  rank: 8\n  scale: 2.0\n  keys: [mlp.up_proj]\n"
    )


def read_yaml(folder: Path) -> None:
    """As the command reads it: the flags of the file become its settings."""
    from click.testing import CliRunner

    from mlx_dgemma.cli.lora import main

    known = {option.name for option in main.params if option.name}
    flags(folder / "run.yaml", known)
    arguments = ["-c", str(folder / "run.yaml"), "--estimate", "--data", str(folder)]
    result = CliRunner().invoke(main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception


PICTURES = {"a.png": "PNG", "a.jpg": "JPEG", "a.webp": "WEBP", "a.gif": "GIF"}
PICTURES |= {"a.bmp": "BMP", "a.tif": "TIFF", "a.avif": "AVIF"}


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    image = drawn(70, 50).resize((300, 200))
    for name, kind in PICTURES.items():
        image.save(folder / name, kind)
    image.quantize(16).save(folder / "a.png", transparency=3)


def read_pictures(folder: Path) -> None:
    for name in PICTURES:
        try:
            read_picture(folder / name, ImageBudget(70))
        except MediaError as error:
            assert len(str(error).splitlines()) == 1


def write_videos(folder: Path) -> None:
    import av

    folder.mkdir()
    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")):
        with av.open(str(folder / name), "w") as container:
            stream: Any = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(25):
                pixels = np.asarray(drawn(64, 48, number))
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def read_videos(folder: Path) -> None:
    for name in ("a.mp4", "a.mkv", "a.avi"):
        try:
            read_frames(folder / name)
        except MediaError as error:
            assert len(str(error).splitlines()) == 1


READERS = {
    "weights": Reader(("model.safetensors",), write_tiny, read_model),
    "conversion": Reader(("model.safetensors", "config.json"), write_tiny, read_source),
    "index": Reader(("model.safetensors.index.json",), write_shards, read_model),
    "config": Reader(("config.json",), write_tiny_vision, read_seeing),
    "processor": Reader(("processor_config.json",), write_tiny_vision, read_seeing),
    "tokenizer": Reader(
        ("tokenizer.json", "tokenizer_config.json"),
        write_tokenizer(byte_fallback),
        read_tokenizer,
    ),
    "byte level": Reader(
        ("tokenizer.json",), write_tokenizer(byte_level), read_tokenizer
    ),
    "sentencepiece": Reader(
        ("tokenizer.model", "tokenizer_config.json"),
        write_sentencepiece,
        read_tokenizer,
    ),
    "template": Reader(("chat_template.jinja",), write_template, read_template),
    "adapters": Reader(
        ("adapters.safetensors", "adapter_config.json"), write_adapted, read_adapted
    ),
    "peft": Reader(
        ("adapter_model.safetensors", "adapter_config.json"),
        write_peft_adapted,
        read_adapted,
    ),
    "cache": Reader(("cache.safetensors",), write_cache, read_cache),
    "run": Reader((STATE, LOG, "adapter_config.json"), write_run, read_run),
    "jsonl": Reader(("train.jsonl",), write_data, read_data),
    "yaml": Reader(("run.yaml",), write_yaml, read_yaml),
    "pictures": Reader(tuple(PICTURES), write_pictures, read_pictures),
    "videos": Reader(("a.mp4", "a.mkv", "a.avi"), write_videos, read_videos),
}
