"""Damaged safetensors files: what we accept, the official reader accepts, and alike.

    python tests/fuzz/headers.py [--count 20000] [--seed 0]

Needs the `safetensors` package. Prints the first files that are judged otherwise or
read with other bytes, and exits with 1 if there is one.
"""

import argparse
import json
import random
import struct
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import safetensors

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files.safetensors import load_tensors, read_header

NUMBERS = [0, 1, 2, 3, 4, 7, 8, 11, 12, -1, 2**31, 2**63, 2**64, 1e3, 1.0, -0.0, True]
WORDS = [None, "", "F32", "BF16", "F64", "x", {}, [], "\ud83d\ude00", "é\u0000"]


def good(rng: random.Random) -> bytes:
    """Return a small file as writers make it."""
    names = rng.sample(["x", "y", "a.b", "é", "__m", ""], rng.randint(0, 4))
    header, data = {}, b""
    if rng.random() < 0.5:
        header["__metadata__"] = {"format": rng.choice(["mlx", "pt"])}
    for name in names:
        dtype, size = rng.choice([("F32", 4), ("U8", 1), ("BF16", 2), ("I64", 8)])
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        length = size * int(np.prod(shape))
        offsets = [len(data), len(data) + length]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += rng.randbytes(length)
    text = json.dumps(header).encode() + b" " * rng.choice([0, 1, 7])
    return struct.pack("<Q", len(text)) + text + data


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return a file changed in one or a few places."""
    length = struct.unpack("<Q", content[:8])[0]
    text, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.random()
    if kind < 0.35:  # bytes
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.randrange(len(changed) + 1)
            match rng.randrange(3):
                case 0 if at < len(changed):
                    changed[at] = rng.randrange(256)
                case 1:
                    changed[at:at] = rng.randbytes(rng.choice([1, 4]))
                case _:
                    del changed[at : at + rng.choice([1, 4])]
        return bytes(changed)
    if kind < 0.5:  # text of the header
        spots = [*b'{}[]",:0123456789-.eE \n\t\\', 0xEF, 0x80]
        changed = bytearray(text)
        at = rng.randrange(len(changed))
        changed[at : at + rng.randint(0, 2)] = bytes(
            rng.choices(spots, k=rng.randint(0, 2))
        )
        text = bytes(changed)
    elif kind < 0.9:  # values
        header = json.loads(text)
        for _ in range(rng.choice([1, 1, 2])):
            change(header, rng)
        text = json.dumps(header, ensure_ascii=rng.random() < 0.5)
        text = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.1 and text[:-1].rstrip() != b"{":
            text = text[:-1] + b", " + text[1:]  # every key twice
    else:
        data = data[: rng.randrange(len(data) + 1)] + rng.randbytes(rng.randrange(9))
    if rng.random() < 0.05:
        text = rng.choice([b"\xef\xbb\xbf", b" ", b"\n"]) + text
    return struct.pack("<Q", len(text)) + text + data


def change(header: dict, rng: random.Random) -> None:
    names = [name for name in header if isinstance(header[name], dict)]
    value = rng.choice([*NUMBERS, *WORDS])
    if not names or rng.random() < 0.1:
        header[rng.choice(["new", "__metadata__", "x"])] = value
        return
    entry = header[rng.choice(names)]
    key = rng.choice([*entry, "more"])
    if isinstance(entry.get(key), list) and entry[key] and rng.random() < 0.8:
        entry[key][rng.randrange(len(entry[key]))] = rng.choice(NUMBERS)
    elif rng.random() < 0.3:
        entry.pop(key, None)
    else:
        entry[key] = value


def compare(path: Path, content: bytes) -> str | None:
    """Return how the two readers differ on a file that we accept."""
    path.write_bytes(content)
    try:
        found = load_tensors(read_header(path))
        ours = {name: (list(a.shape), data_of(a)) for name, a in found.items()}
    except CheckpointError:
        return None
    try:
        theirs = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        return f"accepted, but not by the official reader: {error}"
    wanted = {name: (one["shape"], bytes(one["data"])) for name, one in theirs.items()}
    return None if ours == wanted else f"{ours} instead of {wanted}"


def data_of(array: mx.array) -> bytes:
    flat = mx.contiguous(array.reshape(-1))
    return np.array(mx.view(flat, mx.uint8)).tobytes() if flat.size else b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    accepted, failed = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.count):
            rng = random.Random(f"{given.seed}/{number}")
            content = mutated(good(rng), rng)
            path = Path(folder) / "w.safetensors"
            if why := compare(path, content):
                failed += 1
                if failed <= 10:
                    print(f"{number}: {content!r}\n  {why}")
            else:
                accepted += 1
    print(f"{given.count} files, {failed} judged or read otherwise")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
