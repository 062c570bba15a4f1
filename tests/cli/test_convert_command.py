"""`mlx_dgemma.convert`: flags, words, progress and what a broken run leaves."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from terminal import CODES, environment, python, run_in_terminal

from mlx_dgemma.checkpoint import convert as conversion
from mlx_dgemma.cli import convert as command
from mlx_dgemma.cli.convert import main
from mlx_dgemma.errors import ConversionError

COMMAND = python("-m", "mlx_dgemma.convert")
MB = 1_000_000


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def convert(source, target, *args):
    return run("--hf-path", source, "--mlx-path", target, *args)


def converted(**changes):
    fields = {
        "path": Path("out"),
        "source_bytes": 3_000 * MB,
        "bytes": 1_500 * MB,
        "shards": 2,
        "bits_per_weight": 4.5,
        "dense": (),
        "regrouped": {},
    }
    return conversion.Converted(**fields | changes)


@pytest.fixture
def recorder(monkeypatch):
    """Stands for the library function: its arguments, and an answer to change."""

    class Recorder:
        asked: dict
        answer = converted()

        def __call__(self, hf_path, mlx_path, *, progress, **settings):
            self.asked = {"hf_path": hf_path, "mlx_path": mlx_path, **settings}
            return self.answer

    recorder = Recorder()
    monkeypatch.setattr(conversion, "convert", recorder)
    return recorder


def test_the_folder_holds_what_the_last_line_says(tiny, tmp_path):
    target = tmp_path / "out"
    result = convert(tiny, target, "-q", "--q-bits", "8", "--q-group-size", "32")
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    said = re.fullmatch(
        r"(.+): ([\d.]+) MB in 1 file, ([\d.]+) bits per weight \(from ([\d.]+) MB\)",
        line,
    )
    assert said[1] == str(target)
    written = (target / "model.safetensors").stat().st_size
    assert float(said[2]) == pytest.approx(written / MB, abs=0.06)
    source = (tiny / "model.safetensors").stat().st_size
    assert float(said[4]) == pytest.approx(source / MB, abs=0.06)
    quantization = json.loads((target / "config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (8, 32)


SETTINGS = [
    (["-q"], {"quantize": True}),
    (["-q", "--q-bits", "6"], {"quantize": True, "q_bits": 6}),
    (["-q", "--q-group-size", "128"], {"quantize": True, "q_group_size": 128}),
    (["-q", "--q-mode", "mxfp4"], {"quantize": True, "q_mode": "mxfp4"}),
    (["-q", "--quant-predicate", "mixed"], {"quantize": 1, "quant_predicate": "mixed"}),
    (["--dtype", "float16"], {"dtype": "float16"}),
    (["-d"], {"dequantize": True}),
    (["--dequantize"], {"dequantize": True}),
    (["--revision", "v2"], {"revision": "v2"}),
    (["--upload-repo", "me/it"], {"upload_repo": "me/it"}),
    (["--overwrite"], {"overwrite": True}),
    (["--mlx-path", "there"], {"mlx_path": "there"}),
]


@pytest.mark.parametrize(("args", "changed"), SETTINGS, ids=lambda value: str(value))
def test_a_flag_arrives_as_its_setting_and_nothing_else_changes(
    recorder, args, changed
):
    assert run("--hf-path", "from").exit_code == 0
    unset = recorder.asked
    assert unset["hf_path"] == "from" and unset["mlx_path"] == "mlx_model"
    assert run("--hf-path", "from", *args).exit_code == 0
    assert recorder.asked == unset | changed != unset


@pytest.mark.parametrize(
    ("answer", "stderr", "stdout"),
    [
        (
            {"regrouped": {"a": 32, "b": 16, "c": 32}},
            "3 layers have widths the group size does not divide; "
            "they use groups of 16, 32\n",
            "out: 1.50 GB in 2 files, 4.50 bits per weight (from 3.00 GB)\n",
        ),
        (
            {"dense": ("a", "b", "c", "d"), "shards": 1},
            "4 layers have widths no group size divides and stay dense: a, b, c…\n",
            "out: 1.50 GB in 1 file, 4.50 bits per weight (from 3.00 GB)\n",
        ),
        (
            {"dense": ("a", "b"), "bytes": 999_900_000},
            "2 layers have widths no group size divides and stay dense: a, b\n",
            "out: 999.9 MB in 2 files, 4.50 bits per weight (from 3.00 GB)\n",
        ),
    ],
)
def test_what_could_not_be_done_as_asked_is_said(recorder, answer, stderr, stdout):
    recorder.answer = converted(**answer)
    result = run("--hf-path", "from", "-q")
    assert (result.stderr, result.stdout) == (stderr, stdout)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "--hf-path"),
        (["--hf-path", "m", "--q-bits", "7"], "--q-bits"),
        (["--hf-path", "m", "--dtype", "int8"], "--dtype"),
        (["--hf-path", "m", "--bits", "4"], "--bits"),
    ],
)
def test_wrong_usage_names_the_flag_and_exits_2(recorder, args, named):
    result = run(*args)
    assert result.exit_code == 2
    assert named in result.stderr
    assert result.stdout == ""


def test_a_refusal_is_one_line_and_debug_shows_its_traceback(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    result = convert(tiny, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "--overwrite" in line
    assert (tmp_path / "out" / "kept").read_text() == "kept"
    debugged = convert(tiny, tmp_path / "out", "--debug")
    assert isinstance(debugged.exception, ConversionError)


def test_ctrl_c_leaves_nothing_and_exits_130(tiny, tmp_path, monkeypatch):
    def interrupted(self, name, done, total):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command._Lines, "__call__", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = convert(tiny, tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_in_a_terminal_a_bar_shows_bytes_rate_and_time(tiny, tmp_path):
    target = tmp_path / "out"
    args = ["--hf-path", str(tiny), "--mlx-path", str(target)]
    ended = run_in_terminal([*COMMAND, *args], stdout=tmp_path / "said", columns=40)
    written = (target / "model.safetensors").read_bytes()
    total = len(written) - 8 - int.from_bytes(written[:8], "little")
    lines = re.split(r"[\r\n]+", CODES.sub("", ended.sent))
    done = rf"━+ ({total / 1000:.1f})/\1 kB (\?|[\d.]+ [kM]B/s) 0:00:00"
    assert ended.code == 0
    assert re.fullmatch(done, lines[-2])
    assert max(map(len, lines)) <= 40
    assert f"{target}: " in ended.stdout.decode()


def test_without_a_terminal_progress_is_plain_lines_now_and_then(monkeypatch, capsys):
    seconds = iter([100.0, 101.0, 105.5, 106.0, 110.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(seconds))
    lines = command._Lines()
    for done in (10, 110, 120, 2000):
        lines("a tensor", done * MB, 2000 * MB)
    assert capsys.readouterr().err.splitlines() == [
        "converting 110.0 MB of 2.00 GB, 20.0 MB/s, 94 s left",
        "converting 2.00 GB of 2.00 GB, 200.0 MB/s, 0 s left",
    ]


def test_a_redirected_conversion_sends_no_codes(tiny, tmp_path):
    result = convert(tiny, tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr.startswith("converting ")
    assert "\x1b" not in result.stderr and "\r" not in result.stderr


def test_a_reader_that_left_gets_no_traceback(tiny, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    args = ["--hf-path", str(tiny), "--mlx-path", str(tmp_path / "out")]
    result = subprocess.run(
        [*COMMAND, *args], stdout=writing, stderr=subprocess.PIPE, env=environment()
    )
    os.close(writing)
    assert result.returncode == 141  # as a shell counts SIGPIPE
    assert b"Traceback" not in result.stderr and b"Error" not in result.stderr
    assert (tmp_path / "out" / "config.json").exists()
