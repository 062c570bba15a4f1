"""`mlx_dgemma.benchmark`: every figure, the table, estimates, a model beside."""

import json
import re
from dataclasses import replace

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_dgemma import backends
from mlx_dgemma.cli.benchmark import main
from mlx_dgemma.diffusion.engine import PREFILL_STEP
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.performance import chips, estimate, measure
from mlx_dgemma.performance.cost import PARTS
from mlx_dgemma.performance.measure import Trial
from mlx_dgemma.performance.synthetic import config_26b

QUICK = ["-p", "6", "--steps", "2", "-n", "2"]
TINY, SUDOKU = ("--synthetic", "tiny"), ("--model", "sudoku4")
PUZZLE = "4000\n0310\n0430\n0000"


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def measured(*args):
    result = run(*QUICK, *args, "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)


@pytest.fixture
def fixed(monkeypatch):
    """Figures that are known beforehand; the jobs and seeds they were asked of."""
    asked = []

    def run(model, job, seed=0):
        asked.append((job, seed))
        return Trial(1234.5, 0.25, 16, 4.5, 0.125, 96.0, 3e6)

    monkeypatch.setattr(measure, "run", run)
    times = {"body": 0.125, "vocabulary": 0.0625, "commit": 0.1}
    monkeypatch.setattr(measure, "time_parts", lambda model, job: times)
    return asked


def test_json_is_one_object_with_every_figure(monkeypatch):
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "MATRIX_SIZE", 64)
    found = measured(*TINY, "-b", 3, "--canvases", 2, "--roofline")
    assert list(found) == (
        "machine model weight_bytes job median parts trials roofline".split()
    )
    assert set(found["machine"]) == {"device", "mlx", "mlx_dgemma"}
    assert found["model"] == "synthetic tiny"
    counts = {"prompt_tokens": 6, "rows": 3, "canvases": 2, "steps": 2}
    assert found["job"] == {**counts, "canvas_length": 16, "early_stop": False}
    assert len(found["trials"]) == 2
    for trial in (found["median"], *found["trials"]):
        assert set(trial) == {
            *("prefill_tps", "step_seconds", "tokens", "tokens_per_forward"),
            *("canvases_per_second", "wall_tps", "peak_bytes"),
        }
        assert (trial["tokens"], trial["tokens_per_forward"]) == (96, 8)
    assert set(found["parts"]) == {"body", "vocabulary", "commit"}
    assert list(found["roofline"]["parts"]) == list(PARTS)


def test_flags_of_a_synthetic_model(fixed):
    sizes = {}
    for flags, name in (
        ("--dtype float32", ""),
        ("", ""),
        ("--q-bits 8", ", 8 bit affine, uniform"),
        ("--q-bits 4 --quant-predicate mixed", ", 4 bit affine, mixed"),
        ("--q-mode mxfp4", ", 4 bit mxfp4, uniform"),
    ):
        found = measured(*TINY, *flags.split())
        assert found["model"] == f"synthetic tiny{name}"
        sizes[flags] = found["weight_bytes"]
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert sizes["--dtype float32"] == 2 * sizes[""]


def test_flags_arrive_in_the_workload_and_each_trial_has_its_seed(fixed, tiny):
    run(*TINY, "-n", 3)
    assert [seed for _, seed in fixed] == [0, 0, 1, 2]  # the first one warms up
    base, _ = fixed[0]
    assert (base.canvases, base.steps, base.early) == (1, 16, False)
    assert base.prefill_step_size == PREFILL_STEP and len(base.prompts[0]) == 512
    for name in ("canvases", "steps", "prefill_step_size"):
        run(*TINY, "--" + name.replace("_", "-"), 7)
        assert fixed[-1][0] == replace(base, **{name: 7})
    run("--model", tiny)
    assert fixed[-1][0].early is False
    run(*SUDOKU, "--prompt", PUZZLE, "-b", 2)
    job, _ = fixed[-1]
    assert job.early and job.prompts[0] == job.prompts[1] and len(job.prompts[0]) == 32


def test_table_has_a_line_for_each_phase(fixed, monkeypatch):
    part = {"flops": 2e9, "bytes": 3e9, "seconds": 0.1}
    known = {"flops_per_second": 1e12, "bytes_per_second": 5e10}
    known |= {"parts": {"head": part}, "floor_seconds": 0.1}
    monkeypatch.setattr(measure, "roofline", lambda model, job: known)
    result = run(*TINY, "-b", 2, "--canvases", 3, "-n", 4, "--roofline")
    heading, *lines = result.stdout.split("\n\n")
    heading = heading.splitlines()
    assert heading[0] == "synthetic tiny: 0.5 MB of weights"
    assert "mlx " in heading[1] and "mlx-dgemma " in heading[1]
    assert heading[2] == (
        "2 × 3 × 16 tokens, 16 steps, behind 512 tokens of prompt; median of 4"
    )
    rows = [re.split(r"(?<=\S) {2,}", line) for line in lines[0].splitlines()]
    assert dict(rows) == {
        "prefill": "1,234.5 tok/s",
        "denoising step": "250.0 ms",
        "  body": "125.0 ms",
        "  vocabulary": "62.5 ms",
        "  host and the rest": "62.5 ms",
        "commit": "100.0 ms",
        "canvases": "0.125 a second",
        "tokens per forward": "4.50",
        "wall": "96.0 tok/s",
        "peak memory": "3.0 MB",
    }
    assert lines[1].splitlines() == [
        "one copy 50.0 GB/s, one product 1.000 TFLOP/s, measured now",
        "step                       GFLOP        GB    floor ms",
        "head                         2.0     3.000      100.00",
        "floor 100.00 ms; the step takes 2.5 times that",
    ]


