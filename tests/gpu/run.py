"""Everything that only a GPU can show, in one call and one JSON file.

    python tests/gpu/run.py --out gpu.json          all of it, about 20 minutes
    python tests/gpu/run.py --only parity,sudoku    some sections or parts
    python tests/gpu/run.py --dry-run               list the parts and what they lack
    python tests/gpu/run.py --rehearse              toy sizes on the CPU
    python tests/gpu/run.py --table gpu.json        a finished run as Markdown

Each part runs in a process of its own, so a crash ends that part alone; the file is
complete after each. What a card has no memory for is skipped by name. Exits with 1 if
a part failed or broke.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import plan  # noqa: E402
import tables  # noqa: E402
from parts import Part, Setting, free_memory  # noqa: E402

from mlx_dgemma import backends  # noqa: E402

PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "torch", "transformers", "numpy")
SCRATCH = Path(tempfile.gettempdir())


def describe_machine(setting: Setting) -> dict[str, Any]:
    """Return the device and its choices, and the versions of what is compared."""
    installed = {dist.name for dist in distributions()}
    return {
        "device": backends.current().description(),
        "free_memory": free_memory(),
        "backends": backends.describe(),
        "versions": {name: version(name) for name in PACKAGES if name in installed},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


MACHINE = Part("machine", describe_machine)


def run_here(name: str, result: Path, rehearsal: bool) -> None:
    """Run one part in this process and write its figures to a file."""
    backends.choose("cpu" if rehearsal else None)  # before the first product
    part = next(p for p in [MACHINE, *plan.parts()] if p.name == name)
    with tempfile.TemporaryDirectory() as folder:
        figures = part.run(Setting(rehearsal, Path(folder)))
    result.write_text(json.dumps(figures))


def run_process(part: Part, rehearsal: bool, limit: float) -> dict[str, Any]:
    """Run a part in a new process; return status, seconds, and figures or error."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--part", part.name, str(result)]
        command += ["--rehearse"] * rehearsal
        try:
            ended = subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            found: dict[str, Any] = {
                "status": "broke",
                "why": f"not done after {limit:.0f} s",
            }
        else:
            lines = ended.stderr.strip().splitlines() or ["no message"]
            found = {"status": "broke", "why": lines[-1], "trace": lines[-12:]}
            if ended.returncode == 0 and result.exists():
                figures = json.loads(result.read_text())
                verdicts = {True: "passed", False: "failed", None: "measured"}
                status = verdicts[figures.get("passed")]
                found = {"status": status, "figures": figures}
    return found | {"seconds": round(time.perf_counter() - begun, 2)}


def run(wanted: list[Part], out: Path, *, rehearsal: bool, budget: float) -> bool:
    """Run parts until `budget` seconds are spent; return whether none failed."""
    begun = time.perf_counter()
    machine = run_process(MACHINE, rehearsal, 120)
    found: dict[str, Any] = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rehearsal": rehearsal,
        "machine": machine.get("figures", machine),
        "parts": {},
    }
    free = found["machine"].get("free_memory")
    for part in wanted:
        part = replace(part, memory=0, disk=0) if rehearsal else part
        left = budget - (time.perf_counter() - begun)
        why = part.obstacle(SCRATCH, free)
        if why is None and left < 10:
            why = "no time was left"
        one = {"status": "skipped", "why": why}
        if why is None:
            one = run_process(part, rehearsal, min(part.seconds, left))
        found["parts"][part.name] = one
        staged = out.with_name(out.name + ".part")
        staged.write_text(json.dumps(found, indent=1))
        staged.replace(out)
        print(f"{part.name:<36}{one['status']:<9}{one.get('why', '')}", flush=True)
    return not {"failed", "broke"} & {p["status"] for p in found["parts"].values()}


def listing(wanted: list[Part]) -> str:
    """Return one line per part, with what keeps it from running here."""
    device = backends.current()
    no_gpu = "no GPU here" if device.name == "cpu" else None
    lines = [f"on {device.name}: {device.description()}"]
    for section, parts in groupby(wanted, key=lambda part: part.section):
        lines.append(f"{section}: {plan.SECTIONS[section]}")
        for part in parts:
            why = [no_gpu, part.obstacle(SCRATCH, free_memory())]
            skip = "; ".join(filter(None, why))
            lines.append(f"  {part.name:<36}" + (f"skip: {skip}" if skip else ""))
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
        return run_here(name, Path(result), options.rehearse)
    if options.table is not None:
        return print(tables.markdown(json.loads(options.table.read_text())))
    words = (options.only or "").split(",")
    wanted = [p for p in plan.parts() if any(word in p.name for word in words)]
    if not wanted:
        parser.error(f"no part is named like {options.only!r}; --dry-run lists them")
    if options.dry_run:
        return print(listing(wanted))
    if not options.rehearse and backends.current().name == "cpu":
        parser.error("no GPU here; --dry-run lists, --rehearse runs at toy sizes")
    passed = run(
        wanted, options.out, rehearsal=options.rehearse, budget=options.seconds
    )
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
