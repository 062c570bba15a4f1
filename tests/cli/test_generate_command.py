"""`mlx_dgemma.generate`, in this process and as a person runs it."""

import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass, field

import pytest
from click.testing import CliRunner
from terminal import environment, python, run_in_terminal
from tiny import VOCABULARY

from mlx_dgemma import generate, load, stream_generate
from mlx_dgemma.cli.generate import main
from mlx_dgemma.diffusion import generation
from mlx_dgemma.diffusion.events import Commit, Prefilled, Step
from mlx_dgemma.errors import DGemmaError

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
    return {
        name: re.search(pattern, line)[1]
        for name, pattern in {
            "prompt": r"(\d+) prompt token",
            "committed": r"(\d+) committed token",
            "canvases": r"(\d+) canvas",
            "speed": r"([\d.]+) tok/s wall",
            "forward": r"([\d.]+) tokens per forward",
            "seed": r"seed (\d+)$",
        }.items()
    }


@pytest.fixture(scope="module")
def endless_model(endless):
    return load(endless)


def test_stdout_is_the_answer_alone(endless, endless_model):
    result = ask(endless, "--seed", 5)
    text = generate(*endless_model, "12", seed=5, **QUICK)
    assert result.exit_code == 0
    assert len(text) > 20
    assert result.stdout == text + "\n"


def test_the_numbers_are_those_of_the_events(endless, endless_model):
    result = ask(endless, "--seed", 5)
    events = list(stream_generate(*endless_model, "12", seed=5, **QUICK))
    commits = [e for e in events if isinstance(e, Commit)]
    steps = [e for e in events if isinstance(e, Step)]
    assert len(result.stderr.splitlines()) == 1
    assert len(commits) == 3
    numbers = stats(result.stderr)
    assert int(numbers["prompt"]) == events[0].prompt_tokens
    assert int(numbers["committed"]) == 40
    assert f"3 canvases ({' + '.join(str(c.steps) for c in commits)} steps)" in (
        result.stderr
    )
    assert numbers["forward"] == f"{40 / len(steps):.2f}"
    assert float(numbers["speed"]) > 0
    assert re.search(r"peak memory \d+\.\d MB", result.stderr)
    assert numbers["seed"] == "5"


def test_the_reported_seed_gives_the_same_text_again(endless):
    first, other = ask(endless), ask(endless)
    seed = stats(first.stderr)["seed"]
    assert seed != stats(other.stderr)["seed"]
    assert ask(endless, "--seed", seed).stdout == first.stdout != other.stdout


def test_a_dash_reads_the_prompt_from_stdin(endless):
    asked = ask(endless, "--seed", 1, prompt="3 1\n2")
    piped = ask(endless, "--seed", 1, prompt="-", stdin="3 1\n2")
    assert piped.exit_code == 0
    assert piped.stdout == asked.stdout
    assert stats(piped.stderr)["prompt"] == stats(asked.stderr)["prompt"]


def test_a_system_turn_comes_before_the_prompt(endless):
    alone, with_system = ask(endless), ask(endless, "--system", "abc")
    more = int(stats(with_system.stderr)["prompt"]) - int(stats(alone.stderr)["prompt"])
    assert more == len("abc") + 2  # its turn has a beginning and an end


@dataclass
class Recorder:
    """Stands for stream_generate: remembers what was asked."""

    asked: dict = field(default_factory=dict)

    def __call__(self, model, tokenizer, prompt, **settings):
        self.asked = {"prompt": prompt, **settings}
        yield Prefilled(request=0, seed=1, prompt_tokens=1, seconds=0.0)


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(generation, "stream_generate", recorder)
    monkeypatch.setattr(
        generation, "load", lambda name, adapter, revision: (None, None)
    )
    return recorder


SETTINGS = {
    "--max-tokens": ("max_tokens", 7),
    "--canvas-length": ("canvas_length", 9),
    "--steps": ("steps", 3),
    "--entropy-bound": ("entropy_bound", 0.25),
    "--t-max": ("t_max", 0.9),
    "--t-min": ("t_min", 0.0),
    "--stability": ("stability", 0),
    "--confidence": ("confidence", 0.0),
    "--seed": ("seed", 0),
    "--system": ("system", "be kind"),
    "--prefill-step-size": ("prefill_step_size", 5),
}


