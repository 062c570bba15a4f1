"""Everything that only a GPU can tell, in one call and one JSON.

    python tests/gpu/run.py --out gpu.json          all of it, about 20 minutes
    python tests/gpu/run.py --only parity,sudoku    some sections or parts
    python tests/gpu/run.py --dry-run               what it would do, and could not
    python tests/gpu/run.py --rehearse              at toy sizes on the CPU
    python tests/gpu/run.py --table gpu.json        Markdown of a run

Each part runs in a process of its own, so one that breaks costs only itself; the file
is whole after each. What does not fit a card's memory is skipped and said. Exits with
1 if a part failed or broke.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import plan  # noqa: E402
import tables  # noqa: E402
from parts import Part, Setting  # noqa: E402

from mlx_dgemma import backends  # noqa: E402

PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "torch", "transformers", "numpy")


def survey(setting: Setting) -> dict[str, Any]:
    """The machine: its device and choices, and the versions of what is compared."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device = backends.current()
    chosen = {
        "name": device.name,
        "device": device.description(),
        "memory": device.info_number("free_memory") or device.memory(),
        "numbers": asdict(device),
    }
    return {
        "device": {"chosen": chosen},
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


MACHINE = Part(name="machine/survey", says="what this machine is", run=survey)


def work(name: str, result: Path, rehearsal: bool) -> None:
    """Run one part here and leave its figures in a file."""
    if rehearsal:
        backends.choose("cpu")
    part = next(p for p in [MACHINE, *plan.parts()] if p.name == name)
    with tempfile.TemporaryDirectory() as folder:
        figures = part.run(Setting(rehearsal, Path(folder)))
    result.write_text(json.dumps(figures))


def started(part: Part, rehearsal: bool, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own: its status, seconds, figures or error."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--part", part.name, str(result)]
        command += ["--rehearse"] * rehearsal
        try:
            ended = subprocess.run(
                command,
                env=os.environ | part.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            found = {"status": "broke", "why": f"not done after {limit:.0f} s"}
        else:
            found = _outcome(result, ended)
    return found | {"seconds": round(time.perf_counter() - begun, 2)}


def _outcome(result: Path, ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    if ended.returncode != 0 or not result.exists():
        lines = ended.stderr.strip().splitlines() or ["no message"]
        return {"status": "broke", "why": lines[-1], "trace": lines[-12:]}
    figures = json.loads(result.read_text())
    status = {True: "passed", False: "failed", None: "measured"}[figures.get("passed")]
    return {"status": status, "figures": figures}


def run(wanted: list[Part], out: Path, *, rehearsal: bool, budget: float) -> bool:
    """Run parts until the budget of seconds is spent; whether all that ran are well."""
    begun = time.perf_counter()
    machine = started(MACHINE, rehearsal, 120)
    found: dict[str, Any] = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rehearsal": rehearsal,
        "machine": machine.get("figures", machine),
        "parts": {},
    }
    chosen = found["machine"].get("device", {}).get("chosen", {})
    free, device = chosen.get("memory"), chosen.get("name")
    for part in wanted:
        part = replace(part, memory=0, disk=0) if rehearsal else part
        left = budget - (time.perf_counter() - begun)
        why = plan.obstacle(part, Path(tempfile.gettempdir()), free, device)
        if why is None and left < 10:
            why = "no time was left"
        if why is None:
            one = started(part, rehearsal, min(part.seconds, left))
        else:
            one = {"status": "skipped", "why": why}
        found["parts"][part.name] = one
        _write(out, found)
        print(f"{part.name:<36}{one['status']:<9}{one.get('why', '')}", flush=True)
    _write(out, found)
    return not {"failed", "broke"} & {p["status"] for p in found["parts"].values()}


def _write(out: Path, found: dict[str, Any]) -> None:
    staged = out.with_name(out.name + ".part")
    staged.write_text(json.dumps(found, indent=1))
    staged.replace(out)


def listed(wanted: list[Part]) -> str:
    """What a run would do here."""
    device = backends.current()
    lines = [f"on {device.name}: {device.description()}"]
    for part in wanted:
        free = device.info_number("free_memory") or device.memory()
        why = plan.obstacle(part, Path(tempfile.gettempdir()), free, device.name)
        if device.name == "cpu":
            why = "no GPU here" + (f"; {why}" if why else "")
        lines.append(f"{part.name:<36}{part.says}" + (f"  [skip: {why}]" * bool(why)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", help="sections or parts of names, between commas")
    parser.add_argument("--seconds", type=float, default=3600, help="in all")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--table", type=Path, metavar="JSON")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        name, result = options.part
        work(name, Path(result), options.rehearse)
        return
    if options.table is not None:
        print(tables.markdown(json.loads(options.table.read_text())))
        return
    words = (options.only or "").split(",")
    wanted = [p for p in plan.parts() if any(word in p.name for word in words)]
    if not wanted:
        parser.error(f"no part is named like {options.only!r}; --dry-run lists them")
    if options.dry_run:
        print(listed(wanted))
        return
    if not options.rehearse and backends.current().name == "cpu":
        parser.error("no GPU here; --dry-run lists, --rehearse runs at toy sizes")
    well = run(wanted, options.out, rehearsal=options.rehearse, budget=options.seconds)
    sys.exit(not well)


if __name__ == "__main__":
    main()
