"""Which device was chosen, why no other one, and what it is fast at: in words."""

from dataclasses import asdict
from typing import Any

import mlx.core as mx

from .. import backends
from ..diffusion.report import format_bytes
from ..errors import BackendError


def survey() -> dict[str, Any]:
    """Every backend and whether it is here; of the chosen one its choices and limits.

    `refused` is why none could be chosen, else None.
    """
    refused, found = None, None
    try:
        found = backends.chosen()
    except BackendError as error:
        refused = str(error)
    surveyed: dict[str, Any] = {
        "refused": refused,
        "backends": {
            name: {"missing": backend.missing()}
            for name, backend in backends.BACKENDS.items()
        },
    }
    if found is not None:
        device = found.backend
        choices = {k: _plain(v) for k, v in vars(device.choices).items()}
        surveyed["chosen"] = {
            "name": device.name,
            "reason": found.reason,
            "device": device.description(),
            "limits": asdict(device.limits()),
            "choices": choices,
            "why": dict(device.why),
            "info": dict(device.info()),
        }
    return surveyed


def lines(surveyed: dict[str, Any]) -> list[str]:
    """The survey for a person."""
    found, shown = surveyed.get("chosen"), []
    for name, one in surveyed["backends"].items():
        if found is not None and name == found["name"]:
            shown.append(f"{name:<6} in use: {found['reason']}")
        elif one["missing"] is not None:
            shown.append(f"{name:<6} not here: {one['missing']}")
        else:
            shown.append(f"{name:<6} here: --backend {name} asks for it")
    if found is None:
        return [*shown, "", f"none in use: {surveyed['refused']}"]
    limits = {k: v for k, v in found["limits"].items() if v is not None}
    memory = ", ".join(
        f"{kind} {format_bytes(amount)}" for kind, amount in limits.items()
    )
    shown += ["", f"{found['device']}; {memory or 'memory unknown'}"]
    for name, reason in found["why"].items():
        value = _shown(name, found["choices"].get(name))
        shown.append(f"{name:<18}{value:>10}  {reason}")
    return shown


def _shown(name: str, value: object) -> str:
    match value:
        case True | False:
            return "yes" if value else "no"
        case int() if name.endswith("_bytes"):
            return format_bytes(value)
        case None:
            return "as given" if name == "product_dtype" else ""
    return str(value)


def _plain(value: object) -> object:
    """What JSON can hold."""
    return (
        str(value).removeprefix("mlx.core.") if isinstance(value, mx.Dtype) else value
    )