@pytest.mark.parametrize("flag", SETTINGS)
def test_a_flag_arrives_as_its_setting_and_nothing_else_changes(recorder, flag):
    name, value = SETTINGS[flag]
    assert run("--model", "m", "--prompt", "p").exit_code == 0
    unset = recorder.asked
    assert run("--model", "m", "--prompt", "p", flag, value).exit_code == 0
    assert recorder.asked == {**unset, name: value}
    assert unset[name] != value


def test_what_is_not_given_the_checkpoint_says(recorder):
    assert run("--model", "m", "--prompt", "p").exit_code == 0
    for name in [name for name, _ in SETTINGS.values()][:-1]:
        assert recorder.asked[name] is None
    assert recorder.asked["prefill_step_size"] == generation.PREFILL_STEP


def test_stop_may_be_given_many_times_and_thinking_switched_on(recorder):
    run("--model", "m", "--prompt", "p", "--stop", "a", "--stop", "b", "--thinking")
    assert recorder.asked["stop"] == ("a", "b")
    assert recorder.asked["thinking"] is True


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--t-min", "3"], r"t_min is 3.0, above t_max 0.8: lower t_min"),
        (["--confidence", "nan"], "confidence is nan; it must be a number from 0 up"),
        (["--stop", ""], "must be strings that are not empty"),
        (["--model", "no/where/at/all"], "no/where/at/all: no such folder"),
        (["--prompt", "-"], "stdin is empty; give some text"),
        (["--prompt", "\udcff"], "lone surrogate"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(tiny, args, told):
    result = run("--model", tiny, "--prompt", "1", *args)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and told in line


def test_stdin_that_is_no_text_is_refused(tiny):
    result = run("--model", tiny, "--prompt", "-", stdin=b"ab\xff")
    assert result.exit_code == 1
    assert result.stderr == "error: stdin is not UTF-8 at byte 2; convert it first\n"


def test_stdin_that_is_closed_is_refused(tiny):
    shell = f'exec "{sys.executable}" -m mlx_dgemma.generate --model x --prompt - <&-'
    result = subprocess.run(
        ["sh", "-c", shell], env=environment(), capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == ("error: stdin is closed; give the prompt itself\n")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        # as a wheel without its backend raises it
        (ImportError("libmlx.so: gone", name="core"), "MLX has no backend here"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            ImportError("No module named 'rich'", name="rich"),
            "install mlx-dgemma again",
        ),
        (MemoryError(), "out of memory"),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (RuntimeError("[malloc]\nno\x1b[2Jroom"), "[malloc] no␛[2Jroom; --debug"),
    ],
)
def test_a_failure_is_one_line_and_debug_shows_where(tiny, monkeypatch, raised, told):
    def fails(name, adapter, revision):
        raise raised

    monkeypatch.setattr(generation, "load", fails)
    result = run("--model", tiny, "--prompt", "1")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and told in line
    assert run("--model", tiny, "--prompt", "1", "--debug").exception is raised


def test_debug_shows_the_traceback_of_a_refusal(tmp_path):
    args = ["--model", str(tmp_path), "--prompt", "1"]
    result = subprocess.run(
        [*COMMAND, *args, "--debug"], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert isinstance(run(*args, "--debug").exception, DGemmaError)


def test_a_warning_is_one_line(tiny, recorder, monkeypatch):
    def warns(name, adapter, revision):
        warnings.warn("mind\nthe \x1b[2Jgap", stacklevel=1)
        return None, None

    monkeypatch.setattr(generation, "load", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run("--model", tiny, "--prompt", "1")
    assert result.stderr.splitlines()[0] == "warning: mind the ␛[2Jgap"
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--prompt", "1"], "--model"),
        (["--model", "m"], "--prompt"),
        (["--model", "m", "--prompt", "1", "--max-tokens", "0"], "--max-tokens"),
        (["--model", "m", "--prompt", "1", "--steps", "some"], "--steps"),
        (["--model", "m", "--prompt", "1", "--entropy-bound", "0"], "--entropy-bound"),
        (["--model", "m", "--prompt", "1", "--canvas-length", "0"], "--canvas-length"),
        (["--model", "m", "--prompt", "1", "--temperature", "1"], "--temperature"),
    ],
)
def test_wrong_usage_names_the_flag_and_exits_2(args, named):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert named in result.stderr


