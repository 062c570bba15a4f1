"""mlx-lm's configuration file: the flags of `mlx_dgemma.lora` as YAML."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..files.opening import read_regular, user_path

MAX_YAML = 2**20  # bytes
# what its constructors raise
BROKEN = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
LORA = ("rank", "scale", "keys", "dropout")


def flags(path: str | Path, known: Collection[str]) -> dict[str, Any]:
    """Return the flags a file sets, by name with underscores; null sets nothing.

    `lora_parameters` holds rank, scale and keys; dropout may only be 0. Raises
    SettingsError naming the file and the key.
    """
    import yaml

    path = user_path(path)
    try:
        document = yaml.safe_load(read_regular(path, MAX_YAML).decode("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, *BROKEN) as error:
        reason = " ".join(str(error)[:400].split()) or type(error).__name__
        raise SettingsError(f"{path}: is no YAML ({reason})") from None
    values = _mapping(document, f"{path}:")
    lora = _mapping(values.pop("lora_parameters", {}), f"{path}: lora_parameters")
    for name in values:
        if name not in known or name in ("config", "debug"):
            raise SettingsError(f"{path}: {name} is no flag of mlx_dgemma.lora")
    for name in lora:
        if name not in LORA:
            raise SettingsError(
                f"{path}: lora_parameters holds {name}; known: {', '.join(LORA)}"
            )
    if dropout := lora.pop("dropout", 0):
        raise SettingsError(f"{path}: dropout is {dropout}; only 0 is supported")
    given = (values | lora).items()
    return {
        name: _flag(value, f"{path}: {name}")
        for name, value in given
        if value is not None
    }


def _flag(value: Any, where: str, *, alone: bool = True) -> Any:
    """Return a value as a command line gives it: switches, texts and lists of texts."""
    match value:
        case bool() | str():
            return value
        case int() if abs(value) < 2**64:
            return str(value)
        case float() if math.isfinite(value):
            return str(int(value)) if value.is_integer() else repr(value)
        case list() if alone:
            return [_flag(item, where, alone=False) for item in value]
    raise SettingsError(f"{where} must be text, a number, true or false")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"{where} must hold names and values")
    return dict(value)
