"""A checkpoint that never ends its text by itself."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def endless(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint with an eos that no position ever prefers."""
    import mlx.core as mx

    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(tiny, folder)
    weights = mx.load(str(tiny / "model.safetensors"))
    table = weights["model.decoder.embed_tokens.weight"]
    weights["model.decoder.embed_tokens.weight"] = mx.concatenate(
        [table[:1], mx.zeros_like(table[1:2]), table[2:]]
    )
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = [1]
    (folder / "config.json").write_text(json.dumps(config))
    return folder
