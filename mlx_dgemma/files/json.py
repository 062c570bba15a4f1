"""Strict reading of JSON files and JSON lines; errors name the file and the key."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .opening import open_regular, read_regular

MAX_JSON_BYTES = 64 * 2**20  # a weight index of a large model is a few MB
MAX_LINE_BYTES = 8 * 2**20  # of one row: the longest context is a few MB of text
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_object(text: str | bytes, *, unique: bool = False) -> dict[str, Any]:
    """Return the JSON object in a text, or in UTF-8 bytes with or without a BOM.

    Raises DataError with a reason, without a place: broken JSON, no object, NaN or
    Infinity (which JSON does not have), half a surrogate pair, nested too deeply, or,
    if keys must be `unique`, one that stands twice.
    """

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if unique and len(found) < len(pairs):
            raise DataError("a key stands twice")
        return found

    def refuse(constant: str) -> None:
        raise DataError(f"holds {constant}, which is not a JSON number")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=collect)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise DataError("holds a lone surrogate; remove it") from None
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON ({error})") from None
    except RecursionError:
        raise DataError("is nested too deeply") from None
    except ValueError:  # of int, for thousands of digits
        raise DataError("broken JSON (a number is too long)") from None
    if not isinstance(value, dict):
        raise DataError(f"is {type(value).__name__}, not an object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file.

    Raises ConfigError when the file is missing, too large, or `parse_object` refuses.
    """
    try:
        return parse_object(read_regular(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; is this the right folder?") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except DataError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, numbered from 1.

    Raises DataError when the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    size = f"{MAX_LINE_BYTES // 2**20} MB"
                    raise DataError(f"{path}:{number}: is longer than {size}")
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON lines file with their line numbers.

    Raises DataError "path:line: reason" for the first line `parse_object` refuses.
    """
    for number, line in read_lines(path):
        try:
            row = parse_object(line)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        yield number, row


class Keys:
    """Typed access to one JSON object that remembers which keys were asked for.

    A key that is null counts as absent. Every refusal is a ConfigError that names the
    file, the key and the allowed values.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values = values
        self.where = where
        self._seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def unknown(self, ignored: frozenset[str] = frozenset()) -> list[str]:
        """Return the keys that were not asked for and are not ignored."""
        return sorted(set(self._values) - self._seen - ignored)

    def refuse_unknown(self, why: str, ignored: frozenset[str] = frozenset()) -> None:
        """Refuse the first key that was not asked for and is not ignored."""
        if keys := self.unknown(ignored):
            raise self.refuse(keys[0], why)

    def refuse(self, key: str, why: str) -> ConfigError:
        """Return the error to raise for a key."""
        return ConfigError(f"{self.where}: {key} {why}")

    def _get(self, key: str, default: Any = None) -> Any:
        self._seen.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def _need(self, key: str, default: Any) -> Any:
        value = self._get(key, default)
        if value is None:
            raise self.refuse(key, "is missing")
        return value

    def integer(self, key: str, default: int | None, min: int, max: int) -> int:
        value = self._need(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refuse(key, f"is {value!r}; it must be a whole number")
        if not min <= value <= max:
            raise self.refuse(key, f"is {value}; it must be from {min} to {max}")
        return value

    def number(self, key: str, default: float | None, *, zero: bool = False) -> float:
        """Return a number above 0, or from 0 up if `zero`."""
        value = self._need(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(key, f"is {value!r}; it must be a number")
        try:
            number = float(value)
        except OverflowError:  # whole numbers in JSON have no end
            number = math.inf
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            allowed = "from 0 up" if zero else "above 0"
            raise self.refuse(key, f"is {number}; it must be a number {allowed}")
        return number

    def one_of(self, key: str, default: Any, allowed: tuple[Any, ...]) -> Any:
        value = self._get(key, default)
        # of the same type too: True == 1 and 4.0 == 4
        if not any(type(value) is type(a) and value == a for a in allowed):
            shown = ", ".join(repr(a) for a in allowed)
            raise self.refuse(key, f"is {value!r}; supported: {shown}")
        return value

    def boolean(self, key: str) -> bool:
        return self.one_of(key, False, (False, True))

    def mapping(self, key: str) -> "Keys | None":
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, "must be an object")
        return Keys(value, f"{self.where}: {key}")

    def array(self, key: str) -> list[Any] | None:
        value = self._get(key)
        if value is not None and not isinstance(value, list):
            raise self.refuse(key, "must be a list")
        return value

    def items(self) -> list[tuple[str, Any]]:
        self._seen.update(self._values)
        return list(self._values.items())

    def ids(self, key: str, vocab_size: int) -> tuple[int, ...] | None:
        """Return one token id below `vocab_size` or a list of them; None if absent."""
        value = self._get(key)
        ids = value if isinstance(value, list) else [value]
        if value is None:
            return None
        if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
            raise self.refuse(
                key, f"is {value!r}; it must be token ids below {vocab_size}"
            )
        return tuple(ids)
