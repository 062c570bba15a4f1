"""The safetensors format: what is read, what is refused, what is written."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files.safetensors import (
    DTYPES,
    Pending,
    TensorInfo,
    read_header,
    write_file,
)


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header, given as JSON value or bytes, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def pending(array: mx.array) -> Pending:
    return Pending(array.dtype, array.shape, lambda: array)


def write(path: Path, tensors: dict[str, mx.array]) -> list[tuple[str, int]]:
    return list(write_file(path, {name: pending(a) for name, a in tensors.items()}))


def loaded(path: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    return arrays


def bits(array: mx.array) -> bytes:
    """The bytes of an array, whatever its dtype."""
    return np.array(mx.view(array.reshape(-1), mx.uint8)).tobytes()


def sample(dtype: mx.Dtype, shape: tuple[int, ...]) -> mx.array:
    """Values that no other dtype holds in the same bytes."""
    values = np.random.default_rng(0).normal(size=shape) * 60
    return mx.array(np.abs(values)).astype(dtype)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (), (0,), (2, 0, 3), (2, 1, 3, 2)])
def test_written_files_load_elsewhere_and_here(tmp_path, name, shape):
    path, array = tmp_path / "a.safetensors", sample(DTYPES[name], shape)
    after = mx.array([1, 2, 3], dtype=mx.int32)
    assert write(path, {"x": array, "after": after}) == [
        ("x", array.nbytes),
        ("after", 12),
    ]
    theirs = loaded(path)
    assert theirs["x"].dtype == array.dtype
    assert theirs["x"].shape == shape
    assert bits(theirs["x"]) == bits(array)
    assert theirs["after"].tolist() == [1, 2, 3]
    info = read_header(path)["x"]
    assert info == TensorInfo(array.dtype, shape, path)
    assert info.nbytes == array.nbytes


def test_float32_bytes_are_numpys(tmp_path):
    path = tmp_path / "a.safetensors"
    array = np.array([[1.5, -0.0], [np.inf, 3e-39]], np.float32)
    write(path, {"x": mx.array(array)})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + length])["x"] == entry("F32", [2, 2], [0, 16])
    assert raw[8 + length :] == array.tobytes()


def test_the_data_is_aligned_whatever_the_names(tmp_path):
    for size in range(9):
        path = tmp_path / f"{size}.safetensors"
        write(path, {"n" * size: mx.ones((2,))})
        assert (path.stat().st_size - 8) % 8 == 0


@pytest.mark.parametrize("dtype", [mx.int32, mx.bfloat16])
def test_strided_and_transposed_arrays_are_written_in_row_order(tmp_path, dtype):
    path, array = tmp_path / "a.safetensors", mx.arange(12).reshape(3, 4)
    array = array.astype(dtype)
    write(path, {"t": array.T, "s": array[:, ::2]})
    assert loaded(path)["t"].tolist() == array.T.tolist()
    assert loaded(path)["s"].tolist() == [[0, 2], [4, 6], [8, 10]]


def test_files_mlx_writes_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {"a": sample(mx.bfloat16, (2, 3)), "b": sample(mx.uint8, (4,))}
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    found = read_header(path)
    assert {n: (i.dtype, i.shape) for n, i in found.items()} == {
        "a": (mx.bfloat16, (2, 3)),
        "b": (mx.uint8, (4,)),
    }


def test_tensors_are_made_one_at_a_time_in_order(tmp_path):
    made = []

    def make(name: str) -> mx.array:
        made.append(name)
        return mx.ones((2,))

    tensors = {
        n: Pending(mx.float32, (2,), lambda n=n: make(n)) for n in ("z", "a", "m")
    }
    for count, (name, _) in enumerate(write_file(tmp_path / "f", tensors), 1):
        assert made[-1] == name
        assert len(made) == count
    assert made == ["z", "a", "m"]


@pytest.mark.parametrize("array", [mx.ones((3,)), mx.ones((2,), dtype=mx.float16)])
def test_a_tensor_that_became_something_else_is_not_written(tmp_path, array):
    tensors = {"x": Pending(mx.float32, (2,), lambda: array)}
    with pytest.raises(CheckpointError, match=r"x: became .* instead of"):
        list(write_file(tmp_path / "f", tensors))


GOOD = pack({"x": entry(), "y": entry("U8", [3], [8, 11])}, bytes(range(11)))


def refused(tmp_path: Path, content: bytes, *named: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in named:
        assert part in message.removeprefix(str(path))


def test_the_good_file_is_good(tmp_path):
    (tmp_path / "w").write_bytes(GOOD)
    assert {n: i.shape for n, i in read_header(tmp_path / "w").items()} == {
        "x": (2,),
        "y": (3,),
    }


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_file_cut_anywhere_is_refused(tmp_path, length):
    refused(tmp_path, GOOD[:length])


@pytest.mark.parametrize(
    ("cut", "named"),
    [(0, "0 bytes"), (7, "7 bytes"), (20, "truncated"), (-1, "y: ends 1 bytes")],
)
def test_a_cut_file_says_how_it_is_cut(tmp_path, cut, named):
    refused(tmp_path, GOOD[:cut], named)


def test_data_nobody_owns_is_tolerated(tmp_path):
    (tmp_path / "w").write_bytes(GOOD + b"trailing")
    assert set(read_header(tmp_path / "w")) == {"x", "y"}


BAD: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "longer than the file": (pack({}, length=10**6), ("1000000", "truncated")),
    "largest length": (pack({}, length=2**64 - 1), ("truncated",)),
    "one byte longer": (pack({}, length=3), ("header of 3 bytes", "truncated")),
    "html": (b"<!DOCTYPE html><html>not found</html>", ("truncated",)),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", ("header",)),
    "garbage header": (pack(b"\x80garbage"), ("broken header",)),
    "torn header": (pack(b'{"x": {"dtype":'), ("broken header",)),
    "nested header": (pack(b"[" * 50_000), ("broken header",)),
    "endless number": (pack(b'{"x": ' + b"9" * 5000 + b"}"), ("broken header",)),
    "a list": (pack([entry()]), ("broken header",)),
    "a number": (pack(7), ("broken header",)),
    "entry a list": (pack({"x": [1]}), ("x: broken",)),
    "entry null": (pack({"x": None}), ("x: broken",)),
    "no dtype": (pack({"x": {"shape": [], "data_offsets": [0, 4]}}), ("x: broken",)),
    "no shape": (pack({"x": {"dtype": "F32", "data_offsets": [0, 4]}}), ("x",)),
    "no offsets": (pack({"x": {"dtype": "F32", "shape": []}}), ("x: broken",)),
    "shape a number": (pack({"x": entry(shape=2)}, bytes(8)), ("x: broken",)),
    "shape a string": (pack({"x": entry(shape="2")}, bytes(8)), ("x: broken",)),
    "negative shape": (pack({"x": entry(shape=[-2])}, bytes(8)), ("x: broken",)),
    "two negatives": (pack({"x": entry(shape=[-2, -1])}, bytes(8)), ("x: broken",)),
    "shape of floats": (pack({"x": entry(shape=[2.0])}, bytes(8)), ("x: broken",)),
    "shape of bools": (
        pack({"x": entry(shape=[True], offsets=[0, 4])}, bytes(4)),
        ("x: broken",),
    ),
    "three offsets": (pack({"x": entry(offsets=[0, 4, 8])}, bytes(8)), ("x: broken",)),
    "negative offset": (pack({"x": entry(offsets=[-8, 0])}, bytes(8)), ("x: broken",)),
    "backwards": (pack({"x": entry(offsets=[8, 0])}, bytes(8)), ("x: -8 bytes",)),
    "too few bytes": (pack({"x": entry(offsets=[0, 7])}, bytes(8)), ("x: 7", "8")),
    "too many bytes": (pack({"x": entry(offsets=[0, 9])}, bytes(9)), ("x: 9", "8")),
    "bytes for nothing": (pack({"x": entry(shape=[0])}, bytes(8)), ("x: 8", "0")),
    "vast shape": (pack({"x": entry(shape=[2**62] * 4)}, bytes(8)), ("x: 8 bytes",)),
    "behind the end": (pack({"x": entry(offsets=[4, 12])}, bytes(8)), ("x: ends 4",)),
    "8-bit floats": (
        pack({"x": entry("F8_E4M3", [8])}, bytes(8)),
        ("x: dtype F8_E4M3", "bfloat16 release"),
    ),
    "doubles": (pack({"x": entry("F64", [1])}, bytes(8)), ("x: dtype F64",)),
    "dtype a list": (pack({"x": entry(["F32"])}, bytes(8)), ("x: dtype",)),
    "dtype null": (pack({"x": entry(None)}, bytes(8)), ("x: dtype None",)),
    "overlap": (
        pack({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)),
        ("x and y overlap",),
    ),
    "same range": (pack({"b": entry(), "a": entry()}, bytes(8)), ("a and b overlap",)),
    "one inside another": (
        pack({"in": entry("U8", [1], [3, 4]), "out": entry()}, bytes(8)),
        ("out and in overlap",),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_refused_by_file_and_tensor(tmp_path, name):
    content, named = BAD[name]
    refused(tmp_path, content, *named)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="directory"):
        read_header(tmp_path)


def test_a_header_beyond_the_formats_limit_is_refused_unread(tmp_path):
    path, length = tmp_path / "large", 100 * 2**20 + 1
    path.write_bytes(pack({}, length=length))
    with path.open("r+b") as file:
        file.truncate(8 + length)
    with pytest.raises(CheckpointError, match=f"header of {length} bytes"):
        read_header(path)


def test_reading_a_header_reads_no_data(tmp_path):
    path = tmp_path / "large"
    count = 2**36
    path.write_bytes(pack({"x": entry("U8", [count], [0, count])}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + count)  # a hole of 64 GiB
    assert read_header(path)["x"].nbytes == count


mutations = st.lists(
    st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.sampled_from(list(DTYPES)),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.fixed_dictionaries(
                    {"dtype": inner, "shape": inner, "data_offsets": inner}
                )
            ),
            max_leaves=12,
        ),
        max_size=3,
    )
)
def test_any_json_header_is_read_or_refused(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(pack(header, bytes(16)))
    try:
        infos = read_header(path)
    except CheckpointError:
        return
    assert set(infos) == set(header) - {"__metadata__"}
    assert sum(info.nbytes for info in infos.values()) <= 16
