"""Reading the small JSON files of a checkpoint, with errors that name the key."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

MAX_JSON_BYTES = 64 * 2**20  # a weight index of a large model is a few MB


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises ConfigError when the file is missing, torn, not UTF-8, not an object,
    or holds NaN or Infinity, which JSON does not have.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: larger than 64 MB, so not a configuration")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; is this a model folder?") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None

    def refuse(constant: str) -> None:
        raise ConfigError(f"{path}: holds {constant}, which is not a JSON number")

    try:
        value = json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: broken JSON at line {error.lineno} ({error.msg})"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: cannot be parsed (nested too deeply)") from None
    except ValueError:  # of int, for thousands of digits
        raise ConfigError(f"{path}: cannot be parsed (a number is too long)") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return value


class Keys:
    """Typed access to one JSON object that remembers which keys were asked for.

    Every refusal names the file, the key and the allowed values.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values = values
        self.where = where
        self._seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def unknown(self, ignored: frozenset[str] = frozenset()) -> list[str]:
        """Keys nobody asked for and nobody declared as harmless."""
        return sorted(set(self._values) - self._seen - ignored)

    def refuse(self, key: str, why: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} {why}")

    def _get(self, key: str) -> Any:
        self._seen.add(key)
        return self._values.get(key)

    def integer(self, key: str, default: int | None, least: int, most: int) -> int:
        value = self._get(key)
        if value is None:
            value = default
        if value is None:
            raise self.refuse(key, "is missing")
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refuse(key, f"is {value!r}; it must be a whole number")
        if not least <= value <= most:
            raise self.refuse(key, f"is {value}; it must be from {least} to {most}")
        return value

    def number(self, key: str, default: float | None, *, zero: bool = False) -> float:
        """A number above 0, or from 0 up if `zero`."""
        value = self._get(key)
        if value is None:
            value = default
        if value is None:
            raise self.refuse(key, "is missing")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(key, f"is {value!r}; it must be a number")
        allowed = "from 0 up" if zero else "above 0"
        try:
            number = float(value)
        except OverflowError:  # whole numbers in JSON have no end
            number = math.inf
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            raise self.refuse(key, f"is {number}; it must be a number {allowed}")
        return number

    def one_of(self, key: str, default: Any, allowed: tuple[Any, ...]) -> Any:
        value = self._get(key)
        if value is None:
            value = default
        # of the same type too: True == 1 and 4.0 == 4
        if not any(type(value) is type(a) and value == a for a in allowed):
            shown = ", ".join(repr(a) for a in allowed)
            raise self.refuse(key, f"is {value!r}; supported: {shown}")
        return value

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
        """One token id below `vocab_size` or a list of them; None when absent."""
        value = self._get(key)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            known = isinstance(token, int) and 0 <= token < vocab_size
            if not known or isinstance(token, bool):
                raise self.refuse(
                    key, f"is {value!r}; it must be token ids below {vocab_size}"
                )
        return tuple(ids)
