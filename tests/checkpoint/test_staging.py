"""Files and folders: under their own name there is nothing or everything."""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoint.folders import listing, same, tensors
from tiny import write_tiny

from mlx_dgemma.checkpoint import convert as conversion
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.checkpoint.weights import read_tensors
from mlx_dgemma.errors import ConversionError
from mlx_dgemma.files import atomic
from mlx_dgemma.files.atomic import save_arrays, write_atomically

DRIVER = Path(__file__).with_name("slow_convert.py")
FULL = OSError(errno.ENOSPC, "No space left on device")


def whole(folder: Path, source: Path) -> None:
    """The folder holds the source's model, complete."""
    assert read_tensors(folder).keys() == read_tensors(source).keys()
    same(tensors(folder), tensors(source))
    card = {"README.md"}  # a source may have none
    assert {*listing(folder)} - card == {*listing(source)} - card


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """Another model, with a file that the tiny one lacks."""
    folder = write_tiny(tmp_path_factory.mktemp("older") / "model", seed=1)
    (folder / "LICENSE").write_text("of old")
    return folder


@pytest.fixture
def out(older, tmp_path) -> Path:
    """A target at which a model lies already, alone in its parent."""
    return shutil.copytree(older, tmp_path / "out")


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(scope="module")
def alive() -> Iterator[int]:
    """The id of a process that lives as long as the tests."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


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


def test_a_file_gets_its_name_only_when_it_is_durable(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    synced = []

    def fsync(handle: int) -> None:
        synced.append(sorted(contents(tmp_path)))
        assert path.read_text() == "old"
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        save_arrays(path, {"a": mx.ones((3,))})
    assert synced == [[".partial-a.safetensors", "a.safetensors"]]
    assert contents(tmp_path) == {"a.safetensors": b"old"}


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


def test_an_existing_model_is_replaced_only_if_asked(tiny, older, out):
    refused(tiny, out, r"out: exists; .*--overwrite")
    whole(out, older)
    convert(tiny, out, overwrite=True)
    whole(out, tiny)
    assert listing(out.parent) == ["out"]
    (out.parent / "empty").mkdir()
    convert(tiny, out.parent / "empty", overwrite=True)
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
        assert link.is_symlink()
        link.unlink()
    assert listing(out.parent) == ["file", "out", "photos"]


def test_a_parent_that_is_missing_is_named(tiny, tmp_path):
    refused(tiny, tmp_path / "no" / "out", rf"{tmp_path / 'no'}: no such folder")
    refused(tiny, tmp_path / ("x" * 250), "too long")
    assert listing(tmp_path) == []


def test_the_model_that_is_read_is_never_replaced(older, out):
    convert(out, out / "mlx")  # a folder inside the source is one like any other
    whole(out / "mlx", older)
    indirect = out / "mlx" / ".." / ".." / "out"
    for source, target in ((out, out), (out, indirect), (out / "mlx", out)):
        refused(source, target, "holds the model to convert", overwrite=True)
    assert listing(out) == sorted([*listing(older), "mlx"])
    assert listing(out.parent) == ["out"]


def test_a_relative_target_lies_in_the_working_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(tiny, "out")
    whole(tmp_path / "out", tiny)


# Failures


@pytest.mark.parametrize("error", [FULL, OSError("odd"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("there", [True, False], ids=["overwriting", "new"])
def test_a_failure_midway_leaves_everything_as_it_was(
    tiny, older, tmp_path, monkeypatch, error, there
):
    write = conversion.write_file

    def write_some(path, tensors):
        for number, written in enumerate(write(path, tensors)):
            if number == 9:
                raise error
            yield written

    target = tmp_path / "out"
    if there:
        shutil.copytree(older, target)
    monkeypatch.setattr(conversion, "write_file", write_some)
    wanted = ConversionError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted) as caught:
        convert(tiny, target, overwrite=True)
    if isinstance(error, OSError):
        assert (error.strerror or "odd") in str(caught.value)
    assert listing(tmp_path) == (["out"] if there else [])
    if there:
        whole(target, older)


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("number", [1, 2])
def test_a_failing_rename_puts_the_old_model_back(
    tiny, older, out, monkeypatch, error, number
):
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


def test_every_file_is_durable_before_the_folder_gets_its_name(
    tiny, tmp_path, monkeypatch
):
    events, rename, fsync = [], Path.rename, atomic.fsync

    def note_rename(path: Path, target: Path):
        events.append("named")
        return rename(path, target)

    def note_fsync(path: Path) -> None:
        events.append(path.name)
        fsync(path)

    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(atomic, "fsync", note_fsync)
    convert(tiny, tmp_path / "out")
    before = events[: events.index("named")]
    assert set(before) >= set(listing(tmp_path / "out"))
    assert before[-1] == f".out.partial-{os.getpid()}"  # then the names in it
    assert events[-1] == tmp_path.name  # and last its own name


# Others who use the target meanwhile


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_a_conversion_is_not_deleted(tiny, tmp_path, overwrite):
    out = tmp_path / "out"

    def somebody(name, done, total):
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("ten years of work")

    why = r"exists|is no model folder"
    refused(tiny, out, why, progress=somebody, overwrite=overwrite)
    assert listing(tmp_path) == ["out"]
    assert (out / "thesis.txt").read_text() == "ten years of work"


def test_a_second_conversion_to_the_same_target_does_not_disturb_the_first(
    tiny, tmp_path
):
    out, calls = tmp_path / "out", []

    def again(name, done, total):
        if not calls:
            calls.append(name)
            refused(tiny, out, "out: another conversion to it is running")

    convert(tiny, out, progress=again)
    whole(out, tiny)
    assert calls and listing(tmp_path) == ["out"]


# What other processes left


def leave(tmp_path: Path, kind: str, process: int, source: Path | None = None) -> Path:
    """What a killed conversion leaves beside its target."""
    folder = tmp_path / f".out.{kind}-{process}"
    if source is not None:
        return shutil.copytree(source, folder)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    return folder


def test_what_dead_processes_left_is_removed(tiny, tmp_path, dead, alive):
    leave(tmp_path, "partial", dead)
    leave(tmp_path, "partial", 2**40)  # no process can have that id
    leave(tmp_path, "partial", os.getpid())  # in a container every run may be 7
    others = [f".out2.partial-{dead}", f"out.partial-{dead}", ".out.partial-backup"]
    for name in others:
        (tmp_path / name).mkdir()
    running = leave(tmp_path, "partial", alive)
    convert(tiny, tmp_path / "out")
    whole(tmp_path / "out", tiny)
    assert listing(tmp_path) == sorted(["out", running.name, *others])
    assert listing(running) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["out[1]", "o*t", "?ut"])
def test_names_with_wildcards_find_their_own_leftovers_only(tiny, tmp_path, dead, name):
    (tmp_path / f".{name}.partial-{dead}").mkdir()
    other = leave(tmp_path, "partial", dead)
    convert(tiny, tmp_path / name)
    assert listing(tmp_path) == sorted([other.name, name])


def test_a_replaced_model_whose_successor_died_is_put_back(tiny, older, tmp_path, dead):
    leave(tmp_path, "replaced", dead, older)
    leave(tmp_path, "partial", dead)
    refused(tiny, tmp_path / "out", "--overwrite")
    whole(tmp_path / "out", older)
    assert listing(tmp_path) == ["out"]
    convert(tiny, tmp_path / "out", overwrite=True)
    # and forgotten where its successor stands
    leave(tmp_path, "replaced", dead, older)
    refused(tiny, tmp_path / "out", "--overwrite")
    whole(tmp_path / "out", tiny)
    assert listing(tmp_path) == ["out"]


# SIGKILL


def kill(source: Path, target: Path, step: str, delay: float = 0.0) -> None:
    """Start a conversion with --overwrite and kill it at that step."""
    process = subprocess.Popen(
        [sys.executable, DRIVER, source, target, step],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(atomic.__file__).parents[2])},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        time.sleep(delay)
        process.kill()


RNG = random.Random(0)
STEPS = [f"tensor-{RNG.randrange(1, 60)}", "copy-1", "fsync-3", "rename-1"]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_killed_conversion_leaves_no_target_and_the_next_one_clears_up(
    tiny, tmp_path, step
):
    target = tmp_path / "out"
    kill(tiny, target, step)
    assert not target.exists()
    assert len(listing(tmp_path)) == 1  # what it was writing
    convert(tiny, target)
    whole(target, tiny)
    assert listing(tmp_path) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["rename-1", "rename-2", "remove-1"])
def test_killed_at_the_renames_the_old_or_the_new_model_stands(tiny, older, out, step):
    kill(tiny, out, step)
    if step == "rename-2":
        assert not out.exists()
        refused(tiny, out, "--overwrite")  # puts it back
    whole(out, tiny if step == "remove-1" else older)
    convert(tiny, out, overwrite=True)
    whole(out, tiny)
    assert listing(out.parent) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [RNG.random() * 0.25 for _ in range(3)])
def test_killed_at_any_moment_old_or_new_stands_whole(tiny, older, out, delay):
    kill(tiny, out, "slow", delay)
    if out.exists():
        whole(out, older if (out / "LICENSE").exists() else tiny)
    convert(tiny, out, overwrite=True)
    whole(out, tiny)
    assert listing(out.parent) == ["out"]
