"""The numbers of a request: what is counted, and how a person reads them."""

import mlx.core as mx
import pytest

from mlx_dgemma import Commit, Prefilled, Step
from mlx_dgemma.diffusion import report
from mlx_dgemma.diffusion.report import Report, size


def step(number):
    row = mx.zeros(2, dtype=mx.int32)
    return Step(
        request=0,
        canvas_index=0,
        step=number,
        steps=48,
        temperature=1.0,
        draft=row,
        canvas=row,
        accepted=row == 0,
        entropy=row,
        mean_entropy=0.0,
        stopped=False,
    )


def commit(tokens, steps, reason=None):
    return Commit(
        request=0,
        canvas_index=0,
        tokens=(7,) * tokens,
        steps=steps,
        finish_reason=reason,
    )


@pytest.fixture
def after_two_seconds(monkeypatch):
    """A report of events that began two seconds ago; 3 MB were held at most."""

    def make(*events):
        made = Report(started=100.0)
        for event in events:
            made.add(event)
        return made

    monkeypatch.setattr(report.time, "perf_counter", lambda: 102.0)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 3_000_000)
    return make


PREFILLED = Prefilled(request=0, seed=9, prompt_tokens=6, seconds=0.5)


def test_a_finished_request_is_one_line_of_numbers(after_two_seconds):
    made = after_two_seconds(
        PREFILLED, step(0), step(1), commit(16, 2), step(0), commit(4, 1, "stop")
    )
    assert made.line() == (
        "6 prompt tokens · 20 committed tokens · 2 canvases (2 + 1 steps) · "
        "6.67 tokens per forward · 10.0 tok/s wall · peak memory 3.0 MB · seed 9"
    )
    assert made.finish_reason == "stop"


def test_steps_of_a_canvas_not_finished_are_counted_and_named(after_two_seconds):
    made = after_two_seconds(PREFILLED, step(0), commit(16, 1), step(0), step(1))
    assert made.denoising_steps == 3
    assert made.tokens_per_forward == pytest.approx(16 / 3)
    assert "1 canvas (1 step) and 2 steps of one not finished ·" in made.line()
    nothing = after_two_seconds(PREFILLED, step(0))
    assert "· 0 committed tokens · 0 canvases and 1 step of one not" in nothing.line()
    assert "0.00 tokens per forward · 0.0 tok/s wall" in nothing.line()


def test_many_canvases_are_summed_up(after_two_seconds):
    few = after_two_seconds(*[commit(1, 5)] * 8)
    assert "8 canvases (5 + 5 + 5 + 5 + 5 + 5 + 5 + 5 steps)" in few.line()
    many = after_two_seconds(*[commit(1, 5)] * 8, commit(1, 12))
    assert "9 canvases (5.8 steps each, at most 12)" in many.line()


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, "0.0 MB"),
        (1_250_000, "1.2 MB"),
        (999_000_000, "999.0 MB"),
        (1_000_000_000, "1.00 GB"),
        (52_345_000_000, "52.34 GB"),
    ],
)
def test_sizes_are_in_megabytes_when_small(count, told):
    assert size(count) == told
