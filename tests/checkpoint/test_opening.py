"""Files of strangers: ordinary ones alone are read, no link leads out of a folder."""

import os

import pytest
from checkpoint.folders import copied, listing, refusal

from mlx_dgemma import convert, load
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.evaluation import read_rows
from mlx_dgemma.files import json as reading
from mlx_dgemma.training.record import read
from mlx_dgemma.training.yaml import flags

FILES = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json "
    "chat_template.jinja model.safetensors model.safetensors.index.json".split()
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_in_a_model_folder_is_refused_at_once(
    tiny, tmp_path, name, kind
):
    folder = copied(tiny, tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    message = refusal(lambda: load(folder))
    assert name in message and "no ordinary file" in message


def test_a_pipe_instead_of_rows_flags_or_a_log_is_refused(tmp_path):
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    for opened in (read_rows, lambda p: flags(p, ()), read):
        assert "no ordinary file" in refusal(lambda opened=opened: opened(path))
    (tmp_path / "adapter_config.json").symlink_to("/dev/zero")
    assert "no ordinary file" in refusal(lambda: adapters.read_config(tmp_path))


def test_lines_and_files_have_a_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_JSON_BYTES", 2**20)
    path = tmp_path / "a.jsonl"
    path.write_text("{}" + " " * 2**20)
    assert "a.jsonl:1: is longer than" in refusal(lambda: read_rows(path))


def test_a_link_out_of_the_folder_is_not_copied(tiny, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("private")
    source = copied(tiny, tmp_path / "snapshots" / "1")
    (source / "LICENSE").symlink_to(secret)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "0f").write_text("notice")
    (source / "NOTICE").symlink_to("../../blobs/0f")  # as the hub's cache does
    convert(source, tmp_path / "out")
    assert "LICENSE" not in listing(tmp_path / "out")
    assert (tmp_path / "out" / "NOTICE").read_text() == "notice"


def test_a_path_below_a_folder_that_is_here_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    message = refusal(lambda: load("models/gemna"))
    assert message == "models/gemna: no such folder in models, which is here"


def test_what_is_no_name_of_a_model_is_refused():
    for name in (None, "", " ", 3, ["sudoku4"]):
        with pytest.raises(DGemmaError, match=r"the model is .*; give a folder, a hub"):
            load(name)  # type: ignore[arg-type]
