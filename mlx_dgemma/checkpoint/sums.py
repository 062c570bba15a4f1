"""SHA-256 sums of a model folder: written by a conversion, checked when asked.

SHA256SUMS is the format of `sha256sum -c`. A hub download has none; there the name of a
large file's blob is its sum.
"""

import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from ..errors import CheckpointError
from ..files.opening import open_regular, read_regular

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")
BLOCK = 2**22  # bytes read at a time
MAX_SUMS = 2**24  # bytes

Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all


def write_sums(folder: Path, known: dict[str, str]) -> None:
    """Write the sums of all files of a folder; `known` are not read again."""
    files = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    lines = [f"{known.get(p.name) or _sum(p)}  {p.name}\n" for p in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify(folder: Path, progress: Progress | None = None) -> list[str]:
    """Return the names of the files whose bytes were checked.

    Raises CheckpointError naming the first file that is missing or differs, and for a
    folder that says no sums, or leaves weights out of them.
    """
    wanted = _read_sums(folder) if (folder / SUMS).exists() else _hub_sums(folder)
    if not wanted:
        raise CheckpointError(
            f"{folder}: has no {SUMS}, and is no download of the hub's; convert again"
        )
    weights = {path.name for path in folder.glob("*.safetensors")}
    if left := sorted(weights - wanted.keys()):
        raise CheckpointError(f"{folder / left[0]}: has no sum to be checked against")
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    if missing:
        raise CheckpointError(f"{folder / missing[0]}: is missing; convert again")
    total, done = sum((folder / name).stat().st_size for name in wanted), 0
    for name, expected in wanted.items():

        def report(size: int, name: str = name) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(name, done, total)

        if _sum(folder / name, report) != expected:
            raise CheckpointError(
                f"{folder / name}: differs from what was written; get it again"
            )
    return list(wanted)


def _read_sums(folder: Path) -> dict[str, str]:
    path, found = folder / SUMS, dict[str, str]()
    try:
        lines = read_regular(path, MAX_SUMS).decode("utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: is not UTF-8") from None
    for number, line in enumerate(lines, 1):
        if (match := LINE.fullmatch(line)) is None:
            raise CheckpointError(f"{path}:{number}: is no line of a sum and a name")
        found[match[2]] = match[1]
    return found


def _hub_sums(folder: Path) -> dict[str, str]:
    """Return the sums in the names of a hub download's blobs."""
    links = {path.name: path.resolve().name for path in folder.iterdir()}
    return {n: blob for n, blob in links.items() if re.fullmatch("[0-9a-f]{64}", blob)}


def _sum(path: Path, report: Callable[[int], None] = lambda size: None) -> str:
    digest = sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            report(len(block))
    return digest.hexdigest()
