"""mlx-lm's configuration file: the flags of `mlx_dgemma.lora` as YAML."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import SettingsError

LORA = ("rank", "scale", "keys", "dropout")


def flags(path: str | Path, known: Collection[str]) -> dict[str, Any]:
    """The flags a file sets, by name with underscores.

    `lora_parameters` holds rank, scale and keys; dropout may only be 0. Raises
    SettingsError naming the file and the key.
    """
    import yaml

    path = Path(path).expanduser()
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise SettingsError(f"{path}: is no YAML ({why})") from None
    if not isinstance(document, Mapping):
        raise SettingsError(f"{path}: must hold names and values")
    found: dict[str, Any] = {}
    for name, value in document.items():
        if name == "lora_parameters":
            found |= _lora(value, path)
        elif name not in known or name in ("config", "debug"):
            raise SettingsError(f"{path}: {name} is no flag of mlx_dgemma.lora")
        else:
            found[name] = _number(value)
    return found


def _lora(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"{path}: lora_parameters must hold names and values")
    if strange := sorted(set(value) - set(LORA)):
        raise SettingsError(
            f"{path}: lora_parameters holds {strange[0]}; known: {', '.join(LORA)}"
        )
    if value.get("dropout"):
        raise SettingsError(
            f"{path}: dropout is {value['dropout']}; only 0 is supported"
        )
    found = {name: _number(value[name]) for name in ("rank", "scale") if name in value}
    if "keys" in value:
        found["keys"] = tuple(value["keys"])
    return found


def _number(value: Any) -> Any:
    """1e-5, which YAML takes for text, as mlx-lm reads it."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
