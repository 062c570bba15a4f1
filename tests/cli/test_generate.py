"""`mlx_dgemma.generate`, in this process and as a person runs it."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from terminal import environment, python, run_in_terminal
from tiny import VOCABULARY
from tiny_vision import drawn, write_tiny_vision

from mlx_dgemma import generate, load, loading, stream_generate
from mlx_dgemma.cli.generate import main
from mlx_dgemma.diffusion import generation
from mlx_dgemma.diffusion.events import Commit, Prefilled, Step

COMMAND = python("-m", "mlx_dgemma.generate")
QUICK = {"steps": 4, "max_tokens": 40}  # three canvases of the endless checkpoint
QUICK_FLAGS = ["--steps", "4", "--max-tokens", "40"]
NEVER_DONE = ["--steps", "100000", "--confidence", "0", "--max-tokens", "100000"]


def run(*args, stdin=None):
    return CliRunner().invoke(main, [str(a) for a in args], input=stdin)


def ask(folder, *args, prompt="12", **more):
    return run("--model", folder, "--prompt", prompt, *QUICK_FLAGS, *args, **more)


def stats(stderr):
    """The numbers of the last line of stderr."""
    *_, line = stderr.strip().splitlines()
    patterns = {
        "prompt": r"(\d+) prompt token",
        "committed": r"(\d+) committed token",
        "canvases": r"(\d+) canvas",
        "speed": r"([\d.]+) tok/s wall",
        "forward": r"([\d.]+) tokens per forward",
        "seed": r"seed (\d+)$",
    }
    return {name: re.search(pattern, line)[1] for name, pattern in patterns.items()}


def start(*args):
    return subprocess.Popen(
        [*COMMAND, "--prompt", "12", "--max-tokens", "1000000", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )


@pytest.fixture(scope="module")
def endless_model(endless):
    return load(endless)


def test_stdout_is_the_answer_and_stderr_its_numbers(endless, endless_model):
    result = ask(endless, "--seed", 5)
    events = list(stream_generate(*endless_model, "12", seed=5, **QUICK))
    commits = [e for e in events if isinstance(e, Commit)]
    assert result.exit_code == 0
    assert result.stdout == generate(*endless_model, "12", seed=5, **QUICK) + "\n"
    (line,) = result.stderr.splitlines()
    numbers = stats(line)
    assert int(numbers["prompt"]) == events[0].prompt_tokens
    assert (numbers["committed"], numbers["seed"], len(commits)) == ("40", "5", 3)
    assert f"3 canvases ({' + '.join(str(c.steps) for c in commits)} steps)" in line
    steps = sum(isinstance(e, Step) for e in events)
    assert numbers["forward"] == f"{40 / steps:.2f}"
    assert float(numbers["speed"]) > 0
    assert re.search(r"peak memory \d+\.\d MB", line)
    shown = ask(endless, "--seed", 5, "--show")  # no terminal: plain text
    assert shown.stdout == result.stdout
    assert "step " not in shown.stderr and "\x1b" not in shown.stderr


def test_reported_seed_gives_the_same_text_again(endless):
    first, other = ask(endless), ask(endless)
    seed = stats(first.stderr)["seed"]
    assert seed != stats(other.stderr)["seed"]
    assert ask(endless, "--seed", seed).stdout == first.stdout != other.stdout


def test_dash_reads_the_prompt_from_stdin(endless):
    asked = ask(endless, "--seed", 1, prompt="3 1\n2")
    piped = ask(endless, "--seed", 1, prompt="-", stdin=b"\xef\xbb\xbf3 1\n2")
    assert (piped.exit_code, piped.stdout) == (0, asked.stdout)
    assert stats(piped.stderr)["prompt"] == stats(asked.stderr)["prompt"]


SETTINGS = {
    "max_tokens": 7, "min_tokens": 1, "canvas_length": 9, "steps": 3, "seed": 0,
    "entropy_bound": 0.25, "t_max": 0.9, "t_min": 0.0, "stability": 0,
    "confidence": 0.0, "sampler": "confidence", "min_probability": 0.5,
    "system": "kind", "prefill_step_size": 5,
}  # fmt: skip
FLAGS = {
    **{f"--{k.replace('_', '-')} {v}": {k: v} for k, v in SETTINGS.items()},
    "--stop a --stop b": {"stop": ("a", "b")},
    "--thinking": {"thinking": True},
    "--allow-special": {"allow_special": True},
    "--image a --image b": {"images": ("a", "b")},
    "--video a": {"videos": ("a",)},
    '--chat-template-args {"a":[1]}': {"chat_template_kwargs": {"a": [1]}},
}


def test_flag_arrives_as_its_setting_and_nothing_else_changes(monkeypatch):
    def record(model, tokenizer, prompt, **settings):
        record.asked = {"prompt": prompt, **settings}
        yield Prefilled(request=0, seed=1, prompt_tokens=1, seconds=0.0)

    monkeypatch.setattr(generation, "stream_generate", record)
    monkeypatch.setattr(loading, "load", lambda *a, **k: (None, None))
    assert run("--model", "sudoku4", "--prompt", "p").exit_code == 0
    unset = record.asked
    assert callable(unset.pop("prompt_progress_callback"))
    assert unset["prefill_step_size"] == generation.PREFILL_STEP
    assert {unset[name] for name in ("steps", "max_tokens", "seed")} == {None}
    for flags, changed in FLAGS.items():
        assert run("--model", "sudoku4", "--prompt", "p", *flags.split()).exit_code == 0
        del record.asked["prompt_progress_callback"]
        assert record.asked == {**unset, **changed} != unset, flags


@pytest.fixture(scope="module")
def with_pictures(tmp_path_factory):
    """A folder with the checkpoint `m`, which sees, and two pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in (0, 1):
        drawn(60, 40, seed).save(folder / f"{seed}.png")
    return write_tiny_vision(folder / "m").parent


