"""Files and folders: under their own name there is nothing or everything."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoint.folders import listing, whole

from mlx_dgemma.checkpoint import convert as conversion
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.errors import ConversionError
from mlx_dgemma.files import atomic
from mlx_dgemma.files.atomic import save_arrays, write_atomically

FULL = OSError(errno.ENOSPC, "No space left on device")


# One file


def half(path: Path) -> None:
    path.write_bytes(b"half")
    raise FULL


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failed_write_leaves_the_old_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_atomically(path, half)
    assert contents(tmp_path) == {}
    path.write_text("old")
    for error in (OSError("odd"), RuntimeError(), KeyboardInterrupt(), MemoryError()):

        def torn(file, arrays, metadata, error=error) -> None:
            file.write(b"torn")
            raise error

        monkeypatch.setattr(mx, "save_safetensors", torn)
        with pytest.raises(type(error)):
            save_arrays(path, {"a": mx.ones((3,))})
        assert contents(tmp_path) == {"file.json": b"old"}
    write_atomically(path, lambda partial: partial.write_text("new"))
    assert contents(tmp_path) == {"file.json": b"new"}
    with pytest.raises(OSError, match=f"No such file or directory: '{tmp_path}/a/b'"):
        write_atomically(tmp_path / "a" / "b", half)


def test_links_and_modes_are_kept(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    save_arrays(link, {"a": mx.ones((2,))}, {"iteration": "7"})
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o640
    arrays, metadata = mx.load(str(real), format="safetensors", return_metadata=True)
    assert arrays["a"].tolist() == [1, 1]
    assert metadata == {"format": "mlx", "iteration": "7"}
    assert listing(tmp_path) == ["link", "real"]


# What may be written to


def refused(source: Path, target: Path, why: str, **how) -> None:
    with pytest.raises(ConversionError, match=why):
        convert(source, target, **how)


def test_an_existing_model_is_replaced_only_if_asked(tiny, older, out, monkeypatch):
    refused(tiny, out, r"out: exists; .*--overwrite")
    whole(out, older)
    convert(tiny, out, overwrite=True)
    whole(out, tiny)
    assert listing(out.parent) == ["out"]
    monkeypatch.chdir(out.parent)
    (out.parent / "empty").mkdir()
    convert(tiny, "empty", overwrite=True)  # relative to the working folder
    whole(out.parent / "empty", tiny)


def test_what_is_no_model_folder_is_never_overwritten(tiny, out):
    photos, file = out.with_name("photos"), out.with_name("file")
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"meow")
    file.write_bytes(b"text")
    for target in (photos, file):
        refused(tiny, target, "no model folder", overwrite=True)
    assert (photos / "cat.jpg").read_bytes() == b"meow"
    link = out.with_name("link")
    for there in (out, out / "absent"):
        link.symlink_to(there)
        for overwrite in (True, False):
            refused(tiny, link, "link", overwrite=overwrite)
        link.unlink()
    refused(tiny, out.with_name("no") / "out", "no: no such folder")
    refused(tiny, out.with_name("x" * 250), "too long")
    assert listing(out.parent) == ["file", "out", "photos"]


def test_the_model_that_is_read_is_never_replaced(older, out):
    convert(out, out / "mlx")  # a folder inside the source is one like any other
    whole(out / "mlx", older)
    indirect = out / "mlx" / ".." / ".." / "out"
    for source, target in ((out, out), (out, indirect), (out / "mlx", out)):
        refused(source, target, "holds the model to convert", overwrite=True)
    assert listing(out) == sorted([*listing(older), "mlx"])
    assert listing(out.parent) == ["out"]


# Failures


@pytest.mark.parametrize("error", [FULL, OSError("odd"), KeyboardInterrupt()], ids=repr)
def test_a_failure_midway_leaves_everything_as_it_was(
    tiny, older, tmp_path, monkeypatch, error
):
    write = conversion.write_file

    def write_some(path, tensors, check):
        for number, written in enumerate(write(path, tensors, check)):
            if number == 9:
                raise error
            yield written

    monkeypatch.setattr(conversion, "write_file", write_some)
    wanted = ConversionError if isinstance(error, OSError) else KeyboardInterrupt
    why = "odd|No space" if isinstance(error, OSError) else None
    with pytest.raises(wanted, match=why):
        convert(tiny, tmp_path / "out")
    assert listing(tmp_path) == []
    shutil.copytree(older, tmp_path / "out")
    with pytest.raises(wanted, match=why):
        convert(tiny, tmp_path / "out", overwrite=True)
    assert listing(tmp_path) == ["out"]
    whole(tmp_path / "out", older)


@pytest.mark.parametrize(("error", "number"), [(FULL, 1), (KeyboardInterrupt(), 2)])
def test_a_failing_rename_puts_the_old_model_back(
    tiny, older, out, monkeypatch, error, number
):
    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    calls, rename = [], Path.rename

    def fail(path: Path, target: Path):
        calls.append(path)
        if len(calls) == number:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((ConversionError, KeyboardInterrupt)):
        convert(tiny, out, overwrite=True)
    whole(out, older)
    assert listing(out.parent) == ["out"]


# Others who use the target meanwhile


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_a_conversion_is_not_deleted(tiny, tmp_path, overwrite):
    out = tmp_path / "out"

    def appear(name, done, total):
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("ten years of work")

    why = r"exists|is no model folder"
    refused(tiny, out, why, progress=appear, overwrite=overwrite)
    assert listing(tmp_path) == ["out"]
    assert (out / "thesis.txt").read_text() == "ten years of work"


def test_a_second_conversion_to_the_same_target_is_refused(tiny, tmp_path):
    out, calls = tmp_path / "out", []

    def again(name, done, total):
        if not calls:
            calls.append(name)
            refused(tiny, out, "out: another conversion to it is running")

    convert(tiny, out, progress=again)
    whole(out, tiny)
    assert calls and listing(tmp_path) == ["out"]


# What other processes left


@pytest.mark.parametrize("name", ["out", "o*t", "out[1]"])
def test_what_dead_processes_left_is_removed_and_nothing_else(tiny, tmp_path, name):
    left = tmp_path / f".{name}.partial-0123abcd"
    left.mkdir()
    (left / ".lock").touch()
    others = [f".{name}.partial-old", f".{name}.partial-0123abcf"]  # without a lock
    others += [f".{name}2.partial-0123abcd", f"{name}.partial-0123abcd"]
    for other in others:
        (tmp_path / other).mkdir()
    convert(tiny, tmp_path / name)
    whole(tmp_path / name, tiny)
    assert listing(tmp_path) == sorted([name, *others])


def test_a_replaced_model_whose_successor_died_is_put_back(tiny, older, tmp_path):
    replaced = tmp_path / ".out.replaced-0123abcd"
    shutil.copytree(older, replaced)
    (replaced / ".lock").touch()
    refused(tiny, tmp_path / "out", "--overwrite")
    whole(tmp_path / "out", older)
    assert listing(tmp_path) == ["out"]


def test_names_are_random_and_planted_links_are_not_followed(tmp_path, monkeypatch):
    outside, path = tmp_path / "outside", tmp_path / "folder" / "file"
    path.parent.mkdir()
    outside.write_text("mine")
    names = iter(["aaaaaaaa", "bbbbbbbb"])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda count: next(names))
    (path.parent / ".partial-aaaaaaaa").symlink_to(outside)
    with pytest.raises(OSError, match="File exists"):
        write_atomically(path, lambda partial: partial.write_text("new"))
    write_atomically(path, lambda partial: partial.write_text("new"))
    assert (outside.read_text(), path.read_text()) == ("mine", "new")


def test_a_file_system_without_fsync_of_folders_keeps_the_result(
    tiny, tmp_path, monkeypatch
):
    fsync = os.fsync

    def as_on_a_share(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", as_on_a_share)
    convert(tiny, tmp_path / "out")
    whole(tmp_path / "out", tiny)
    save_arrays(tmp_path / "file", {"a": mx.ones((2,))})
    assert (tmp_path / "file").exists()


def test_a_system_that_cannot_exchange_names_replaces_all_the_same(
    tiny, older, out, monkeypatch
):
    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    convert(tiny, out, overwrite=True)
    whole(out, tiny)
    assert listing(out.parent) == ["out"]


@pytest.mark.slow
def test_two_writers_never_tear_a_file(tmp_path):
    path = tmp_path / "file"
    code = (
        "import sys; from pathlib import Path\n"
        "from mlx_dgemma.files.atomic import write_atomically\n"
        "for n in range(500):\n"
        "    text = sys.argv[2] * 50_000\n"
        "    write_atomically(Path(sys.argv[1]), lambda p: p.write_text(text))\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, path, letter]) for letter in "ab"
    ]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            assert path.read_text() in ("a" * 50_000, "b" * 50_000)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert listing(tmp_path) == ["file"]
