"""The results of a GPU run as Markdown."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any


def markdown(found: dict[str, Any]) -> str:
    """Return a table per section, after lines that say where and how it ran."""
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    if found["rehearsal"]:
        yield "A rehearsal on a CPU at toy sizes: these figures mean nothing.\n"
    machine, parts = found["machine"], found["parts"]
    installed = ", ".join(map(" ".join, machine.get("versions", {}).items()))
    yield f"{machine.get('device', 'unknown device')}; {installed}; {found['began']}."
    yield f"`{found['command']}`"
    names = [name.partition("/") for name, part in parts.items() if "figures" in part]
    for section, group in groupby(names, key=lambda name: name[0]):
        rows = {
            name: parts["".join((s, slash, name))]["figures"]
            for s, slash, name in group
        }
        cells = [{k: _cell(v) for k, v in row.items()} for row in rows.values()]
        columns = dict.fromkeys(
            k for row in cells for k, v in row.items() if v is not None
        )
        yield "\n| " + " | ".join([section, *columns]) + " |"
        yield "| --- " * (1 + len(columns)) + "|"
        for name, row in zip(rows, cells, strict=True):
            yield " | ".join([f"| {name}", *(row.get(k) or "" for k in columns)]) + " |"
        yield ""
    for name, part in parts.items():
        if "why" in part:
            yield f"- {name}: {part['status']}, {part['why']}"
        for failure in part.get("figures", {}).get("failed", []):
            yield f"- {name}: {failure}"


def _cell(value: object) -> str | None:
    """Return the text of a figure that is a number or a word, else None."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, int | str) else None
