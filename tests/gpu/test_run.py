"""`run.py` on any machine: what it lists, skips, survives and writes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ops
import parity
import plan
import run
import tables
from parts import GB, ROOT, Part, Setting

from mlx_dgemma import backends

CALL = re.compile(r"\bmx\.((?:fast\.|random\.)?[a-z_]+)\(")
# calls that compute nothing on the device; `ones` is probed with `zeros`
NO_OPERATION = frozenset(
    "array array_equal async_eval clear_cache compile default_device device_count "
    "device_info disable_compile eval finfo get_peak_memory load ones random.key "
    "reset_peak_memory save_safetensors set_cache_limit set_default_device "
    "set_wired_limit stream synchronize".split()
)
ALL = list(plan.parts())


def fake(name: str, **changes) -> Part:
    return Part(name, lambda setting: {"passed": True}, **changes)


def test_every_operation_of_the_package_is_probed():
    sources = (ROOT / "mlx_dgemma").rglob("*.py")
    used = {call for file in sources for call in CALL.findall(file.read_text())}
    probes = (ROOT / "tests" / "gpu" / "ops.py").read_text()
    probed = {call for call in used if f"mx.{call}" in probes}
    assert used - NO_OPERATION - probed == set()


def test_parts_have_names_of_their_own_and_known_sections():
    assert len({part.name for part in ALL}) == len(ALL)
    assert {part.section for part in ALL} == set(plan.SECTIONS)


@pytest.mark.parametrize("family", ops.families())
def test_probes_pass_on_this_machine(family):
    found = ops.run(ops.families()[family], ops.TOY)
    assert found["passed"] and not found["failed"]


def test_probes_report_wrong_and_missing_operations(monkeypatch):
    def missing(*given, **named):
        raise RuntimeError("ArgReduce has no CUDA implementation.")

    results = iter([lambda a, x: x, mx.power])  # on the device, then on the CPU
    monkeypatch.setattr(mx, "power", lambda a, x: next(results)(a, x))
    (wrong,) = ops.run(ops.families()["elementwise"], ops.TOY)["failed"]
    assert wrong.startswith("power: off by")
    monkeypatch.setattr(mx, "argsort", missing)
    found = ops.run(ops.families()["rows"], ops.TOY)
    assert found["failed"] == ["argsort: ArgReduce has no CUDA implementation."]
    assert found["operations"] > 10 and not found["passed"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_parity_fails_when_attention_is_wrong(tmp_path, as_gpu, monkeypatch):
    device = backends.current()
    attend = device.attend

    def without_first_quarter(queries, keys, values, mask):
        seen = mx.arange(keys.shape[2]) >= keys.shape[2] // 4
        return attend(queries, keys, values, seen if mask is None else mask)

    (tmp_path / "right").mkdir(), (tmp_path / "wrong").mkdir()
    small = {"layer_types": parity.TEXT["layer_types"], "num_hidden_layers": 4}
    monkeypatch.setattr(parity, "TEXT", small)
    monkeypatch.setattr(parity, "SIZES", (20, 16))
    right = parity.quantized(Setting(True, tmp_path / "right"), "8 bit")
    assert right["passed"] and right["worst_ratio"] < 2
    monkeypatch.setattr(device, "attend", without_first_quarter)
    wrong = parity.quantized(Setting(True, tmp_path / "wrong"), "8 bit")
    assert not wrong["passed"] and wrong["worst_ratio"] > parity.ALLOWED


def test_parity_judges_the_worst_error_of_clearly_routed_tokens():
    truth = np.zeros((1, 4, 3))
    clear = np.array([[True, True, True, False]])
    near, far = truth + 0.1, truth + 0.1
    far[0, 1, 2] = 0.5
    far[0, 3] = 99  # routed too closely to be compared
    for logits, worst in ((near, 1), (far, 5)):
        found = parity.judge([truth], [clear], [logits], [near])
        assert found["worst_ratio"] == pytest.approx(worst)
        assert found["passed"] == (worst <= parity.ALLOWED)


def test_obstacles(tmp_path):
    for change, free, why in (
        ({"needs": ("no_such_package",)}, 24 * GB, "no_such_package is not installed"),
        ({"memory": 30 * GB}, 24 * GB, "needs 30 GB of memory, 24 free"),
        ({"disk": 10**18}, 24 * GB, "of disk"),
    ):
        assert why in fake("full/x", **change).obstacle(tmp_path, free)
    assert fake("full/x", memory=24 * GB).obstacle(tmp_path, 24 * GB) is None
    assert fake("full/x", memory=10**15).obstacle(tmp_path, None) is None
    too_large = [p for p in ALL if replace(p, needs=()).obstacle(tmp_path, 12 * GB)]
    assert {p.section for p in too_large} == {"full"}


def test_a_broken_part_does_not_end_the_run(tmp_path, monkeypatch):
    passed = {"status": "passed", "figures": {"passed": True}}
    broke = {"status": "broke", "why": "CUDA error: an illegal memory access"}
    for outcomes, budget, expected in (
        ([passed, broke, passed], 100, ["broke", "passed"]),
        ([passed, passed], 5, ["skipped"]),
    ):
        results = iter(outcomes)
        monkeypatch.setattr(run, "run_process", lambda *_, r=results: dict(next(r)))
        parts = [fake(f"ops/{n}") for n in range(len(outcomes) - 1)]
        out = tmp_path / "gpu.json"
        well = run.run(parts, out, rehearsal=True, budget=budget)
        found = json.loads(out.read_text())
        assert [p["status"] for p in found["parts"].values()] == expected
        assert well == ("broke" not in expected)
        assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"]
        text = tables.markdown(found)
        assert "rehearsal" in text.splitlines()[0]
        assert ("illegal memory access" in text) == ("broke" in expected)
        assert ("no time was left" in text) == ("skipped" in expected)


def test_failed_and_hanging_processes_are_reported(monkeypatch):
    stderr = "Traceback\nRuntimeError: broken\n"
    done = subprocess.CompletedProcess([], 1, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    found = run.run_process(fake("ops/x"), True, 5)
    assert (found["status"], found["why"]) == ("broke", "RuntimeError: broken")

    def hang(*_, timeout, **__):
        raise subprocess.TimeoutExpired("x", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert run.run_process(fake("ops/x"), True, 5)["why"] == "not done after 5 s"


def script(*given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "run.py"), *given]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DGEMMA_BACKEND", "cpu")
    lines = script("--dry-run").stdout.splitlines()
    shown = [line for line in lines if line.startswith("  ")]
    assert [line[:36].strip() for line in shown] == [part.name for part in ALL]
    assert all("no GPU here" in line for line in shown)
    refused = script("--only", "ops/random")
    assert refused.returncode == 2 and "--rehearse runs at toy" in refused.stderr
    assert "no part is named like" in script("--only", "nonsense").stderr

    out = tmp_path / "gpu.json"
    ran = script("--rehearse", "--only", "ops/random,sudoku/dense", "--out", str(out))
    assert ran.returncode == 0, ran.stderr + ran.stdout
    found = json.loads(out.read_text())
    statuses = {name: part["status"] for name, part in found["parts"].items()}
    assert statuses == {"ops/random": "passed", "sudoku/dense": "passed"}
    text = script("--table", str(out)).stdout
    assert "| random | 2 | yes |" in text and "| dense | 20 | 1 |" in text