def test_in_a_terminal_the_canvas_is_drawn_and_only_the_answer_stays(
    endless, endless_model
):
    asked = ["--model", str(endless), "--prompt", "12", "--seed", "5"]
    ended = run_in_terminal([*COMMAND, *asked, *QUICK_FLAGS, "--show"])
    text = generate(*endless_model, "12", seed=5, **QUICK)
    *shown, numbers = "\n".join(ended.screen(10_000).lines()).rsplit("\n", 1)
    assert ended.code == 0
    assert "\n".join(shown) == "\n".join(line.rstrip() for line in text.split("\n"))
    assert stats(numbers)["committed"] == "40"
    assert re.search(r"step \d+/4 · entropy \d\.\d{3} nats · \d+/16 acc", ended.sent)
    assert "\x1b[1m" in ended.sent and "\x1b[2m" in ended.sent
    assert ended.screen(80).widest <= 80


def test_show_does_not_change_what_is_written_to_a_file(
    endless, endless_model, tmp_path
):
    asked = ["--model", str(endless), "--prompt", "12", "--seed", "5"]
    ended = run_in_terminal(
        [*COMMAND, *asked, *QUICK_FLAGS, "--show"], stdout=tmp_path / "out"
    )
    text = generate(*endless_model, "12", seed=5, **QUICK)
    assert ended.code == 0
    assert ended.stdout == ask(endless, "--seed", 5).stdout_bytes
    assert ended.stdout.decode() == text + "\n"
    assert "step " in ended.sent, "the canvas was drawn"
    assert len(ended.screen(10_000).lines()) == 1, "only the numbers stay"


def test_show_without_a_terminal_is_plain_text(endless):
    plain, shown = ask(endless, "--seed", 5), ask(endless, "--seed", 5, "--show")
    assert shown.stdout == plain.stdout
    assert "step " not in shown.stderr and "\x1b" not in shown.stderr


# stop strings that never come, though any character may begin one: the last one waits
HELD = [part for c in VOCABULARY[5:] for part in ("--stop", f"{c}☃")]


@pytest.mark.parametrize("stop", [[], HELD], ids=["plain", "with text held back"])
def test_ctrl_c_keeps_exactly_what_is_committed(endless, endless_model, stop):
    endless_text = ["--steps", "2", "--max-tokens", "1000000", "--seed", "5", *stop]
    process = subprocess.Popen(
        [*COMMAND, "--model", str(endless), "--prompt", "12", *endless_text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    written = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    more, stderr = process.communicate(timeout=60)
    count = int(stats(stderr.decode())["canvases"])
    events = stream_generate(
        *endless_model, "12", steps=2, max_tokens=1_000_000, seed=5
    )
    commits = (event for event in events if isinstance(event, Commit))
    text = "".join(next(commits).text for _ in range(count))
    assert process.returncode == 130
    assert count >= 1
    assert (written + more).decode() == text.removesuffix("\n") + "\n"
    assert len(stderr.splitlines()) == 1


def test_ctrl_c_while_drawing_ends_after_the_step_and_clears_the_canvas(tiny, tmp_path):
    asked = []

    def interrupt(sent, process):
        if "step 2" in sent and not asked:
            asked.append(process.send_signal(signal.SIGINT))

    ended = run_in_terminal(
        [*COMMAND, "--model", str(tiny), "--prompt", "12", *NEVER_DONE, "--show"],
        stdout=tmp_path / "out",
        columns=40,
        watch=interrupt,
    )
    assert ended.code == 130
    assert ended.stdout == b""
    (numbers,) = ended.screen(10_000).lines()
    assert " 0 committed tokens · 0 canvases and " in numbers
    assert re.search(r"and \d{1,5} steps of one not finished", numbers)
    assert ended.screen(40).widest <= 40


def test_ctrl_c_while_loading_says_so(tiny, monkeypatch):
    def interrupted(name, adapter, revision):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "load", interrupted)
    result = run("--model", tiny, "--prompt", "1")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "interrupted\n"


def test_a_reader_that_leaves_early_is_no_error(endless):
    process = subprocess.Popen(
        [*COMMAND, "--model", endless, "--prompt", "12", "--max-tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141  # as a shell counts SIGPIPE
    assert stderr == b""
