"""`mlx_dgemma.lora`: flags and YAML to a request, what it prints, what it refuses."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dgemma import LoRA, TrainSettings, load
from mlx_dgemma.adapters.lora import TARGETS
from mlx_dgemma.cli import lora as command
from mlx_dgemma.cli.generate import main as generate

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from runs import write_rows

QUICK = ["--iters", 4, "--batch-size", 4, "--rank", 2, "--val-batches", 1]
QUICK += ["--warmup-steps", 1, "--steps-per-report", 2, "--learning-rate", 0.01]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"))


def run(*args):
    return CliRunner().invoke(command.main, [str(a) for a in args])


def refused(*args):
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def asked(monkeypatch):
    """The request that would be trained."""
    requests = []
    monkeypatch.setattr(command, "_train", requests.append)

    def ask(*args):
        result = run("--train", "--model", "m", "--data", "d", *args)
        assert (result.exit_code, result.stderr) == (0, "")
        return requests[-1]

    return ask


def test_it_trains_saves_and_tests(tiny, data, tmp_path):
    out = tmp_path / "a"
    given = ["--model", tiny, "--data", data, "--adapter-path", out]
    result = run("--train", "--test", *given, *QUICK)
    assert result.exit_code == 0, result.output
    told = result.stdout.splitlines()
    count = sum(a.size for a in _arrays(out / "adapters.safetensors").values())
    assert told[0] == (
        f"{count:,} trained parameters; 24 examples, 0 bad rows left out, 0 answers cut"
    )
    assert told[1] == f"{out}/adapters.safetensors: after iteration 4"
    assert told[2].startswith("test: denoising ")
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("iteration 0", "iteration 2", "iteration 4", "iteration 4")
    ]
    assert all(line.endswith(" s left") for line in lines)
    assert (out / "loss.png").exists()
    with_adapter = CliRunner().invoke(
        generate,
        ["--model", str(tiny), "--adapter-path", str(out), "--prompt", "a", "-m", "3"],
    )
    assert with_adapter.exit_code == 0, with_adapter.output


def _arrays(path):
    import mlx.core as mx

    return mx.load(str(path))


def test_defaults_are_the_library_s(asked):
    request = asked()
    assert request.settings == TrainSettings()
    assert request.lora == LoRA()
    assert (request.resume, request.skip_bad, request.train_router) == (False,) * 3


def test_every_flag_reaches_the_request(asked):
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
    flags = [
        part
        for name, value in settings.items()
        for part in ("--" + name.replace("_", "-"), value)
    ]
    switches = ["--mask-prompt", "--grad-checkpoint", "--resume", "--skip-bad"]
    chosen = ["--rank", 3, "--scale", 4, "--num-layers", 5, "--target", "experts"]
    request = asked(*flags, *switches, *chosen, "--revision", "r")
    assert request.settings == TrainSettings(
        **settings, mask_prompt=True, grad_checkpoint=True
    )
    keys = TARGETS["experts"]
    assert request.lora == LoRA(rank=3, scale=4, num_layers=5, keys=keys)
    assert request.resume and request.skip_bad and request.revision == "r"
    full = asked("--fine-tune-type", "full", "--train-router", "--num-layers", 2)
    assert (full.lora, full.train_router, full.num_layers) == (None, True, 2)


def test_yaml_says_what_the_command_line_does_not(asked, tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text(
        "iters: 30\nbatch_size: 3\nlearning_rate: 1e-5\ngrad_checkpoint: true\n"
        "num_layers: 2\nlora_parameters:\n  rank: 5\n  scale: 10.0\n  dropout: 0.0\n"
        "  keys: [self_attn.q_proj, mlp.down_proj]\n"
    )
    request = asked("-c", path, "--batch-size", 6)
    assert request.settings == TrainSettings(
        iters=30, batch_size=6, learning_rate=1e-5, grad_checkpoint=True
    )
    keys = ("self_attn.q_proj", "mlp.down_proj")
    assert request.lora == LoRA(rank=5, scale=10, num_layers=2, keys=keys)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("report_to: wandb", "report_to is no flag"),
        ("lora_parameters:\n  alpha: 3", "holds alpha; known: rank, scale"),
        ("lora_parameters:\n  dropout: 0.1", "dropout is 0.1; only 0 is supported"),
        ("lora_parameters: 3", "must hold names and values"),
        ("lora_parameters:\n  keys: [lm_head]", "lora keys hold 'lm_head'"),
        ("a: [", "is no YAML"),
        ("- a", "must hold names and values"),
        ("iters: 0", "iters is 0; it must be from 1 up"),
    ],
)
def test_bad_yaml_is_refused_by_name(tmp_path, text, named):
    path = tmp_path / "lora.yaml"
    path.write_text(text)
    given = ["--train", "--model", "m", "--data", "d"]
    assert named in refused("-c", path, *given)


def test_yaml_values_are_checked_like_flags(tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text("fine_tune_type: dora")
    result = run("-c", path, "--train", "--model", "m", "--data", "d")
    assert result.exit_code == 2 and "'dora' is not one of" in result.stderr


def test_what_does_not_go_together_is_refused(tiny, data, tmp_path):
    base = ["--train", "--model", tiny, "--data", data]
    full = ["--fine-tune-type", "full"]
    for args, named in (
        (["--model", tiny, "--data", data], "give at least one of --train, --test"),
        (["--train", "--data", data], "--model is missing"),
        (["--train", "--model", tiny], "--data is missing"),
        ([*base, *full, "--target", "mlp"], "--target is for --fine-tune-type lora"),
        ([*base, "--train-router"], "--train-router is for --fine-tune-type full"),
        ([*base, "--rank", 0], "rank is 0"),
        ([*base, "--num-layers", 9], "this model has 3"),
        ([*base, "--iters", 3, "--grad-accumulation-steps", 2], "must be a multiple"),
        ([*base, "--max-seq-length", 4], "leaves no canvas"),
        (["--train", "--model", tiny, "--data", tmp_path / "no"], "no such folder"),
        ([*base, "--resume-adapter-file", tmp_path / "x"], "no such file"),
        ([*base, "--resume", "--resume-adapter-file", "x"], "exclude one another"),
    ):
        assert named in refused(*args, "--adapter-path", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_bad_rows_are_named_or_counted(tiny, data, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = (data / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(rows + '{"prompt": "a"}\n')
    given = ["--train", "--model", tiny, "--data", folder, *QUICK]
    said = refused(*given, "--adapter-path", tmp_path / "a")
    assert f"{folder}/train.jsonl:25: has neither" in said and "--skip-bad" in said
    result = run(*given, "--adapter-path", tmp_path / "a", "--skip-bad")
    assert result.exit_code == 0, result.output
    assert "24 examples, 1 bad rows left out" in result.stdout


def test_a_quantised_base_is_not_trained_itself(tiny, data, tmp_path):
    from mlx_dgemma import convert

    convert(tiny, tmp_path / "q", quantize=True, q_bits=4, q_group_size=32)
    given = ["--train", "--model", tmp_path / "q", "--data", data, *QUICK]
    given += ["--adapter-path", tmp_path / "a"]
    assert "needs dense weights" in refused(*given, "--fine-tune-type", "full")
    result = run(*given)
    assert result.exit_code == 0, result.output
    load(tmp_path / "q", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["model"] == str(tmp_path / "q")
