"""The safetensors format: headers checked before a byte is trusted, files written
one tensor at a time so that a shard of any size needs the memory of one tensor.

A file is an 8-byte little-endian length, a JSON header (name -> dtype, shape, byte
range) and the tensors' bytes; see https://github.com/huggingface/safetensors.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, DataError, DGemmaError
from .json import parse_object
from .opening import open_regular

MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
MAX_NAMES = 5  # shown in one message
SUMMED = 2**22  # words of an array summed at a time
MAX_DIMENSION = 2**31 - 1
DTYPES: dict[str, mx.Dtype] = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U8": mx.uint8,
    "U32": mx.uint32,
    "I8": mx.int8,
    "I32": mx.int32,
    "I64": mx.int64,
    "U64": mx.uint64,
    "BOOL": mx.bool_,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
Key = TypeVar("Key")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, known from the header alone."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors in a file by name, after checking that all bytes are there.

    Raises CheckpointError naming the file, and the tensor where there is one.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes is no safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: header of {length} bytes in a file of {size}; "
                    "truncated, or not safetensors: download it again"
                )
            text = file.read(length)
            if not text.startswith(b"{"):  # the format allows nothing before it
                raise DataError("is no object")
            header = parse_object(text, unique=True)
    except FileNotFoundError:
        why = "no such file"
        if path.is_symlink():
            why = f"links to {os.readlink(path)}, which is gone; download it again"
        raise CheckpointError(f"{path}: {why}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except DataError:
        raise CheckpointError(f"{path}: broken header; download it again") from None
    metadata = header.pop("__metadata__", None)
    values = {} if metadata is None else metadata
    if not isinstance(values, dict) or not all(
        isinstance(text, str) for text in values.values()
    ):
        raise CheckpointError(f"{path}: broken header; download it again")
    return _check_entries(path, header, size - 8 - length)


def _check_entries(
    path: Path, header: dict[str, Any], available: int
) -> dict[str, TensorInfo]:
    infos, ranges = {}, []
    for name, entry in header.items():
        try:
            dtype_name, shape, start, end = _parse_entry(entry)
        except (TypeError, KeyError, ValueError):
            raise CheckpointError(f"{path}: {name}: broken header entry") from None
        if dtype_name not in DTYPES:
            why = "is not supported; convert from the bfloat16 release"
            raise CheckpointError(f"{path}: {name}: dtype {dtype_name} {why}")
        info = TensorInfo(name, DTYPES[dtype_name], shape, path)
        if end - start != info.nbytes:
            why = f"shape {list(shape)} of {dtype_name}, which needs {info.nbytes}"
            raise CheckpointError(f"{path}: {name}: {end - start} bytes for {why}")
        if end > available:
            why = "bytes behind the file's end; truncated: download it again"
            raise CheckpointError(f"{path}: {name}: ends {end - available} {why}")
        infos[name] = info
        ranges.append((start, end, name))
    ranges.sort()
    # as the official reader: no overlap, no hole, nothing behind the last tensor
    ranges = [(0, 0, "the header"), *ranges, (available, available, "the file's end")]
    for (_, end, name), (start, _, following) in pairwise(ranges):
        if start < end:
            raise CheckpointError(f"{path}: {name} and {following} overlap")
        if start > end:
            why = f"{start - end} bytes of no tensor lie between {name} and {following}"
            raise CheckpointError(f"{path}: {why}; damaged: download it again")
    return infos


def _parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape and byte range of a header entry."""
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    # bool is an int too; dimensions are int32 in MLX
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError
    if any(n > MAX_DIMENSION for n in shape):
        raise ValueError
    return str(entry["dtype"]), shape, start, end


class Expected(NamedTuple):
    """What a tensor must be. `source` is what asks for it, for the message."""

    shape: tuple[int, ...]
    dtypes: tuple[mx.Dtype, ...] = FLOATS
    source: str = "config.json"


