"""`mlx_dgemma.fuse`: flags, words, and what a broken run leaves."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from adapters.adapter_files import factors, write_adapter, write_peft
from click.testing import CliRunner
from terminal import CODES, environment, python, run_in_terminal

from mlx_dgemma.adapters import fuse as library
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.convert import Converted, convert
from mlx_dgemma.cli import convert as shared
from mlx_dgemma.cli.fuse import main
from mlx_dgemma.errors import ConversionError

COMMAND = python("-m", "mlx_dgemma.fuse")
MB = 1_000_000


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def fuse(model, adapter, target, *args):
    named = "--model", model, "--adapter-path", adapter, "--save-path", target
    return run(*named, *args)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a", read_config(tiny))


@pytest.fixture
def recorder(monkeypatch):
    """Stands for the library function: its arguments, and an answer."""

    class Recorder:
        asked: dict

        def __call__(self, model, adapter_path, save_path, *, progress, **settings):
            paths = {"model": model, "adapter_path": adapter_path}
            self.asked = {**paths, "save_path": save_path, **settings}
            return Converted(
                path=Path("out"),
                source_bytes=3_000 * MB,
                bytes=1_500 * MB,
                shards=2,
                bits_per_weight=4.5,
                dense=(),
                regrouped={},
            )

    recorder = Recorder()
    monkeypatch.setattr(library, "fuse", recorder)
    return recorder


SETTINGS = [
    (["--adapter-path", "there"], {"adapter_path": "there"}),
    (["--save-path", "there"], {"save_path": "there"}),
    (["--dequantize"], {"dequantize": True}),
    (["--de-quantize"], {"dequantize": True}),
    (["-d"], {"dequantize": True}),
    (["--revision", "v2"], {"revision": "v2"}),
    (["--upload-repo", "me/it"], {"upload_repo": "me/it"}),
    (["--overwrite"], {"overwrite": True}),
]


@pytest.mark.parametrize(("args", "changed"), SETTINGS, ids=str)
def test_a_flag_arrives_as_its_setting_and_nothing_else_changes(
    recorder, args, changed
):
    result = run("--model", "from")
    said = "out: 1.50 GB in 2 files, 4.50 bits per weight (from 3.00 GB)\n"
    assert (result.exit_code, result.stdout) == (0, said)
    unset = recorder.asked
    assert (unset["model"], unset["adapter_path"]) == ("from", "adapters")
    assert unset["save_path"] == "fused_model"
    assert run("--model", "from", *args).exit_code == 0
    assert recorder.asked == unset | changed != unset


@pytest.mark.parametrize("args", [[], ["--model", "m", "--mlx-path", "x"]])
def test_wrong_usage_names_the_flag_and_exits_2(recorder, args):
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert (args[2] if args else "--model") in result.stderr


def test_the_folder_holds_what_the_last_line_says(tiny, adapter, tmp_path):
    convert(tiny, tmp_path / "q", quantize=True, q_bits=8)
    for target, flags, bits in (("kept", [], 8), ("dense", ["--dequantize"], None)):
        result = fuse(tmp_path / "q", adapter, tmp_path / target, *flags)
        assert result.exit_code == 0, result.stderr
        (line,) = result.stdout.splitlines()
        assert line.startswith(f"{tmp_path / target}: ")
        said = re.search(r": ([\d.]+) MB in 1 file, ([\d.]+) bits per weight", line)
        written = (tmp_path / target / "model.safetensors").stat().st_size
        assert float(said[1]) == pytest.approx(written / MB, abs=0.06)
        config = json.loads((tmp_path / target / "config.json").read_text())
        assert config.get("quantization", {}).get("bits") == bits
        assert result.stderr.startswith("fusing ")


def test_an_adapter_saved_by_peft_may_be_given(tiny, tmp_path):
    layers = factors(read_config(tiny), ("layers.0.mlp.up_proj",))
    both = {"decoder": layers, "encoder": layers}
    one = write_peft(tmp_path / "a", both)
    assert fuse(tiny, one, tmp_path / "out").exit_code == 0
    two = write_peft(tmp_path / "b", {"decoder": layers})
    result = fuse(tiny, two, tmp_path / "other")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert "encoder and decoder have different adapters" in line
    assert "--adapter-path" in line
    assert not (tmp_path / "other").exists()


def test_a_refusal_is_one_line_and_debug_shows_its_traceback(tiny, adapter, tmp_path):
    target = shutil.copytree(tiny, tmp_path / "out")
    result = fuse(tiny, adapter, target)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "--overwrite" in line
    debugged = fuse(tiny, adapter, target, "--debug")
    assert isinstance(debugged.exception, ConversionError)
    assert fuse(tiny, adapter, target, "--overwrite").exit_code == 0
    assert "mlx_dgemma.fuse" in (target / "README.md").read_text()


def test_ctrl_c_leaves_nothing_and_exits_130(tiny, adapter, tmp_path, monkeypatch):
    def interrupted(self, name, done, total):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(shared._Lines, "__call__", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = fuse(tiny, adapter, tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_in_a_terminal_a_bar_shows_bytes_rate_and_time(tiny, adapter, tmp_path):
    target = tmp_path / "out"
    named = ["--model", tiny, "--adapter-path", adapter, "--save-path", target]
    command = [*COMMAND, *map(str, named)]
    ended = run_in_terminal(command, stdout=tmp_path / "said", columns=40)
    lines = re.split(r"[\r\n]+", CODES.sub("", ended.sent))
    assert ended.code == 0
    assert re.fullmatch(r"━+ ([\d.]+)/\1 kB (\?|[\d.]+ [kM]B/s) 0:00:00", lines[-2])
    assert f"{target}: " in ended.stdout.decode()


def test_the_module_runs_and_names_what_is_missing(tiny, tmp_path):
    args = ["--model", str(tiny), "--save-path", str(tmp_path / "out")]
    result = subprocess.run(
        [*COMMAND, *args], capture_output=True, text=True, env=environment(), cwd="/"
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: adapters: no such folder\n"
