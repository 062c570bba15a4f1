"""`mlx_dgemma.benchmark`: every figure, the table, estimates, a model beside."""

import json
import re
from dataclasses import replace

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_dgemma.cli.benchmark import main
from mlx_dgemma.diffusion.engine import PREFILL_STEP
from mlx_dgemma.errors import DGemmaError
from mlx_dgemma.performance import chips, estimate, measure
from mlx_dgemma.performance.cost import PARTS
from mlx_dgemma.performance.measure import PartTimes, Trial
from mlx_dgemma.performance.synthetic import config_26b

QUICK = ["-p", "6", "--steps", "2", "-n", "2"]
PUZZLE = "4000\n0310\n0430\n0000"
FIGURES = {"prefill_tps", "step_seconds", "tokens", "tokens_per_forward"}
FIGURES |= {"canvases_per_second", "wall_tps", "peak_bytes"}


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
    times = PartTimes(0.125, 0.0625, 0.1)
    monkeypatch.setattr(measure, "dissect", lambda model, job: times)
    return asked


def test_json_is_one_object_with_every_figure(monkeypatch):
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "MATRIX_SIZE", 64)
    found = measured("--synthetic", "tiny", "-b", 3, "--canvases", 2, "--roofline")
    top = {"machine", "model", "weight_bytes", "job", "median", "parts", "trials"}
    assert set(found) == top | {"roofline"}
    assert set(found["machine"]) == {"device", "mlx", "mlx_dgemma"}
    assert found["model"] == "synthetic tiny"
    counts = {"prompt_tokens": 6, "rows": 3, "canvases": 2, "steps": 2}
    assert found["job"] == {**counts, "canvas_length": 16, "early_stop": False}
    assert len(found["trials"]) == 2
    for trial in (found["median"], *found["trials"]):
        assert set(trial) == FIGURES
        assert (trial["tokens"], trial["tokens_per_forward"]) == (96, 8)
        assert all(v > 0 for v in trial.values())
    assert set(found["parts"]) == {"body", "vocabulary", "commit"}
    assert list(found["roofline"]["parts"]) == list(PARTS)


def test_flags_of_a_synthetic_model():
    sizes = {}
    for flags, name in (
        ("", ""),
        ("--dtype float32", ""),
        ("--q-bits 8", ", 8 bit affine, uniform"),
        ("--q-bits 4 --quant-predicate mixed", ", 4 bit affine, mixed"),
        ("--q-mode mxfp4", ", 4 bit mxfp4, uniform"),
    ):
        found = measured("--synthetic", "tiny", "-n", 1, *flags.split())
        assert found["model"] == f"synthetic tiny{name}"
        sizes[flags] = found["weight_bytes"]
    order = sorted(sizes, key=sizes.__getitem__, reverse=True)
    assert order == ["--dtype float32", "", *list(sizes)[2:]]
    assert sizes["--dtype float32"] == 2 * sizes[""]


def test_model_from_a_folder_takes_every_step(tiny, tiny_model):
    found = measured("--model", tiny, "--steps", 3, "-n", 1)
    parameters = tree_flatten(tiny_model[0].parameters())
    assert found["weight_bytes"] == sum(array.nbytes for _, array in parameters)
    assert found["job"]["early_stop"] is False
    assert found["median"]["tokens_per_forward"] == found["job"]["canvas_length"] / 3


def test_real_prompt_is_given_to_every_row_and_stops_early(fixed):
    run("--model", "sudoku4", "--prompt", PUZZLE, "-b", 2)
    job, _ = fixed[-1]
    assert job.early and job.prompts[0] == job.prompts[1] and len(job.prompts[0]) == 32


def test_each_flag_arrives_in_the_workload_and_each_trial_has_its_seed(fixed):
    run("--synthetic", "tiny", "-n", 3)
    assert [seed for _, seed in fixed] == [0, 0, 1, 2]  # the first one warms up
    base, _ = fixed[0]
    assert (base.canvases, base.steps, base.early) == (1, 16, False)
    assert base.prefill_step_size == PREFILL_STEP and len(base.prompts[0]) == 512
    for name in ("canvases", "steps", "prefill_step_size"):
        run("--synthetic", "tiny", "--" + name.replace("_", "-"), 7)
        assert fixed[-1][0] == replace(base, **{name: 7})


def rows(lines):
    """Each line of the table by its label, indentation kept."""
    return dict(re.split(r"(?<=\S) {2,}", line, maxsplit=1) for line in lines)