def test_pictures_stand_in_front_of_the_prompt(with_pictures, tiny):
    one, two = (["--image", with_pictures / f"{i}.png"] for i in (0, 1))
    counts = []
    for pictures in ([], one, one + two):
        result = ask(with_pictures / "m", *pictures, prompt="abc")
        assert result.exit_code == 0
        counts.append(int(stats(result.stderr)["prompt"]))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 10
    refused = ask(tiny, *one)
    assert refused.exit_code == 1 and "reads text only" in refused.stderr


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--t-min", "3"], r"t_min is 3.0, above t_max 0.8: lower t_min"),
        (["--confidence", "nan"], "confidence is nan; it must be a number from 0 up"),
        (["--stop", ""], "must be strings that are not empty"),
        (["--model", "no/where/at/all"], "no/where/at/all: no such folder"),
        (["--prompt", " "], "--prompt is empty; give some text"),
        (["--prompt", "-"], "stdin is not UTF-8 at byte 2; convert it first"),
        (["--prompt", "\udcff"], "lone surrogate"),
        (["--image", __file__], "picture 1: "),
        (["--image", "http://127.0.0.1/a.png"], "http: sources are not fetched"),
        (["--video", __file__], "error: "),
    ],
)
def test_refusal_is_one_line_and_exit_code_1(with_pictures, args, error):
    named = ["--model", with_pictures / "m", "--prompt", "1"]
    result = run(*named, *args, stdin=b"ab\xff")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and error in line


def test_a_wrong_value_of_any_length_is_named_in_a_line():
    result = run("--model", "sudoku4", "--prompt", "1", "--seed", "9" * 5000)
    assert result.exit_code == 2
    _, line = result.stderr.splitlines()
    assert "'--seed'" in line and len(line) < 700