def check_tensors(
    where: Path,
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, Expected],
    *,
    partial: bool = False,
    name_of: Callable[[str], str] = str,
    error: Callable[[str], DGemmaError] = CheckpointError,
) -> None:
    """Raise an error naming tensors that are missing, unexpected or of a wrong kind.

    where     file or folder, for the message
    partial   some may be missing
    name_of   from a key of both mappings to the name on disk
    error     what makes the error of a message
    """
    if not partial and (missing := expected.keys() - found.keys()):
        raise error(f"{where}: missing tensors: {shorten(map(name_of, missing))}")
    if extra := found.keys() - expected.keys():
        raise error(f"{where}: unexpected tensors: {shorten(map(name_of, extra))}")
    for key, info in found.items():
        shape, dtypes, source = expected[key]
        if info.shape != shape:
            why = f"has shape {list(info.shape)}, but {source} needs {list(shape)}"
            raise error(f"{info.file}: {info.name} {why}")
        if info.dtype not in dtypes:
            kind = "floats" if dtypes == FLOATS else str(dtypes[0])
            raise error(f"{info.file}: {info.name} holds {info.dtype}, not {kind}")


def shorten(names: Iterable[str]) -> str:
    """Return the first few names in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def load_tensors(infos: Mapping[Key, TensorInfo]) -> dict[Key, mx.array]:
    """Return tensors, unevaluated: their bytes are read when they are used."""
    files: dict[Path, Any] = {}
    for file in {info.file for info in infos.values()}:
        try:
            files[file] = mx.load(str(file), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from None
    return {key: files[info.file][info.name] for key, info in infos.items()}


def load_file(
    path: Path,
) -> tuple[dict[str, TensorInfo], dict[str, mx.array], dict[str, str]]:
    """Return the tensors in a file from its checked header, as arrays, and metadata.

    Raises CheckpointError.
    """
    infos = read_header(path)
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    return infos, *loaded


def checksum(arrays: dict[str, mx.array]) -> str:
    """Return a hash of names, types, shapes and every bit of arrays.

    The bits go in as two sums over the words of each array, plain and weighted by odd
    numbers, modulo 2^32: made on the device, in the time of one read.
    """
    digest = sha256()
    for name, array in sorted(arrays.items()):
        flat = mx.contiguous(array.reshape(-1))
        words = mx.view(flat, {1: mx.uint8, 2: mx.uint16}.get(flat.itemsize, mx.uint32))
        sums = mx.zeros((2,), dtype=mx.uint32)
        for start in range(0, words.size, SUMMED):
            some = words[start : start + SUMMED].astype(mx.uint32)
            odd = (mx.arange(some.size, dtype=mx.uint32) + start) * 2 + 1
            sums = sums + mx.stack([mx.sum(some), mx.sum(some * odd)])
            mx.eval(sums)
        numbers = np.array(sums).tolist()
        digest.update(repr([name, str(array.dtype), array.shape, numbers]).encode())
    return digest.hexdigest()


def count_nonfinite(array: mx.array) -> int:
    """Return how many values of an array of floats are NaN or infinite."""
    bits = {mx.float32: mx.uint32, mx.float16: mx.uint16, mx.bfloat16: mx.uint16}
    exponent = {mx.float32: 0x7F800000, mx.float16: 0x7C00, mx.bfloat16: 0x7F80}
    if array.dtype not in bits or array.size == 0:
        return 0
    # by their exponents: three times as fast as isfinite on a CPU
    exponents: Any = mx.view(mx.contiguous(array.reshape(-1)), bits[array.dtype])
    exponents = exponents & exponent[array.dtype]
    largest: Any = mx.max(exponents).item()
    if largest < exponent[array.dtype]:
        return 0
    count: Any = mx.sum(exponents == exponent[array.dtype]).item()
    return count


def write_file(
    path: Path,
    tensors: dict[str, mx.array],
    check: Callable[[str, mx.array], None] = lambda name, array: None,
) -> Iterator[tuple[str, int, bytes]]:
    """Write tensors in order and take them out of the dict.

    Yields the name of each, its size in bytes, and the SHA-256 of the file so far.
    Arrays that are not evaluated yet are computed one at a time; `check` sees each
    before it is written. The file is durable before the last yield returns.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned data, as other writers leave it
    start = struct.pack("<Q", len(text)) + text
    digest = sha256(start)
    with path.open("wb") as file:
        file.write(start)
        for name in list(tensors):
            array = tensors.pop(name)
            check(name, array)
            array = mx.contiguous(array.reshape(-1) if array.ndim == 0 else array)
            data: Any = mx.view(array, mx.uint8)
            del array
            file.write(memoryview(data))
            digest.update(memoryview(data))
            yield name, data.nbytes, digest.digest()
            del data
        file.flush()
        os.fsync(file.fileno())
