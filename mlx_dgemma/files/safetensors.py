"""The safetensors format: headers checked before a byte is trusted, files written
one tensor at a time so that a shard of any size needs the memory of one tensor.

A file is an 8-byte little-endian length, a JSON header (name -> dtype, shape, byte
range) and the tensors' bytes; see https://github.com/huggingface/safetensors.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError

MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
DTYPES: dict[str, mx.Dtype] = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U8": mx.uint8,
    "U32": mx.uint32,
    "I8": mx.int8,
    "I32": mx.int32,
    "I64": mx.int64,
    "BOOL": mx.bool_,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from a header alone."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in one file, after checking that all bytes are there.

    Raises CheckpointError naming the file, and the tensor where there is one.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes is no safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: header of {length} bytes in a file of {size}; "
                    "truncated, or not safetensors: download it again"
                )
            header = json.loads(file.read(length).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: broken header; download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: broken header; download it again")
    header.pop("__metadata__", None)
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
            raise CheckpointError(
                f"{path}: {name}: dtype {dtype_name} is not supported; "
                "convert from the bfloat16 release"
            )
        info = TensorInfo(DTYPES[dtype_name], shape, path)
        if end - start != info.nbytes:
            raise CheckpointError(
                f"{path}: {name}: {end - start} bytes for shape {list(shape)} "
                f"of {dtype_name}, which needs {info.nbytes}"
            )
        if end > available:
            raise CheckpointError(
                f"{path}: {name}: ends {end - available} bytes behind the file's "
                "end; truncated: download it again"
            )
        infos[name] = info
        ranges.append((start, end, name))
    ranges.sort()
    for (_, end, name), (start, _, following) in pairwise(ranges):
        if start < end:
            raise CheckpointError(f"{path}: {name} and {following} overlap")
    return infos


def _parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape and byte range of a header entry; ValueError if it is no such."""
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    # bool is an int too
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError
    return str(entry["dtype"]), shape, start, end


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: its dtype and shape now, its values when asked."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    make: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def write_file(path: Path, tensors: dict[str, Pending]) -> Iterator[tuple[str, int]]:
    """Write `tensors` to `path` in order, yielding (name, bytes) after each.

    The file is fsynced before the last yield returns; only one tensor is held.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned data, as other writers leave it
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, tensor in tensors.items():
            file.write(_bytes(name, tensor))
            yield name, tensor.nbytes
        file.flush()
        os.fsync(file.fileno())


def _bytes(name: str, tensor: Pending) -> memoryview:
    array = tensor.make()
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise CheckpointError(
            f"{name}: became {array.dtype} {list(array.shape)} "
            f"instead of {tensor.dtype} {list(tensor.shape)}"
        )
    if array.dtype == mx.bfloat16:  # numpy has no bfloat16; the bytes are the same
        array = mx.view(array, mx.uint16)
    rows = np.ascontiguousarray(np.array(array, copy=False))
    return rows.reshape(-1).view(np.uint8).data
