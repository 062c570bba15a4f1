"""A run on a GPU as Markdown."""

from collections.abc import Iterator
from typing import Any


def markdown(found: dict[str, Any]) -> str:
    """All tables of a run; the first lines say where and how it ran."""
    return "\n".join(_all(found))


def _all(found: dict[str, Any]) -> Iterator[str]:
    if found["rehearsal"]:
        yield "A rehearsal on a CPU at toy sizes: these figures mean nothing.\n"
    machine, parts = found["machine"], found["parts"]
    chosen = machine.get("device", {}).get("chosen", {})
    versions = ", ".join(
        f"{name} {one}" for name, one in machine.get("versions", {}).items() if one
    )
    yield f"{chosen.get('device', 'unknown device')}; {versions}; {found['began']}."
    yield f"`{found['command']}`\n"
    yield from _parity(parts)
    yield from _missing(parts)
    yield from _solved(parts)
    yield from _kernels(parts)
    yield from _speed(parts)
    for name, part in parts.items():
        if part["status"] in ("skipped", "broke"):
            yield f"- {name}: {part['status']}, {part['why']}"


def _of(parts: dict[str, Any], section: str) -> dict[str, Any]:
    """Figures of a section's parts that ran, by what they are about."""
    return {
        name.partition("/")[2]: part["figures"]
        for name, part in parts.items()
        if name.startswith(section + "/") and "figures" in part
    }


def _parity(parts: dict[str, Any]) -> Iterator[str]:
    found = _of(parts, "parity")
    if not found:
        return
    yield "| parity | judge | max error | the judge's | worst ratio | verdict |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, one in found.items():
        ours = max(step["gpu"]["max"] for step in one["steps"])
        theirs = max(step[one["judge"]]["max"] for step in one["steps"])
        yield (
            f"| {name} | {one['judge']} | {ours:.2e} | {theirs:.2e} | "
            f"{one['worst']:.2f} | {_verdict(one)} |"
        )
    yield ""


def _missing(parts: dict[str, Any]) -> Iterator[str]:
    found = _of(parts, "ops")
    if not found:
        return
    probes = {n: p for one in found.values() for n, p in one["probes"].items()}
    wrong = {name: one for name, one in probes.items() if not one["passed"]}
    yield f"Operations: {len(probes) - len(wrong)} of {len(probes)} there and right."
    for name, one in wrong.items():
        yield f"- {name}: " + (one.get("error") or f"off by {one['relative']:.1e}")
    yield ""


def _solved(parts: dict[str, Any]) -> Iterator[str]:
    for name, one in _of(parts, "trajectory").items():
        right = one["tests"] - len(one["failed"])
        yield f"Trajectories ({name}): {right} of {one['tests']} tests passed.\n"
    found = _of(parts, "sudoku")
    if not found:
        return
    yield "| sudoku4 | puzzles | solved | mean steps | seconds |"
    yield "| --- | --- | --- | --- | --- |"
    for name, one in found.items():
        yield (
            f"| {name} | {one['puzzles']} | {one['solved']:.1%} | "
            f"{one['mean_steps']:.2f} | {one['seconds']:.1f} |"
        )
    yield ""


def _kernels(parts: dict[str, Any]) -> Iterator[str]:
    found = _of(parts, "kernels")
    if not found:
        return
    yield "| kernel | plain, ms | kernel, ms | verdict |"
    yield "| --- | --- | --- | --- |"
    for name, one in found.items():
        yield (
            f"| {name} | {1e3 * one['plain_seconds']:.3f} | "
            f"{1e3 * one['kernel_seconds']:.3f} | {_verdict(one)} |"
        )
    yield ""


def _speed(parts: dict[str, Any]) -> Iterator[str]:
    found = _of(parts, "full")
    if not found:
        return
    yield (
        "| 26B of noise | load, s | prefill, tok/s | step, ms | body | vocabulary | "
        "floor | mlx-vlm's step | ours ÷ theirs | peak, GB |"
    )
    yield "| --- " * 10 + "|"
    for name, one in found.items():
        if "trial" not in one:
            yield (
                f"| {name} | | | {1e3 * one['step_seconds']:.1f} | | | | | | "
                f"{(one['peak_bytes'] or 0) / 1e9:.1f} |"
            )
            continue
        trial, parts_of, beside = one["trial"], one["parts"], one["beside"]
        theirs, ratio = "", ""
        if isinstance(beside, dict):
            theirs = f"{1e3 * beside['mlx-vlm']['step_seconds']:.1f}"
            ratio = f"{beside['ours_over_theirs']:.2f}"
        yield (
            f"| {name} | {one['load_seconds']:.1f} | {trial['prefill_tps']:,.0f} | "
            f"{1e3 * trial['step_seconds']:.1f} | {1e3 * parts_of['body']:.1f} | "
            f"{1e3 * parts_of['vocabulary']:.1f} | "
            f"{1e3 * one['roofline']['floor_seconds']:.1f} | {theirs} | {ratio} | "
            f"{trial['peak_bytes'] / 1e9:.1f} |"
        )
    yield ""


def _verdict(one: dict[str, Any]) -> str:
    return "passed" if one["passed"] else "FAILED"