def test_estimates_need_no_model(monkeypatch):
    monkeypatch.setattr(measure, "run", lambda *a: pytest.fail("ran"))
    result = run("--estimate", "apple m4 max, 64")
    lines = estimate.lines(config_26b(), *chips.find("M4 Max 64GB"))
    assert (result.exit_code, result.stdout.splitlines()) == (0, lines)
    result = run("--estimate", "all")
    assert result.stdout.splitlines() == estimate.table(config_26b())


@pytest.mark.slow
def test_model_beside_generates_as_many_tokens(tmp_path):
    from mlx_lm.models.llama import Model, ModelArgs

    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    config |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = measured(*TINY, "--canvases", 2, "--beside", tmp_path)
    beside = found["beside"]
    assert (beside["model"], beside["prompt_tokens"]) == (str(tmp_path), 6)
    assert beside["tokens"] == found["median"]["tokens"] == 32
    assert len(beside["trials"]) == 2
    for trial in (beside["median"], *beside["trials"]):
        assert set(trial) == {"prompt_tps", "generation_tps", "wall_tps", "peak_bytes"}
    for trial in beside["trials"]:
        parts = 6 / trial["prompt_tps"] + 31 / trial["generation_tps"]
        assert parts == pytest.approx(32 / trial["wall_tps"])
    lines = run(*QUICK, *TINY, "--beside", tmp_path).stdout.splitlines()[-5:]
    assert lines[0].endswith("token by token through mlx-lm: 16 tokens behind 6")
    assert [line.split()[0] for line in lines[1:4]] == ["prompt", "generation", "peak"]
    assert lines[4].startswith("wall: ours") and str(tmp_path) in lines[4]
    numbers = re.findall(r"([\d,]+\.\d+)(?: tok/s|$)", lines[4])
    ours, theirs, ratio = (float(number.replace(",", "")) for number in numbers)
    assert ratio == pytest.approx(ours / theirs, abs=0.01)
    for change, reason in (
        ({"model_type": "nosuch"}, "ValueError: Model type nosuch not supported"),
        ({"vocab_size": 48}, "Expected shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        result = run(*QUICK, *TINY, "--beside", tmp_path)
        assert (result.exit_code, result.stdout) == (1, "")
        line = result.stderr.splitlines()[-1]
        assert line.startswith("error: --beside") and reason in line


def test_refusals_are_one_line_before_anything_runs(monkeypatch):
    monkeypatch.setattr(measure, "run", lambda *a: pytest.fail("ran"))
    monkeypatch.setattr(backends.current(), "memory", lambda: 10**9)
    for args, reason in (
        ((), "give one of --model, --synthetic, --estimate and --backends"),
        ((*SUDOKU, *TINY), "give one of --model"),
        ((*SUDOKU, "--backends"), "give one of --model"),
        (("--estimate", "M9 64GB"), "chip is 'M9 64GB'; write it like 'M4 Max 64GB'"),
        (("--estimate", "a\n\x1b[2Jb"), "chip is"),
        (("--estimate", "all", "--json"), "--estimate has no --json"),
        (("--backends", "--roofline"), "--roofline needs something to measure"),
        (("--backends", "--beside", "x"), "--beside needs something to measure"),
        ((*TINY, "--beside", "x", "-b", 2), "--beside compares one row"),
        ((*TINY, "--beside", "no/where/at"), "no/where/at: no such folder"),
        ((*SUDOKU, "--q-bits", "4"), "--q-bits, --q-mode and --dtype are"),
        ((*SUDOKU, "--dtype", "float32"), "are for --synthetic"),
        ((*TINY, "--prompt", ""), "--prompt needs --model"),
        ((*TINY, "--revision", "v1"), "--revision needs --model"),
        ((*TINY, "--quant-predicate", "mixed"), "mixed needs --q-bits"),
        ((*TINY, "--q-bits", "2", "--q-mode", "mxfp4"), "q-bits is 2; mxfp4"),
        (("--model", "no/where/at/all"), "no/where/at/all: no such folder"),
        (("--synthetic", "26b"), "GB of it weights; this device has 1.0 GB"),
        ((*SUDOKU, "--revision", "v1"), "so it has no revision 'v1'"),
        ((*SUDOKU, "--prompt", "\udcff"), "lone surrogate"),
    ):
        result = run(*args)
        *usage, line = result.stderr.splitlines()
        assert (result.exit_code, result.stdout) == (2 if usage else 1, ""), args
        assert line.startswith("error: ") and reason in line
        if not usage:
            assert isinstance(run(*args, "--debug").exception, DGemmaError)
