"""What `-m gpu` checks on a Metal or CUDA device; the probes run on a CPU too."""

import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import ops
import quantized
import solve_rate  # finds convert/
from sudoku import held_out

from mlx_dgemma import backends, convert, load

HERE = Path(__file__).parent
CALL = re.compile(r"\bmx\.((?:fast\.|random\.)?[a-z_]+)\(")
# calls that compute nothing on the device; `ones` is probed with `zeros`
NO_OPERATION = frozenset(
    "array array_equal async_eval clear_cache compile default_device device_count "
    "device_info disable_compile eval finfo get_peak_memory load ones random.key "
    "reset_peak_memory save_safetensors set_cache_limit set_default_device "
    "set_wired_limit stream synchronize".split()
)
# On a CPU all 500 puzzles are solved, dense and quantised. Another device rounds
# differently and so samples other tokens, but must solve as many.
SOLVED = 0.99
gpu = pytest.mark.gpu


@pytest.fixture
def device():
    found = backends.current()
    assert found.name != "cpu", "`-m gpu` needs a Metal or CUDA device"
    return found


@gpu
@pytest.mark.parametrize("family", ops.families())
def test_every_operation_gives_the_cpus_result(device, family):
    assert ops.run(ops.families()[family], ops.Shapes()) == []


@gpu
@pytest.mark.parametrize("recipe", quantized.RECIPES)
def test_quantised_logits_err_no_more_than_on_a_cpu(device, tmp_path, recipe):
    worst, compared = quantized.compare(tmp_path, recipe)
    print(recipe, worst, compared)
    assert worst <= quantized.ALLOWED and compared > 0.25


@gpu
@pytest.mark.parametrize(
    "recipe", [None, "8 bit", "mixed", "4 bit", "mxfp8", "mxfp4", "nvfp4"]
)
def test_unseen_puzzles_are_solved(device, tmp_path, recipe):
    name: str | Path = "sudoku4"
    if recipe is not None:
        name = tmp_path / "model"
        convert("sudoku4", name, quantize=True, **quantized.RECIPES[recipe])
    solved, _ = solve_rate.solve(*load(name), held_out(500), None)
    assert solved >= SOLVED


# --- on any device -------------------------------------------------------------------


def test_every_call_of_the_package_is_probed():
    sources = Path(backends.__file__).parents[1].rglob("*.py")
    used = {call for file in sources for call in CALL.findall(file.read_text())}
    probes = (HERE / "ops.py").read_text()
    probed = {call for call in used if f"mx.{call}" in probes}
    assert used - NO_OPERATION - probed == set()


@pytest.mark.parametrize("family", ops.families())
def test_probes_pass_here(family):
    assert ops.run(ops.families()[family], ops.TOY) == []


def test_probes_report_wrong_and_missing_calls(monkeypatch):
    def missing(*given, **named):
        raise RuntimeError("ArgReduce has no CUDA implementation.")

    results = iter([lambda a, x: x, mx.power])  # on the device, then on the CPU
    monkeypatch.setattr(mx, "power", lambda a, x: next(results)(a, x))
    (wrong,) = ops.run(ops.families()["elementwise"], ops.TOY)
    assert wrong.startswith("power: off by")
    monkeypatch.setattr(mx, "argsort", missing)
    found = ops.run(ops.families()["rows"], ops.TOY)
    assert found == ["argsort: ArgReduce has no CUDA implementation."]


def test_the_worst_error_of_clearly_routed_tokens_counts():
    truth = np.zeros((1, 4, 3))
    clear = np.array([[True, True, True, False]])
    near, far = truth + 0.1, truth + 0.1
    far[0, 1, 2] = 0.5
    far[0, 3] = 99  # routed too closely to be compared
    for logits, worst in ((near, 1), (far, 5)):
        found = quantized.worst_ratio([truth], [clear], [logits], [near])
        assert found == pytest.approx(worst)


@pytest.mark.slow
def test_steps_are_listed_run_and_summed_up(tmp_path):
    def run(*given: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(HERE / "run.py"), *given]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "full mixed" in run("--dry-run").stdout.splitlines()
    assert "no step is named like" in run("--only", "nonsense").stderr
    done = run("--only", "machine,sudoku", "--out", str(tmp_path / "gpu"))
    assert done.returncode == 1  # without a GPU
    summary = (tmp_path / "gpu" / "summary.md").read_text()
    assert "| machine | passed in" in summary and "| sudoku | FAILED" in summary
    assert "needs a Metal or CUDA" in (tmp_path / "gpu" / "sudoku.txt").read_text()
