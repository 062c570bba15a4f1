"""`mlx_dgemma.convert` and `mlx_dgemma.fuse`: flags, summary, progress, Ctrl-C."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from adapters.adapter_files import factors, write_adapter, write_peft
from click.testing import CliRunner
from terminal import CODES, python, run_in_terminal

from mlx_dgemma.adapters import fuse as fusing
from mlx_dgemma.checkpoint import convert as conversion
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.cli import convert as command
from mlx_dgemma.cli.convert import main as convert_main
from mlx_dgemma.cli.fuse import main as fuse_main
from mlx_dgemma.errors import ConversionError

MB = 1_000_000


def run(main, *args):
    return CliRunner().invoke(main, [str(a) for a in args])


def convert(source, target, *args):
    return run(convert_main, "--hf-path", source, "--mlx-path", target, *args)


def fuse(model, adapter, target, *args):
    named = "--model", model, "--adapter-path", adapter, "--save-path", target
    return run(fuse_main, *named, *args)


CONVERTED = conversion.Converted(
    path=Path("out"),
    source_bytes=3_000 * MB,
    bytes=1_500 * MB,
    shards=2,
    bits_per_weight=4.5,
    dense=(),
    regrouped={},
)


@pytest.fixture
def recorder(monkeypatch):
    """Stands for both library functions: their arguments, and an answer to change."""

    def recorder(*paths, progress, **settings):
        recorder.asked = {"paths": paths, **settings}
        return recorder.answer

    recorder.answer = CONVERTED
    monkeypatch.setattr(conversion, "convert", recorder)
    monkeypatch.setattr(fusing, "fuse", recorder)
    return recorder


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a", read_config(tiny))


BOTH = {
    "-d": {"dequantize": True},
    "--dequantize": {"dequantize": True},
    "--revision v2": {"revision": "v2"},
    "--upload-repo me/it": {"upload_repo": "me/it"},
    "--overwrite": {"overwrite": True},
}
CONVERT = BOTH | {
    "-q": {"quantize": True},
    "-q --q-bits 6": {"quantize": True, "q_bits": 6},
    "-q --q-group-size 128": {"quantize": True, "q_group_size": 128},
    "-q --q-mode mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "-q --quant-predicate mixed": {"quantize": True, "quant_predicate": "mixed"},
    "--dtype float16": {"dtype": "float16"},
    "--mlx-path there": {"paths": ("from", "there")},
}
FUSE = BOTH | {
    "--de-quantize": {"dequantize": True},
    "--adapter-path there": {"paths": ("from", "there", "fused_model")},
    "--save-path there": {"paths": ("from", "adapters", "there")},
}


def test_flag_arrives_as_its_setting_and_nothing_else_changes(recorder):
    for main, source, table in (
        (convert_main, "--hf-path", CONVERT),
        (fuse_main, "--model", FUSE),
    ):
        assert run(main, source, "from").exit_code == 0
        unset = recorder.asked
        for flags, changed in table.items():
            assert run(main, source, "from", *flags.split()).exit_code == 0
            assert recorder.asked == unset | changed != unset, flags


def test_summary_says_what_could_not_be_done_as_asked(recorder):
    ratio = "4.50 bits per weight (from 3.00 GB)\n"
    for changes, stderr, stdout in (
        (
            {"regrouped": {"a": 32, "b": 16, "c": 32}},
            "3 layers have widths the group size does not divide; "
            "they use groups of 16, 32\n",
            f"out: 1.50 GB in 2 files, {ratio}",
        ),
        (
            {"dense": ("a", "b", "c", "d"), "shards": 1, "bytes": 999_900_000},
            "4 layers have widths no group size divides and stay dense: a, b, c…\n",
            f"out: 999.9 MB in 1 file, {ratio}",
        ),
    ):
        recorder.answer = replace(CONVERTED, **changes)
        result = run(convert_main, "--hf-path", "from", "-q")
        assert (result.stderr, result.stdout) == (stderr, stdout)


def test_folder_holds_what_the_last_line_says(tiny, adapter, tmp_path):
    small, fused, dense = (tmp_path / name for name in ("small", "fused", "dense"))
    results = {
        small: convert(tiny, small, "-q", "--q-bits", "8", "--q-group-size", "32"),
        fused: fuse(small, adapter, fused),
        dense: fuse(small, adapter, dense, "--dequantize"),
    }
    for target, result in results.items():
        assert result.exit_code == 0, result.stderr
        (line,) = result.stdout.splitlines()
        assert line.startswith(f"{target}: ")
        said = re.search(r": ([\d.]+) MB in 1 file, ([\d.]+) bits per weight", line)
        written = (target / "model.safetensors").stat().st_size
        assert float(said[1]) == pytest.approx(written / MB, abs=0.06)
        config = json.loads((target / "config.json").read_text())
        bits = config.get("quantization", {}).get("bits")
        assert bits == (None if target == dense else 8)
        verb = "converting" if target == small else "fusing"
        assert result.stderr.startswith(f"{verb} ")
        assert "\x1b" not in result.stderr and "\r" not in result.stderr
    source = (tiny / "model.safetensors").stat().st_size
    assert f"(from {source / MB:.1f} MB)" in results[small].stdout


def test_a_folder_is_verified(tiny, tmp_path):
    convert(tiny, tmp_path / "out")
    result = run(convert_main, "--verify", tmp_path / "out")
    count = len(list((tmp_path / "out").iterdir())) - 1
    assert result.stdout == (
        f"{tmp_path / 'out'}: {count} files are as they were written\n"
    )
    (tmp_path / "out" / "config.json").write_text("{}")
    result = run(convert_main, "--verify", tmp_path / "out")
    assert result.exit_code == 1 and "config.json: differs" in result.stderr
    for args in ([], ["--verify", "x", "--hf-path", "y"]):
        result = run(convert_main, *args)
        assert result.exit_code == 2
        assert result.stderr.endswith("error: give one of --hf-path and --verify\n")


def test_peft_adapter_must_be_the_same_in_both_modes(tiny, tmp_path):
    layers = factors(read_config(tiny), ("layers.0.mlp.up_proj",))
    same = write_peft(tmp_path / "same", {"decoder": layers, "encoder": layers})
    assert fuse(tiny, same, tmp_path / "out").exit_code == 0
    result = fuse(tiny, write_peft(tmp_path / "b", {"decoder": layers}), "never")
    assert result.exit_code == 1
    assert "encoder and decoder have different adapters" in result.stderr
    assert "--adapter-path" in result.stderr


@pytest.mark.parametrize("fused", [False, True])
def test_refusals_and_ctrl_c_leave_what_was_there(
    tiny, adapter, tmp_path, monkeypatch, fused
):
    def start(target, *args):
        if fused:
            return fuse(tiny, adapter, target, *args)
        return convert(tiny, target, *args)

    kept = tmp_path / "out" / "kept"
    kept.parent.mkdir()
    kept.write_text("kept")
    result = start(kept.parent)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "--overwrite" in line
    assert kept.read_text() == "kept"
    assert isinstance(start(kept.parent, "--debug").exception, ConversionError)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = lambda *args, **more: signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr("rich.progress.Progress.update", interrupt)
    try:
        result = start(tmp_path / "new")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == [kept.parent]


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    seconds = [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: seconds[0])
    with command.show_progress("converting") as progress:
        for now, done in (101.0, 10), (105.5, 110), (106.0, 120), (110.0, 2000):
            seconds[0] = now
            progress("a tensor", done * MB, 2000 * MB)
    assert capsys.readouterr().err.splitlines() == [
        "converting 110.0 MB of 2.00 GB, 20.0 MB/s, 94 s left",
        "converting 2.00 GB of 2.00 GB, 200.0 MB/s, 0 s left",
    ]


@pytest.mark.slow
def test_progress_in_a_terminal_is_a_bar(tiny, adapter, tmp_path):
    for name, source in (
        ("convert", ["--hf-path", str(tiny), "--mlx-path"]),
        ("fuse", ["--model", str(tiny), "--adapter-path", adapter, "--save-path"]),
    ):
        target = tmp_path / name
        ended = run_in_terminal(
            python("-m", f"mlx_dgemma.{name}", *source, str(target)),
            stdout=tmp_path / f"{name}.txt",
            columns=40,
        )
        lines = re.split(r"[\r\n]+", CODES.sub("", ended.sent))
        assert ended.code == 0
        size = (target / "model.safetensors").stat().st_size
        done = re.fullmatch(
            r"━+ ([\d.]+)/([\d.]+) kB (\?|[\d.]+ [kM]B/s) 0:00:00", lines[-2].rstrip()
        )
        assert done[1] == done[2]
        assert float(done[1]) == pytest.approx(size / 1000, rel=0.1)
        assert max(map(len, lines)) <= 40
        assert f"{target}: " in ended.stdout.decode()
