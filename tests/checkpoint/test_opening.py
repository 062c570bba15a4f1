"""Files of strangers: ordinary ones alone are read, no link leads out of a folder."""

import os

import pytest
from checkpoint.folders import copied, listing, refusal

from mlx_dgemma import Conversation, convert, load
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.checkpoint.sums import verify
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.evaluation import load_scorer, read_rows
from mlx_dgemma.files import json as reading
from mlx_dgemma.media.images import ImageBudget, read_picture
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
    path = tmp_path / "SHA256SUMS"
    os.mkfifo(path)
    scorer = lambda p: load_scorer(f"{p}:score", [])  # noqa: E731
    sums = lambda p: verify(p.parent)  # noqa: E731
    for opened in (read_rows, lambda p: flags(p, ()), read, scorer, sums):
        assert "no ordinary file" in refusal(lambda opened=opened: opened(path))
    (tmp_path / "adapter_config.json").symlink_to("/dev/zero")
    assert "no ordinary file" in refusal(lambda: adapters.read_config(tmp_path))


@pytest.mark.parametrize(
    "name", ["a\0b", "a" * 5000, "\ud800"], ids=["NUL", "long", "half"]
)
def test_a_path_that_no_file_can_have_is_refused(tiny, tmp_path, name):
    for call in (
        load,
        read_rows,
        Conversation(*load(tiny)).save,
        lambda p: load(tiny, adapter_path=p),
        lambda p: convert(p, tmp_path / "out"),
        lambda p: convert(tiny, p),
        lambda p: read_picture(p, ImageBudget()),
        lambda p: flags(p, ()),
    ):
        refusal(lambda call=call: call(name)).encode()
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="Linux only")
def test_a_picture_whose_disk_fails_is_refused():
    said = refusal(lambda: read_picture("/proc/self/mem", ImageBudget()))
    assert "cannot be read (Input/output error)" in said


def test_lines_and_files_have_a_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 2**20)
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
