"""The run itself, on any machine: what it lists, skips, survives and writes."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import ops
import parity
import plan
import pytest
import run
import tables
from parts import GB, Part, Setting

from mlx_dgemma import backends

ROOT = Path(__file__).resolve().parents[2]
CALL = re.compile(r"\bmx\.((?:fast\.|random\.)?[a-z_]+)\(")
# of the host, of memory and of files; arrays of ones come with zeros
NO_OPERATION = frozenset(
    "array array_equal async_eval clear_cache compile default_device device_count "
    "device_info disable_compile eval finfo get_peak_memory load ones random.key "
    "reset_peak_memory save_safetensors set_cache_limit set_default_device "
    "set_wired_limit stream synchronize".split()
)
ALL = list(plan.parts())


def fake(name: str, **changes) -> Part:
    part = Part(name=name, says="", run=lambda setting: {"passed": True})
    return replace(part, **changes)


def test_every_operation_of_the_package_is_probed():
    sources = (ROOT / "mlx_dgemma").rglob("*.py")
    used = {call for file in sources for call in CALL.findall(file.read_text())}
    probed = set(CALL.findall((ROOT / "tests" / "gpu" / "ops.py").read_text()))
    assert used - NO_OPERATION - probed == set()


def test_every_recipe_and_mode_is_compared_at_full_size_or_in_parity():
    names = {part.name for part in ALL}
    assert len(names) == len(ALL)
    for word in ("bf16", "8 bit", "mixed", "nvfp4"):
        assert f"full/{word}" in names
    for word in (*parity.RECIPES, "tiny float32 release", "mid bfloat16 release"):
        assert f"parity/{word}" in names
    sections = {part.section for part in ALL}
    assert sections >= {"ops", "parity", "trajectory", "sudoku", "full", "kernels"}


@pytest.mark.parametrize("family", ops.families())
def test_probes_pass_where_operations_are_right(family):
    found = ops.run(ops.families()[family], ops.TOY)
    assert found["probes"]
    wrong = {n: p for n, p in found["probes"].items() if not p["passed"]}
    assert not wrong and found["passed"]


def test_a_probe_notices_what_is_wrong_and_names_what_is_missing(monkeypatch):
    def missing(*given, **named):
        raise RuntimeError("ArgReduce has no CUDA implementation.")

    monkeypatch.setattr(mx, "tanh", lambda x: x)
    assert not ops.run(ops.families()["elementwise"], ops.TOY)["probes"]["tanh"][
        "passed"
    ]
    monkeypatch.setattr(mx, "argmax", missing)
    found = ops.run(ops.families()["rows"], ops.TOY)
    assert found["probes"]["argmax"]["error"] == "ArgReduce has no CUDA implementation."
    assert found["probes"]["cumsum"]["passed"] and not found["passed"]


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_device_fails_parity(tmp_path, as_gpu, monkeypatch):
    """Attention that forgets a quarter of what it should see."""
    device = backends.current()
    attend = device.attend

    def short(queries, keys, values, mask):
        seen = mx.arange(keys.shape[2]) >= keys.shape[2] // 4
        return attend(queries, keys, values, seen if mask is None else mask)

    (tmp_path / "right").mkdir(), (tmp_path / "wrong").mkdir()
    monkeypatch.setattr(parity, "SHAPES", {"mid": (parity.SMALL, 16, 20)})
    right = parity.coded(Setting(True, tmp_path / "right"), "8 bit")
    assert right["passed"] and right["worst"] < 2
    monkeypatch.setattr(device, "attend", short)
    wrong = parity.coded(Setting(True, tmp_path / "wrong"), "8 bit")
    assert not wrong["passed"] and wrong["worst"] > parity.ALLOWED


def test_errors_are_judged_by_the_worst_of_all():
    truth = np.zeros((1, 4, 3))
    clear = np.array([[True, True, True, False]])
    near, far = truth + 0.1, truth + 0.1
    far[0, 1, 2] = 0.5
    far[0, 3] = 99  # routed too closely to be compared
    one = parity._judged([truth], [clear], [near], cpu=[near])
    assert one["passed"] and one["worst"] == pytest.approx(1)
    other = parity._judged([truth], [clear], [far], cpu=[near])
    assert not other["passed"] and other["worst"] == pytest.approx(5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"needs": ("no_such_package",)}, "no_such_package is not installed"),
        ({"memory": 30 * GB}, "needs 30 GB of memory, 24 are free"),
        ({"disk": 10**18}, "of disk"),
        ({"memory": 24 * GB}, None),
    ],
)
def test_what_does_not_fit_is_skipped_and_said(tmp_path, change, why):
    found = plan.obstacle(fake("full/x", **change), tmp_path, 24 * GB)
    assert found is None if why is None else why in found


def test_an_rtx_card_of_12_gb_is_left_all_that_is_not_full_size():
    fits = [
        p
        for p in ALL
        if plan.obstacle(replace(p, needs=()), Path("/"), 12 * GB) is None
    ]
    assert {p.section for p in ALL} - {p.section for p in fits} == {"full"}


def test_a_kernel_for_one_backend_is_not_run_on_another(tmp_path):
    part = fake("kernels/x", backend="cuda")
    assert plan.obstacle(part, tmp_path, None, "metal") == "is for cuda only"
    assert plan.obstacle(part, tmp_path, None, "cuda") is None


def test_memory_a_device_does_not_tell_of_is_tried(tmp_path):
    assert plan.obstacle(fake("full/x", memory=10**15), tmp_path, None) is None


def small_run(tmp_path, monkeypatch, outcomes, budget=100.0) -> dict:
    """A run of parts whose processes end as told."""
    told = iter(outcomes)
    monkeypatch.setattr(run, "started", lambda part, *given: dict(next(told)))
    parts = [fake(f"ops/{n}") for n in range(len(outcomes) - 1)]
    out = tmp_path / "gpu.json"
    well = run.run(parts, out, rehearsal=True, budget=budget)
    assert [f.name for f in tmp_path.iterdir()] == ["gpu.json"]
    return json.loads(out.read_text()) | {"well": well}


def test_a_part_that_breaks_costs_only_itself(tmp_path, monkeypatch):
    broke = {"status": "broke", "why": "CUDA error: an illegal memory access"}
    passed = {"status": "passed", "figures": {"probes": {}, "passed": True}}
    found = small_run(tmp_path, monkeypatch, [passed, broke, passed])
    assert [p["status"] for p in found["parts"].values()] == ["broke", "passed"]
    assert not found["well"]
    assert "illegal memory access" in tables.markdown(found)
    assert "rehearsal" in tables.markdown(found).splitlines()[0]


def test_no_part_begins_when_the_time_is_spent(tmp_path, monkeypatch):
    passed = {"status": "passed", "figures": {"passed": True}}
    found = small_run(tmp_path, monkeypatch, [passed, passed], budget=5)
    assert found["parts"]["ops/0"] == {"status": "skipped", "why": "no time was left"}
    assert found["well"]


def test_a_process_that_fails_or_hangs_is_reported_by_its_last_words(monkeypatch):
    done = subprocess.CompletedProcess(
        [], 1, stderr="Traceback\nRuntimeError: broken\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    found = run.started(fake("ops/x"), True, 5)
    assert (found["status"], found["why"]) == ("broke", "RuntimeError: broken")

    def hang(*given, timeout, **named):
        raise subprocess.TimeoutExpired("x", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert run.started(fake("ops/x"), True, 5)["why"] == "not done after 5 s"


def script(*given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "run.py"), *given]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_dry_run_lists_every_part_on_any_machine():
    shown = script("--dry-run")
    assert shown.returncode == 0, shown.stderr
    listed = shown.stdout.splitlines()[1:]
    assert [line[:36].strip() for line in listed] == [part.name for part in ALL]
    if backends.current().name == "cpu":
        assert all("no GPU here" in line for line in listed)


def test_parts_run_in_processes_and_their_figures_become_a_table(tmp_path):
    out, begun = tmp_path / "gpu.json", time.perf_counter()
    ran = script("--rehearse", "--only", "ops/random,sudoku/dense", "--out", str(out))
    assert ran.returncode == 0, ran.stderr + ran.stdout
    found = json.loads(out.read_text())
    assert list(found["parts"]) == ["ops/random", "sudoku/dense"]
    assert {p["status"] for p in found["parts"].values()} == {"passed"}
    assert found["machine"]["device"]["chosen"]["name"] == "cpu"
    shown = script("--table", str(out)).stdout
    assert "Operations: 2 of 2 there and right." in shown
    assert "| dense | 20 | 100.0% |" in shown
    assert (
        sum(p["seconds"] for p in found["parts"].values()) < time.perf_counter() - begun
    )


def test_without_a_gpu_it_says_what_can_be_done(as_cpu):
    refused = script("--only", "ops/random")
    assert refused.returncode == 2
    assert "--dry-run lists, --rehearse runs" in refused.stderr
    assert "no part is named like" in script("--only", "nonsense").stderr


@pytest.fixture
def as_cpu(monkeypatch):
    monkeypatch.setenv("MLX_DGEMMA_BACKEND", "cpu")
