"""Every command that writes, killed before each of its file operations in turn.

    python tests/fuzz/kills.py [--every 1] [NAME ...]

The name that is written must hold the old or the new whole, and the same command run
again must end as if nothing had happened. Needs Linux and `strace`, whose injection
kills the process at a system call. Exits with 1 if anything else was found.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import write_tiny
from training.runs import command, write_rows

CALLS = "mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,fsync,fdatasync,"
CALLS += "ftruncate,write,pwrite64,chmod,fchmod,fchmodat,link,linkat,symlink,symlinkat"


@dataclass(frozen=True)
class Job:
    """What is run on a folder, and what of it must be whole at any time."""

    write: Callable[[Path], object]  # the folder before the command
    command: Callable[[Path], list[str]]
    typed: bytes  # its standard input
    targets: tuple[str, ...]  # each of them, and all files inside, old or new
    again: tuple[str, ...] = ()  # flags of the command that follows a killed one


def python(name: str, *flags: object) -> list[str]:
    return [sys.executable, "-m", f"mlx_dgemma.{name}", *map(str, flags)]


def digest(path: Path) -> str | None:
    """Return a hash of a file, or of a folder's files; None where there is nothing."""
    if not path.exists():
        return None
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.name != ".lock":
            found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def write_models(folder: Path) -> None:
    write_tiny(folder / "model")
    write_tiny(folder / "old", seed=1)


def write_trained(folder: Path) -> None:
    write_models(folder)
    write_rows(folder / "data", train=8, valid=2)
    subprocess.run(lora(folder), check=True, capture_output=True)


def write_run(folder: Path) -> None:
    write_models(folder)
    write_rows(folder / "data", train=8, valid=2)


def lora(folder: Path) -> list[str]:
    more = "--iters=2", "--save-every=1", "--steps-per-eval=2"
    return command(folder / "model", folder / "data", folder / "adapter", *more)


def chat(folder: Path) -> list[str]:
    short = "--max-tokens=8", "--steps=2", "--seed=1"
    cache = folder / "cache.safetensors"
    return python(
        "chat", "--model", folder / "model", *short, "--prompt-cache-file", cache
    )


def write_chat(folder: Path) -> None:
    """The cache and the transcript of another conversation."""
    write_models(folder)
    typed = f"ab 12\n/save {folder / 'talk.jsonl'}\n".encode()
    subprocess.run(chat(folder), input=typed, check=True, capture_output=True)


JOBS = {
    "convert": Job(
        write_models,
        lambda f: python("convert", "--hf-path", f / "model", "--mlx-path", f / "out"),
        b"",
        ("out",),
    ),
    "overwrite": Job(
        write_models,
        lambda f: python(
            *("convert", "--hf-path", f / "model", "--mlx-path", f / "old"),
            "--overwrite",
        ),
        b"",
        ("old",),
    ),
    "fuse": Job(
        write_trained,
        lambda f: python(
            *("fuse", "--model", f / "model", "--adapter-path", f / "adapter"),
            *("--save-path", f / "old", "--overwrite"),
        ),
        b"",
        ("old",),
    ),
    "lora": Job(
        write_run, lora, b"", ("adapter/adapters.safetensors",), again=("--resume",)
    ),
    "chat": Job(
        write_chat,
        chat,
        b"cd\n/save --overwrite talk.jsonl\n",
        ("cache.safetensors", "talk.jsonl"),
    ),
}


def run(job: Job, folder: Path, kill_at: int | None = None, *more: str):
    """Run the command in a folder, killed at one of its file operations if asked."""
    parts = [*job.command(folder), *more]
    log = folder / ".strace"
    if kill_at is not None:
        trace = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={CALLS}"]
        if kill_at:
            trace += ["-e", f"inject={CALLS}:signal=KILL:when={kill_at}"]
        parts = [*trace, *parts]
    done = subprocess.run(parts, cwd=folder, input=job.typed, capture_output=True)
    text = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    return done, text


def outcomes(job: Job, start: Path, folder: Path) -> tuple[dict[str, set], dict, int]:
    """Return what each target may hold, holds in the end, and the count of operations.

    The intermediate states of a target that is written more than once are allowed too.
    """
    shutil.copytree(start, folder)
    allowed = {name: {digest(folder / name)} for name in job.targets}
    done, text = run(job, folder, 0)
    assert done.returncode == 0, done.stderr.decode()
    end = {name: digest(folder / name) for name in job.targets}
    for name in job.targets:
        allowed[name].add(end[name])
    for file in folder.glob("adapter/*_adapters.safetensors"):  # of each save
        allowed.get("adapter/adapters.safetensors", set()).add(digest(file))
    first = text.partition("\n")[0].split()[0]
    own = [line for line in text.splitlines() if line.split()[0] == first]
    shutil.rmtree(folder)
    return allowed, end, sum(bool(re.match(r"\d+ +\w+\(", line)) for line in own)


def faults_of(name: str, every: int) -> tuple[int, list[str]]:
    """Kill a job everywhere; return how often, and what was wrong."""
    job, faults, kills = JOBS[name], [], 0
    with tempfile.TemporaryDirectory() as work:
        start, folder = Path(work) / "start", Path(work) / "changed"
        start.mkdir()
        job.write(start)
        # paths are the same in every run: a cache or a config may hold them
        allowed, end, count = outcomes(job, start, folder)
        for at in range(1, count + 1, every):
            shutil.copytree(start, folder)
            killed, _ = run(job, folder, at)
            kills += killed.returncode != 0
            for target in job.targets:
                if digest(folder / target) not in allowed[target]:
                    faults.append(f"{name} {at}: {target} is neither old nor new")
            states = [digest(folder / target) == end[target] for target in job.targets]
            resumes = (folder / "adapter" / "training_state.safetensors").exists()
            if name == "lora" and not resumes:  # an adapter alone is not replaced
                shutil.rmtree(folder / "adapter", ignore_errors=True)
            if not (name == "convert" and all(states)):
                done, _ = run(job, folder, None, *(job.again if resumes else ()))
                if done.returncode:
                    lines = done.stderr.decode().strip().splitlines()
                    faults.append(f"{name} {at}: again: {lines[-1][:300]}")
            for target in job.targets:
                if digest(folder / target) != end[target]:
                    faults.append(f"{name} {at}: again: another {target}")
            if left := [p.name for p in folder.rglob(".*") if p.name != ".lock"]:
                faults.append(f"{name} {at}: left behind: {', '.join(left)}")
            shutil.rmtree(folder)
    return kills, faults


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[[], *JOBS])
    parser.add_argument("--every", type=int, default=1)
    given = parser.parse_args()
    wrong = 0
    for name in given.names or JOBS:
        kills, faults = faults_of(name, given.every)
        wrong += len(faults)
        print(f"{name}: killed {kills} times, {len(faults)} faults", flush=True)
        print(*faults[:10], sep="\n", end="\n" if faults else "", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
