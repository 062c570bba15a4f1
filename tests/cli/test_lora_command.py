"""`mlx_dgemma.lora`: flags and YAML to a run, what it prints, what it refuses."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from terminal import Terminal, python

from mlx_dgemma import LoRA, TrainSettings, convert, load
from mlx_dgemma.adapters.lora import TARGETS
from mlx_dgemma.cli import lora as command
from mlx_dgemma.training.settings import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from runs import write_rows

QUICK = "--iters 4 --rank 2 --val-batches 1 --warmup-steps 1 --steps-per-report 2"
TRAIN = ["--train", "--model", "m", "--data", "d"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "model"
    return convert(tiny, folder, quantize=True, q_group_size=32).path


def run(*args):
    return CliRunner().invoke(command.main, [str(a) for a in args])


def refused(*args, code=1):
    """The last line of stderr: the only one, or below the usage for code 2."""
    result = run(*args)
    assert result.exit_code == code, result.output
    *usage, line = result.stderr.splitlines()
    assert bool(usage) == (code == 2) and line.startswith("error: ")
    return line


@pytest.fixture
def asked(monkeypatch):
    """`asked("--iters 3")`: the run that would begin."""

    def ask(flags="", *more) -> Run:
        found = []
        monkeypatch.setattr(command, "_train", found.append)
        result = run(*TRAIN, *flags.split(), *more)
        assert (result.exit_code, result.stderr) == (0, "")
        return found[0]

    return ask


def test_it_trains_saves_and_tests(tiny, data, tmp_path):
    out = tmp_path / "a"
    given = ["--model", tiny, "--data", data, "--adapter-path", out]
    result = run("--train", "--test", *given, *QUICK.split())
    assert result.exit_code == 0, result.output
    first, saved, tested = result.stdout.splitlines()
    count = sum(a.size for a in mx.load(str(out / "adapters.safetensors")).values())
    assert first == (
        f"{count:,} trained parameters; 24 examples, 0 bad rows left out, 0 answers cut"
    )
    assert saved == f"{out}/adapters.safetensors: after iteration 4"
    assert tested.startswith("test: denoising ")
    lines = result.stderr.splitlines()
    assert [line.split(":")[0][-1] for line in lines] == ["0", "2", "4", "4"]
    assert all(line.endswith(" s left") for line in lines)
    assert (out / "loss.png").exists()


def test_every_flag_reaches_the_run(asked):
    assert asked() == Run(model="m", data="d")
    settings = {
        "iters": 12,
        "batch_size": 2,
        "grad_accumulation_steps": 3,
        "optimizer": "adafactor",
        "learning_rate": 0.5,
        "lr_schedule": "constant",
        "warmup_steps": 7,
        "max_seq_length": 99,
        "encoder_loss_weight": 0.25,
        "steps_per_report": 4,
        "steps_per_eval": 5,
        "val_batches": -1,
        "save_every": 6,
        "seed": 8,
    }
    flags = [f"--{n.replace('_', '-')} {value}" for n, value in settings.items()]
    flags += ["--mask-prompt --grad-checkpoint --resume --skip-bad --rank 3 --scale 4"]
    flags += ["--num-layers 5 --target experts --revision r --resume-adapter-file f"]
    settings |= {"mask_prompt": True, "grad_checkpoint": True}
    assert asked(" ".join([*flags, "--adapter-path a"])) == Run(
        model="m",
        data="d",
        adapter_path="a",
        lora=LoRA(rank=3, scale=4, num_layers=5, keys=TARGETS["experts"]),
        num_layers=5,
        settings=TrainSettings(**settings),
        resume=True,
        resume_adapter_file="f",
        skip_bad=True,
        revision="r",
    )
    full = asked("--fine-tune-type full --train-router --num-layers 2")
    assert (full.lora, full.train_router, full.num_layers) == (None, True, 2)


def test_yaml_sets_what_the_command_line_does_not(asked, tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text(
        "iters: 30\nbatch_size: 3\nlearning_rate: 1e-5\ngrad_checkpoint: true\n"
        "num_layers: 2\nlora_parameters:\n  rank: 5\n  scale: 10.0\n  dropout: 0.0\n"
        "  keys: [self_attn.q_proj, mlp.down_proj]\n"
    )
    found = asked("--batch-size 6", "-c", path)
    assert found.settings == TrainSettings(
        iters=30, batch_size=6, learning_rate=1e-5, grad_checkpoint=True
    )
    keys = ("self_attn.q_proj", "mlp.down_proj")
    assert found.lora == LoRA(rank=5, scale=10, num_layers=2, keys=keys)


def test_yaml_text_stays_text_and_null_sets_nothing(monkeypatch, tmp_path):
    asked: list[Run] = []
    monkeypatch.setattr(command, "_train", asked.append)
    path = tmp_path / "c.yaml"
    path.write_text(
        'adapter_path: "20241201"\nrevision: "12e45678"\nmodel: 0123\nseed: null\n'
        "train: true\ndata: x\nlearning_rate: 1e-5\n"
    )
    assert run("-c", path).exit_code == 0
    found = asked[-1]
    assert (found.adapter_path, found.revision) == ("20241201", "12e45678")
    assert (found.settings.seed, found.settings.learning_rate) == (0, 1e-5)


def test_bad_yaml_is_refused_by_name(tmp_path):
    path = tmp_path / "lora.yaml"
    for text, message in (
        ("report_to: wandb", "report_to is no flag"),
        ("lora_parameters:\n  alpha: 3", "holds alpha; known: rank, scale"),
        ("lora_parameters:\n  dropout: 0.1", "dropout is 0.1; only 0 is supported"),
        ("lora_parameters: 3", "must hold names and values"),
        ("lora_parameters:\n  keys: [lm_head]", "lora keys hold 'lm_head'"),
        ("a: [", "is no YAML"),
        ("- a", "must hold names and values"),
        ("iters: 0", "iters is 0; it must be from 1 up"),
        ("iters: .inf", "iters must be text, a number, true or false"),
        ("iters: !!set {a}", "iters must be text, a number, true or false"),
        (f"iters: 0x{'f' * 6000}", "iters must be text, a number, true or false"),
        ("rank: !!timestamp x", "is no YAML"),
    ):
        path.write_text(text)
        assert message in refused("-c", path, *TRAIN)
    path.write_text("fine_tune_type: dora")
    assert "'dora' is not one of" in run("-c", path, *TRAIN).stderr


def test_what_does_not_go_together_is_refused(tiny, data, quantized, tmp_path):
    base, full = ["--train", "--model", tiny, "--data", data], "--fine-tune-type=full"
    for code, args, message in (
        (2, ["--model", tiny, "--data", data], "give at least one of --train, --test"),
        (2, ["--train", "--data", data], "--model is missing"),
        (2, ["--train", "--model", tiny], "--data is missing"),
        (2, [*base, full, "--target", "mlp"], "--target is for --fine-tune-type lora"),
        (2, [*base, "--train-router"], "--train-router is for --fine-tune-type full"),
        (1, [*base, "--rank", 0], "rank is 0"),
        (1, [*base, "--num-layers", 9], "this model has 3"),
        (1, [*base, "--iters=3", "--grad-accumulation-steps=2"], "must be a multiple"),
        (1, [*base, "--max-seq-length", 4], "leaves no canvas"),
        (1, [*base, "--data", tmp_path / "no"], "no such folder"),
        (1, [*base, "--resume-adapter-file", tmp_path / "x"], "no such file"),
        (1, [*base, "--resume", "--resume-adapter-file=x"], "exclude one another"),
        (1, [*base, full, "--model", quantized], "needs dense weights"),
    ):
        assert message in refused(*args, "--adapter-path", tmp_path / "a", code=code)
    assert not (tmp_path / "a").exists()


def test_bad_rows_are_named_or_counted_beside_a_quantised_base(
    data, quantized, tmp_path
):
    path, out = tmp_path / "train.jsonl", tmp_path / "a"
    path.write_text((data / "train.jsonl").read_text() + '{"prompt": "a"}\n{"a"\n')
    given = ["--train", "--model", quantized, "--data", tmp_path, *QUICK.split()]
    given += ["--adapter-path", out]
    said = refused(*given)
    assert f"{path}:25: has neither" in said and "--skip-bad" in said
    result = run(*given, "--skip-bad")
    assert "24 examples, 2 bad rows left out" in result.stdout
    load(quantized, out)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["model"] == str(quantized)


def test_estimate_needs_neither_data_nor_files():
    result = run("--estimate", "--model", "26b-4bit", "--grad-checkpoint")
    assert result.exit_code == 0 and "together" in result.stdout
    assert "Mac of 48 GB (38.7 for one process): fits" in result.stdout


@pytest.mark.slow
def test_in_a_terminal_no_line_is_written_into_the_bar(tiny, data, tmp_path):
    given = [*TRAIN, "--model", tiny, "--data", data, "--iters", "5000", "--rank", "2"]
    given += ["--steps-per-report", "2", "--adapter-path", tmp_path / "a"]
    terminal = Terminal(python("-m", "mlx_dgemma.lora", *map(str, given)))
    assert terminal.until("iteration 4").type("\x03").code == 130
    lines = [line.rstrip() for line in terminal.screen().lines()]
    assert "saving after this update; again to leave at once" in lines
    for start in ("iteration 2: train denoising", "stopped after iteration"):
        assert any(line.startswith(start) for line in lines), start
    assert sum("/5000" in line for line in lines) == 1, "one bar, with the time left"
