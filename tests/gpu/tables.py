"""The results of a GPU run as Markdown."""

from collections.abc import Iterator
from typing import Any


def markdown(found: dict[str, Any]) -> str:
    """Return a table per section, after lines that say where and how it ran."""
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    if found["rehearsal"]:
        yield "A rehearsal on a CPU at toy sizes: these figures mean nothing.\n"
    machine, parts = found["machine"], found["parts"]
    versions = machine.get("versions", {}).items()
    installed = ", ".join(f"{name} {version}" for name, version in versions if version)
    yield f"{machine.get('device', 'unknown device')}; {installed}; {found['began']}."
    yield f"`{found['command']}`"
    sections = dict.fromkeys(name.partition("/")[0] for name in parts)
    for section in sections:
        yield from _table(section, parts)
    for name, part in parts.items():
        if part["status"] in ("skipped", "broke"):
            yield f"- {name}: {part['status']}, {part['why']}"
        for failure in part.get("figures", {}).get("failed", []):
            yield f"- {name}: {failure}"


def _table(section: str, parts: dict[str, Any]) -> Iterator[str]:
    """Yield one row per part that ran: every figure that is a number or a word."""
    rows = {
        name.partition("/")[2]: part["figures"]
        for name, part in parts.items()
        if name.startswith(section + "/") and "figures" in part
    }
    columns = dict.fromkeys(
        key for row in rows.values() for key, value in row.items() if _is_cell(value)
    )
    if not rows:
        return
    yield "\n| " + " | ".join([section, *columns]) + " |"
    yield "| --- " * (1 + len(columns)) + "|"
    for name, row in rows.items():
        cells = [_cell(row.get(key)) for key in columns]
        yield "| " + " | ".join([name, *cells]) + " |"
    yield ""


def _is_cell(value: object) -> bool:
    return isinstance(value, bool | int | float | str)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value or "")
