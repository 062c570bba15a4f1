"""`mlx_dgemma.benchmark`: every figure, the table, estimates and refusals."""

import json
import re
import subprocess
import tomllib
from dataclasses import asdict, replace

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from terminal import ROOT, environment, python

from mlx_dgemma import load, stream_generate
from mlx_dgemma.checkpoint.quantize import Quantization
from mlx_dgemma.cli.benchmark import main
from mlx_dgemma.diffusion.engine import PREFILL_STEP
from mlx_dgemma.diffusion.events import Commit
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.performance import chips, estimate, measure
from mlx_dgemma.performance.cost import PARTS, Loaded, step_cost, weight_bytes
from mlx_dgemma.performance.measure import Anatomy, Trial
from mlx_dgemma.performance.synthetic import config_26b, config_tiny, synthetic_model

COMMAND = python("-W", "error", "-m", "mlx_dgemma.benchmark")
QUICK = ["-p", "6", "--steps", "2", "-n", "2"]
PUZZLE = "4000\n0310\n0430\n0000"
L = config_tiny().canvas_length
FIGURES = {
    *("prefill_tps", "step_seconds", "tokens_per_forward"),
    *("canvases_per_second", "wall_tps", "peak_bytes"),
}
COUNTS = ["--prompt-tokens", "--canvases", "--steps", "--batch-size", "--num-trials"]
COUNTS += ["--prefill-step-size"]
HEAVY = {"mlx", "mlx_lm", "numpy", "rich", "tokenizers", "transformers", "jinja2"}


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def measured(*args):
    result = run(*QUICK, *args, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def synthetic(*args):
    return measured("--synthetic", "tiny", *args)


def held(model):
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.fixture
def small(monkeypatch):
    """Ceilings of little work."""
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "PRODUCT", 64)


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("something was measured")

    monkeypatch.setattr(measure, "run", refuse)
    monkeypatch.setattr(measure, "dissect", refuse)


# JSON


def test_json_is_one_object_with_every_figure():
    found = synthetic()
    top = {"machine", "model", "weight_bytes", "job", "median", "parts", "trials"}
    assert set(found) == top
    assert set(found["machine"]) == {"device", "mlx", "mlx_dgemma"}
    assert all(isinstance(v, str) and v for v in found["machine"].values())
    assert found["model"] == "synthetic tiny"
    counts = {"prompt_tokens": 6, "rows": 1, "canvases": 1, "steps": 2}
    assert found["job"] == {**counts, "canvas_length": L, "early_stop": False}
    assert len(found["trials"]) == 2
    for trial in (found["median"], *found["trials"]):
        assert set(trial) == FIGURES
    assert set(found["parts"]) == {"body", "vocabulary", "commit"}
    shown = [found["weight_bytes"], *found["parts"].values()]
    shown += [v for t in (found["median"], *found["trials"]) for v in t.values()]
    assert all(isinstance(v, int | float) and v > 0 for v in shown)


def test_the_median_is_that_of_the_trials():
    found = synthetic("-n", 3)
    trials = [Trial(**trial) for trial in found["trials"]]
    assert len(trials) == 3
    assert found["median"] == asdict(Trial.median(trials))


