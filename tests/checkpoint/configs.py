"""Writing configurations, and how one must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.errors import ConfigError


def write(folder: Path, config: dict[str, Any], generation: Any = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def refused(folder: Path, file: Path, named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(folder)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    for part in named:
        assert part in message.removeprefix(str(file))