def test_table_has_a_line_for_each_phase(fixed):
    result = run("--synthetic", "tiny", "-b", 2, "--canvases", 3, "-n", 4)
    heading, lines = result.stdout.splitlines()[:3], result.stdout.splitlines()[4:]
    assert heading[0] == "synthetic tiny: 0.5 MB of weights"
    assert "mlx " in heading[1] and "mlx-dgemma " in heading[1]
    assert heading[2] == (
        "2 × 3 × 16 tokens, 16 steps, behind 512 tokens of prompt; median of 4"
    )
    assert rows(lines) == {
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


def test_roofline_is_printed_below(fixed, monkeypatch):
    part = {"flops": 2e9, "bytes": 3e9, "seconds": 0.1}
    known = {"flops_per_second": 1e12, "bytes_per_second": 5e10}
    known |= {"parts": {"head": part}, "floor_seconds": 0.1}
    monkeypatch.setattr(measure, "roofline", lambda model, job: known)
    result = run("--synthetic", "tiny", "--roofline")
    assert result.stdout.splitlines()[-4:] == [
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


# Beside a token-by-token model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from mlx_lm.models.llama import Model, ModelArgs

    folder = tmp_path_factory.mktemp("beside") / "llama"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    config |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_model_beside_generates_as_many_tokens(llama):
    found = measured("--synthetic", "tiny", "--canvases", 2, "--beside", llama)
    beside = found["beside"]
    assert (beside["model"], beside["prompt_tokens"]) == (str(llama), 6)
    assert beside["tokens"] == found["median"]["tokens"] == 32
    assert len(beside["trials"]) == 2
    figures = {"prompt_tps", "generation_tps", "wall_tps", "peak_bytes"}
    assert set(beside["median"]) == figures
    for trial in beside["trials"]:
        assert set(trial) == figures and all(v > 0 for v in trial.values())
        parts = 6 / trial["prompt_tps"] + 31 / trial["generation_tps"]
        assert parts == pytest.approx(32 / trial["wall_tps"])
    lines = run(*QUICK, "--synthetic", "tiny", "--beside", llama).stdout.splitlines()
    assert lines[-5].endswith("token by token through mlx-lm: 16 tokens behind 6")
    assert [line.split()[0] for line in lines[-4:-1]] == [
        "prompt",
        "generation",
        "peak",
    ]
    assert lines[-1].startswith("wall: ours") and str(llama) in lines[-1]
    numbers = re.findall(r"([\d,]+\.\d+)(?: tok/s|$)", lines[-1])
    ours, theirs, ratio = (float(number.replace(",", "")) for number in numbers)
    assert ratio == pytest.approx(ours / theirs, abs=0.01)


@pytest.mark.slow
def test_what_mlx_lm_cannot_load_is_one_line(llama, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    config = json.loads((llama / "config.json").read_text())
    for change, told in (
        ({"model_type": "nosuch"}, "ValueError: Model type nosuch not supported"),
        ({"vocab_size": 48}, "Expected shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        result = run(*QUICK, "--synthetic", "tiny", "--beside", tmp_path)
        assert (result.exit_code, result.stdout) == (1, "")
        line = result.stderr.splitlines()[-1]
        assert line.startswith("error: --beside") and told in line


# Refusals


def test_refusals_are_one_line_before_anything_runs(monkeypatch):
    monkeypatch.setattr(measure, "run", lambda *a: pytest.fail("ran"))
    model, tiny = ("--model", "sudoku4"), ("--synthetic", "tiny")
    for args, told in (
        ((), "give one of --model, --synthetic, --estimate and --backends"),
        ((*model, *tiny), "give one of --model"),
        ((*model, "--backends"), "give one of --model"),
        (("--estimate", "M9 64GB"), "chip is 'M9 64GB'; write it like 'M4 Max 64GB'"),
        (("--estimate", "a\n\x1b[2Jb"), "chip is"),
        (("--estimate", "all", "--json"), "--estimate has no --json"),
        (("--backends", "--roofline"), "--roofline needs something to measure"),
        (("--backends", "--beside", "x"), "--beside needs something to measure"),
        ((*tiny, "--beside", "x", "-b", 2), "--beside compares one row"),
        ((*tiny, "--beside", "no/where/at"), "no/where/at: no such folder"),
        ((*model, "--q-bits", "4"), "--q-bits, --q-mode and --dtype are"),
        ((*model, "--dtype", "float32"), "are for --synthetic"),
        ((*tiny, "--prompt", ""), "--prompt needs --model"),
        ((*tiny, "--revision", "v1"), "--revision needs --model"),
        ((*tiny, "--quant-predicate", "mixed"), "mixed needs --q-bits"),
        ((*tiny, "--q-bits", "2", "--q-mode", "mxfp4"), "q-bits is 2; mxfp4"),
        (("--model", "no/where/at/all"), "no/where/at/all: no such folder"),
        ((*model, "--revision", "v1"), "so it has no revision 'v1'"),
        ((*model, "--prompt", "\udcff"), "lone surrogate"),
    ):
        result = run(*args)
        *usage, line = result.stderr.splitlines()
        assert (result.exit_code, result.stdout) == (2 if usage else 1, ""), args
        assert line.startswith("error: ") and told in line
        if not usage:
            assert isinstance(run(*args, "--debug").exception, DGemmaError)