@pytest.mark.parametrize(("rows", "canvases", "steps"), [(1, 1, 3), (3, 2, 2)])
def test_rows_canvases_and_steps_multiply(rows, canvases, steps):
    found = synthetic("-b", rows, "--canvases", canvases, "--steps", steps)
    job = found["job"]
    assert (job["rows"], job["canvases"], job["steps"]) == (rows, canvases, steps)
    for trial in found["trials"]:
        assert trial["tokens_per_forward"] == L / steps
        # three figures of one time, of which each counts something else
        wall = rows * canvases * L / trial["wall_tps"]
        denoising = rows * canvases / trial["canvases_per_second"]
        prefill = rows * 6 / trial["prefill_tps"]
        assert prefill + denoising <= wall * (1 + 1e-9)
        timed = canvases * steps - (canvases - 1)
        assert trial["step_seconds"] * (timed // 2) <= denoising
        assert trial["peak_bytes"] >= found["weight_bytes"]


@pytest.mark.parametrize(
    ("flags", "code", "recipe", "dtype"),
    [
        ("", None, "uniform", mx.bfloat16),
        ("--dtype float32", None, "uniform", mx.float32),
        ("--dtype float16", None, "uniform", mx.float16),
        ("--q-bits 4", ("affine", 4), "uniform", mx.bfloat16),
        ("--q-bits 8 --dtype float32", ("affine", 8), "uniform", mx.float32),
        ("--q-mode mxfp4", ("mxfp4", 4), "uniform", mx.bfloat16),
        ("--q-bits 4 --quant-predicate mixed", ("affine", 4), "mixed", mx.bfloat16),
    ],
)
def test_weights_are_as_large_as_their_arrays(flags, code, recipe, dtype):
    found = synthetic("-n", 1, *flags.split())
    q = Quantization.with_defaults(*code, None) if code else None
    model = synthetic_model(
        config_tiny(), quantization=q, recipe=recipe, dtype=dtype, seed=0
    )
    assert found["weight_bytes"] == held(model)
    assert found["weight_bytes"] == weight_bytes(model.config, Loaded.of(model))
    named = f", {code[1]} bit {code[0]}, {recipe}" if code else ""
    assert found["model"] == f"synthetic tiny{named}"


def test_a_model_from_a_folder_takes_every_step(tiny, tiny_model):
    found = measured("--model", tiny, "--steps", 3)
    assert found["model"] == str(tiny)
    assert found["weight_bytes"] == held(tiny_model[0])
    assert found["job"]["early_stop"] is False
    assert found["median"]["tokens_per_forward"] == found["job"]["canvas_length"] / 3


def test_a_solved_puzzle_stops_early():
    found = measured("--model", "sudoku4", "--prompt", PUZZLE, "--steps", 16)
    model, tokenizer = load("sudoku4")
    job = found["job"]
    assert (job["early_stop"], job["steps"], job["prompt_tokens"]) == (True, 16, 32)
    for seed, trial in enumerate(found["trials"]):
        events = stream_generate(model, tokenizer, PUZZLE, seed=seed, steps=16)
        (commit,) = [event for event in events if isinstance(event, Commit)]
        assert trial["tokens_per_forward"] == len(commit.tokens) / commit.steps
        assert trial["tokens_per_forward"] > job["canvas_length"] / 16


def test_a_prompt_is_given_to_every_row():
    found = measured("--model", "sudoku4", "--prompt", PUZZLE, "-b", 3, "-n", 1)
    assert (found["job"]["rows"], found["job"]["prompt_tokens"]) == (3, 32)


# Roofline


def test_the_roofline_is_the_cost_of_a_step_by_part(small):
    found = synthetic("--roofline", "-b", 2, "--q-bits", 4, "-n", 1)
    roofline = found["roofline"]
    rates = {"bytes_per_second", "flops_per_second"}
    assert set(roofline) == {*rates, "parts", "floor_seconds"}
    model = synthetic_model(
        config_tiny(), quantization=Quantization(), dtype=mx.bfloat16, seed=0
    )
    costs = step_cost(model.config, Loaded.of(model), 2, 6, L)
    assert list(roofline["parts"]) == list(PARTS)
    for name, part in roofline["parts"].items():
        assert (part["flops"], part["bytes"]) == (costs[name].flops, costs[name].bytes)
        assert part["seconds"] > 0
    seconds = sum(part["seconds"] for part in roofline["parts"].values())
    assert seconds == pytest.approx(roofline["floor_seconds"])
    assert all(roofline[rate] > 0 for rate in rates)


# The table


@pytest.fixture
def fixed(monkeypatch):
    """Figures that are known beforehand; the jobs and seeds they were asked of."""
    asked = []

    def run(model, job, seed=0):
        asked.append((job, seed))
        return Trial(1234.5, 0.25, 4.5, 0.125, 96.0, 3e6)

    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(
        measure, "dissect", lambda model, job: Anatomy(0.125, 0.0625, 0.1)
    )
    return asked


@pytest.mark.parametrize("name", ["canvases", "steps", "prefill_step_size"])
def test_a_flag_arrives_in_the_job_and_nothing_else_changes(fixed, name):
    run("--synthetic", "tiny")
    run("--synthetic", "tiny", "--" + name.replace("_", "-"), 7)
    (unset, _), (job, _) = fixed[0], fixed[-1]
    assert job == replace(unset, **{name: 7}) != unset
    assert (unset.canvases, unset.steps, unset.early) == (1, 16, False)
    assert unset.prefill_step_size == PREFILL_STEP


def test_one_trial_warms_up_and_each_other_has_its_seed(fixed):
    run("--synthetic", "tiny", "-n", 3)
    assert [seed for _, seed in fixed] == [0, 0, 1, 2]
    assert len({id(job) for job, _ in fixed}) == 1


def rows(lines):
    """Each line of the table by its label, indentation kept."""
    return dict(re.split(r"(?<=\S) {2,}", line, maxsplit=1) for line in lines)


def test_the_table_has_a_line_for_each_phase(fixed):
    asked = ["--synthetic", "tiny", "-b", "2", "--canvases", "3", "-n", "4"]
    result = run(*asked)
    *heading, blank = result.stdout.splitlines()[:4]
    table = rows(result.stdout.splitlines()[4:])
    assert (result.exit_code, result.stderr, blank) == (0, "", "")
    assert heading[0] == "synthetic tiny: 0.5 MB of weights"
    assert "mlx " in heading[1] and "mlx-dgemma " in heading[1]
    assert heading[2] == (
        "2 × 3 × 16 tokens, 16 steps, behind 512 tokens of prompt; median of 4"
    )
    assert table == {
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


def test_the_table_of_a_real_run_fits_a_terminal(small):
    result = run("--synthetic", "tiny", *QUICK, "-b", 2, "--roofline")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    first = lines.index("", 4)
    ceilings, head, *parts, floor = lines[first + 1 :]
    assert re.match(r"one copy [\d.,]+ GB/s, one product [\d.,]+ TFLOP/s", ceilings)
    assert head.split() == ["step", "GFLOP", "GB", "floor", "ms"]
    assert [line.split()[0] for line in parts] == list(PARTS)
    shown = re.fullmatch(r"floor ([\d.,]+) ms; the step takes ([\d.]+) times.*", floor)
    total = float(shown[1].replace(",", ""))
    assert sum(float(p.split()[-1]) for p in parts) == pytest.approx(total, abs=0.05)
    step = float(rows(lines[4:first])["denoising step"].split()[0].replace(",", ""))
    assert float(shown[2]) == pytest.approx(step / total, rel=0.05, abs=0.1)


# Estimates


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("written", ["M4 Max 64GB", "apple m4 max, 64"])
def test_an_estimate_says_what_it_is_and_recommends(written):
    result = run("--estimate", written)
    found = estimate.estimate(config_26b(), *chips.find("M4 Max 64GB"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == estimate.lines(found)
    assert result.stdout.startswith("ESTIMATE ")
    assert "Recommended: 8 bit, the most precise" in result.stdout.splitlines()[-1]


@pytest.mark.usefixtures("nothing_runs")
def test_an_estimate_of_all_lists_every_chip():
    result = run("--estimate", "all")
    assert (result.exit_code, result.stderr) == (0, "")
    headline, _, *lines = result.stdout.splitlines()
    assert headline.startswith("ESTIMATE ")
    for line, chip in zip(lines, chips.CHIPS, strict=True):
        assert line.startswith(f"{chip.name} ")
        assert line.removeprefix(chip.name).split()[0] == str(chip.gpu_cores)


# Refusals


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "give one of --model, --synthetic, --estimate and --backends"),
        (["--model", "sudoku4", "--synthetic", "tiny"], "give one of --model"),
        (["--synthetic", "tiny", "--estimate", "all"], "give one of --model"),
        (["--estimate", "M9 64GB"], "chip is 'M9 64GB'; write it like 'M4 Max 64GB'"),
        (["--estimate", "M4 Max 63GB"], "M4 Max is sold with 36, 48, 64, 128 GB"),
        (["--estimate", "a\n\x1b[2Jb"], "chip is"),
        (["--estimate", "all", "--json"], "--json and --roofline need something"),
        (["--estimate", "all", "--roofline"], "--json and --roofline need something"),
        (["--model", "sudoku4", "--q-bits", "4"], "--q-bits, --q-mode and --dtype are"),
        (["--model", "sudoku4", "--q-mode", "mxfp4"], "are for --synthetic"),
        (["--model", "sudoku4", "--dtype", "float32"], "are for --synthetic"),
        (["--synthetic", "tiny", "--prompt", "1"], "--prompt needs --model"),
        (["--synthetic", "tiny", "--prompt", ""], "--prompt needs --model"),
        (["--synthetic", "tiny", "--revision", "v1"], "--revision needs --model"),
        (["--synthetic", "tiny", "--quant-predicate", "mixed"], "mixed needs --q-bits"),
        (
            ["--synthetic", "tiny", "--q-bits", "2", "--q-mode", "mxfp4"],
            "q-bits is 2; mxfp4 supports 4",
        ),
        (["--model", "no/where/at/all"], "no/where/at/all: no such folder"),
        (["--model", "sudoku4", "--revision", "v1"], "so it has no revision 'v1'"),
        (["--model", "sudoku4", "--prompt", "\udcff"], "lone surrogate"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(args, told):
    result = run(*args)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and told in line
    assert isinstance(run(*args, "--debug").exception, DGemmaError)


def test_what_the_sampler_cannot_do_is_refused():
    result = run("--synthetic", "tiny", "--steps", 2_000_000)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: steps is 2000000; it must be a whole")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((flag, "0") for flag in COUNTS),
        ("--steps", "some"),
        ("--synthetic", "27b"),
        ("--q-bits", "7"),
        ("--q-mode", "int4"),
        ("--quant-predicate", "most"),
        ("--dtype", "float64"),
        ("--temperature", "1"),
    ],
)
def test_wrong_usage_names_the_flag_and_exits_2(flag, value):
    result = run("--synthetic", "tiny", flag, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert flag in result.stderr


# As a person runs it


def ended(command):
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_a_refusal_shows_no_traceback():
    result = ended([*COMMAND, "--model", "no/where/at/all"])
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_help_names_every_option_and_prints_no_warning():
    result = ended([*COMMAND, "--help"])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: python -m mlx_dgemma.benchmark [OPTIONS]")
    for option in main.params:
        assert all(name in result.stdout for name in option.opts)


def test_help_imports_nothing_heavy():
    result = ended(
        python(
            *("-W", "error", "-c"),
            "import sys, runpy; sys.argv[1:] = ['--help']\n"
            "try: runpy.run_module('mlx_dgemma.benchmark', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print(*sys.modules, file=sys.stderr)",
        )
    )
    loaded = {module.partition(".")[0] for module in result.stderr.split()}
    assert "click" in loaded
    assert not loaded & HEAVY


def test_the_command_is_installed_under_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["mlx_dgemma.benchmark"] == "mlx_dgemma.cli.benchmark:main"