MISSING = "cannot open shared object file"


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        # as a wheel without its backend raises it
        (ImportError(f"libmlx.so: {MISSING}", name="core"), "MLX has no backend here"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ImportError("No module named 'a'", name="a"), "install mlx-dgemma again"),
        (MemoryError(), "out of memory"),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (RuntimeError("[malloc]\nno\x1b[2Jroom"), "[malloc] no␛[2Jroom; --debug"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_failure_is_one_line_and_debug_shows_where(monkeypatch, raised, error):
    def fail(*given, **more):
        raise raised

    monkeypatch.setattr(loading, "load", fail)
    result = run("--model", "sudoku4", "--prompt", "1")
    (line,) = result.stderr.splitlines()
    if isinstance(raised, KeyboardInterrupt):
        assert (result.exit_code, line) == (130, "interrupted")
    else:
        assert result.exit_code == 1
        assert line.startswith("error: ") and error in line
        assert run("--model", "sudoku4", "--prompt", "1", "--debug").exception is raised


# ------------------------------------------------------- processes and terminals


@pytest.mark.slow
def test_text_prompt_needs_no_pillow(tiny):
    code = (
        "import sys\nfrom mlx_dgemma.cli.generate import main\n"
        f"try: main(['--model', {str(tiny)!r}, '--prompt', '1', *{QUICK_FLAGS}])\n"
        "except SystemExit: pass\n"
        "assert not {'PIL', 'av'} & {name.partition('.')[0] for name in sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_canvas_is_drawn_in_a_terminal_and_the_answer_stays(endless, endless_model):
    asked = ["--model", endless, "--prompt", "12", "--seed", "5", *QUICK_FLAGS]
    text = generate(*endless_model, "12", seed=5, **QUICK)
    ended = run_in_terminal([*COMMAND, *asked, "--show"])
    *shown, numbers = "\n".join(ended.screen(10_000).lines()).rsplit("\n", 1)
    assert ended.code == 0
    assert "\n".join(shown) == "\n".join(line.rstrip() for line in text.split("\n"))
    assert stats(numbers)["committed"] == "40"
    assert re.search(r"step \d+/4 · entropy \d\.\d{3} nats · \d+/16 acc", ended.sent)
    assert "\x1b[1m" in ended.sent and "\x1b[2m" in ended.sent
    assert ended.screen(80).widest <= 80


# stop strings that never come, though any character may begin one: the last one waits
HELD = [part for c in VOCABULARY[5:] for part in ("--stop", f"{c}☃")]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [[], HELD], ids=["plain", "with text held back"])
def test_ctrl_c_keeps_exactly_what_is_committed(endless, endless_model, stop):
    process = start("--model", endless, "--steps", 2, "--seed", 5, *stop)
    written = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    more, stderr = process.communicate(timeout=60)
    count = int(stats(stderr.decode())["canvases"])
    settings = {"steps": 2, "max_tokens": 1_000_000, "seed": 5}
    events = stream_generate(*endless_model, "12", **settings)
    commits = (event for event in events if isinstance(event, Commit))
    text = "".join(next(commits).text for _ in range(count))
    assert process.returncode == 130
    assert count >= 1
    assert (written + more).decode() == text.removesuffix("\n") + "\n"
    assert len(stderr.splitlines()) == 1


@pytest.mark.slow
def test_ctrl_c_while_drawing_ends_after_the_step_and_clears_the_canvas(tiny, tmp_path):
    asked = []

    def interrupt(sent, process):
        if "step 2" in sent and not asked:
            asked.append(process.send_signal(signal.SIGINT))

    ended = run_in_terminal(
        [*COMMAND, "--model", tiny, "--prompt", "12", *NEVER_DONE, "--show"],
        stdout=tmp_path / "out",
        columns=40,
        watch=interrupt,
    )
    assert (ended.code, ended.stdout) == (130, b"")
    (numbers,) = ended.screen(10_000).lines()
    assert " 0 committed tokens · 0 canvases and " in numbers
    assert re.search(r"and \d{1,5} steps of one not finished", numbers)
    assert ended.screen(40).widest <= 40


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_long_prompt_shows_its_progress_and_ends_after_a_chunk(tiny, number):
    asked = []

    def interrupt(sent, process):
        if re.search(r"encoding [\d,]+ of 60,0\d\d tokens", sent) and not asked:
            asked.append(time.monotonic())
            process.send_signal(number)

    prompt = ["--prompt", "1" * 60_000, "--prefill-step-size", "256"]
    ended = run_in_terminal([*COMMAND, "--model", tiny, *prompt], watch=interrupt)
    assert ended.code == 130 and time.monotonic() - asked[0] < 5
    assert ended.screen().lines()[-1] == "interrupted"


@pytest.mark.slow
def test_second_ctrl_c_leaves_while_mlx_computes(tmp_path):
    """Python's handlers wait until a call of MLX returns."""
    code = (
        "import sys\n"
        "import mlx.core as mx\n"
        "from mlx_dgemma.cli.render import AnswerView\n"
        "x = mx.zeros((3000, 3000))\n"
        "for _ in range(300): x = x @ x + 1e-9\n"
        "with AnswerView(None, False):\n"
        "    print('ready', file=sys.stderr, flush=True)\n"
        "    mx.eval(x)\n"
    )
    asked = []

    def interrupt(sent, process):
        if "ready" in sent and not asked:
            asked.append(time.monotonic())
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)

    ended = run_in_terminal(python("-c", code), watch=interrupt)
    assert ended.code == 130 and time.monotonic() - asked[0] < 5
    assert "stopping after this chunk" in ended.sent


@pytest.mark.slow
def test_reader_that_leaves_early_is_no_error(endless):
    process = start("--model", endless)
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait(60) == 141  # as a shell counts SIGPIPE
