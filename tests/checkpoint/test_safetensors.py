"""The safetensors format: what is read, what is refused, what is written."""

import json
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoint.folders import bits, refusal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files.safetensors import (
    DTYPES,
    TensorInfo,
    load_tensors,
    read_header,
    write_file,
)


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header, given as JSON value or bytes, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, tensors: dict[str, mx.array]) -> list[tuple[str, int]]:
    written = list(write_file(path, dict(tensors)))
    assert written[-1][2] == sha256(path.read_bytes()).digest()
    return [(name, size) for name, size, _ in written]


def loaded(path: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(path)))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (), (2, 0, 3)])
def test_written_files_load_elsewhere_and_here(tmp_path, name, shape):
    path = tmp_path / "a.safetensors"
    values = np.abs(np.random.default_rng(0).normal(size=shape) * 60)
    array, after = mx.array(values).astype(DTYPES[name]), mx.array([1, 2, 3])
    written = write(path, {"x": array, "after": after})
    assert written == [("x", array.nbytes), ("after", 12)]
    info = read_header(path)["x"]
    assert info == TensorInfo("x", array.dtype, shape, path)
    assert info.nbytes == array.nbytes
    for theirs in (loaded(path), load_tensors(read_header(path))):
        assert (theirs["x"].dtype, theirs["x"].shape) == (array.dtype, shape)
        assert bits(theirs["x"]) == bits(array)
        assert theirs["after"].tolist() == [1, 2, 3]


def test_float32_bytes_are_numpys_and_aligned(tmp_path):
    path = tmp_path / "a.safetensors"
    array = np.array([[1.5, -0.0], [np.inf, 3e-39]], np.float32)
    for size in range(1, 9):
        write(path, {"n" * size: mx.array(array)})
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert path.read_bytes()[8 + length :] == array.tobytes()
        assert length % 8 == 0
    strided = mx.arange(12).reshape(3, 4).astype(mx.bfloat16)
    write(path, {"t": strided.T, "s": strided[:, ::2]})
    assert loaded(path)["t"].tolist() == strided.T.tolist()
    assert loaded(path)["s"].tolist() == [[0, 2], [4, 6], [8, 10]]


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    size = 4 * 2**20
    tensors = {n: mx.full((2**20,), i) + 0.5 for i, n in enumerate("zamb")}
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for count, (name, written, _) in enumerate(write_file(tmp_path / "f", tensors), 1):
        assert (name, written) == ("zamb"[count - 1], size)
        assert list(tensors) == list("zamb"[count:])
    assert mx.get_peak_memory() - before < 3 * size


GOOD = pack({"x": entry(), "y": entry("U8", [3], [8, 11])}, bytes(range(11)))


def refused(tmp_path: Path, content: bytes, named: str = "") -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    message = refusal(read_header, path)
    assert message.startswith(f"{path}: ") and named in message.removeprefix(str(path))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    (tmp_path / "w").write_bytes(GOOD)
    found = {n: i.shape for n, i in read_header(tmp_path / "w").items()}
    assert found == {"x": (2,), "y": (3,)}
    refused(tmp_path, GOOD + b"trailing", "8 bytes of no tensor lie between y and the")
    for length in range(len(GOOD)):
        refused(tmp_path, GOOD[:length])
    for cut, named in ((0, "0 bytes"), (7, "7 bytes"), (20, "truncated")):
        refused(tmp_path, GOOD[:cut], named)
    refused(tmp_path, GOOD[:-1], "y: ends 1 bytes")


def one(
    dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), size: int = 8
) -> bytes:
    """A file that should hold one tensor."""
    return pack({"x": entry(dtype, shape, offsets)}, bytes(size))


BROKEN_ENTRIES = [
    *([1], None, {"shape": [], "data_offsets": [0, 4]}),
    *({"dtype": "F32", "data_offsets": [0, 4]}, {"dtype": "F32", "shape": []}),
    *(entry(shape=shape) for shape in (2, "2", [-2], [-2, -1], [2.0], [True] * 2)),
    *(entry(offsets=offsets) for offsets in ([0, 4, 8], [-8, 0])),
]
BAD = [
    (pack({}, length=10**6), "header of 1000000 bytes"),
    (pack({}, length=2**64 - 1), "truncated"),
    (pack({}, length=3), "header of 3 bytes"),
    (b"<!DOCTYPE html><html>not found</html>", "truncated"),
    (b"version https://git-lfs.github.com/spec/v1\n", "header"),
    (pack(b"\x80garbage"), "broken header"),
    (pack(b"[" * 50_000), "broken header"),
    (pack(b'{"x": ' + b"9" * 5000 + b"}"), "broken header"),
    (pack([entry()]), "broken header"),
    *((pack({"x": broken}, bytes(8)), "x: broken") for broken in BROKEN_ENTRIES),
    (one(offsets=[8, 0]), "x: -8 bytes"),
    (one(offsets=[0, 7]), "x: 7 bytes for shape [2] of F32, which needs 8"),
    (one(offsets=[0, 9], size=9), "x: 9 bytes"),
    (one(shape=[2**30] * 8), "x: 8 bytes"),
    (one(offsets=[4, 12]), "x: ends 4"),
    (one("F8_E4M3", [8]), "F8_E4M3 is not supported; convert from the bfloat16"),
    (one(None), "x: dtype None"),
    (pack({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)), "x and y over"),
    (pack({"b": entry(), "a": entry()}, bytes(8)), "a and b overlap"),
    (pack({"in": entry("U8", [1], [3, 4]), "out": entry()}, bytes(8)), "and in ov"),
    (one(offsets=[1, 9], size=9), "1 bytes of no tensor lie between the header and x"),
    (one(shape=[2**31, 0], offsets=[0, 0], size=0), "x: broken"),
    (pack(b"\xef\xbb\xbf{}"), "broken header"),
    (pack(b'{"x": 1, "x": 1}'), "broken header"),
    (pack({"__metadata__": {"step": 1}}), "broken header"),
    (pack({"__metadata__": []}), "broken header"),
]


def test_a_bad_header_is_refused_by_file_and_tensor(tmp_path):
    for content, named in BAD:
        refused(tmp_path, content, named)
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="directory"):
        read_header(tmp_path)


def test_neither_a_vast_header_nor_data_is_read(tmp_path):
    path, length = tmp_path / "large", 100 * 2**20 + 1
    path.write_bytes(pack({}, length=length))
    with path.open("r+b") as file:
        file.truncate(8 + length)
    with pytest.raises(CheckpointError, match=f"header of {length} bytes"):
        read_header(path)
    count = 2**36
    path.write_bytes(pack({"x": entry("U8", [2**20, 2**16], [0, count])}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + count)  # a hole of 64 GiB
    assert read_header(path)["x"].nbytes == count


mutations = st.lists(
    st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1
)
quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(mutations)
@example([(len(GOOD) - 11, 255)])
@example([(GOOD.index(b"[0"), ord("{")), (GOOD.index(b"8]") + 1, ord("}"))])
@example([(GOOD.index(b"2"), ord("0"))])
def test_mutated_bytes_are_refused_or_harmless(tmp_path, changes):
    mutated = bytearray(GOOD)
    for position, value in changes:
        mutated[position] = value
    path = tmp_path / "w.safetensors"
    path.write_bytes(mutated)
    try:
        infos = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    if mutated[:-11] == GOOD[:-11]:  # only data changed
        assert {n: i.shape for n, i in infos.items()} == {"x": (2,), "y": (3,)}
    assert sum(info.nbytes for info in infos.values()) <= 11
    for info in infos.values():
        assert all(type(n) is int and n >= 0 for n in info.shape)
